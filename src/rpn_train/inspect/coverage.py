"""Which objects a set of anchors can reach, known before anything is trained.

All anchors of one shape stand at multiples of a stride, and are symmetric about their place. What
such an anchor shares with a box rises and falls along each axis on its own, so of all places the
nearest shares most: one IoU for each object and shape says what all anchors of an image would.

That IoU is computed as `targets.assign` computes it. With anchors in whole pixels the best one is
the same bit for bit, since every rounding keeps the order; with others the rounding of float32
differs from place to place, and the best one may be missed by that much.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from rpn_train.anchors import AnchorGrid, cell_anchors
from rpn_train.boxes import clip
from rpn_train.data.index import Index
from rpn_train.data.sampler import canvas_of
from rpn_train.data.transforms import fit_size
from rpn_train.recall import SIZES
from rpn_train.targets import POSITIVE, AssignmentRule, assign

# Bounds of the groups: sqrt(width x height) px after resizing, and height / width.
SIDES = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
RATIOS = (1 / 3, 2 / 3, 3 / 2, 3.0)
CHUNK = 1 << 16  # objects compared at once: bounds memory, and stays in the cache


class Objects(NamedTuple):
    """The M objects of N images as training sees them: resized, without crowd and difficult boxes.

    boxes: float32 [M, 4] xyxy px. areas: float64 [M] px^2, of the annotation, before resizing.
    image: int64 [M], ascending rows of the images. sizes: int64 [N, 2] (height, width) px.
    canvases: int64 [N, 2], each image padded on its own, as in evaluation. A batch of training is
    padded to its largest image, which only adds anchors beyond these.
    """

    boxes: Tensor
    areas: Tensor
    image: Tensor
    sizes: Tensor
    canvases: Tensor

    def width_height(self) -> tuple[Tensor, Tensor]:
        """float32 [M] px each."""
        x1, y1, x2, y2 = self.boxes.unbind(1)
        return x2 - x1, y2 - y1

    def sides(self) -> Tensor:
        """float32 [M] px: side of the square of the same area."""
        width, height = self.width_height()
        return (width * height).sqrt()


@dataclass(frozen=True, eq=False)
class Coverage:
    """The best anchor of each of M objects.

    best_iou: float32 [M]. best_shape: int64 [M], level * A + anchor of the cell, the first of
    several; -1 where no anchor overlaps the object. per_cell: A.
    """

    best_iou: Tensor
    best_shape: Tensor
    per_cell: int


@dataclass(frozen=True)
class Reach:
    """How well some objects can be reached; shares are NaN where there is no object.

    mean_iou: mean of the best IoUs, which is the best possible recall averaged over all IoU
    thresholds from 0 to 1 (Uijlings et al. 2013, section 5, "average best overlap").
    recall_iou50, recall_iou70: best possible recall of proposals that are the anchors themselves.
    reached: share whose best IoU is at least fg_iou. forced: share that has not, and is trained
    only because its best anchors are positive in any case. The rest is not trained at all.
    """

    num_objects: int
    mean_iou: float
    recall_iou50: float
    recall_iou70: float
    reached: float
    forced: float


class Positives(NamedTuple):
    """Positive anchors in some images.

    images: int64 [I]. per_image: int64 [I]. objects: int64 [K], rows of the objects in these
    images. per_object: int64 [K]; 0 where another object has a higher IoU with every positive.
    """

    images: Tensor
    per_image: Tensor
    objects: Tensor
    per_object: Tensor


class ShapeUse(NamedTuple):
    """One shape of one level (stride and size in px, ratio = height / width), and its use.

    best_for: number of objects whose best anchor has it.
    """

    stride: int
    size: float
    ratio: float
    best_for: int


def resized_objects(index: Index, *, short_side: int, max_side: int, divisor: int) -> Objects:
    """The objects of a split, resized as for training without change of scale."""
    sizes = [fit_size((h, w), short_side, max_side) for h, w in index.sizes.tolist()]
    canvases = [canvas_of([size], divisor) for size in sizes]
    resized = torch.tensor(sizes)
    factors = (resized.double() / torch.tensor(index.sizes)).float().flip(1).repeat(1, 2)
    counted = ~index.ignore
    images = np.repeat(np.arange(len(index)), np.diff(index.box_offsets))
    image = torch.from_numpy(images[counted])
    corners = torch.from_numpy(index.boxes_xywh[counted])
    corners[:, 2:] += corners[:, :2]  # rounded to float32 after the sum, as by the index
    boxes = clip(corners.float() * factors[image], resized[image])
    areas = torch.from_numpy(index.areas[counted])
    return Objects(boxes, areas, image, resized, torch.tensor(canvases))


def object_coverage(objects: Objects, grid: AnchorGrid, *, border: str) -> Coverage:
    """The best IoU of each object with all anchors of its image, and the shape that has it.

    Args:
        border: "use" or "ignore", as of `targets.assign`.
    """
    best_iou = torch.empty(len(objects.boxes))
    best_shape = torch.empty(len(objects.boxes), dtype=torch.int64)
    for rows in torch.arange(len(objects.boxes)).split(CHUNK):
        part = objects._replace(boxes=objects.boxes[rows], image=objects.image[rows])
        ious = [level_ious(part, grid, level, border=border) for level in range(len(grid.strides))]
        best_iou[rows], best_shape[rows] = torch.cat(ious).max(0)
    best_shape[best_iou == 0] = -1
    return Coverage(best_iou, best_shape, grid.per_cell)


def level_ious(objects: Objects, grid: AnchorGrid, level: int, *, border: str) -> Tensor:
    """Best IoU of each object with the anchors of each shape of a level: float32 [A, M]."""
    stride = grid.strides[level]
    x1, y1, x2, y2 = objects.boxes.t().contiguous()
    left, top, right, bottom = cell_anchors(grid.sizes[level], grid.ratios, grid.rounded).t()
    height, width = objects.sizes[objects.image].t()
    rows, columns = (objects.canvases[objects.image] // stride).t()
    shared_x, anchor_width = _nearest(
        x1, x2, left, right, columns, stride, width if border == "ignore" else None
    )
    shared_y, anchor_height = _nearest(
        y1, y2, top, bottom, rows, stride, height if border == "ignore" else None
    )
    shared = shared_x.mul_(shared_y)
    areas = (x2 - x1) * (y2 - y1) + anchor_width.mul_(anchor_height)
    return shared / areas.sub_(shared)


def _nearest(
    box_low: Tensor,
    box_high: Tensor,
    low: Tensor,
    high: Tensor,
    cells: Tensor,
    stride: int,
    border: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Along one axis: what the nearest anchors share with each box, and their extent, [A, M] px.

    Args:
        box_low, box_high: float32 [M]. low, high: float32 [A], edges of the shapes around 0.
        cells: int64 [M], number of places. border: [M] px; anchors that cross it share nothing.
    """
    low, high = low[:, None], high[:, None]
    # as float64 the sum of the edges is exact, and so is the choice
    cell = ((box_low.double() + box_high) / (2 * stride)).round().clamp(min=0)
    cell = torch.minimum(cell, cells - 1.0)  # [M]
    if border is not None:
        cell = torch.maximum(cell, (-low / stride).ceil())  # [A, M]
        cell = torch.minimum(cell, ((border - high.double()) / stride).floor())
    center = (cell * stride).float()
    start, end = center + low, center + high  # [A, M]
    shared = torch.minimum(end, box_high).sub_(torch.maximum(start, box_low)).clamp_(min=0)
    shared.mul_(cells > 0)
    if border is not None:
        shared.mul_((start >= 0) & (end <= border))
    return shared, end.sub_(start)


