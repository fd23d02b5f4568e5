from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rpn_train.figures import (
    BLACK,
    BLUISH_GREEN,
    CAPTION_PX,
    CELL_PX,
    GREY,
    ORANGE,
    SKY_BLUE,
    TEXT_PX,
    VERMILLION,
    ScoredImage,
    contact_sheet,
    draw_anchors,
    draw_detections,
    worst_sheet,
)

IMAGE = torch.full((3, 101, 67), 200, dtype=torch.uint8)  # drawn four times as large: 404 x 268
NONE = torch.zeros(0, 4)


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
    small = detections(gt_boxes=box, gt_ignore=torch.tensor([False]), enlarge=False)
    assert small.shape == IMAGE.shape
    assert colours(small[:, 15, 9:11]) == [BLACK, BLUISH_GREEN]


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


def scored(height: int, width: int, name: str = "a.jpg") -> ScoredImage:
    """A grey image with a found, a missed and an ignored object side by side, and a proposal."""
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.6], [0.4, 0.2, 0.6, 0.6], [0.7, 0.2, 0.9, 0.6]])
    pixels = torch.tensor([width, height, width, height])
    return ScoredImage(
        file_name=name,
        image=torch.full((3, height, width), 200, dtype=torch.uint8),
        gt_boxes=boxes * pixels,
        gt_ignore=torch.tensor([False, False, True]),
        found=torch.tensor([True, False, False]),
        proposals=torch.tensor([[0.1, 0.7, 0.9, 0.9]]) * pixels,
    )


def sheet_of(*images: ScoredImage) -> Tensor:
    return worst_sheet(images, iou=0.5, num_proposals=1000)


def cell(sheet: Tensor, row: int, column: int) -> Tensor:
    height, width = CAPTION_PX + CELL_PX[1], CELL_PX[0]
    top = CAPTION_PX + TEXT_PX + row * (height + TEXT_PX)
    left = TEXT_PX + column * (width + TEXT_PX)
    return sheet[:, top : top + height, left : left + width]


@pytest.mark.parametrize("scale", [0.25, 1, 7])
def test_on_a_sheet_every_image_fits_its_cell_and_has_its_boxes(scale: float) -> None:
    """480 x 360 px in a cell, of an image of the same shape: boxes where their shares say."""
    height, width = round(360 * scale), round(480 * scale)
    sheet = sheet_of(*[scored(height, width)] * 3, scored(height, width))
    picture = cell(sheet, 1, 0)[:, CAPTION_PX:]
    assert picture.shape == (3, 360, 480)
    for x, colour in ((48, BLUISH_GREEN), (192, VERMILLION), (336, GREY)):
        row = colours(picture[:, 144, x - 1 : x + 4])
        assert row == [BLACK, colour, colour, colour, BLACK]
    assert colours(picture[:, 290, 48:50]) == [SKY_BLUE, (200,) * 3]
    assert (cell(sheet, 1, 1) == 255).all()
    assert (cell(sheet, 1, 0) == cell(sheet, 0, 2)).all()


def test_an_image_of_another_shape_stands_in_the_middle_of_its_cell() -> None:
    tall = cell(sheet_of(scored(1800, 600)), 0, 0)[:, CAPTION_PX:]  # drawn 120 px wide
    grey = (tall[:, 40] == 200).all(0)
    assert grey.nonzero().flatten().tolist() == list(range(180, 300))
    wide = cell(sheet_of(scored(3, 1700)), 0, 0)[:, CAPTION_PX:]  # drawn 1 px high
    assert (wide[:, 3:] == 255).all()


def test_the_caption_has_the_ends_of_a_long_name_and_the_count_of_misses() -> None:
    def caption(name: str) -> Tensor:
        return cell(sheet_of(scored(36, 48, name)), 0, 0)[:, :CAPTION_PX]

    short, long = caption("a.jpg"), caption("a" + "x" * 300 + "b.jpg")
    assert torch.equal(long, caption("a" + "x" * 50 + "y" * 200 + "x" * 50 + "b.jpg"))
    assert not torch.equal(long, caption("a" + "x" * 300 + "c.jpg"))
    assert torch.equal(short[:, :, 360:], long[:, :, 360:])  # "1 of 2 missed"
    assert short[:, :, 360:].min() == 0
    assert (short[:, :, 100:360] == 255).all()
    assert torch.equal(caption("a\n\udcff"), caption("a??"))  # what cannot be printed


def test_an_ignored_object_is_never_counted_as_missed() -> None:
    def caption(*found: bool) -> Tensor:
        changed = replace(scored(36, 48), found=torch.tensor(found))
        return cell(sheet_of(changed), 0, 0)[:, :CAPTION_PX]

    assert torch.equal(caption(True, False, True), caption(True, False, False))
    assert not torch.equal(caption(True, True, False), caption(True, False, False))


def test_the_legend_explains_the_colours_whatever_is_on_the_sheet() -> None:
    legend = sheet_of()[:, :CAPTION_PX]
    assert torch.equal(legend, sheet_of(scored(36, 48))[:, :CAPTION_PX])
    for colour in (BLUISH_GREEN, VERMILLION, GREY, SKY_BLUE):
        same = (legend == torch.tensor(colour).reshape(3, 1, 1)).all(0).sum()
        assert same >= (2 * TEXT_PX - 1) * (TEXT_PX - 1)
    assert not torch.equal(sheet_of(), worst_sheet([], iou=0.5, num_proposals=300))
    assert not torch.equal(sheet_of(), worst_sheet([], iou=0.7, num_proposals=1000))
