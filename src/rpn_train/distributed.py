"""Several processes as one: start, wrap, reduce, gather. Torch's own groups and DDP, no more."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rpn_train.errors import LostProcessError

# How long a process waits for another. The longest that it has to: the main one scores and draws
# an evaluation alone, or a disk on the network is gone for a while.
TIMEOUT = timedelta(minutes=10)
# Where the processes that `shell.launch` started meet; torchrun has variables of its own.
MEETING = "RPN_TRAIN_MEETING"


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank in 0..world-1, and the device it computes on.

    control: the processes connected through the CPU, for what must not wait for a GPU.
    """

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """The one process that writes files and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients; itself when there is one process."""
        if self.world == 1:
            return model
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if on_gpu else None,
            gradient_as_bucket_view=True,
        )

    def grad_sync(self, model: nn.Module, last_piece: bool) -> AbstractContextManager[None]:
        """Gradients are averaged once per step: after the last piece of its batch."""
        if self.world == 1 or last_piece:
            return nullcontext()
        return cast(DistributedDataParallel, model).no_sync()

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process; the same answer in all."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes, in order of rank, in the main process; elsewhere None."""
        if self.world == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world if self.is_main else None
        dist.gather_object(value, gathered, group=self.control)
        return gathered


@contextmanager
def start(device: str, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the processes that a launcher started, if one did; leave them at the end.

    Args:
        device: "auto", "cpu" or "cuda". One GPU per process, by local rank.
        timeout: of every wait for another process.

    Raises:
        LostProcessError: another process ended before its time, or does not answer.
    """
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    here = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(here)
    if not launched():
        yield Ranks(0, 1, here)
        return
    try:
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            init_method=os.environ.get(MEETING),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            device_id=here if use_cuda else None,
        )
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        yield Ranks(dist.get_rank(), dist.get_world_size(), here, control)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo has no class
            raise
        raise LostProcessError(
            "another process of this command has ended, or has not answered for "
            f"{timeout.total_seconds():.0f} s; if it did not say why, it may have been killed for "
            "want of memory; a run goes on with resume=auto"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launched() -> bool:
    """Whether a launcher, `shell.launch` or torchrun, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ
