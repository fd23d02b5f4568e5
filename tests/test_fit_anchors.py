"""Anchors fitted to objects whose anchors are known, and what must not get worse."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rpn_train.anchors import AnchorGrid
from rpn_train.config import AnchorsConfig
from rpn_train.data.index import build_index
from rpn_train.errors import DataError
from rpn_train.inspect.coverage import Objects, object_coverage, reach, resized_objects
from rpn_train.inspect.fit_anchors import (
    ALLOWED_LOSS,
    anchors_yaml,
    dimension_clusters,
    fit_anchors,
    image_size_advice,
)
from rpn_train.options import from_mapping

STRIDES = (4, 8, 16, 32)
GIVEN = AnchorGrid(((32.0,), (64.0,), (128.0,), (256.0,)), (0.5, 1.0, 2.0), STRIDES, True)
OPTIONS = {"sizes_per_level": 1, "num_ratios": 3, "border": "use", "fg_iou": 0.7}


def scatter(generator, sides, ratios):
    """Objects of these sides and ratios (height / width), anywhere in images of 480 x 640 px."""
    width, height = sides / ratios.sqrt(), sides * ratios.sqrt()
    space = torch.tensor([640, 480]) - torch.stack([width, height], 1)
    corners = space * torch.rand(len(sides), 2, generator=generator)
    boxes = torch.cat([corners, corners + torch.stack([width, height], 1)], 1)
    image = torch.arange(len(sides)) // 4
    sizes = torch.tensor([[480, 640]]).expand(int(image[-1]) + 1, 2)
    return Objects(boxes, (width * height).double(), image, sizes, sizes)


def of_kinds(sizes, ratios, spread, count=1000):
    """Of products of some sizes and ratios, each times a random factor near 1."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(sizes) * len(ratios), (count,), generator=generator)
    noise = torch.exp(spread * torch.randn(2, count, generator=generator))
    sides = torch.tensor(sizes)[picks % len(sizes)] * noise[0]
    return scatter(generator, sides, torch.tensor(ratios)[picks // len(sizes)] * noise[1])


def broad(count=1500):
    """Of all sides and ratios."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.exp(math.log(60) + 0.9 * torch.randn(count, generator=generator)).clamp(3, 300)
    ratios = torch.exp(0.6 * torch.randn(count, generator=generator)).clamp(0.4, 2.5)
    return scatter(generator, sides, ratios)


def figures(coverage):
    return reach(coverage.best_iou, fg_iou=0.7, force_best=True, forced_min_iou=0.0)


def test_known_anchors_are_found():
    """Each level's size is well above its stride, so that the grid hides no shape."""
    sizes, ratios = [21.0, 50.0, 95.0, 180.0], [0.36, 0.9, 2.4]
    objects = of_kinds(sizes, ratios, spread=0.05)
    fit = fit_anchors(objects, GIVEN, **OPTIONS)
    found = torch.tensor([*sum(fit.grid.sizes, ()), *fit.grid.ratios])
    torch.testing.assert_close(found, torch.tensor(sizes + ratios), rtol=0.1, atol=0)
    before, after = figures(fit.before), figures(fit.after)
    assert before.recall_iou70 < 0.35
    assert after.recall_iou70 > 0.9
    assert after.mean_iou > before.mean_iou + 0.15
    assert fit.grid.strides == STRIDES
    assert fit.grid.rounded
    again = object_coverage(objects, fit.grid, border="use")
    assert torch.equal(again.best_iou, fit.after.best_iou)


def test_several_sizes_on_one_level():
    one_level = AnchorGrid(((64.0, 100.0, 200.0),), (1.0,), (8,), False)
    objects = of_kinds([30.0, 66.0, 140.0], [0.7], spread=0.04)
    fit = fit_anchors(objects, one_level, **{**OPTIONS, "sizes_per_level": 3, "num_ratios": 1})
    assert len(fit.grid.sizes) == 1
    found = torch.tensor([*fit.grid.sizes[0], *fit.grid.ratios])
    torch.testing.assert_close(found, torch.tensor([30, 66, 140, 0.7]), rtol=0.05, atol=0)
    assert not fit.grid.rounded


@pytest.mark.parametrize("border", ["use", "ignore"])
def test_nothing_that_is_reported_gets_much_worse(border):
    fit = fit_anchors(broad(), GIVEN, **{**OPTIONS, "border": border, "fg_iou": 0.6})
    before, after = fit.before.best_iou, fit.after.best_iou
    assert after.mean() > before.mean()
    for threshold in (0.5, 0.6, 0.7):
        lost = (before >= threshold).float().mean() - (after >= threshold).float().mean()
        assert lost <= ALLOWED_LOSS


def test_the_constraint_holds_back_the_mean(monkeypatch):
    """Without it the mean could rise further, at the cost of the recall at IoU 0.5."""
    held = figures(fit_anchors(broad(), GIVEN, **OPTIONS).after)
    monkeypatch.setattr("rpn_train.inspect.fit_anchors.ALLOWED_LOSS", 1.0)
    free = figures(fit_anchors(broad(), GIVEN, **OPTIONS).after)
    assert free.mean_iou > held.mean_iou
    assert free.recall_iou50 < held.recall_iou50


def test_no_small_step_is_left(monkeypatch):
    """Where recall may fall, no size or ratio a little larger or smaller has a higher mean IoU."""
    monkeypatch.setattr("rpn_train.inspect.fit_anchors.ALLOWED_LOSS", 1.0)
    objects = broad(400)
    grid = fit_anchors(objects, GIVEN, **OPTIONS).grid
    most = object_coverage(objects, grid, border="use").best_iou.mean()
    others = []
    for factor in (2 ** (1 / 32), 2 ** (-1 / 32)):
        for i in range(4):
            sizes = [
                (size * factor,) if k == i else (size,) for k, (size,) in enumerate(grid.sizes)
            ]
            others.append(replace(grid, sizes=tuple(sizes)))
        for i in range(3):
            ratios = [r * factor if k == i else r for k, r in enumerate(grid.ratios)]
            others.append(replace(grid, ratios=tuple(ratios)))
    for other in others:
        mean = object_coverage(objects, other, border="use").best_iou.mean()
        assert mean < most + 2e-4  # fitted numbers have three digits


def test_the_same_every_time_and_in_order():
    objects = broad(600)
    options = {**OPTIONS, "sizes_per_level": 2, "num_ratios": 2}
    first = fit_anchors(objects, GIVEN, **options, most_objects=200)
    again = fit_anchors(objects, GIVEN, **options, most_objects=200)
    assert first.grid == again.grid
    assert {len(sizes) for sizes in first.grid.sizes} == {2}
    numbers = [*sum(first.grid.sizes, ())], [*first.grid.ratios]
    for ascending in numbers:
        assert ascending == sorted(ascending)
        assert all(number == float(f"{number:.3g}") for number in ascending)
    assert len(first.after.best_iou) == 600  # fitted to some, measured on all


def test_objects_that_are_all_alike():
    alike = of_kinds([40.0], [1.0], spread=0.0, count=7)
    fit = fit_anchors(alike, GIVEN, **OPTIONS)
    assert figures(fit.after).mean_iou > figures(fit.before).mean_iou
    assert figures(fit.after).recall_iou70 == 1


def test_no_objects():
    none = broad(4)
    none = none._replace(boxes=none.boxes[:, [0, 1, 0, 1]])
    with pytest.raises(DataError, match=r"inspect\.fit: expected at least one object"):
        fit_anchors(none, GIVEN, **OPTIONS)


def test_clusters_by_hand():
    """Three sides and two ratios in all products: each is the median of its own."""
    side = torch.tensor([10.0, 20, 60, 10, 20, 60, 10.2, 9.8])  # the last two near the first
    ratio = torch.tensor([1.0, 1, 1, 4, 4, 4, 1, 1])
    width, height = side / ratio.sqrt(), side * ratio.sqrt()
    sizes, ratios = dimension_clusters(width, height, num_sizes=3, num_ratios=2)
    assert sizes == pytest.approx([10, 20, 60])
    assert ratios == pytest.approx([1, 4])


def test_yaml_is_what_training_reads():
    grid = AnchorGrid(((8.25, 37.0), (120.0, 1020.0)), (0.353, 1.0), (16, 32), False)
    text = anchors_yaml(grid, "Fitted to some objects:\nrecall 0.1 -> 0.2")
    assert text == (
        "# Fitted to some objects:\n# recall 0.1 -> 0.2\n"
        "sizes: [[8.25, 37], [120, 1020]]\nratios: [0.353, 1]\nstrides: [16, 32]\nrounded: false\n"
    )
    cfg = from_mapping(AnchorsConfig, yaml.safe_load(text))
    assert AnchorGrid(cfg.sizes, cfg.ratios, cfg.strides, cfg.rounded) == grid


def index_of(boxes_xywh, ignore):
    count = len(boxes_xywh)
    return build_index(
        source=Path("a.json"),
        root=Path("root"),
        image_ids=np.array([1, 2]),
        file_names=["a", "b"],
        sizes=np.array([[100, 100], [50, 400]]),
        box_rows=np.arange(count) % 2,
        box_ids=np.arange(count),
        boxes_xywh=np.array(boxes_xywh, np.float64).reshape(-1, 4),
        areas=np.full(count, np.nan),
        ignore=np.array(ignore, bool),
        keep_empty=True,
    )


def test_advice_by_hand():
    """The first image is scaled by 2, 2.5, 3 and 4, the long one by half of that."""
    boxes = [(0, 0, 4, 9), (0, 0, 30, 10), (0, 0, 7, 7), (0, 0, 20, 20), (0, 0, 2, 2)]
    # sides 6, 17.3, 7, 20 and a crowd; at first 12, 17.3, 14, 20, then 15, 21.7, 17.5, 25
    index = index_of(boxes, [False] * 4 + [True])
    advice = image_size_advice(index, short_side=200, max_side=400)
    assert [tuple(line) for line in advice] == [
        (200, 400, 0.5),
        (250, 500, 0.25),
        (300, 600, 0.0),
        (400, 800, 0.0),
    ]
    objects = resized_objects(index, short_side=200, max_side=400, divisor=32)
    assert objects.sides().tolist() == pytest.approx([12, 14, 300**0.5, 20])
    larger = image_size_advice(index, short_side=200, max_side=400, small_px=17.4)
    assert larger[0].share == 0.75
    empty = image_size_advice(index_of([], []), short_side=200, max_side=400)
    assert all(math.isnan(line.share) for line in empty)
