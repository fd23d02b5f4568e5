"""What the network is asked of a batch, and how its answers are judged: the losses, by method."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import generalized_iou, take_boxes
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.dense_losses import dense_losses
from rpn_train.heads import Outputs
from rpn_train.losses import Losses, rpn_losses
from rpn_train.method_targets import (
    center_region_targets,
    dense_targets,
    method_at,
    quality_targets,
    sampled_targets,
)
from rpn_train.model import autocast, normalize_images
from rpn_train.targets import IGNORED, POSITIVE, Assignment, Picks

# Sums over anchors are divided by this before the number of positives of the step is known: it is
# about that of an image, so that gradients in half precision stay in its range.
POSITIVES_PER_IMAGE = 16
# The sum over a first stage's positives is divided by this share of all anchors.
FIRST_STAGE_SHARE = 1 / 200


class BatchLosses(NamedTuple):
    """Scalars, float32, already weighted: the loss is the sum of the first two.

    objectness: of all that ranks proposals, centerness too. divisor: where it is not None the loss
    is yet to be divided by this, summed over the processes and pieces of a step, and multiplied by
    `positives_expected`: so N processes compute what one would.
    """

    objectness: Tensor
    box: Tensor
    divisor: Tensor | None


def positives_expected(cfg: TrainConfig) -> int:
    """What sums over a batch were divided by, in place of its divisor."""
    return POSITIVES_PER_IMAGE * cfg.schedule.batch_size


def batch_losses(
    network: nn.Module, grid: AnchorGrid, batch: Batch, cfg: TrainConfig, progress: float
) -> tuple[BatchLosses, Picks]:
    """Losses of a batch and the anchors they were read at. Waits for nothing.

    Args:
        progress: share of the run that is done, 0..1.
    """
    anchors = grid_anchors(grid, batch.canvas, batch.images.device)
    if cfg.method.head == "cascade":
        return _losses_of_two_stages(network, grid, anchors, batch, cfg)
    if cfg.method.sampling == "all":
        return _losses_of_all(network, grid, anchors, batch, cfg, progress)
    # the classic: which anchors are read follows from boxes and anchors, so it comes first
    assignment, picks = sampled_targets(grid, batch, cfg.method)
    outputs = _ask(network, batch, cfg, picks.at)
    losses = _losses_of_sample(outputs, anchors, batch, assignment, picks, cfg)
    return BatchLosses(*losses, None), picks


def _losses_of_sample(
    outputs: Outputs,
    anchors: Tensor,
    batch: Batch,
    assignment: Assignment,
    picks: Picks,
    cfg: TrainConfig,
) -> Losses:
    """Losses of the outputs at `picks`.

    The normaliser is that of the whole batch over all processes and pieces, so the losses of all
    add up to the loss of the step.

    Args:
        anchors: [R, 4] or [B, R, 4], to which deltas refer.
    """
    method = cfg.method
    anchors = take_boxes(anchors, picks.at)  # [B, S, 4]
    gt = take_boxes(batch.gt_boxes, assignment.matches.gather(1, picks.at))
    return rpn_losses(
        outputs.logits,
        outputs.deltas,
        picks,
        anchors,
        gt,
        quality_targets(outputs.deltas, anchors, gt, method),
        objectness_kind=method.objectness_loss,
        box_kind=method.box_loss,
        beta=method.smooth_l1_beta,
        stds=method.delta_stds,
        box_weight=method.box_weight,
        normalizer=method.num_samples * cfg.schedule.batch_size,
    )


def _losses_of_two_stages(
    network: nn.Module, grid: AnchorGrid, anchors: Tensor, batch: Batch, cfg: TrainConfig
) -> tuple[BatchLosses, Picks]:
    """Cascade RPN (Vu et al. 2019): the classic, on anchors that a first stage has moved.

    That stage learns by the generalized IoU of the moved anchors of the centre region: where boxes
    have come apart, the plain one of the authors has no gradient that would bring them back. Its
    sum is divided by a share of all anchors, as in their code: processes and pieces agree on that.
    """
    method = cfg.method
    outputs = _ask(network, batch, cfg, None)
    assert outputs.anchors is not None
    first = center_region_targets(grid, anchors, batch, method)
    positive = first.labels == POSITIVE
    gt = take_boxes(batch.gt_boxes, first.matches)
    # what has no object meets itself: finite values and gradients
    error = 1 - generalized_iou(
        torch.where(positive[..., None], outputs.anchors, anchors),
        torch.where(positive[..., None], gt, anchors),
    )
    normalizer = FIRST_STAGE_SHARE * len(anchors) * cfg.schedule.batch_size
    moving = method.box_weight * torch.where(positive, error, 0.0).sum() / normalizer
    moved = outputs.starting_from(anchors)
    second, picks = sampled_targets(grid, batch, method, moved)
    at_picks = Outputs(outputs.logits.gather(1, picks.at), take_boxes(outputs.deltas, picks.at))
    objectness, box = _losses_of_sample(at_picks, moved, batch, second, picks, cfg)
    return BatchLosses(objectness, box + moving, None), picks


def _losses_of_all(
    network: nn.Module,
    grid: AnchorGrid,
    anchors: Tensor,
    batch: Batch,
    cfg: TrainConfig,
    progress: float,
) -> tuple[BatchLosses, Picks]:
    """Every anchor is read; which are positive may follow from what the network says of them."""
    method = method_at(cfg.method, progress)
    begins_as_atss = method is not cfg.method  # though it has no branch for centerness
    outputs = _ask(network, batch, cfg, None)
    targets = dense_targets(grid, batch, outputs, method)
    sums = dense_losses(
        outputs.logits,
        outputs.deltas,
        outputs.centerness,
        anchors,
        batch.gt_boxes,
        *targets,
        objectness_kind=method.objectness_loss,
        by_centerness=method.centerness or begins_as_atss,
        box_kind=method.box_loss,
        beta=method.smooth_l1_beta,
        box_weight=method.box_weight,
        delta_stds=method.delta_stds,
        focal_alpha=method.focal_alpha,
        focal_gamma=method.focal_gamma,
    )
    positive, read = targets.labels == POSITIVE, targets.labels != IGNORED
    at = torch.arange(len(anchors), device=positive.device).expand_as(positive)
    expected = positives_expected(cfg)
    losses = BatchLosses(
        (sums.objectness + sums.centerness) / expected, sums.box / expected, sums.divisor
    )
    return losses, Picks(at, positive, read)


def _ask(network: nn.Module, batch: Batch, cfg: TrainConfig, at: Tensor | None) -> Outputs:
    images = normalize_images(batch.images, batch.sizes)
    with autocast(cfg.precision, images.device):
        return network(images, at=at)
