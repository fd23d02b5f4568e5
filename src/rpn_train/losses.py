"""The two losses of an RPN (Ren et al. 2015, eq. 1) over sampled anchors.

Both are sums divided by a fixed number (slots x images of the whole batch), not by a count that
differs between processes or pieces of a batch: so N processes compute what one would, and an image
without objects gives 0, not NaN. With all slots filled this equals torchvision's mean; lambda = 10
of the paper goes with the paper's other normaliser, and is 1 here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rpn_train.boxes import (
    complete_iou,
    decode,
    encode,
    generalized_iou,
    plain_iou,
)
from rpn_train.objectness_losses import OBJECTNESS_LOSSES
from rpn_train.targets import Picks


class Losses(NamedTuple):
    """Scalars, float32, already weighted: the loss is their sum."""

    objectness: Tensor
    box: Tensor


def objectness_loss(
    logits: Tensor, picks: Picks, quality: Tensor | None = None, *, kind: str = "bce"
) -> Tensor:
    """Sum over valid slots of the objectness loss: logits [B, S] -> scalar.

    Args:
        quality: [B, S] what the objectness of a positive aims at; None: 1.
        kind: of OBJECTNESS_LOSSES, but not a focal one.
    """
    positive = picks.positive
    targets = positive.float() if quality is None else torch.where(positive, quality, 0.0)
    return (OBJECTNESS_LOSSES[kind](logits.float(), targets) * picks.valid).sum()


# Kinds of box loss that are 1 less a similarity of the decoded box and its object.
SIMILARITIES = {"iou": plain_iou, "giou": generalized_iou, "ciou": complete_iou}


def box_errors(
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    positive: Tensor,
    *,
    kind: str,
    beta: float,
    stds: Sequence[float],
) -> Tensor:
    """Regression loss of each anchor: float32 [...], 0 where it is not positive.

    Args:
        deltas: predictions [..., 4]. anchors, gt_boxes: [..., 4] xyxy px, of each prediction;
            gt_boxes and deltas may hold anything where positive [...] is false.
        kind: "smooth_l1" (Girshick 2015, with `beta` where the square ends) or "l1", summed over
            the four deltas; "iou" (1 - IoU), "giou" (Rezatofighi et al. 2019) or "ciou" (Zheng et
            al. 2020) of the decoded boxes.
        stds: of "smooth_l1" and "l1" the divisors of the four differences (the targets' standard
            deviations: small ones make the same difference cost more).
    """
    # what has no object predicts its own anchor and aims at it: finite values and gradients
    deltas = torch.where(positive[..., None], deltas.float(), 0.0)
    target_boxes = torch.where(positive[..., None], gt_boxes, anchors)
    if kind in SIMILARITIES:
        each = 1 - SIMILARITIES[kind](decode(deltas, anchors), target_boxes)
    else:
        differences = (deltas - encode(target_boxes, anchors)).unbind(-1)
        # by numbers: a tensor of them would have to be copied to the GPU, which waits
        scaled = torch.stack([d / std for d, std in zip(differences, stds, strict=True)], dim=-1)
        beta = beta if kind == "smooth_l1" else 0.0
        each = F.smooth_l1_loss(scaled, torch.zeros_like(scaled), beta=beta, reduction="none").sum(
            -1
        )
    return torch.where(positive, each, 0.0)


def rpn_losses(
    logits: Tensor,
    deltas: Tensor,
    picks: Picks,
    anchors: Tensor,
    gt_boxes: Tensor,
    quality: Tensor | None = None,
    *,
    objectness_kind: str = "bce",
    box_kind: str,
    beta: float,
    stds: Sequence[float],
    box_weight: float,
    normalizer: float,
) -> Losses:
    """Losses of a batch from the outputs at the sampled anchors.

    Args:
        logits, deltas: [B, S] and [B, S, 4], at `picks.at`.
        anchors, gt_boxes: [B, S, 4] xyxy px, of each slot; gt_boxes may hold anything where it is
            not positive. quality, objectness_kind: of `objectness_loss`.
        box_kind, beta, stds: of `box_errors`.
        normalizer: slots per image x images of the whole batch, over all processes.
    """
    errors = box_errors(
        deltas, anchors, gt_boxes, picks.positive, kind=box_kind, beta=beta, stds=stds
    )
    box = errors.sum() * box_weight
    objectness = objectness_loss(logits, picks, quality, kind=objectness_kind)
    return Losses(objectness / normalizer, box / normalizer)
