"""What every anchor of a batch is to learn, by the assignment of the method."""

from dataclasses import replace

import torch
from torch import Tensor

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import decode, plain_iou, take_boxes
from rpn_train.build import assignment_rule
from rpn_train.data.batch import Batch
from rpn_train.dense_targets import (
    DenseTargets,
    atss_assign,
    center_region_assign,
    centerness_targets,
    task_aligned_assign,
)
from rpn_train.heads import Outputs
from rpn_train.method_config import MethodConfig
from rpn_train.targets import (
    IGNORED,
    POSITIVE,
    Assignment,
    Picks,
    assign,
    assign_dense,
    random_keys,
    sample,
)


@torch.no_grad()
def sampled_targets(
    grid: AnchorGrid, batch: Batch, method: MethodConfig, moved: Tensor | None = None
) -> tuple[Assignment, Picks]:
    """What every anchor is, and which of them are sampled.

    Args:
        moved: [B, R, 4] where a first stage has moved the anchors; None: they are those of `grid`.
    """
    assignment = (
        _assign(grid, batch, method) if moved is None else _assign_moved(moved, batch, method)
    )
    labels = _learned(assignment.labels, method)
    picks = sample(
        labels,
        random_keys(batch.seeds, labels.shape[1]),
        num_samples=method.num_samples,
        fg_fraction=method.fg_fraction,
    )
    return Assignment(labels, assignment.matches), picks


@torch.no_grad()
def dense_targets(
    grid: AnchorGrid, batch: Batch, outputs: Outputs, method: MethodConfig
) -> DenseTargets:
    """What every anchor learns, by the assignment of the method (as it is: see `method_at`)."""
    anchors = grid_anchors(grid, batch.canvas, batch.images.device)
    targets = _assign_all(grid, anchors, batch, outputs, method)
    labels, matches, quality = targets
    labels = _learned(labels, method)
    if method.objectness_target == "label":
        quality = None
    elif quality is None:
        gt = take_boxes(batch.gt_boxes, matches)
        quality = quality_targets(outputs.deltas, anchors, gt, method)
    return DenseTargets(labels, matches, quality)


def method_at(method: MethodConfig, progress: float) -> MethodConfig:
    """The method as it is when a share of the run, 0..1, is done.

    One that assigns by its own predictions begins as ATSS, as in the authors' code (Feng et al.
    2021): what the network says is worth nothing at first.
    """
    if method.assignment != "task_aligned" or progress >= method.aligned_from:
        return method
    return replace(method, assignment="atss", objectness_loss="focal", objectness_target="label")


def quality_targets(
    deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, method: MethodConfig
) -> Tensor | None:
    """What the objectness of positives aims at, [B, S], of deltas, anchors and objects [B, S, 4].

    None: it aims at 1.
    """
    if method.objectness_target == "label":
        return None
    if method.objectness_target == "centerness":
        return centerness_targets(anchors, gt_boxes)
    return plain_iou(decode(deltas.detach().float(), anchors), gt_boxes)


def center_region_targets(
    grid: AnchorGrid, anchors: Tensor, batch: Batch, method: MethodConfig
) -> Assignment:
    """Which anchors are in the middle of an object: what the first stage of a cascade learns."""
    return center_region_assign(
        anchors,
        grid.level_lengths(batch.canvas),
        grid.strides,
        *_objects(batch),
        share=method.center_share,
        ignore_ioa=method.ignore_ioa,
    )


def _learned(labels: Tensor, method: MethodConfig) -> Tensor:
    """The labels with what the method does not learn ignored."""
    if method.learn_background:
        return labels
    return torch.where(labels == POSITIVE, labels, IGNORED)


def _assign_all(
    grid: AnchorGrid,
    anchors: Tensor,
    batch: Batch,
    outputs: Outputs,
    method: MethodConfig,
) -> DenseTargets:
    if method.assignment == "max_iou":
        return DenseTargets(*_assign(grid, batch, method), None)
    if method.assignment == "center_region":
        return DenseTargets(*center_region_targets(grid, anchors, batch, method), None)
    if method.assignment == "task_aligned":
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
    assignment = atss_assign(
        anchors,
        grid.level_lengths(batch.canvas),
        *_objects(batch),
        candidates=method.atss_candidates,
        ignore_ioa=method.ignore_ioa,
    )
    return DenseTargets(*assignment, None)


def _assign(grid: AnchorGrid, batch: Batch, method: MethodConfig) -> Assignment:
    rule = assignment_rule(method)
    return assign(grid, batch.canvas, *_objects(batch), batch.sizes, **rule)


def _assign_moved(moved: Tensor, batch: Batch, method: MethodConfig) -> Assignment:
    """The same for anchors [B, R, 4] that differ between images."""
    rule = assignment_rule(method)
    images = zip(moved, *(t.split(1) for t in (*_objects(batch), batch.sizes)), strict=True)
    each = [assign_dense(anchors, *of_image, **rule) for anchors, *of_image in images]
    return Assignment(*map(torch.cat, zip(*each, strict=True)))


def _objects(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.gt_boxes, batch.gt_valid, batch.gt_ignore
