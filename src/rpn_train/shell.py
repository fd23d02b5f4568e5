"""What all commands share: exit codes, folders, devices, processes.

Exit codes: 0 done, 1 a fault of the program (with a traceback), 2 a fault of the input (one line),
128 + n stopped by signal n.
"""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from rpn_train.config import TrainConfig
from rpn_train.data.loading import StalledWarning
from rpn_train.distributed import MEETING, launched
from rpn_train.errors import ConfigError, UserError
from rpn_train.stop import StopRequest, stop_on_signals

GRACE_S = 60.0  # what the other processes get to end in when one has failed
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of a command; a fault of the user's is one line."""
    try:
        with _stalls_in_one_line():
            return command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch has no class of its own for it
            raise
        print(
            f"error: a loader process ended: {str(error).splitlines()[0]} If it was for want of "
            "memory, fewer workers= need less; go on with resume=auto",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in _NO_ACCESS and error.filename:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        if error.errno not in _NO_ROOM:
            raise
        print(
            f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); what was "
            "saved before is intact: make room, and a run goes on with resume=auto",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextmanager
def _stalls_in_one_line() -> Iterator[None]:
    """Every StalledWarning is a line on the terminal, above the progress bar if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", StalledWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, *where: Any, **rest: Any) -> None:
            if isinstance(message, StalledWarning):
                tqdm.write(f"warning: {message}", file=sys.stderr)
            else:
                show(message, *where, **rest)

        warnings.showwarning = show_line
        yield


def check_device(cfg: TrainConfig) -> None:
    """Refuse a device that is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a GPU for 'cuda', found none; device=cpu needs none")


def launch(command: str, typed: Sequence[str], processes: int) -> int:
    """A command ("train", "eval", "propose") again in several processes of this machine.

    Not torch's launcher: that answers a fault of one with pages of its own, and moves the processes
    out of the terminal's group, away from Ctrl-C.

    Returns:
        0, or the exit code of the process that failed first; the others end before this returns.
    """
    program = [sys.executable, "-m", "rpn_train", command, *typed]
    # one thread pool for each process, not one of all cores for each
    threads = max(1, (os.cpu_count() or 1) // processes)
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="rpn-train-") as folder, stop_on_signals() as stop:
        shared = {"OMP_NUM_THREADS": str(threads), **os.environ, "WORLD_SIZE": str(processes)}
        shared[MEETING] = f"file://{folder}/meeting"
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(subprocess.Popen(program, env={**shared, **own}))
            return _exit_code(started, stop)
        finally:
            for process in started:
                _end(process, None if stop else GRACE_S)


def _exit_code(started: Sequence[subprocess.Popen[bytes]], stop: StopRequest) -> int:
    """Wait for all to be done or one to fail; pass SIGTERM on, while Ctrl-C reaches all anyway."""
    passed_on = False
    while None in (codes := [process.poll() for process in started]) and not any(codes):
        if stop.signal == signal.SIGTERM and not passed_on:
            passed_on = True
            for process in started:
                process.terminate()
        time.sleep(0.1)
    # one that was killed comes before those that lost it
    code = min(code for code in codes if code) if any(codes) else 0
    if code >= 0:  # it has said why itself
        return code
    if not stop:
        rank = codes.index(code)
        print(
            f"error: process {rank} of {len(started)} (pid {started[rank].pid}) was ended by "
            f"{signal.Signals(-code).name}; the others stop; a run goes on with resume=auto",
            file=sys.stderr,
        )
    return 128 - code


def _end(process: subprocess.Popen[bytes], grace_s: float | None) -> None:
    """Let a process finish what it is at, such as a checkpoint, but not for ever."""
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def num_processes(cfg: TrainConfig) -> int:
    """How many processes a run has: as launched, else `devices`, else one per GPU of the box."""
    if launched():
        return int(os.environ["WORLD_SIZE"])
    gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()
    if gpus and cfg.devices is not None and cfg.devices > gpus:
        raise ConfigError(f"devices: expected at most {gpus}, the GPUs here, got {cfg.devices}")
    return cfg.devices or max(1, gpus)
