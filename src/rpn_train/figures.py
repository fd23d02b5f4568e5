"""Pictures for TensorBoard and reports: boxes on images, one by one or many on a sheet.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ORANGE, SKY_BLUE, BLUISH_GREEN = (230, 159, 0), (86, 180, 233), (0, 158, 115)
BLUE, VERMILLION, GREY = (0, 114, 178), (213, 94, 0), (153, 153, 153)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)

MIN_SIDE_PX = 400  # of the long side of a picture: a smaller image is enlarged
DRAWN_PROPOSALS = 20  # that callers draw in a picture: more would hide the image

SHEET_COLUMNS = 3
CELL_PX = (480, 360)  # width and height of an image on a sheet
CAPTION_PX, TEXT_PX = 24, 15  # height of a line with its padding, and of its letters


def draw_detections(
    image: Tensor,
    *,
    gt_boxes: Tensor,
    gt_ignore: Tensor,
    proposals: Tensor,
    scores: Tensor,
    found: Tensor | None = None,
    enlarge: bool = True,
) -> Tensor:
    """Ground truth (thick) over proposals (thin, sky blue, the fainter the lower the score).

    An object is bluish green if a proposal found it, vermillion if none did, grey if it is
    ignored. Lines run along the inside of their box.

    Args:
        image: uint8 [3, H, W] RGB.
        gt_boxes: [G, 4] xyxy in pixels of the image; G = 0 is fine.
        gt_ignore: bool [G].
        proposals: [K, 4] like `gt_boxes`; all are drawn, so pass the best few. K = 0 is fine.
        scores: [K] in [0, 1].
        found: bool [G]; None draws every object as found.
        enlarge: by the least whole s that makes the picture `MIN_SIDE_PX` long; otherwise s is 1.

    Returns:
        uint8 [3, s * H, s * W].
    """
    picture = _Picture(image, enlarge)
    for box, score in zip(proposals, scores.tolist(), strict=True):
        picture.box(box, (*SKY_BLUE, round(115 + 140 * score)))
    for g, box in enumerate(gt_boxes):
        hit = found is None or bool(found[g])
        colour = GREY if gt_ignore[g] else BLUISH_GREEN if hit else VERMILLION
        picture.framed_box(box, colour)
    return picture.tensor()


def draw_anchors(image: Tensor, *, gt_boxes: Tensor, positives: Tensor) -> Tensor:
    """Ground truth (thick, bluish green) under positive anchors (thin, orange).

    Arguments and result are like those of `draw_detections`; positives: [P, 4].
    """
    picture = _Picture(image)
    for box in gt_boxes:
        picture.framed_box(box, BLUISH_GREEN)
    for box in positives:
        picture.box(box, (*ORANGE, 255))
    return picture.tensor()


class _Picture:
    """An image, enlarged if small, to draw boxes on that are given in pixels of the image."""

    def __init__(self, image: Tensor, enlarge: bool = True) -> None:
        long_side = max(image.shape[1:])
        self._scale = math.ceil(MIN_SIDE_PX / long_side) if enlarge else 1
        self._line = max(1, self._scale * long_side // MIN_SIDE_PX)  # width of a thin line
        self._image = _to_pil(
            image.repeat_interleave(self._scale, 1).repeat_interleave(self._scale, 2)
        )
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def box(self, box: Tensor, colour: tuple[int, ...], lines: int = 1, border: int = 0) -> None:
        """Lines inside the box, `border` pixels wider on both sides."""
        x1, y1, x2, y2 = (round(self._scale * v) for v in box.tolist())
        x1, y1, x2, y2 = x1 - border, y1 - border, x2 - 1 + border, y2 - 1 + border
        corners = (x1, y1, max(x1, x2), max(y1, y2))
        self._draw.rectangle(corners, outline=colour, width=lines * self._line + 2 * border)

    def framed_box(self, box: Tensor, colour: tuple[int, ...]) -> None:
        """A thick line between two black ones, which stands out on any background."""
        self.box(box, BLACK, lines=3, border=1)
        self.box(box, colour, lines=3)

    def tensor(self) -> Tensor:
        return _to_tensor(self._image)


def contact_sheet(images: Sequence[Tensor], columns: int, *, padding: int = 4) -> Tensor:
    """Images in rows on white.

    Args:
        images: each uint8 [3, H, W], of any size; every cell has the largest.
        columns: images in a row.
        padding: pixels around every image.

    Returns:
        uint8 [3, H', W']; without images no more than padding.
    """
    height = padding + max((image.shape[1] for image in images), default=0)
    width = padding + max((image.shape[2] for image in images), default=0)
    rows = math.ceil(len(images) / columns)
    shape = (3, rows * height + padding, columns * width + padding)
    sheet = torch.full(shape, 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = padding + i // columns * height, padding + i % columns * width
        sheet[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return sheet


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """An image, its objects and whether they were found.

    Args:
        file_name: shown as it is, shortened if long.
        image: uint8 [3, H, W] RGB.
        gt_boxes: [G, 4] xyxy in pixels of the image.
        gt_ignore: bool [G].
        found: bool [G].
        proposals: [K, 4] like `gt_boxes`, best first.
    """

    file_name: str
    image: Tensor
    gt_boxes: Tensor
    gt_ignore: Tensor
    found: Tensor
    proposals: Tensor


def worst_sheet(scored: Sequence[ScoredImage], *, iou: float, num_proposals: int) -> Tensor:
    """Images with their objects found and missed, in rows, under a legend.

    Every image is scaled to the same cell, whatever its size, and has its name and the number of
    its missed objects above it.

    Args:
        iou: the threshold for found.
        num_proposals: the number of best proposals that could find an object. Of them the best
            `DRAWN_PROPOSALS` are drawn.

    Returns:
        uint8 [3, H', W']; without images the legend alone.
    """
    nothing = torch.zeros(3, 0, CELL_PX[0], dtype=torch.uint8)  # keeps the width for the legend
    cells = [_cell(one) for one in scored] or [nothing]
    sheet = contact_sheet(cells, SHEET_COLUMNS, padding=TEXT_PX)
    legend = Image.new("RGB", (sheet.shape[2], CAPTION_PX), WHITE)
    draw = ImageDraw.Draw(legend)
    x = TEXT_PX
    for colour, text in (
        (BLUISH_GREEN, "found"),
        (VERMILLION, "missed"),
        (GREY, "ignored"),
        (SKY_BLUE, f"{DRAWN_PROPOSALS} best proposals"),
        (None, f"IoU {iou:g}, {num_proposals} proposals"),
    ):
        if colour is not None:
            top = (CAPTION_PX - TEXT_PX) // 2
            draw.rectangle((x, top, x + 2 * TEXT_PX, top + TEXT_PX), colour, BLACK)
            x += 5 * TEXT_PX // 2
        x += _write(draw, x, text) + 2 * TEXT_PX
    return torch.cat([_to_tensor(legend), sheet], dim=1)


def _cell(scored: ScoredImage) -> Tensor:
    """An image with its boxes, scaled to `CELL_PX`, under its caption."""
    height, width = scored.image.shape[1:]
    scale = min(CELL_PX[0] / width, CELL_PX[1] / height)
    fitted = _to_pil(scored.image).resize(
        (max(1, round(scale * width)), max(1, round(scale * height))), Image.Resampling.LANCZOS
    )
    drawn = min(DRAWN_PROPOSALS, len(scored.proposals))
    picture = draw_detections(
        _to_tensor(fitted),
        gt_boxes=scored.gt_boxes * scale,
        gt_ignore=scored.gt_ignore,
        proposals=scored.proposals[:drawn] * scale,
        scores=torch.linspace(1, 0.4, drawn),
        found=scored.found,
        enlarge=False,
    )
    cell = Image.new("RGB", (CELL_PX[0], CAPTION_PX + CELL_PX[1]), WHITE)
    cell.paste(_to_pil(picture), ((CELL_PX[0] - fitted.width) // 2, CAPTION_PX))
    objects = ~scored.gt_ignore
    tally = f"{int((objects & ~scored.found).sum())} of {int(objects.sum())} missed"
    draw = ImageDraw.Draw(cell)
    room = CELL_PX[0] - _font().getlength(tally) - 2 * TEXT_PX
    _write(draw, 0, _shortened(scored.file_name, room))
    _write(draw, CELL_PX[0] - round(_font().getlength(tally)), tally)
    return _to_tensor(cell)


def _shortened(text: str, room: float) -> str:
    """Text on one line of at most `room` pixels: characters in the middle give way to "..."."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    kept, shown = len(text), text
    while kept and _font().getlength(shown) > room:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return shown


def _write(draw: ImageDraw.ImageDraw, x: int, text: str) -> int:
    """Black text in the middle of a line; how wide it is."""
    draw.text((x, CAPTION_PX / 2), text, BLACK, _font(), anchor="lm")
    return round(_font().getlength(text))


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(TEXT_PX)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
