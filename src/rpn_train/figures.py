"""Pictures for TensorBoard and reports: boxes on images, and curves of recall.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from rpn_train.recall import IOU_THRESHOLDS, Recall

ORANGE, SKY_BLUE, BLUISH_GREEN = (230, 159, 0), (86, 180, 233), (0, 158, 115)
BLUE, VERMILLION, GREY = (0, 114, 178), (213, 94, 0), (153, 153, 153)

MIN_SIDE_PX = 400  # of the long side of a picture: a smaller image is enlarged
LINES = ((BLUE, "-"), (VERMILLION, "--"), (BLUISH_GREEN, "-."), (ORANGE, ":"))  # of curves, in turn

DRAWN_PROPOSALS = 20  # that callers draw in a picture: more would hide the image


def draw_detections(
    image: Tensor,
    *,
    gt_boxes: Tensor,
    gt_ignore: Tensor,
    proposals: Tensor,
    scores: Tensor,
    found: Tensor | None = None,
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

    Returns:
        uint8 [3, s * H, s * W], enlarged by the least whole s that makes it `MIN_SIDE_PX` long.
    """
    picture = _Picture(image)
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

    def __init__(self, image: Tensor) -> None:
        long_side = max(image.shape[1:])
        self._scale = math.ceil(MIN_SIDE_PX / long_side)
        self._line = max(1, self._scale * long_side // MIN_SIDE_PX)  # width of a thin line
        pixels = image.repeat_interleave(self._scale, 1).repeat_interleave(self._scale, 2)
        self._image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def box(self, box: Tensor, colour: tuple[int, ...], lines: int = 1, border: int = 0) -> None:
        """Lines inside the box, `border` pixels wider on both sides."""
        x1, y1, x2, y2 = (round(self._scale * v) for v in box.tolist())
        x1, y1, x2, y2 = x1 - border, y1 - border, x2 - 1 + border, y2 - 1 + border
        corners = (x1, y1, max(x1, x2), max(y1, y2))
        self._draw.rectangle(corners, outline=colour, width=lines * self._line + 2 * border)

    def framed_box(self, box: Tensor, colour: tuple[int, ...]) -> None:
        """A thick line between two black ones, which stands out on any background."""
        self.box(box, (0, 0, 0), lines=3, border=1)
        self.box(box, colour, lines=3)

    def tensor(self) -> Tensor:
        return torch.from_numpy(np.array(self._image)).permute(2, 0, 1).contiguous()


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


def recall_curves(recall: Recall) -> Figure:
    """Recall against the IoU threshold and against the number of proposals (Hosang et al. 2016).

    The second follows from `matched_rank`, so it is exact under the protocol "coco"; under
    "greedy" only its right end is. Without objects there are axes but no curves.
    """
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    by_iou, by_number = figure.subplots(1, 2, sharey=True)
    for n, limit in enumerate(recall.max_proposals):
        curve = recall.recall[:, 0, n]
        _plot(by_iou, n, IOU_THRESHOLDS, curve, f"{limit} proposals, AR {curve.mean():.3f}")
    by_iou.set(xlabel="IoU threshold", ylabel="recall (share of objects)", ylim=(0, 1.02))

    limit = max(recall.max_proposals)
    objects = recall.num_objects["all"] or math.nan
    found = [np.bincount(rank[rank >= 0], minlength=limit) for rank in recall.matched_rank[:, 0]]
    curves = np.cumsum(found, axis=1) / objects  # [T, limit]
    numbers = np.arange(1, limit + 1)
    for i, t in enumerate((0, 5, 8)):
        _plot(by_number, i, numbers, curves[t], f"IoU {IOU_THRESHOLDS[t]:.2f}")
    _plot(by_number, 3, numbers, curves.mean(axis=0), "average recall, IoU 0.50 to 0.95")
    by_number.set(xlabel="proposals per image", xscale="log", xlim=(1, max(limit, 2)))
    for axes in (by_iou, by_number):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=10)
    return figure


def _plot(axes: Axes, i: int, x: np.ndarray, y: np.ndarray, label: str) -> None:
    colour, style = LINES[i % len(LINES)]
    axes.plot(x, y, color=[c / 255 for c in colour], linestyle=style, linewidth=2, label=label)


def figure_to_image(figure: Figure) -> Tensor:
    """A matplotlib figure as uint8 [3, H, W] RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())[:, :, :3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
