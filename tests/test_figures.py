import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rpn_train.figures import (
    BLUISH_GREEN,
    GREY,
    ORANGE,
    SKY_BLUE,
    VERMILLION,
    contact_sheet,
    draw_anchors,
    draw_detections,
    figure_to_image,
    recall_curves,
)
from rpn_train.recall import IOU_THRESHOLDS, SIZES, Recall

IMAGE = torch.full((3, 101, 67), 200, dtype=torch.uint8)  # drawn four times as large: 404 x 268
NONE = torch.zeros(0, 4)
BLACK = (0, 0, 0)


def detections(**changes: Any) -> Tensor:
    nothing = {
        "gt_boxes": NONE,
        "gt_ignore": torch.zeros(0, dtype=torch.bool),
        "proposals": NONE,
        "scores": torch.zeros(0),
    }
    return draw_detections(IMAGE, **nothing | changes)


def colours(row: Tensor) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in row.T.tolist()]


def test_objects_have_the_colour_of_their_fate_on_the_inside_of_their_box() -> None:
    boxes = torch.tensor([[10.0, 5, 50, 25], [10, 30, 50, 50], [10, 60, 50, 80]])
    picture = detections(
        gt_boxes=boxes,
        gt_ignore=torch.tensor([False, False, True]),
        found=torch.tensor([True, False, False]),
    )
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 404, 268)
    for y, colour in ((15, BLUISH_GREEN), (40, VERMILLION), (70, GREY)):
        # Columns 40 to 199 belong to the box; the line is three pixels wide, its border one.
        assert colours(picture[:, 4 * y, 39:44]) == [BLACK, colour, colour, colour, BLACK]
        assert colours(picture[:, 4 * y, 196:201]) == [BLACK, colour, colour, colour, BLACK]
        assert colours(picture[:, 4 * y, 44:45]) == [(200,) * 3]  # the rest is the image


def test_without_found_every_object_is_drawn_as_found() -> None:
    box = torch.tensor([[10.0, 5, 50, 25]])
    picture = detections(gt_boxes=box, gt_ignore=torch.tensor([False]))
    assert colours(picture[:, 60, 40:41]) == [BLUISH_GREEN]


def test_a_better_proposal_is_less_faint() -> None:
    proposals = torch.tensor([[10.0, 5, 50, 25], [10, 40, 50, 60]])
    picture = detections(proposals=proposals, scores=torch.tensor([1.0, 0.0]))
    best, worst = colours(picture[:, 60, 40:41])[0], colours(picture[:, 200, 40:41])[0]
    assert best == SKY_BLUE
    # 115 of 255 parts of the line, the rest is the image: 200 - 115 / 255 * (200 - 86) = 148.6.
    assert worst == pytest.approx((148.6, 191.0, 214.9), abs=1)
    assert colours(picture[:, 60, 41:42]) == [(200,) * 3]  # one pixel wide


def test_anchors_may_reach_over_the_image_and_tiny_boxes_are_drawn() -> None:
    positives = torch.tensor([[-30.0, 10, 20, 200], [30, 30, 30.1, 30.1]])
    gt_boxes = torch.tensor([[40.0, 50, 41, 51]])
    picture = draw_anchors(IMAGE, gt_boxes=gt_boxes, positives=positives)
    assert colours(picture[:, 200, 79:80]) == [ORANGE]
    assert colours(picture[:, 120, 120:121]) == [ORANGE]
    assert colours(picture[:, 201, 161:162]) == [BLUISH_GREEN]


def test_nothing_to_draw_leaves_the_image_enlarged_and_itself_untouched() -> None:
    image = torch.arange(3 * 101 * 67, dtype=torch.int64).reshape(3, 101, 67).to(torch.uint8)
    picture = draw_anchors(image, gt_boxes=NONE, positives=NONE)
    assert torch.equal(picture[:, 2::4, 1::4], image)
    before = IMAGE.clone()
    assert torch.equal(detections(), detections())
    detections(proposals=torch.tensor([[1.0, 2, 30, 40]]), scores=torch.ones(1))
    assert torch.equal(IMAGE, before)


def test_a_large_image_keeps_its_size() -> None:
    image = torch.zeros(3, 401, 13, dtype=torch.uint8)
    assert draw_anchors(image, gt_boxes=NONE, positives=NONE).shape == (3, 401, 13)


def test_a_contact_sheet_has_cells_of_the_largest_image() -> None:
    images = [torch.full((3, 5, 7), 1), torch.full((3, 6, 2), 2), torch.full((3, 1, 1), 3)]
    sheet = contact_sheet([image.to(torch.uint8) for image in images], 2, padding=4)
    assert sheet.shape == (3, 4 + 6 + 4 + 6 + 4, 4 + 7 + 4 + 7 + 4)
    assert (sheet[:, 4:9, 4:11] == 1).all()
    assert (sheet[:, 4:10, 15:17] == 2).all()
    assert (sheet[:, 14, 4] == 3).all()
    assert sheet.ne(255).sum() == 3 * (5 * 7 + 6 * 2 + 1)
    assert contact_sheet([], 2, padding=4).shape == (3, 4, 12)


def example(num_objects: int) -> Recall:
    """Three objects: found by proposal 0 at every IoU, by proposal 2 up to 0.7, and never."""
    rank = np.full((10, num_objects), -1, np.int32)
    recall = np.full((10, len(SIZES), 2), math.nan)
    if num_objects:
        rank[:, 0] = 0
        rank[:5, 1] = 2
        recall[:] = 1 / 3
        recall[:5, :, 1] = 2 / 3
    return Recall((1, 5), recall, 1, dict.fromkeys(SIZES, num_objects), rank)


def test_recall_curves_show_the_recall() -> None:
    by_iou, by_number = recall_curves(example(3)).axes
    first, second = by_iou.lines
    np.testing.assert_allclose(first.get_xydata(), np.stack([IOU_THRESHOLDS, [1 / 3] * 10], 1))
    np.testing.assert_allclose(second.get_ydata(), [2 / 3] * 5 + [1 / 3] * 5)
    assert second.get_label() == "5 proposals, AR 0.500"
    iou50, iou75, _, average = by_number.lines
    assert iou50.get_xdata().tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(iou50.get_ydata(), [1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(iou75.get_ydata(), [1 / 3] * 5)
    np.testing.assert_allclose(average.get_ydata(), [1 / 3, 1 / 3, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("num_objects", [3, 0])
def test_a_figure_becomes_an_image(num_objects: int) -> None:
    image = figure_to_image(recall_curves(example(num_objects)))
    assert image.shape == (3, 450, 1100)
    assert image.dtype == torch.uint8
    assert (image[:, 0, 0] == 255).all()
    assert image.min() == 0
    blue = (image == torch.tensor([0, 114, 178]).reshape(3, 1, 1)).all(0).sum()
    assert blue > 20  # RGB in this order; without objects, in the legend alone
