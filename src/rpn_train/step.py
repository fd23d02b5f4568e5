"""One training step, and the numbers it leaves on the device until they are read."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.build import assignment_rule
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.data.index import Index
from rpn_train.data.sampler import Planner
from rpn_train.distributed import Ranks
from rpn_train.errors import DivergedError
from rpn_train.losses import Losses, rpn_losses
from rpn_train.model import autocast, normalize_images
from rpn_train.run_state import RunState
from rpn_train.targets import Picks, assign, random_keys, sample

# The columns of RunState.history.
HISTORY = ("train/loss_objectness", "train/loss_box", "train/positives", "train/grad_norm")


@dataclass
class Clock:
    """Where the time went since `started`: steps done and seconds spent waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0

    def next(self, loader: Iterator[Batch]) -> Batch:
        """The next batch, timed."""
        before = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - before
        return batch


def prepare_network(model: nn.Module, cfg: TrainConfig, ranks: Ranks) -> nn.Module:
    """The model in training mode, compiled and distributed as configured; it shares its weights."""
    model.train()
    if cfg.compile:
        model.compile()  # in place: the keys of the state dict stay plain
    return ranks.wrap(model)


def batch_losses(
    network: nn.Module, grid: AnchorGrid, batch: Batch, cfg: TrainConfig
) -> tuple[Losses, Picks]:
    """Losses of a batch and the anchors they were read at. Waits for nothing.

    The normaliser is that of the whole batch over all processes and pieces, so the losses of all
    add up to the loss of the step.
    """
    method = cfg.method
    anchors = grid_anchors(grid, batch.canvas, batch.images.device)
    assignment = assign(
        grid,
        batch.canvas,
        batch.gt_boxes,
        batch.gt_valid,
        batch.gt_ignore,
        batch.sizes,
        **assignment_rule(method),
    )
    picks = sample(
        assignment.labels,
        random_keys(batch.seeds, len(anchors)),
        num_samples=method.num_samples,
        fg_fraction=method.fg_fraction,
    )
    images = normalize_images(batch.images, batch.sizes)
    with autocast(cfg.precision, images.device):
        outputs = network(images, at=picks.at)
    losses = rpn_losses(
        outputs.logits,
        outputs.deltas,
        picks,
        anchors,
        batch.gt_boxes,
        assignment.matches,
        box_kind=method.box_loss,
        beta=method.smooth_l1_beta,
        box_weight=method.box_weight,
        normalizer=method.num_samples * cfg.schedule.batch_size,
    )
    return losses, picks


def training_step(
    state: RunState,
    network: nn.Module,
    loader: Iterator[Batch],
    cfg: TrainConfig,
    lr: float,
    clock: Clock,
    ranks: Ranks,
) -> tuple[Batch, Picks]:
    """Forward, backward and update on the next batch; returns its last piece, for a picture."""
    optimizer, pieces = state.optimizer, cfg.schedule.accumulate
    for group in optimizer.param_groups:
        group["lr"] = lr
    terms = torch.zeros(3, device=ranks.device)
    for piece in range(pieces):
        batch = clock.next(loader).to(ranks.device)
        with ranks.grad_sync(network, piece == pieces - 1):
            losses, picks = batch_losses(network, state.model.grid, batch, cfg)
            # DDP averages over the processes; the normaliser already counts their images
            total = (losses.objectness + losses.box) * ranks.world
            state.scaler.scale(total).backward()
        positives = picks.positive.sum() / cfg.schedule.batch_size
        terms += torch.stack([losses.objectness, losses.box, positives]).detach()
    state.scaler.unscale_(optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if cfg.schedule.clip_norm is not None:
        clip_grads_with_norm_(parameters, cfg.schedule.clip_norm, norm)
    state.scaler.step(optimizer)
    state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    # the norm is the same in all processes, which are summed over when this is read
    state.pending.append(torch.cat([terms, norm[None] / ranks.world]))
    state.step += 1
    clock.steps += 1
    return batch, picks


def drain(
    state: RunState, cfg: TrainConfig, planner: Planner, index: Index, lr: float, ranks: Ranks
) -> None:
    """Read the numbers of the last steps from the device: the one wait of a plain step.

    Raises:
        DivergedError: a loss was not finite; names the step. It comes before anything is saved.
    """
    if not state.pending:
        return
    rows: list[list[float]] = ranks.sum(torch.stack(state.pending)).tolist()
    for i, (objectness, box, *_) in enumerate(rows):
        if not math.isfinite(objectness + box):
            step = state.step - len(rows) + i + 1
            ids = [int(index.image_ids[item.row]) for item in planner.plan(step).items]
            raise DivergedError(
                f"step {step}: expected a finite loss, got objectness {objectness:g}, box {box:g} "
                f"at learning rate {lr:g} on images {ids}; nothing was overwritten. "
                "Look at their boxes, or lower schedule.lr"
            )
    state.history.extend(rows)
    state.pending.clear()
