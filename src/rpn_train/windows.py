"""Which anchors of a grid can share a given area with a box: windows of rows and columns.

Anchors of one shape differ by whole strides alone. So the area that a box shares with them is a
product, the width shared with their column times the height shared with their row, and each factor
rises and then falls along its axis. Where the product reaches an area, each factor reaches that
area over the most that the other can be: a range of columns and a range of rows, in closed form.
60 objects and 220,000 anchors are 13 million pairs, of which 7,000 lie in windows for IoU 0.3.

A window holds all anchors that share the area, and perhaps some more: it is found in float64, with
a margin above all rounding of float32 boxes. What it holds is to be computed from the boxes.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rpn_train.anchors import AnchorGrid, cell_anchors

# float32 edges and their differences are off by less than this, up to 65,536 px.
MARGIN_PX = 1 / 64
# Pairs that are held at once, if no box has more; some 100 bytes each with what is made of them.
BLOCK_PAIRS = 1 << 18


class Shapes(NamedTuple):
    """The M shapes of the anchors of a padded image: one for each level and anchor of its cell.

    corners: float64 [M, 4], xyxy around (0, 0), px. strides: float64 [M, 1], px. cells: int64
    [M, 2], number of columns and rows. steps: int64 [M, 2], from an anchor to the next in its row
    and in its column, as indices of anchors. first: int64 [M], the anchor at (0, 0).
    """

    corners: Tensor
    strides: Tensor
    cells: Tensor
    steps: Tensor
    first: Tensor

    def areas(self) -> Tensor:
        """float64 [M], px; as float32 anchors have them, or a little less."""
        return (self.corners[:, 2:] - self.corners[:, :2] - MARGIN_PX).clamp(min=0).prod(-1)


@lru_cache(maxsize=64)
def grid_shapes(grid: AnchorGrid, canvas: tuple[int, int]) -> Shapes:
    """Shapes of the anchors of `grid_anchors`, cached as those are."""
    height, width = canvas
    corners, numbers, start = [], [], 0
    for sizes, stride in zip(grid.sizes, grid.strides, strict=True):
        columns, rows = width // stride, height // stride
        if columns * rows:
            corners.append(cell_anchors(sizes, grid.ratios, grid.rounded))
            of_level = (stride, columns, rows, grid.per_cell, grid.per_cell * columns)
            numbers += [(*of_level, start + i) for i in range(grid.per_cell)]
        start += columns * rows * grid.per_cell
    strides, cells, steps, first = torch.tensor(numbers).split([1, 2, 2, 1], dim=1)
    return Shapes(torch.cat(corners).double(), strides.double(), cells, steps, first[:, 0])


def nearest_anchors(boxes: Tensor, shapes: Shapes, borders: Tensor | None) -> Tensor:
    """Of each shape, the anchor whose centre is nearest to that of a box; none shares more with it.

    Args:
        boxes: float32 [N, 4] xyxy px.
        borders: [N, 2] height and width px, or None; the nearest anchor within them, if any is.

    Returns:
        int64 [N, M], indices of anchors.
    """
    low, high, box_low, box_high = _corners(boxes, shapes)
    first, last = torch.zeros_like(low), shapes.cells - 1.0
    if borders is not None:
        right_and_bottom = borders.flip(-1)[:, None]  # [N, 1, 2]
        first = (-low / shapes.strides).ceil().clamp(min=0)
        last = torch.minimum(last, ((right_and_bottom - high) / shapes.strides).floor())
    cell = ((box_low + box_high - low - high) / (2 * shapes.strides)).round()  # [N, M, 2]
    cell = torch.minimum(torch.maximum(cell, first), last).clamp(min=0).long()
    return shapes.first + (cell * shapes.steps).sum(-1)


def window_pairs(boxes: Tensor, areas: Tensor, shapes: Shapes) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a box and an anchor, all that share an area among them, in blocks of whole boxes.

    Args:
        boxes: float32 [N, 4] xyxy px.
        areas: float64 [N, M], px: what a box and an anchor of each shape have to share.

    Yields:
        int64 [P], rows of boxes, ascending; and int64 [P], indices of anchors.
    """
    first, cells = _windows(boxes, areas, shapes)  # [N, M, 2]
    box, shape = cells.prod(-1).nonzero().unbind(1)  # [W] windows that are not empty
    cells, steps = cells[box, shape], shapes.steps[shape]  # [W, 2]
    start = shapes.first[shape] + (first[box, shape] * steps).sum(-1)
    pairs = cells.prod(-1)
    before = (pairs.cumsum(0) - pairs)[torch.searchsorted(box, box)]  # pairs of all earlier boxes
    _, windows = (before // BLOCK_PAIRS).unique_consecutive(return_counts=True)
    blocks = (values.split(windows.tolist()) for values in (box, start, cells, steps))
    for of_block in zip(*blocks, strict=True):
        box, start, cells, steps = of_block
        window, row = _ragged(cells[:, 1])  # [Q] rows of windows
        row_start = start[window] + row * steps[window, 1]
        of_row, column = _ragged(cells[window, 0])  # [P]
        yield box[window][of_row], row_start[of_row] + column * steps[0, 0]


def _windows(boxes: Tensor, areas: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """First column and row, and number of columns and rows: int64 [N, M, 2] each."""
    low, high, box_low, box_high = _corners(boxes, shapes)
    most = torch.minimum(high - low, box_high - box_low) + MARGIN_PX  # [N, M, 2] px to share
    least = areas[..., None] / most.flip(-1) - MARGIN_PX
    first = ((box_low + least - high) / shapes.strides).ceil().clamp(min=0)
    last = torch.minimum(((box_high - least - low) / shapes.strides).floor(), shapes.cells - 1.0)
    reachable = (areas <= most.prod(-1))[..., None]
    return first.long(), ((last - first + 1).clamp(min=0) * reachable).long()


def _corners(boxes: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upper left and lower right corners of shapes [M, 2] and of boxes [N, 1, 2], float64."""
    low, high = shapes.corners.split(2, dim=-1)
    box_low, box_high = boxes.double()[:, None].split(2, dim=-1)
    return low, high, box_low, box_high


def _ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Row, and place in the row, of each entry of rows of some lengths: 3, 1 -> 0001, 0120."""
    row = torch.repeat_interleave(lengths)
    return row, torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
