"""What all commands share: exit codes, folders, devices, processes.

Exit codes: 0 done, 1 a fault of the program (with a traceback), 2 a fault of the input (one line),
128 + n stopped by signal n.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import torch

from rpn_train.config import TrainConfig
from rpn_train.distributed import launched
from rpn_train.errors import ConfigError, UserError


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of a command; a fault of the user's is one line."""
    try:
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def check_device(cfg: TrainConfig) -> None:
    """Refuse a device that is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a GPU for 'cuda', found none; device=cpu needs none")


def launch(command: str, typed: Sequence[str], processes: int) -> int:
    """A command ("train", "eval", "propose") again in several processes, by torch's launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [sys.executable, *launcher, "-m", "rpn_train", command, *typed]
    # one thread pool for each process, not one of all cores for each (torchrun would take 1)
    threads = max(1, (os.cpu_count() or 1) // processes)
    started = subprocess.Popen(program, env={"OMP_NUM_THREADS": str(threads), **os.environ})
    came = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGTERM:  # to this process alone; Ctrl-C reaches the others by itself
            started.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    code = started.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return 128 + came[0] if came else code


def num_processes(cfg: TrainConfig) -> int:
    """How many processes a run has: as launched, else `devices`, else one per GPU of the box."""
    if launched():
        return int(os.environ["WORLD_SIZE"])
    gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()
    if gpus and cfg.devices is not None and cfg.devices > gpus:
        raise ConfigError(f"devices: expected at most {gpus}, the GPUs here, got {cfg.devices}")
    return cfg.devices or max(1, gpus)
