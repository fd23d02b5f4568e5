"""What anchors reach: against all anchors of small images, and against the labels of training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.data.index import build_index
from rpn_train.data.transforms import resize
from rpn_train.inspect.coverage import (
    Coverage,
    Objects,
    ShapeUse,
    count_positives,
    level_ious,
    object_coverage,
    object_groups,
    reach,
    resized_objects,
    shape_use,
)
from rpn_train.targets import POSITIVE, assign

CPU = torch.device("cpu")
RATIOS = (0.5, 1.0, 2.0)
FPN = AnchorGrid(((8.0,), (16.0,), (32.0,), (64.0,)), RATIOS, (4, 8, 16, 32), True)
GRIDS = [
    FPN,
    AnchorGrid(((32.0, 64.0, 150.0),), RATIOS, (16,), True),
    AnchorGrid(((4.0,),), (1.0,), (32,), True),  # gaps between the anchors
    AnchorGrid(((8.0, 11.0), (30.3, 50.0)), (0.3, 1.0, 2.7), (8, 32), False),
]
RULE = {
    "fg_iou": 0.7,
    "bg_iou": 0.3,
    "force_best": True,
    "forced_min_iou": 0.0,
    "ignore_ioa": 0.5,
    "border": "use",
}


def make_objects(images):
    """Of (size, canvas, boxes) each."""
    sizes, canvases, boxes = zip(*images, strict=True)
    rows = torch.tensor([i for i, of_image in enumerate(boxes) for _ in of_image])
    flat = torch.tensor([box for of_image in boxes for box in of_image]).float().view(-1, 4)
    areas = (flat[:, 2:] - flat[:, :2]).prod(1).double()
    return Objects(flat, areas, rows.long(), torch.tensor(sizes), torch.tensor(canvases))


@st.composite
def images(draw):
    """1 to 3 images, their canvases multiples of 32, and boxes that matter."""
    eighths = st.integers(0, 8 * 200).map(lambda n: n / 8)
    lengths = st.one_of(eighths, st.integers(1, 200).map(float), st.floats(0.125, 250, width=32))
    starts = st.one_of(
        eighths,
        st.floats(-20, 200, width=32, allow_subnormal=False),
        st.integers(-9, 25).map(lambda n: 8.0 * n),
    )
    drawn = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 130)), draw(st.integers(1, 190))
        canvas = tuple(-(-side // 32) * 32 for side in size)
        corners = draw(
            st.lists(st.tuples(starts, starts, lengths, lengths), min_size=1, max_size=6)
        )
        drawn.append((size, canvas, [(x, y, x + w, y + h) for x, y, w, h in corners]))
    return drawn


def all_ious(grid, size, canvas, boxes, border):
    """IoU [G, R] with all anchors of an image; 0 with those that may not be used."""
    anchors = grid_anchors(grid, canvas, CPU)
    ious = box_iou(torch.tensor(boxes).float(), anchors)
    if border == "ignore":
        x1, y1, x2, y2 = anchors.unbind(1)
        ious *= (x1 >= 0) & (y1 >= 0) & (x2 <= size[1]) & (y2 <= size[0])
    return ious


@settings(deadline=None, max_examples=150)
@given(images(), st.sampled_from(GRIDS), st.sampled_from(["use", "ignore"]))
def test_best_iou_is_that_of_all_anchors(drawn, grid, border):
    objects = make_objects(drawn)
    coverage = object_coverage(objects, grid, border=border)
    expected = torch.cat([all_ious(grid, *image, border).amax(1) for image in drawn])
    exact = {"rtol": 0, "atol": 0.0 if grid.rounded else 1e-6}
    torch.testing.assert_close(coverage.best_iou, expected, **exact)
    # each shape on its own: the anchors of a level are [cells, A]
    by_shape = []
    for level in range(len(grid.strides)):
        one = AnchorGrid((grid.sizes[level],), grid.ratios, (grid.strides[level],), grid.rounded)
        ious = [all_ious(one, *image, border) for image in drawn]
        by_shape.append(torch.cat([i.unflatten(1, (-1, grid.per_cell)).amax(1) for i in ious]).t())
        found = level_ious(objects, grid, level, border=border)
        torch.testing.assert_close(found, by_shape[-1], **exact)
    hit = coverage.best_iou > 0
    at_best = torch.cat(by_shape).gather(0, coverage.best_shape.clamp(min=0)[None])[0]
    torch.testing.assert_close(at_best[hit], coverage.best_iou[hit], **exact)
    assert (coverage.best_shape[~hit] == -1).all()


@settings(deadline=None, max_examples=150)
@given(
    images(),
    st.sampled_from(GRIDS),
    st.sampled_from(["use", "ignore"]),
    st.sampled_from([0.3, 0.5, 0.7]),
    st.sampled_from([0.0, 0.4]),
)
def test_reached_objects_are_those_with_a_positive_anchor(drawn, grid, border, fg_iou, least):
    """Alone in its image, an object has a positive anchor just if its best IoU says so."""
    rule = {**RULE, "border": border, "fg_iou": fg_iou, "forced_min_iou": least}
    objects = make_objects(drawn)
    best_iou = object_coverage(objects, grid, border=border).best_iou
    if not grid.rounded:  # there the threshold may lie between two roundings
        best_iou = best_iou.where((best_iou - fg_iou).abs() > 1e-6, torch.nan)
    for force_best in (False, True):
        positive = []
        for size, canvas, boxes in drawn:
            alone = torch.tensor(boxes).float()[:, None]  # [G, 1, 4]
            yes = torch.ones(len(boxes), 1, dtype=torch.bool)
            sizes = torch.tensor([size] * len(boxes))
            labels = assign(
                grid, canvas, alone, yes, ~yes, sizes, **{**rule, "force_best": force_best}
            ).labels
            positive.append((labels == POSITIVE).any(1))
        for value, has_positive in zip(best_iou, torch.cat(positive), strict=True):
            if value.isnan():
                continue
            found = reach(value[None], fg_iou=fg_iou, force_best=force_best, forced_min_iou=least)
            assert found.reached + found.forced == has_positive


@settings(deadline=None, max_examples=60)
@given(images(), st.sampled_from(["use", "ignore"]), st.sampled_from([0.3, 0.5, 0.7]))
def test_it_is_so_among_others_too(drawn, border, fg_iou):
    """In a whole image: the positives of IoU >= fg_iou with an object are there, or are not."""
    rule = {**RULE, "border": border, "fg_iou": fg_iou}
    best_iou = object_coverage(make_objects(drawn), FPN, border=border).best_iou
    reached = []
    for size, canvas, boxes in drawn:
        yes = torch.ones(1, len(boxes), dtype=torch.bool)
        labels, _ = assign(
            FPN, canvas, torch.tensor([boxes]).float(), yes, ~yes, torch.tensor([size]), **rule
        )
        ious = all_ious(FPN, size, canvas, boxes, "use")
        reached.append(((ious >= fg_iou) & (labels == POSITIVE)).any(1))
    assert torch.equal(best_iou >= fg_iou, torch.cat(reached))


def test_the_nearest_place_is_found_where_float32_sees_a_tie():
    """The box is from 1022.00006 to 1030 px, so that it shares 6 px with 1028 +- 4, not with 1024.

    The sum of its edges is 2052.00006, which in float32 is 2052: as near to one as to the other.
    """
    grid = AnchorGrid(((8.0,),), (1.0,), (4,), True)
    box = (1022 + 2**-14, 4, 1030, 12)
    objects = make_objects([((32, 1280), (32, 1280), [box])])
    best = object_coverage(objects, grid, border="use").best_iou
    assert best == all_ious(grid, (32, 1280), (32, 1280), [box], "use").max()


def test_many_images_in_chunks(monkeypatch):
    drawn = [
        ((60 + i, 100 - i), (96, 128), [(i, 2.5 * j, 40 + j, 50 + i) for j in range(i % 4)])
        for i in range(12)
    ]
    objects = make_objects(drawn)
    whole = object_coverage(objects, FPN, border="ignore")
    monkeypatch.setattr("rpn_train.inspect.coverage.CHUNK", 5)
    chunked = object_coverage(objects, FPN, border="ignore")
    assert torch.equal(whole.best_iou, chunked.best_iou)
    assert torch.equal(whole.best_shape, chunked.best_shape)


def make_index():
    """Three images, the middle one without objects; a crowd; a box over the border."""
    return build_index(
        source=Path("a.json"),
        root=Path("root"),
        image_ids=np.array([1, 2, 3]),
        file_names=["a", "b", "c"],
        sizes=np.array([[97, 211], [50, 50], [333, 101]]),
        box_rows=np.array([0, 0, 2, 2, 0]),
        box_ids=np.arange(5),
        boxes_xywh=np.array(
            [[10.1, 3, 33.3, 7], [0, 0, 9, 9], [-5, 1, 50, 400], [7, 7, 1.7, 0.3], [200, 5, 30, 9]]
        ),
        areas=np.array([np.nan, 5, np.nan, 100.0, np.nan]),
        ignore=np.array([False, True, False, False, False]),
        keep_empty=True,
    )


def test_objects_are_resized_as_for_training():
    index = make_index()
    objects = resized_objects(index, short_side=75, max_side=150, divisor=32)
    # 75 / 97 would make the long side 163; 150 / 211 = .711 it is, and 150 / 333 = .450
    assert objects.sizes.tolist() == [[69, 150], [75, 75], [150, 45]]
    assert objects.canvases.tolist() == [[96, 160], [96, 96], [160, 64]]
    assert objects.image.tolist() == [0, 0, 2, 2]
    assert objects.areas.tolist() == [33.3 * 7, 30 * 9, 50 * 400, 100]
    expected = []
    for row, (height, width) in enumerate(index.sizes.tolist()):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        boxes = torch.from_numpy(index.boxes_xyxy(row))
        _, boxes = resize(image, boxes, tuple(objects.sizes[row].tolist()))
        expected.append(boxes[~torch.from_numpy(index.ignored(row))])
    assert torch.equal(objects.boxes, torch.cat(expected))
    assert index.boxes_xywh[0].tolist() == [10.1, 3, 33.3, 7]  # left as it was


def test_figures_by_hand():
    """Anchors of 16 px around 0, 16, ...: a box of 16 x 8 has .5, one of 16 x 12 has .75."""
    grid = AnchorGrid(((16.0,),), (1.0,), (16,), True)
    boxes = [(8, 8, 24, 24), (8, 12, 24, 20), (8, 10, 24, 22), (10, 10, 14, 14), (0, 0, 16, 16)]
    objects = make_objects([((64, 64), (64, 64), boxes), ((9, 9), (16, 16), [(8, 8, 9, 9)])])
    coverage = object_coverage(objects, grid, border="use")
    # the fifth shares 8 x 8 with four anchors: 64 / 448. The last touches the only anchor
    expected = [1, 0.5, 0.75, 16 / 256, 64 / 448, 0]
    torch.testing.assert_close(coverage.best_iou, torch.tensor(expected))
    assert coverage.best_shape.tolist() == [0, 0, 0, 0, 0, -1]
    rule = {"fg_iou": 0.6, "force_best": True, "forced_min_iou": 0.0}
    found = reach(coverage.best_iou, **rule)
    assert found.num_objects == 6
    assert found.mean_iou == pytest.approx(sum(expected) / 6)
    shares = (found.recall_iou50, found.recall_iou70, found.reached, found.forced)
    assert shares == pytest.approx((3 / 6, 2 / 6, 2 / 6, 3 / 6))  # nothing forces the last
    assert reach(coverage.best_iou, **{**rule, "fg_iou": 0.75}).reached == pytest.approx(2 / 6)
    assert reach(coverage.best_iou, **{**rule, "force_best": False}).forced == 0
    assert reach(coverage.best_iou, **{**rule, "forced_min_iou": 0.1}).forced == pytest.approx(
        2 / 6
    )
    none = reach(coverage.best_iou[:0], **rule)
    assert none.num_objects == 0
    assert math.isnan(none.reached)


def test_a_split_without_objects():
    objects = make_objects([((30, 40), (32, 64), [])])
    coverage = object_coverage(objects, FPN, border="use")
    assert coverage.best_iou.shape == coverage.best_shape.shape == (0,)
    assert {use.best_for for use in shape_use(coverage, FPN)} == {0}
    positives = count_positives(objects, FPN, num_images=5, **RULE)
    assert positives.per_image.tolist() == [0]
    assert positives.per_object.tolist() == positives.objects.tolist() == []


def test_groups_by_hand():
    """Sides 8, 7.99.., 600 and 32, ratios 1, 3, 2/3 - and 1/4."""
    boxes = [(0, 0, 8, 8), (0, 0, 4.6, 13.8), (0, 0, 750, 500), (0, 0, 64, 16)]
    objects = make_objects([((600, 800), (608, 800), boxes)])
    objects = objects._replace(areas=torch.tensor([1024.0, 1025, 9216, 1e6]).double())
    groups = {
        kind: {name: members.nonzero()[:, 0].tolist() for name, members in named.items()}
        for kind, named in object_groups(objects).items()
    }
    assert groups["area"] == {
        "all": [0, 1, 2, 3],
        "small": [0],
        "medium": [0, 1, 2],
        "large": [2, 3],
    }
    assert {name: rows for name, rows in groups["side"].items() if rows} == {
        "under 8 px": [1],
        "8 px - 16 px": [0],
        "32 px - 64 px": [3],
        "from 512 px": [2],
    }
    assert groups["ratio"] == {
        "under 1:3": [3],
        "1:3 - 2:3": [],
        "2:3 - 3:2": [0, 2],
        "3:2 - 3:1": [],
        "from 3:1": [1],
    }


def test_who_serves_whom():
    grid = AnchorGrid(((8.0, 12.0), (40.0, 50.0)), (1.0, 2.0), (4, 16), True)
    coverage = Coverage(torch.ones(5), torch.tensor([0, 7, 7, 3, -1]), grid.per_cell)
    # the fifth object is served by nobody
    assert shape_use(coverage, grid) == [
        ShapeUse(4, 8.0, 1.0, 1),
        ShapeUse(4, 12.0, 1.0, 0),
        ShapeUse(4, 8.0, 2.0, 0),
        ShapeUse(4, 12.0, 2.0, 1),
        ShapeUse(16, 40.0, 1.0, 0),
        ShapeUse(16, 50.0, 1.0, 0),
        ShapeUse(16, 40.0, 2.0, 0),
        ShapeUse(16, 50.0, 2.0, 2),
    ]


def test_positives_are_those_of_training():
    """Anchors of 16 px around 0, 16, ..., and the images 0, 2 and 3 of five.

    In the first the objects are an anchor, the same again (which the first object keeps), and one
    between four anchors. The second has none, the third has one that forces one anchor.
    """
    grid = AnchorGrid(((16.0,),), (1.0,), (16,), True)
    image = (64, 64), (64, 64)
    objects = make_objects(
        [
            (*image, [(8, 8, 24, 24), (8, 8, 24, 24), (32, 32, 48, 48)]),
            (*image, [(8, 8, 24, 24)]),
            (*image, []),
            ((30, 30), (32, 32), [(10, 10, 14, 14)]),
            (*image, [(8, 8, 24, 24)]),
        ]
    )
    positives = count_positives(objects, grid, num_images=3, **RULE)
    assert positives.images.tolist() == [0, 1, 3]
    assert positives.objects.tolist() == [0, 1, 2, 3, 4]
    assert positives.per_object.tolist() == [1, 0, 4, 1, 1]
    assert positives.per_image.tolist() == [5, 1, 1]
    every = count_positives(objects, grid, num_images=99, **RULE)
    assert every.images.tolist() == [0, 1, 2, 3, 4]
    assert every.per_image.tolist() == [5, 1, 0, 1, 1]
    unforced = count_positives(objects, grid, num_images=99, **{**RULE, "force_best": False})
    assert unforced.per_object.tolist() == [1, 0, 0, 1, 0, 1]
