"""What a checkpoint of a run holds, and the way into a checkpoint and back."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rpn_train import checkpoint
from rpn_train.build import build_model
from rpn_train.config import TrainConfig
from rpn_train.distributed import Ranks
from rpn_train.errors import CheckpointError
from rpn_train.model import RPN
from rpn_train.options import differences, to_mapping
from rpn_train.pretrained import find_pretrained
from rpn_train.run_log import truncate_lines
from rpn_train.schedule import build_optimizer
from rpn_train.weights import norms_fit

# A change of these makes another network or another problem: weights of before do not fit it.
_FIXED = (
    *("backbone.", "anchors.", "method.head", "method.num_convs", "method.channels"),
    *("method.centerness", "method.delta_stds"),
)
# What the weights of a network were learned with. (Which stages were frozen is not part of it.)
_ARCHITECTURE = (
    *("backbone.name", "backbone.norm", "backbone.fpn_norm", "anchors.", "method.delta_stds"),
)


@dataclass
class RunState:
    """Everything that the steps to come depend on besides the configuration.

    step: steps done. evaluated: the last step whose evaluation is done, -1 for none. history: a row
    of logged numbers for each step since the last logged one; pending: those still on the device.
    skipped: steps in a row, up to the last, that were left out because they were not finite.
    """

    model: RPN
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: RPN | None
    step: int = 0
    evaluated: int = -1
    best_ar_100: float = -1.0
    history: list[list[float]] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)
    skipped: int = 0

    @property
    def judged(self) -> RPN:
        """The network that is evaluated: the averaged weights where there are some."""
        return self.ema or self.model


def build_state(cfg: TrainConfig, device: torch.device, *, initial: bool = True) -> RunState:
    """The state before step 1; without `initial`, weights that are to be replaced are not read."""
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    backbone = cfg.backbone if initial else replace(cfg.backbone, weights=None)
    model = build_model(replace(cfg, backbone=backbone)).to(device).to(memory_format=layout)
    optimizer = build_optimizer(
        model,
        name=cfg.schedule.optimizer,
        momentum=cfg.schedule.momentum,
        weight_decay=cfg.schedule.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    ema = None if cfg.schedule.ema is None else deepcopy(model)
    return RunState(model, optimizer, scaler, ema)


def last_of(folder: Path) -> Path:
    """The checkpoint that a run goes on from, if it is whole."""
    return folder / "checkpoints" / "last.pt"


def save(state: RunState, cfg: TrainConfig, folder: Path, ranks: Ranks, name: str = "last") -> None:
    """Write the state to `checkpoints/<name>.pt`, from the main process."""
    assert not state.pending, "numbers of finished steps would be lost"
    if not ranks.is_main:
        return
    saved = {
        "step": state.step,
        "evaluated": state.evaluated,
        "best_ar_100": state.best_ar_100,
        "history": state.history,
        "config": to_mapping(cfg),
        "model": state.model.state_dict(),
        "ema": state.ema and state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
    }
    keep = cfg.keep_checkpoints if name == "last" else 1
    checkpoint.save(saved, folder / "checkpoints" / f"{name}.pt", keep=keep)


def resume(state: RunState, cfg: TrainConfig, folder: Path, ranks: Ranks) -> dict[str, str]:
    """Restore the last checkpoint of a folder into the state, or else start from `cfg.init_from`.

    Logged lines of later steps are dropped.

    Returns:
        What differs between the configuration of that and `cfg`, key -> 'old -> new'.

    Raises:
        CheckpointError: the checkpoint cannot be read or is of another network.
    """
    last = last_of(folder)
    if not checkpoint.kept(last):
        if ranks.is_main:  # there may be some of step 0
            forget_later_lines(state, folder)
        return {} if cfg.init_from is None else start_from(state, cfg, cfg.init_from)
    saved, path, fault = checkpoint.load_newest(last)
    changed = differences(saved["config"], to_mapping(cfg))
    for key in ("resume", "output_dir", "init_from"):
        changed.pop(key, None)
    fixed = [f"{key}: {change}" for key, change in changed.items() if key.startswith(_FIXED)]
    if fixed:
        raise CheckpointError(
            f"{'; '.join(fixed)}: {path} is of another network; start in another output_dir"
        )
    checkpoint.load_weights(state.model, saved["model"], path)
    if state.ema is not None:
        checkpoint.load_weights(state.ema, saved["ema"] or saved["model"], path)
    if "schedule.optimizer" not in changed:
        state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.evaluated = saved["step"], saved["evaluated"]
    state.best_ar_100, state.history = saved["best_ar_100"], saved["history"]
    if ranks.is_main:
        forget_later_lines(state, folder)
    return changed if fault is None else {last.name: f"{fault} -> {path.name}", **changed}


def start_from(state: RunState, cfg: TrainConfig, where: str) -> dict[str, str]:
    """Take over the weights of a trained network; what its architecture had otherwise is returned.

    Raises:
        CheckpointError: the weights do not fit the network of `cfg`.
    """
    source = find_pretrained(where)
    weights = norms_fit(state.model, source.weights)
    changed = differences(source.config, to_mapping(cfg))
    try:
        checkpoint.load_weights(state.model, weights, f"init_from {where}")
    except CheckpointError as error:
        network = [f"{key}: {change}" for key, change in changed.items() if key.startswith(_FIXED)]
        said = f"; changed: {'; '.join(network)}" if network else ""
        raise CheckpointError(f"{error}{said}") from error
    if state.ema is not None:
        checkpoint.load_weights(state.ema, weights, f"init_from {where}")
    return {key: change for key, change in changed.items() if key.startswith(_ARCHITECTURE)}


def forget_later_lines(state: RunState, folder: Path) -> None:
    """Drop logged lines of steps that will be done again, so that none stands twice."""

    def stays(line: dict[str, Any]) -> bool:
        evaluation = any(key.startswith("val/") for key in line)
        return bool(line["step"] <= (state.evaluated if evaluation else state.step))

    for name in ("metrics.jsonl", "timing.jsonl"):
        truncate_lines(folder / name, stays)
