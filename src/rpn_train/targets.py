"""Which anchors are positive, background or ignored, and which of them the loss reads.

Both follow from boxes and anchors alone, not from predictions, so they come before the network.
On a GPU everything works with fixed shapes and masks: nothing here waits for it.
"""

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.overlaps import Overlaps, dense_overlaps, window_overlaps

POSITIVE, BACKGROUND, IGNORED = 1, 0, -1


class AssignmentRule(TypedDict):
    """The keywords of `assign`."""

    fg_iou: float
    bg_iou: float
    force_best: bool
    forced_min_iou: float
    ignore_ioa: float
    border: str


class Assignment(NamedTuple):
    """labels int8 [B, R]: POSITIVE, BACKGROUND, IGNORED; matches int64 [B, R]: rows of gt_boxes.

    A positive's match is the object of highest IoU, the first of several. The match of any other
    anchor is some row, and means nothing.
    """

    labels: Tensor
    matches: Tensor


class Picks(NamedTuple):
    """The sampled anchors, in a fixed number of slots S per image, positives first.

    at: int64 [B, S], indices into the R anchors. positive: bool [B, S]. valid: bool [B, S], false
    for slots that stay empty because an image has too few anchors (their index is arbitrary).
    """

    at: Tensor
    positive: Tensor
    valid: Tensor


def assign(
    grid: AnchorGrid,
    canvas: tuple[int, int],
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_ignore: Tensor,
    sizes: Tensor,
    **rule: Unpack[AssignmentRule],
) -> Assignment:
    """Labels and matches of the anchors of a batch (Ren et al. 2015, section 3.1.2).

    Positive: IoU >= fg_iou with an object, or the highest IoU of all anchors with some object,
    ties included (`force_best`), if it is at least forced_min_iou. Background: IoU < bg_iou with
    every object. Ignored: the rest, anchors of which `ignore_ioa` of the area lies in an ignore
    box (unless positive), and with border="ignore" those that cross the image border.

    A forced positive keeps the object it overlaps most, as in torchvision and Detectron2. Unlike
    there an object that no anchor overlaps forces nothing (they make every anchor of IoU 0
    positive then; pinned in `test_parity.py`).

    Args:
        grid, canvas: of `grid_anchors`, whose anchors these are.
        gt_boxes: float32 [B, G, 4] xyxy px, padded to G >= 1 rows.
        gt_valid: bool [B, G], false for padding.
        gt_ignore: bool [B, G], true for crowd and difficult boxes.
        sizes: int64 [B, 2], height and width of the images without padding, px.
    """
    if gt_boxes.device.type != "cpu":
        anchors = grid_anchors(grid, canvas, gt_boxes.device)
        return assign_dense(anchors, gt_boxes, gt_valid, gt_ignore, sizes, **rule)
    overlaps = window_overlaps(
        grid,
        canvas,
        gt_boxes,
        gt_valid & ~gt_ignore,
        gt_valid & gt_ignore,
        sizes if rule["border"] == "ignore" else None,
        exact_from=min(rule["fg_iou"], rule["bg_iou"]),
        forced_from=rule["forced_min_iou"] if rule["force_best"] else torch.inf,
        ignore_ioa=rule["ignore_ioa"],
    )
    return Assignment(_labels(overlaps, rule), overlaps.matches)


def assign_dense(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_ignore: Tensor,
    sizes: Tensor,
    **rule: Unpack[AssignmentRule],
) -> Assignment:
    """`assign` for any anchors [R, 4] on any device, by comparing all of them with all boxes."""
    overlaps = dense_overlaps(
        anchors,
        gt_boxes,
        gt_valid & ~gt_ignore,
        gt_valid & gt_ignore,
        sizes if rule["border"] == "ignore" else None,
        forced_from=rule["forced_min_iou"] if rule["force_best"] else torch.inf,
        ignore_ioa=rule["ignore_ioa"],
    )
    return Assignment(_labels(overlaps, rule), overlaps.matches)


def _labels(overlaps: Overlaps, rule: AssignmentRule) -> Tensor:
    """Labels int8 [B, R]; by arithmetic, since filling by masks is slow on a CPU."""
    positive = (overlaps.forced | (overlaps.best_iou >= rule["fg_iou"])) & overlaps.usable
    ignored = (
        overlaps.in_crowd | (overlaps.best_iou >= rule["bg_iou"]) | ~overlaps.usable
    ) & ~positive
    return positive.view(torch.int8) - ignored.view(torch.int8)


def random_keys(seeds: Tensor, num_anchors: int) -> Tensor:
    """Distinct random keys int64 [B, R] in [0, 2^32), a pure function of each image's seed.

    A counter-based hash instead of a generator: the same on every device and for every split of
    the batch over processes, with no state that a resumed run would have to restore.

    Args:
        seeds: int64 [B] in [0, 2^62), one of each image and step.
    """
    index = torch.arange(num_anchors, dtype=torch.int32, device=seeds.device)
    low, high = seeds[:, None].int(), (seeds[:, None] >> 32).int()
    # each operation permutes the 32-bit integers, so the keys of an image are as distinct as index
    keys = _hash32_(_hash32_(_hash32_(index) ^ low).bitwise_xor_(high))  # [B, R]
    return keys.long().bitwise_and_(0xFFFFFFFF)


def sample(labels: Tensor, keys: Tensor, *, num_samples: int, fg_fraction: float) -> Picks:
    """Balanced random sample (Ren et al. 2015, section 3.1.3) in S = num_samples slots per image.

    At most fg_fraction * num_samples positives, filled up with background.

    Args:
        labels: int8 [B, R].
        keys: distinct int64 [B, R]; of each kind the anchors of the largest keys are taken.
    """
    num_anchors = labels.shape[1]
    most_positives = min(int(num_samples * fg_fraction), num_anchors)
    slots = min(num_samples, num_anchors)
    positives = torch.where(labels == POSITIVE, keys, -1).topk(most_positives)  # [B, P]
    background = torch.where(labels == BACKGROUND, keys, -1).topk(slots)  # [B, S]
    num_positive = (positives.values >= 0).sum(1, keepdim=True)  # [B, 1]
    num_background = (background.values >= 0).sum(1, keepdim=True)
    slot = torch.arange(slots, device=labels.device).expand_as(background.indices)
    positive = slot < num_positive
    both = torch.cat([positives.indices, background.indices], dim=1)
    at = both.gather(1, torch.where(positive, slot, most_positives + slot - num_positive))
    return Picks(at, positive, slot < num_positive + num_background)


def _hash32_(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers that mixes every bit ("lowbias32", C. Wellons 2018).

    In place, on an int32 tensor, whose products wrap: half the memory of int64, and faster.
    """
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_(0xFFFFFFFF >> shift))  # without copies of the sign
        x.mul_(factor)
    return x
