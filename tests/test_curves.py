"""Curves against hand-computed recall, and their legends against odd names."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rpn_train.curves import LINES, figure_to_image, recall_by_iou, recall_by_number
from rpn_train.recall import (
    IOU_THRESHOLDS,
    SIZES,
    ObjectArrays,
    ProposalArrays,
    Recall,
    score_recall,
)

NUM_OBJECTS = {"all": 3, "small": 1, "medium": 2, "large": 0}


def example(max_proposals: Sequence[int] = (5, 1), shift: int = 0) -> Recall:
    """Three objects: found by proposal 0 at every IoU, by proposal 2 up to 0.7, and never.

    The first counts as small, the others as medium; `shift` is added to every rank.
    """
    rank = np.full((10, 4, 3), -1, np.int32)
    rank[:, :2, 0] = 0 + shift
    rank[:5, [0, 2], 1] = 2 + shift
    rank[rank >= max(max_proposals)] = -1
    counts = np.array(list(NUM_OBJECTS.values()), float)
    counts[counts == 0] = math.nan
    found = [((rank >= 0) & (rank < n)).sum(axis=2) for n in max_proposals]  # N x [T, A]
    recall = np.stack(found, axis=2) / counts[:, None]
    return Recall(tuple(max_proposals), recall, 1, NUM_OBJECTS, rank)


def nothing() -> Recall:
    recall, rank = np.full((10, 4, 1), math.nan), np.zeros((10, 4, 0), np.int32)
    return Recall((5,), recall, 2, dict.fromkeys(SIZES, 0), rank)


def lines(axes: Axes) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.lines}


def test_one_recall_by_number_has_lines_for_three_ious_and_their_average() -> None:
    everything, small, medium, _ = recall_by_number({"": example()}, "coco").axes
    numbers, third = [1, 2, 3, 4, 5], 1 / 3
    shown = lines(everything)
    assert shown["IoU 0.50"] == [numbers, pytest.approx([third, third] + 3 * [2 / 3])]
    assert shown["IoU 0.75"] == shown["IoU 0.90"] == [numbers, pytest.approx(5 * [third])]
    average = shown["average recall, IoU 0.50 to 0.95"]
    assert average == [numbers, pytest.approx([third, third, 0.5, 0.5, 0.5])]
    assert lines(small)["IoU 0.90"] == [numbers, [1] * 5]
    assert lines(medium)["IoU 0.50"] == [numbers, [0, 0, 0.5, 0.5, 0.5]]
    assert (everything.get_xlabel(), everything.get_xscale()) == ("proposals per image", "log")
    assert everything.get_ylabel() == "recall (share of objects)"


def test_under_greedy_only_what_was_scored_is_a_point() -> None:
    axes = recall_by_number({"": example()}, "greedy").axes[0]
    assert lines(axes)["IoU 0.50"] == [[1, 5], pytest.approx([1 / 3, 2 / 3])]
    assert axes.lines[0].get_markevery() is None  # all are marked
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5"]


def test_several_recalls_by_number_have_a_line_each() -> None:
    recalls = {"a": example(), "b": example((7,), shift=2)}
    shown = lines(recall_by_number(recalls, "coco").axes[0])
    assert shown["a"] == [[1, 2, 3, 4, 5], pytest.approx([1 / 3, 1 / 3, 0.5, 0.5, 0.5])]
    assert shown["b"][1] == pytest.approx([0, 0, 1 / 3, 1 / 3, 0.5, 0.5, 0.5])


def test_curves_of_scored_proposals_pass_through_the_figures_of_the_table() -> None:
    rng = np.random.default_rng(7)
    boxes = np.hstack([rng.uniform(0, 20, (39, 2)), rng.uniform(5, 150, (39, 2))])
    objects = ObjectArrays(
        boxes, boxes[:, 2] * boxes[:, 3], rng.random(39) < 0.1, np.array([0, 13, 39])
    )
    noisy = np.abs(boxes.repeat(3, axis=0) + rng.normal(0, 3, (117, 4)))
    proposals = ProposalArrays(noisy, rng.normal(size=117), np.array([0, 39, 117]))
    recall = score_recall(proposals, objects, max_proposals=(30, 4, 11))
    panels = recall_by_number({"": recall}, "coco").axes
    for a, axes in enumerate(panels):
        for t, line in zip((0, 5, 8), axes.lines, strict=False):
            np.testing.assert_allclose(line.get_ydata()[[29, 3, 10]], recall.recall[t, a])


@pytest.mark.parametrize(
    ("scored", "shown"),
    [((10, 300, 2000), (300, 2000)), ((7, 1, 9, 5), (5, 7, 9)), ((1000, 300), (300, 1000))],
)
def test_one_recall_by_iou_has_a_line_for_each_number(
    scored: tuple[int, ...], shown: tuple[int, ...]
) -> None:
    recall = example(scored, shift=6)
    everything, small, *_ = recall_by_iou({"": recall}).axes
    assert list(lines(everything)) == [f"{n:,} proposals" for n in shown]
    for axes, a in ((everything, 0), (small, 1)):
        for n, (x, y) in zip(shown, lines(axes).values(), strict=True):
            assert x == IOU_THRESHOLDS.tolist()
            assert y == recall.recall[:, a, scored.index(n)].tolist()
    assert everything.get_xlabel() == "IoU threshold"


def test_several_recalls_by_iou_have_a_row_for_each_number() -> None:
    recalls = {"a": example((1, 5)), "b": example((1, 5), shift=2)}
    panels = np.array(recall_by_iou(recalls).axes).reshape(2, 4)
    assert lines(panels[0, 0])["b"][1] == [0] * 10
    assert lines(panels[1, 0])["b"][1] == pytest.approx([2 / 3] * 5 + [1 / 3] * 5)
    assert panels[1, 0].get_ylabel() == "recall at 5 proposals\n(share of objects)"
    assert panels[0, 2].get_title() == "medium, 2 objects, area 32² to 96² px²"
    assert not panels[1, 2].get_title()


def test_a_size_without_objects_says_so() -> None:
    *_, small, _, large = recall_by_number({"": example()}, "coco").axes
    assert small.get_title() == "small, 1 object, area ≤ 32² px²"
    assert large.get_title() == "large, 0 objects, area ≥ 96² px²"
    assert [text.get_text() for text in large.texts] == ["no objects"]
    assert not large.lines
    assert not large.axison
    assert not recall_by_iou({"": nothing()}).legends


NAMES = [f"{i}, a rather long name of a file with proposals" for i in range(6)] + ["_a", "$b$"]


@pytest.mark.parametrize("names", [NAMES, NAMES[6:], ["x" * 90, "y"]])
def test_the_legend_has_the_names_as_they_are_and_covers_nothing(names: list[str]) -> None:
    figure = recall_by_number(dict.fromkeys(names, example()), "coco")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert not any(text.get_parse_math() for text in legend.get_texts())
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    bottoms = [axes.get_tightbbox(canvas.get_renderer()).y0 for axes in figure.axes]
    assert box.y1 <= min(bottoms)


def test_eight_lines_differ_in_colour_dashes_and_marker() -> None:
    figure = recall_by_number({str(i): example() for i in range(9)}, "coco")
    drawn = figure.axes[0].lines
    for looks in zip(*LINES, strict=True):
        assert len(set(looks)) == 8
    assert len({tuple(line.get_color()) for line in drawn}) == 8
    assert drawn[8].get_color() == drawn[0].get_color()


@pytest.mark.parametrize(
    ("name", "recall"), [("", example()), ("_$x$", example((1,))), ("", nothing())]
)
def test_a_figure_becomes_an_image(name: str, recall: Recall) -> None:
    figures = recall_by_number({name: recall}, "coco"), recall_by_iou({name: recall})
    for figure in (*figures, recall_by_number({name: recall}, "greedy")):
        image = figure_to_image(figure)
        assert image.shape == (3, 400, 1400)
        assert image.dtype == torch.uint8
        assert (image[:, 0, 0] == 255).all()
        assert image.min() == 0
        blue = (image == torch.tensor([0, 114, 178]).reshape(3, 1, 1)).all(0).sum()
        assert (blue > 20) == bool(recall.num_objects["all"])  # RGB in this order
