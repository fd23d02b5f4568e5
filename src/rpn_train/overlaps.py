"""Overlaps of anchors with objects and crowds: all that the labels of anchors follow from.

Two ways to the same result. `dense_overlaps` compares all pairs of a box and an anchor in fixed
shapes: it waits for no GPU, and it is the definition. `window_overlaps` compares only the pairs
that can count, those in the windows of an object: with anchors whose IoU may reach the threshold
below which all is background or, where that is less, the best IoU of the object, since the anchors
that have it are forced to be positive. A forced anchor may overlap another object more, by less
than counts for that one: it is compared with all objects.

Both evaluate the same float32 expressions, those of torchvision's `box_iou`, so that labels and
the matches of positives are equal bit for bit (`test_windows.py`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import area, plain_iou, shared_area
from rpn_train.windows import BLOCK_PAIRS, Shapes, grid_shapes, nearest_anchors, window_pairs

# Pairs that the dense way holds at once, some 20 bytes each.
DENSE_PAIRS = 1 << 24
# Windows reach a little further than they need to, by more than the rounding of any IoU.
_SLACK = 1e-5
_MASK32 = 0xFFFFFFFF


class Overlaps(NamedTuple):
    """Overlaps of the anchors of a batch, each [B, R].

    best_iou: float32, highest IoU with an object; -1 in an image without. matches: int64, row of
    the first object of that IoU. forced: bool, no anchor has a higher IoU with some object.
    in_crowd: bool. usable: bool; best_iou and matches of an unusable anchor are arbitrary.
    """

    best_iou: Tensor
    matches: Tensor
    forced: Tensor
    in_crowd: Tensor
    usable: Tensor


def dense_overlaps(
    anchors: Tensor,
    gt_boxes: Tensor,
    is_object: Tensor,
    is_crowd: Tensor,
    borders: Tensor | None,
    *,
    forced_from: float,
    ignore_ioa: float,
) -> Overlaps:
    """Overlaps from all pairs, some boxes at a time.

    Args:
        anchors: [R, 4] xyxy px, each with an extent.
        gt_boxes: [B, G, 4] xyxy px, G >= 1. is_object, is_crowd: bool [B, G].
        borders: [B, 2] height and width px, if only anchors within them are usable.
        forced_from: an object forces its best anchors if their IoU is above 0 and at least this.
        ignore_ioa: share of its area in a crowd box from which on an anchor is in a crowd.
    """
    usable = _usable(anchors, borders, len(gt_boxes))
    images = zip(gt_boxes, is_object, is_crowd, usable, strict=True)
    overlaps = [_dense_image(anchors, *image, forced_from, ignore_ioa) for image in images]
    best_iou, matches, forced, in_crowd = map(torch.stack, zip(*overlaps, strict=True))
    return Overlaps(best_iou, matches, forced, in_crowd, usable)


def window_overlaps(
    grid: AnchorGrid,
    canvas: tuple[int, int],
    gt_boxes: Tensor,
    is_object: Tensor,
    is_crowd: Tensor,
    borders: Tensor | None,
    *,
    exact_from: float,
    forced_from: float,
    ignore_ioa: float,
) -> Overlaps:
    """Overlaps from the pairs in windows, on the CPU.

    Args:
        grid, canvas: of `grid_anchors`, whose anchors these are. The rest as of `dense_overlaps`.
        exact_from: IoU in [0, 1] below which a best IoU may be given too low, and the match of an
            anchor is any row unless it is forced.
    """
    anchors, shapes = grid_anchors(grid, canvas, gt_boxes.device), grid_shapes(grid, canvas)
    usable = _usable(anchors, borders, len(gt_boxes))  # [B, R]
    best_iou = torch.where(is_object.any(1), 0.0, -1.0)[:, None].repeat(1, len(anchors))
    first = is_object.int().argmax(1)  # the match where the IoU is 0
    ranks = _ranks(torch.zeros(len(first)), first)[:, None].repeat(1, len(anchors))
    image, row = is_object.nonzero().unbind(1)  # [N] objects of the batch
    objects = gt_boxes[image, row]
    nearest = nearest_anchors(objects, shapes, None if borders is None else borders[image])
    iou = plain_iou(objects[:, None], anchors[nearest]) * usable[image[:, None], nearest]  # [N, M]
    # some anchor has this IoU, so the best of an object are among those with no less
    least_iou = iou.amax(1).clamp(forced_from, exact_from).double()[:, None]
    areas = least_iou / (1 + least_iou) * (area(objects)[:, None] + shapes.areas())
    forced = [row[:0]]
    for box, at in window_pairs(objects, (1 - _SLACK) * areas, shapes):
        iou = plain_iou(objects.index_select(0, box), anchors.index_select(0, at))  # [P]
        at += image[box] * len(anchors)  # from here on an index into [B, R]
        iou *= usable.view(-1)[at]
        best_iou.view(-1).scatter_reduce_(0, at, iou, "amax")
        ranks.view(-1).scatter_reduce_(0, at, _ranks(iou, row[box]), "amax")
        of_object = torch.zeros(len(objects)).scatter_reduce_(0, box, iou, "amax")
        of_object[(of_object == 0) | (of_object < forced_from)] = torch.inf
        forced.append(at[iou == of_object[box]])
    at = torch.cat(forced)
    is_forced = torch.zeros_like(usable)
    is_forced.view(-1)[at] = True
    weak = at[best_iou.view(-1)[at] < exact_from]
    _rank_all(anchors, gt_boxes, is_object, weak, ranks)
    in_crowd = _in_crowds(anchors, shapes, gt_boxes, is_crowd, ignore_ioa)
    matches = ranks.bitwise_not_().bitwise_and_(_MASK32)
    return Overlaps(best_iou, matches, is_forced, in_crowd, usable)


def _rank_all(
    anchors: Tensor, gt_boxes: Tensor, is_object: Tensor, chosen: Tensor, ranks: Tensor
) -> None:
    """Raise the ranks [B, R] of some anchors by all objects that overlap them."""
    images = chosen // len(anchors)
    for image in images.unique().tolist():
        rows = is_object[image].nonzero()[:, 0]
        x1, y1, x2, y2 = gt_boxes[image, rows, None].unbind(-1)  # [N, 1]
        in_image = chosen[images == image] - image * len(anchors)
        for at in in_image.split(max(1, BLOCK_PAIRS // len(rows))):
            left, top, right, bottom = anchors[at].unbind(-1)  # [F]
            near = (x1 < right) & (left < x2) & (y1 < bottom) & (top < y2)  # [N, F]
            box, of_at = near.nonzero().unbind(1)
            row, at = rows[box], at[of_at]
            iou = plain_iou(gt_boxes[image, row], anchors[at])
            ranks[image].scatter_reduce_(0, at, _ranks(iou, row), "amax")


def _in_crowds(
    anchors: Tensor,
    shapes: Shapes,
    gt_boxes: Tensor,
    is_crowd: Tensor,
    ignore_ioa: float,
) -> Tensor:
    """Bool [B, R]: anchors of which a share of ignore_ioa or more lies in a crowd box."""
    in_crowd = torch.zeros(len(gt_boxes), len(anchors), dtype=torch.bool)
    image, row = is_crowd.nonzero().unbind(1)
    crowds = gt_boxes[image, row]
    areas = ((1 - _SLACK) * ignore_ioa * shapes.areas()).expand(len(crowds), -1)
    for box, at in window_pairs(crowds, areas, shapes):
        share = shared_area(crowds[box], anchors[at]) / area(anchors[at])
        at += image[box] * len(anchors)
        in_crowd.view(-1)[at[share >= ignore_ioa]] = True
    return in_crowd


def _dense_image(
    anchors: Tensor,
    gt_boxes: Tensor,
    is_object: Tensor,
    is_crowd: Tensor,
    usable: Tensor,
    forced_from: float,
    ignore_ioa: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    best_iou = torch.full_like(anchors[:, 0], -1.0)
    matches = torch.zeros_like(best_iou, dtype=torch.int64)
    forced, in_crowd = torch.zeros_like(usable), torch.zeros_like(usable)
    chunk = max(1, DENSE_PAIRS // len(anchors))
    for first in range(0, len(gt_boxes), chunk):
        part = slice(first, first + chunk)
        boxes = gt_boxes[part, None]  # [C, 1, 4]
        counts = is_object[part, None] & usable  # [C, R]
        iou = plain_iou(boxes, anchors).masked_fill_(~counts, -1.0)
        highest, index = iou.max(dim=0)
        better = highest > best_iou  # not where equal: the first object of several
        best_iou = torch.where(better, highest, best_iou)
        matches = torch.where(better, first + index, matches)
        of_object = iou.amax(dim=1, keepdim=True)  # [C, 1]
        forced |= ((iou == of_object) & (of_object > 0) & (of_object >= forced_from)).any(dim=0)
        share = shared_area(boxes, anchors).div_(area(anchors))  # [C, R]
        in_crowd |= ((share >= ignore_ioa) & is_crowd[part, None]).any(dim=0)
    return best_iou, matches, forced, in_crowd


def _usable(anchors: Tensor, borders: Tensor | None, batch: int) -> Tensor:
    """Bool [B, R]: anchors that do not cross the border."""
    x1, y1, x2, y2 = anchors.unbind(-1)
    if borders is None:
        return torch.ones(batch, len(anchors), dtype=torch.bool, device=anchors.device)
    height, width = borders[:, None].unbind(-1)  # [B, 1]
    return (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)


def _ranks(iou: Tensor, row: Tensor) -> Tensor:
    """int64 numbers in the order of IoUs >= 0, and of equal IoUs that of the first row highest.

    The bits of such float32 numbers are in the same order. The highest holds the row of the match.
    """
    return (iou.view(torch.int32).long() << 32) | (row ^ _MASK32)
