"""Checkpoints: saved whole or not at all, loaded without running anything they contain."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rpn_train.errors import CheckpointError
from rpn_train.whole_file import replacing

FORMAT = 1
_KEYS = {"format", "config", "step", "evaluated", "best_ar_100", "history"}
_KEYS |= {"model", "ema", "optimizer", "scaler"}


class FormatError(CheckpointError):
    """A whole checkpoint of another version of rpn-train: an older one must not stand in for it."""


def save(state: dict[str, Any], path: Path, *, keep: int = 1) -> None:
    """Write a checkpoint atomically: a crash leaves the previous one as it was.

    Args:
        keep: how many stay: besides the new one that of before as `<name>.1.pt`, and so on.

    Raises:
        CheckpointError: it cannot be written, for want of room perhaps. Those of before stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **state}, file)
            _keep_older(path, keep)
    except (OSError, RuntimeError) as error:
        # torch's writer hides that of the disk behind what it found when it ended the file
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):  # of a GPU, or a loader process was killed meanwhile
            raise
        reason = str(cause).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); what was saved before is intact: make room and "
            "go on with resume=auto"
        ) from error


def _keep_older(path: Path, keep: int) -> None:
    """Move each one place further; `path` itself stays until it is replaced."""
    for place in range(keep - 1, 0, -1):
        newer, older = _older(path, place - 1), _older(path, place)
        if place > 1 and newer.is_file():
            os.replace(newer, older)
        elif newer.is_file():
            temporary = older.with_name(older.name + ".tmp")
            temporary.unlink(missing_ok=True)
            try:
                os.link(newer, temporary)
            except OSError:  # not every file system has links
                shutil.copyfile(newer, temporary)
            os.replace(temporary, older)


def _older(path: Path, place: int) -> Path:
    """The name of the one that many saves before `path`."""
    return path.with_name(f"{path.stem}.{place}{path.suffix}") if place else path


def load_newest(path: Path) -> tuple[dict[str, Any], Path, str | None]:
    """The newest whole checkpoint of `path` and those kept from before it.

    Returns:
        The checkpoint, its path, and what is wrong with those that are newer; None if it is `path`.

    Raises:
        FormatError: the newest that is whole is of another format.
        CheckpointError: none is whole; says what is wrong with the newest.
    """
    faults: list[str] = []
    for candidate in kept(path):
        try:
            return load(candidate), candidate, "; ".join(faults) or None
        except FormatError:
            raise
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError(faults[0] if faults else f"expected a checkpoint, got nothing at {path}")


def kept(path: Path) -> list[Path]:
    """`path` and those kept from before it, as far as they are there, newest first."""
    older = path.parent.glob(f"{path.stem}.*{path.suffix}")
    numbered = {int(p.name.split(".")[-2]): p for p in older if p.name.split(".")[-2].isdigit()}
    return [p for p in (path, *(numbered[n] for n in sorted(numbered))) if p.is_file()]


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU.

    Every byte is checked: a checkpoint is a zip archive, which holds a CRC-32 of each tensor.

    Raises:
        FormatError: of another format.
        CheckpointError: missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint, got nothing at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file can break the reader in any way
        raise CheckpointError(
            f"{path}: expected a checkpoint of rpn-train, got a broken or another file "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise CheckpointError(f"{path}: expected a checkpoint of rpn-train, got another file")
    if state["format"] != FORMAT:  # before the keys, which may be others there
        raise FormatError(
            f"{path}: expected checkpoint format {FORMAT}, got {state['format']}; "
            "use the version of rpn-train that wrote it"
        )
    if not state.keys() >= _KEYS:
        raise CheckpointError(f"{path}: expected a checkpoint of rpn-train, got another file")
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
