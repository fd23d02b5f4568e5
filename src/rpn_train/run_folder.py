"""The folder of a run: its name, and that no two runs write to one."""

import datetime
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rpn_train.errors import ConfigError


def default_folder(name: str) -> Path:
    """runs/<date>_<time>_<name>."""
    return Path("runs") / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"


def make_folder(folder: Path) -> None:
    """Make a folder to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"output_dir: expected a folder to write to, got {folder}: {error.strerror}"
        ) from error


@contextmanager
def run_folder(folder: Path, *, goes_on: bool) -> Iterator[None]:
    """Make the folder of a run and hold it; refuse one that holds, or is held by, another run.

    A run that a fault of the input ended before its first figure does not count, and leaves no
    folder that was not there. The hold ends with the process, however it ends.

    Raises:
        ConfigError: another run is there, or the folder cannot be written to.
    """
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    if begun and not goes_on:
        raise ConfigError(
            f"output_dir: {folder} holds a run already; give resume=auto to go on with it, or "
            "another folder"
        )
    made = not folder.exists()
    make_folder(folder)
    with open(folder / "lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not passed on to loader processes
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            raise ConfigError(
                f"output_dir: {folder} is in use by the run of process {lock.read().strip()}; "
                "wait for it, or give another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        try:
            yield
        finally:
            if made and os.listdir(folder) == ["lock"]:
                os.remove(lock.name)
                folder.rmdir()
