"""One training step, and the numbers it leaves on the device until they are read."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch, Unread
from rpn_train.data.index import Index
from rpn_train.data.sampler import Planner
from rpn_train.distributed import Ranks
from rpn_train.errors import DivergedError
from rpn_train.objective import batch_losses, positives_expected
from rpn_train.run_state import RunState
from rpn_train.schedule import update_average
from rpn_train.targets import Picks

# The columns of RunState.history.
HISTORY = ("train/loss_objectness", "train/loss_box", "train/positives", "train/grad_norm")


@dataclass
class Clock:
    """What the loader gave since `started`: steps done, seconds waited for it, images not read."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0
    unread: list[Unread] = field(default_factory=list)

    def next(self, loader: Iterator[Batch]) -> Batch:
        """The next batch, timed."""
        before = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - before
        self.unread += batch.unread
        return batch

    def take_unread(self) -> list[Unread]:
        """The images that could not be read since this was asked last."""
        unread, self.unread = self.unread, []
        return unread


def prepare_network(model: nn.Module, cfg: TrainConfig, ranks: Ranks) -> nn.Module:
    """The model in training mode, compiled and distributed as configured; it shares its weights."""
    model.train()
    if cfg.compile:
        from torch._dynamo.utils import counters  # here, as its import takes a second

        counters.clear()  # another run of this process may have counted
        model.compile()  # in place: the keys of the state dict stay plain
    return ranks.wrap(model)


def training_step(
    state: RunState,
    network: nn.Module,
    loader: Iterator[Batch],
    cfg: TrainConfig,
    lr: float,
    progress: float,
    clock: Clock,
    ranks: Ranks,
) -> tuple[Batch, Picks]:
    """Forward, backward and update on the next batch; returns its last piece, for a picture.

    Args:
        progress: share of the run that is done, 0..1.
    """
    pieces = cfg.schedule.accumulate
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    before = [b.clone() for b in state.model.buffers()] if skips(cfg) else None
    terms = torch.zeros(3, device=ranks.device)
    divisors: list[Tensor] = []
    for piece in range(pieces):
        batch = clock.next(loader).to(ranks.device)
        with ranks.grad_sync(network, piece == pieces - 1):
            losses, picks = batch_losses(network, state.model.grid, batch, cfg, progress)
            # DDP averages over the processes; the normaliser already counts their images
            total = (losses.objectness + losses.box) * ranks.world
            state.scaler.scale(total).backward()
        positives = picks.positive.sum() / cfg.schedule.batch_size
        terms += torch.stack([losses.objectness, losses.box, positives]).detach()
        if losses.divisor is not None:
            divisors.append(losses.divisor)
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if divisors:
        factor = positives_expected(cfg) / ranks.sum(torch.stack(divisors).sum()).clamp(min=1)
        torch._foreach_mul_(gradients, factor)
        terms[:2] *= factor
    norm = get_total_norm(gradients)
    if cfg.schedule.clip_norm is not None:
        clip_grads_with_norm_(parameters, cfg.schedule.clip_norm, norm)
    _update(state, norm, before, cfg.schedule.ema)
    # the norm is the same in all processes, which are summed over when this is read
    state.pending.append(torch.cat([terms, norm[None] / ranks.world]))
    state.step += 1
    clock.steps += 1
    return batch, picks


def _update(
    state: RunState, norm: Tensor, before: list[Tensor] | None, ema_decay: float | None
) -> None:
    """Update the weights, or leave the step out where its gradient is not finite.

    Args:
        norm: of the gradient.
        before: the buffers of the model before the step; None: no step is left out.
    """
    if before is not None and not norm.isfinite():  # waits for the device
        state.skipped += 1
        for buffer, value in zip(state.model.buffers(), before, strict=True):
            buffer.copy_(value)  # running statistics of the norms, which saw what overflowed
    else:
        state.skipped = 0
        state.scaler.step(state.optimizer)
        if state.ema is not None and ema_decay is not None:
            update_average(state.ema, state.model, ema_decay)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)


def skips(cfg: TrainConfig) -> bool:
    """Whether steps that are not finite are left out; in fp16 they belong to finding the scale."""
    return cfg.on_nonfinite == "skip" or cfg.precision == "fp16"


def drain(
    state: RunState, cfg: TrainConfig, planner: Planner, index: Index, lr: float, ranks: Ranks
) -> None:
    """Read the numbers of the last steps from the device: the one wait of a plain step.

    Raises:
        DivergedError: a loss or a gradient was not finite, or too many in a row were left out;
            names the step. It comes before anything is saved.
    """
    if not state.pending:
        return
    rows: list[list[float]] = ranks.sum(torch.stack(state.pending)).tolist()
    for i, (objectness, box, _, norm) in enumerate(rows):
        left_out = skips(cfg) and not math.isfinite(norm)
        if not math.isfinite(objectness + box + norm) and not left_out:
            step = state.step - len(rows) + i + 1
            ids = [int(index.image_ids[item.row]) for item in planner.plan(step).items]
            raise DivergedError(
                f"step {step}: expected a finite loss, got objectness {objectness:g}, box {box:g}, "
                f"gradient norm {norm:g} at learning rate {lr:g} on images {ids}; nothing was "
                "overwritten. Look at their boxes, or lower schedule.lr"
            )
    if state.skipped > cfg.max_skipped:
        raise DivergedError(
            f"step {state.step}: expected at most max_skipped = {cfg.max_skipped} steps in a row "
            f"whose gradient is not finite, got {state.skipped} at learning rate {lr:g}; nothing "
            "was overwritten. Lower schedule.lr"
        )
    state.history.extend(rows)
    state.pending.clear()