def reach(best_iou: Tensor, *, fg_iou: float, force_best: bool, forced_min_iou: float) -> Reach:
    """Figures of the objects whose best IoUs are given, float32 [M]; the rest as of `assign`."""
    reached = best_iou >= fg_iou
    forced = (best_iou > 0) & (best_iou >= forced_min_iou) & ~reached & force_best

    def mean(values: Tensor) -> float:
        return values.double().mean().item()

    return Reach(
        num_objects=len(best_iou),
        mean_iou=mean(best_iou),
        recall_iou50=mean(best_iou >= 0.5),
        recall_iou70=mean(best_iou >= 0.7),
        reached=mean(reached),
        forced=mean(forced),
    )


def object_groups(objects: Objects) -> dict[str, dict[str, Tensor]]:
    """Kind of group -> name -> which objects are in it, bool [M].

    "area" has the sizes of `recall` (an area on a border counts in both); "side" and "ratio", of
    the resized boxes, have the bounds SIDES and RATIOS, each the first of the group above it.
    """
    width, height = objects.width_height()
    return {
        "area": {
            name: (objects.areas >= low) & (objects.areas <= high)
            for name, (low, high) in SIZES.items()
        },
        "side": _bins(objects.sides(), SIDES, [f"{bound:g} px" for bound in SIDES]),
        "ratio": _bins(height / width, RATIOS, ["1:3", "2:3", "3:2", "3:1"]),
    }


def _bins(values: Tensor, bounds: tuple[float, ...], names: list[str]) -> dict[str, Tensor]:
    between = [f"{low} - {high}" for low, high in pairwise(names)]
    bins = torch.bucketize(values, torch.tensor(bounds), right=True)
    labels = [f"under {names[0]}", *between, f"from {names[-1]}"]
    return {label: bins == i for i, label in enumerate(labels)}


def shape_use(coverage: Coverage, grid: AnchorGrid) -> list[ShapeUse]:
    """All shapes of all levels, in the order of the anchors."""
    shapes = [
        (stride, size, ratio)
        for sizes, stride in zip(grid.sizes, grid.strides, strict=True)
        for ratio in grid.ratios
        for size in sizes
    ]
    best = coverage.best_shape[coverage.best_shape >= 0]
    counts = best.bincount(minlength=len(shapes)).tolist()
    return [ShapeUse(*shape, count) for shape, count in zip(shapes, counts, strict=True)]


def count_positives(
    objects: Objects, grid: AnchorGrid, *, num_images: int, **rule: Unpack[AssignmentRule]
) -> Positives:
    """Positive anchors in images evenly spaced over the split, by the assignment of training."""
    total = len(objects.sizes)
    images = torch.arange(min(num_images, total)) * total // min(num_images, total)
    starts = torch.searchsorted(objects.image, images)
    ends = torch.searchsorted(objects.image, images, right=True)
    per_object = [torch.zeros(0, dtype=torch.int64)]
    for image, start, end in zip(images.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if start == end:
            continue
        boxes = objects.boxes[None, start:end]
        valid = torch.ones(1, end - start, dtype=torch.bool)
        height, width = objects.canvases[image].tolist()
        labels, matches = assign(
            grid, (height, width), boxes, valid, ~valid, objects.sizes[image, None], **rule
        )
        per_object.append(matches[labels == POSITIVE].bincount(minlength=end - start))
    counts = torch.cat(per_object)
    rows = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    per_image = torch.zeros(total, dtype=torch.int64).index_add_(0, objects.image[rows], counts)
    return Positives(images, per_image[images], rows, counts)
