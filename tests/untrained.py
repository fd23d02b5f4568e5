"""A run folder with an untrained network, as a stand-in for a trained one."""

from collections.abc import Sequence
from pathlib import Path

from rpn_train import checkpoint
from rpn_train.build import build_model
from rpn_train.cli import compose_run
from rpn_train.options import to_mapping


def untrained_run(folder: Path, typed: Sequence[str]) -> Path:
    """Write `checkpoints/last.pt` of step 0 for what would be typed to rpn-train; the folder."""
    cfg = compose_run(typed)
    nothing = {"evaluated": -1, "best_ar_100": -1.0, "history": [], "optimizer": {}, "scaler": {}}
    weights = build_model(cfg).state_dict()
    state = {"step": 0, "config": to_mapping(cfg), "model": weights, "ema": None, **nothing}
    checkpoint.save(state, folder / "checkpoints" / "last.pt")
    return folder
