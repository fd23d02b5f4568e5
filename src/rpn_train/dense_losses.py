"""The losses of methods that read every anchor: RetinaNet's, ATSS's, task-aligned.

All are sums, and come with the number to divide them by: these methods count their positives, over
the images of all processes, which only the caller knows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rpn_train.boxes import take_boxes
from rpn_train.dense_targets import centerness_targets
from rpn_train.losses import box_errors
from rpn_train.objectness_losses import OBJECTNESS_LOSSES
from rpn_train.targets import IGNORED, POSITIVE

# Of the positives of ATSS with anchors of 8 x stride, on 88 images of COCO at 800 px.
MEAN_CENTERNESS = 0.635


class DenseLosses(NamedTuple):
    """Scalars, float32: sums over a batch, already weighted, and the number to divide them by.

    centerness: 0 where the head does not predict it. divisor: the sum of what the objectness of the
    positives aims at, so their number unless that is soft; 0 without positives.
    """

    objectness: Tensor
    box: Tensor
    centerness: Tensor
    divisor: Tensor


def dense_losses(
    logits: Tensor,
    deltas: Tensor,
    centerness_logits: Tensor | None,
    anchors: Tensor,
    gt_boxes: Tensor,
    labels: Tensor,
    matches: Tensor,
    quality: Tensor | None,
    *,
    objectness_kind: str,
    by_centerness: bool,
    box_kind: str,
    beta: float,
    box_weight: float,
    delta_stds: Sequence[float],
    focal_alpha: float,
    focal_gamma: float,
) -> DenseLosses:
    """Losses of a batch from the outputs at all anchors. Ignored anchors add nothing.

    A positive's box loss is weighted by its centerness if that is asked for (Tian et al. 2019,
    Zhang et al. 2020), or else by its `quality` if there is one (Feng et al. 2021, equation 7), or
    else by 1. With centerness the authors divide the boxes by the sum of these weights; here one
    number divides all, and that sum is taken to be `MEAN_CENTERNESS` times it, so that a box counts
    as much as it is central in any batch.

    Args:
        logits, deltas: [B, R] and [B, R, 4]. centerness_logits: [B, R]; None: not predicted.
        anchors: [R, 4]. gt_boxes: [B, G, 4]. labels, matches: [B, R] as of `Assignment`.
        quality: [B, R] what the objectness of a positive aims at; None: 1.
        by_centerness: whether boxes are weighted so, of a head that predicts it or not.
        focal_gamma: 0, or at least 1: between them gradients need not be finite.
        objectness_kind: of OBJECTNESS_LOSSES. box_kind, beta, delta_stds: of `box_errors`.
    """
    positive = labels == POSITIVE
    gt = take_boxes(gt_boxes, matches)  # [B, R, 4]
    targets = positive.float() if quality is None else torch.where(positive, quality, 0.0)
    loss = OBJECTNESS_LOSSES[objectness_kind]
    each = loss(logits.float(), targets, alpha=focal_alpha, gamma=focal_gamma)
    objectness = torch.where(labels != IGNORED, each, 0.0).sum()
    weights, centerness_loss = targets, torch.zeros_like(objectness)
    if by_centerness or centerness_logits is not None:
        centerness = torch.where(positive, centerness_targets(anchors, gt), 0.0)
    if by_centerness:
        weights = centerness / MEAN_CENTERNESS
    if centerness_logits is not None:
        each = F.binary_cross_entropy_with_logits(
            centerness_logits.float(), centerness, reduction="none"
        )
        centerness_loss = torch.where(positive, each, 0.0).sum()
    each = box_errors(deltas, anchors, gt, positive, kind=box_kind, beta=beta, stds=delta_stds)
    box = box_weight * (weights * each).sum()
    return DenseLosses(objectness, box, centerness_loss, targets.sum())
