"""The two losses of an RPN (Ren et al. 2015, eq. 1) over sampled anchors.

Both are sums divided by a fixed number (slots x images of the whole batch), not by a count that
differs between processes or pieces of a batch: so N processes compute what one would, and an image
without objects gives 0, not NaN. With all slots filled this equals torchvision's mean; lambda = 10
of the paper goes with the paper's other normaliser, and is 1 here.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rpn_train.boxes import decode, encode, generalized_iou
from rpn_train.targets import Picks


class Losses(NamedTuple):
    """Scalars, float32, already weighted: the loss is their sum."""

    objectness: Tensor
    box: Tensor


def objectness_loss(logits: Tensor, picks: Picks) -> Tensor:
    """Sum over valid slots of binary cross entropy: logits [B, S] -> scalar."""
    each = F.binary_cross_entropy_with_logits(
        logits.float(), picks.positive.float(), reduction="none"
    )
    return (each * picks.valid).sum()


def box_loss(
    deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, positive: Tensor, *, kind: str, beta: float
) -> Tensor:
    """Sum over positive slots of the regression loss: a scalar.

    Args:
        deltas: predictions [B, S, 4]. anchors, gt_boxes: [B, S, 4] xyxy px, of each slot; gt_boxes
            may hold anything where positive [B, S] is false.
        kind: "smooth_l1" (Girshick 2015, with `beta` where the square ends), "l1", or "giou"
            (Rezatofighi et al. 2019, on decoded boxes).
    """
    deltas = deltas.float()
    # a slot without object aims at its own anchor: finite values, whose loss is masked below
    target_boxes = torch.where(positive[..., None], gt_boxes, anchors)
    if kind == "giou":
        each = 1 - generalized_iou(decode(deltas, anchors), target_boxes)
    else:
        targets = encode(target_boxes, anchors)
        beta = beta if kind == "smooth_l1" else 0.0
        each = F.smooth_l1_loss(deltas, targets, beta=beta, reduction="none").sum(-1)
    return torch.where(positive, each, 0.0).sum()


def rpn_losses(
    logits: Tensor,
    deltas: Tensor,
    picks: Picks,
    anchors: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    *,
    box_kind: str,
    beta: float,
    box_weight: float,
    normalizer: float,
) -> Losses:
    """Losses of a batch from the outputs at the sampled anchors.

    Args:
        logits, deltas: [B, S] and [B, S, 4], at `picks.at`.
        anchors: [R, 4]. gt_boxes: [B, G, 4]. matches: int64 [B, R], rows of gt_boxes.
        normalizer: slots per image x images of the whole batch, over all processes.
    """
    matched = matches.gather(1, picks.at)  # [B, S]
    gt = gt_boxes.gather(1, matched[..., None].expand(-1, -1, 4))  # [B, S, 4]
    box = box_loss(deltas, anchors[picks.at], gt, picks.positive, kind=box_kind, beta=beta)
    return Losses(objectness_loss(logits, picks) / normalizer, box * box_weight / normalizer)
