"""Checkpoints: saved whole or not at all, loaded without running anything they contain."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rpn_train.errors import CheckpointError

FORMAT = 1
_KEYS = {"format", "config", "step", "evaluated", "best_ar_100", "history"}
_KEYS |= {"model", "ema", "optimizer", "scaler"}


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: a crash leaves the previous one as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU.

    Raises:
        CheckpointError: missing, unreadable, not one of ours, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint, got nothing at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file can break the reader in any way
        raise CheckpointError(
            f"{path}: expected a checkpoint of rpn-train, got a broken or another file "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise CheckpointError(f"{path}: expected a checkpoint of rpn-train, got another file")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, got {state['format']}; "
            "use the version of rpn-train that wrote it"
        )
    return cast(dict[str, Any], state)


def find(path: Path) -> Path:
    """The checkpoint that is meant: a file itself, or the last one of a run folder."""
    if path.is_dir():
        last = path / "checkpoints" / "last.pt"
        if not last.is_file():
            raise CheckpointError(
                f"{path}: expected a run folder, got no checkpoints/last.pt in it"
            )
        return last
    if not path.is_file():
        raise CheckpointError(f"expected a run folder or a checkpoint, got nothing at {path}")
    return path


def load_weights(model: nn.Module, weights: dict[str, Any], path: Path | str) -> None:
    """Weights of a checkpoint into a model built from its configuration.

    Raises:
        CheckpointError: the weights are of another network; names the first key.
    """
    expected, given = model.state_dict(), weights
    for key in (*expected, *given):
        if key not in given:
            raise CheckpointError(f"{path}: expected weights {key!r}, got none of that name")
        if key not in expected:
            raise CheckpointError(f"{path}: weights {key!r} have no place in this network")
        if expected[key].shape != given[key].shape:
            raise CheckpointError(
                f"{path}: expected {key!r} of shape {tuple(expected[key].shape)}, "
                f"got {tuple(given[key].shape)}"
            )
    model.load_state_dict(weights)
