"""What can be wrong with a box, and with all of them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rpn_train.errors import DataError

FAULTS = ("", "box not finite", "box without extent", "box outside the image")  # by fault code
NOT_FOUR_NUMBERS = "box not of four numbers"
_FEW_BOXES, _NEARLY_ALL, _MANY = 10, 0.99, 0.2  # when boxes look like those of another format


def check_format(source: Path, boxes_xywh: NDArray[np.float64], sizes: NDArray[np.int64]) -> None:
    """Refuse boxes that are no pixels, or no (x, y, width, height): most would still have an IoU.

    Args:
        boxes_xywh: [M, 4].
        sizes: [M, 2] of the image of each box.
    """
    if len(boxes_xywh) < _FEW_BOXES:
        return
    x, y, w, h = boxes_xywh.T
    height, width = sizes.T
    if (np.abs(boxes_xywh).max(axis=1) <= 1).mean() > _NEARLY_ALL and sizes.min() > 2:
        raise DataError(
            f"{source}: expected boxes in pixels, got shares of the image: nearly all numbers are "
            "between 0 and 1; multiply them by width and height"
        )
    as_corners = (x >= 0) & (y >= 0) & (w > x) & (h > y) & (w <= width) & (h <= height)
    with np.errstate(over="ignore", invalid="ignore"):  # as in `to_corners`
        outside = (x + w > width + 1) | (y + h > height + 1)
    if as_corners.mean() > _NEARLY_ALL and outside.mean() > _MANY:
        raise DataError(
            f"{source}: expected boxes as x, y, width, height, got what looks like x1, y1, x2, y2: "
            f"as the former, {outside.mean():.0%} of them reach out of their image"
        )


def box_faults(boxes_xywh: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.intp]:
    """Fault code [M] of each box, 0 for none, given the size [M, 2] of its image.

    Judged in float32, the form that training sees: a box may be finite and have an extent in
    float64 alone.
    """
    boxes = to_corners(boxes_xywh)
    finite = np.isfinite(boxes).all(axis=1)
    extent = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    overlaps = ((boxes[:, 2:] > 0) & (boxes[:, :2] < sizes[:, ::-1])).all(axis=1)
    return np.select([~finite, ~extent, ~overlaps], [1, 2, 3], 0)


def to_corners(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float32]:
    """x, y, width, height [..., 4] -> x1, y1, x2, y2."""
    with np.errstate(over="ignore", invalid="ignore"):  # `box_faults` looks for the infinities
        corners = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
        return corners.astype(np.float32)
