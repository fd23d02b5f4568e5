"""Which anchors are positive, background or ignored, and which of them the loss reads.

Both follow from boxes and anchors alone, not from predictions, so they come before the network.
Everything works with fixed shapes and masks: nothing here waits for a GPU.
"""

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from torchvision.ops import box_iou

from rpn_train.boxes import intersection_over_anchor

POSITIVE, BACKGROUND, IGNORED = 1, 0, -1

_MASK32 = 0xFFFFFFFF


class Assignment(NamedTuple):
    """labels int8 [B, R]: POSITIVE, BACKGROUND, IGNORED; matches int64 [B, R]: rows of gt_boxes."""

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


def assign_image(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_ignore: Tensor,
    size: Tensor,
    *,
    fg_iou: float,
    bg_iou: float,
    force_best: bool,
    forced_min_iou: float,
    ignore_ioa: float,
    border: str,
) -> tuple[Tensor, Tensor]:
    """Labels and matches of the anchors of one image (Ren et al. 2015, section 3.1.2).

    Positive: IoU >= fg_iou with an object, or the highest IoU of all anchors with some object,
    ties included (`force_best`). Background: IoU < bg_iou with every object. Ignored: the rest,
    anchors of which `ignore_ioa` of the area lies in an ignore box (unless positive), and with
    border="ignore" those that cross the image border.

    A forced positive keeps the object it overlaps most, as in torchvision and Detectron2. Unlike
    there an object that no anchor overlaps forces nothing (they make every anchor of IoU 0
    positive then; pinned in `test_parity.py`).

    Args:
        anchors: [R, 4] xyxy px.
        gt_boxes: [G, 4] xyxy px, padded to G >= 1 rows.
        gt_valid: bool [G], false for padding.
        gt_ignore: bool [G], true for crowd and difficult boxes.
        size: [2] height and width of the image without padding, px.

    Returns:
        labels int8 [R] and matches int64 [R], the row of the object of highest IoU.
    """
    is_object = gt_valid & ~gt_ignore
    iou = box_iou(gt_boxes, anchors)  # [G, R]
    usable = torch.ones_like(anchors[:, 0], dtype=torch.bool)
    if border == "ignore":
        height, width = size.unbind()
        usable = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
    iou = iou.masked_fill(~(is_object[:, None] & usable), -1.0)
    best_iou, matches = iou.max(dim=0)  # [R]
    labels = torch.full_like(matches, IGNORED, dtype=torch.int8)
    labels[best_iou < bg_iou] = BACKGROUND
    in_crowd = intersection_over_anchor(anchors, gt_boxes) >= ignore_ioa  # [G, R]
    labels[(in_crowd & (gt_valid & gt_ignore)[:, None]).any(dim=0)] = IGNORED
    labels[best_iou >= fg_iou] = POSITIVE
    if force_best:
        best_of_object = iou.amax(dim=1, keepdim=True)  # [G, 1]
        reachable = (best_of_object > 0) & (best_of_object >= forced_min_iou)
        labels[((iou == best_of_object) & reachable).any(dim=0)] = POSITIVE
    labels[~usable] = IGNORED
    return labels, matches


class AssignmentRule(TypedDict):
    """The keywords of `assign_image`, as the batch version passes them on."""

    fg_iou: float
    bg_iou: float
    force_best: bool
    forced_min_iou: float
    ignore_ioa: float
    border: str


def assign(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_ignore: Tensor,
    sizes: Tensor,
    **rule: Unpack[AssignmentRule],
) -> Assignment:
    """`assign_image` for a batch: gt_boxes [B, G, 4], gt_valid, gt_ignore [B, G], sizes [B, 2]."""
    images = zip(gt_boxes, gt_valid, gt_ignore, sizes, strict=True)
    labels, matches = zip(*(assign_image(anchors, *image, **rule) for image in images), strict=True)
    return Assignment(torch.stack(labels), torch.stack(matches))


def random_keys(seeds: Tensor, num_anchors: int) -> Tensor:
    """Distinct random keys int64 [B, R] in [0, 2^32), a pure function of each image's seed.

    A counter-based hash instead of a generator: the same on every device and for every split of
    the batch over processes, with no state that a resumed run would have to restore.

    Args:
        seeds: int64 [B] in [0, 2^62), one of each image and step.
    """
    index = torch.arange(num_anchors, device=seeds.device)
    low, high = seeds[:, None] & _MASK32, seeds[:, None] >> 32
    # each operation permutes the 32-bit integers, so the keys of an image are as distinct as index
    return _hash32(_hash32(_hash32(index) ^ low) ^ high)  # [B, R]


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
    is_positive, is_background = labels == POSITIVE, labels == BACKGROUND
    positives = keys.masked_fill(~is_positive, -1).topk(most_positives).indices  # [B, P]
    background = keys.masked_fill(~is_background, -1).topk(slots).indices  # [B, S]
    num_positive = is_positive.sum(1, keepdim=True).clamp(max=most_positives)  # [B, 1]
    num_background = is_background.sum(1, keepdim=True)
    slot = torch.arange(slots, device=labels.device).expand_as(background)
    positive = slot < num_positive
    both = torch.cat([positives, background], dim=1)
    at = both.gather(1, torch.where(positive, slot, most_positives + slot - num_positive))
    return Picks(at, positive, slot < num_positive + num_background)


def _hash32(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers that mixes every bit ("lowbias32", C. Wellons 2018)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
