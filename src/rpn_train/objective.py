"""What the network is asked of a batch, and how its answers are judged: the losses, by method."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import decode
from rpn_train.build import assignment_rule
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.dense_losses import dense_losses
from rpn_train.dense_targets import DenseTargets, atss_assign, iou_quality, task_aligned_assign
from rpn_train.losses import rpn_losses
from rpn_train.method_config import MethodConfig
from rpn_train.model import Outputs, autocast, normalize_images
from rpn_train.targets import IGNORED, POSITIVE, Assignment, Picks, assign, random_keys, sample

# Sums over anchors are divided by this before the number of positives of the step is known: it is
# about that of an image, so that gradients in half precision stay in its range.
POSITIVES_PER_IMAGE = 16


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
    if cfg.method.sampling == "all":
        return _losses_of_all(network, grid, batch, cfg, progress)
    return _losses_of_sample(network, grid, batch, cfg)


def _losses_of_sample(
    network: nn.Module, grid: AnchorGrid, batch: Batch, cfg: TrainConfig
) -> tuple[BatchLosses, Picks]:
    """The classic: which anchors are read follows from boxes and anchors, so it comes first.

    The normaliser is that of the whole batch over all processes and pieces, so the losses of all
    add up to the loss of the step.
    """
    method = cfg.method
    assignment, picks = sampled_targets(grid, batch, method)
    outputs = _ask(network, batch, cfg, picks.at)
    losses = rpn_losses(
        outputs.logits,
        outputs.deltas,
        picks,
        grid_anchors(grid, batch.canvas, batch.images.device),
        batch.gt_boxes,
        assignment.matches,
        box_kind=method.box_loss,
        beta=method.smooth_l1_beta,
        stds=method.delta_stds,
        box_weight=method.box_weight,
        normalizer=method.num_samples * cfg.schedule.batch_size,
    )
    return BatchLosses(*losses, None), picks


def _losses_of_all(
    network: nn.Module, grid: AnchorGrid, batch: Batch, cfg: TrainConfig, progress: float
) -> tuple[BatchLosses, Picks]:
    """Every anchor is read; which are positive may follow from what the network says of them."""
    method = cfg.method
    anchors = grid_anchors(grid, batch.canvas, batch.images.device)
    outputs = _ask(network, batch, cfg, None)
    targets = dense_targets(grid, batch, outputs, method, progress)
    sums = dense_losses(
        outputs.logits,
        outputs.deltas,
        outputs.quality,
        anchors,
        batch.gt_boxes,
        targets.labels,
        targets.matches,
        targets.quality if method.objectness_target == "quality" else None,
        objectness_kind=method.objectness_loss,
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


def sampled_targets(
    grid: AnchorGrid, batch: Batch, method: MethodConfig
) -> tuple[Assignment, Picks]:
    """What every anchor is, and which of them are sampled."""
    assignment = _assign(grid, batch, method)
    picks = sample(
        assignment.labels,
        random_keys(batch.seeds, assignment.labels.shape[1]),
        num_samples=method.num_samples,
        fg_fraction=method.fg_fraction,
    )
    return assignment, picks


@torch.no_grad()
def dense_targets(
    grid: AnchorGrid, batch: Batch, outputs: Outputs, method: MethodConfig, progress: float
) -> DenseTargets:
    """What every anchor learns, by the assignment of the method."""
    anchors = grid_anchors(grid, batch.canvas, batch.images.device)
    if method.assignment == "max_iou":
        assignment = _assign(grid, batch, method)
    elif method.assignment == "atss" or progress < method.aligned_from:
        assignment = atss_assign(
            anchors,
            grid.level_lengths(batch.canvas),
            *_objects(batch),
            candidates=method.atss_candidates,
            ignore_ioa=method.ignore_ioa,
        )
    else:
        return task_aligned_assign(
            outputs.logits.sigmoid(),
            decode(outputs.deltas, anchors),
            anchors,
            *_objects(batch),
            candidates=method.aligned_candidates,
            alpha=method.aligned_alpha,
            beta=method.aligned_beta,
            ignore_ioa=method.ignore_ioa,
        )
    quality = iou_quality(assignment, decode(outputs.deltas, anchors), batch.gt_boxes)
    return DenseTargets(*assignment, quality)


def _assign(grid: AnchorGrid, batch: Batch, method: MethodConfig) -> Assignment:
    rule = assignment_rule(method)
    return assign(grid, batch.canvas, *_objects(batch), batch.sizes, **rule)


def _objects(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.gt_boxes, batch.gt_valid, batch.gt_ignore


def _ask(network: nn.Module, batch: Batch, cfg: TrainConfig, at: Tensor | None) -> Outputs:
    images = normalize_images(batch.images, batch.sizes)
    with autocast(cfg.precision, images.device):
        return network(images, at=at)
