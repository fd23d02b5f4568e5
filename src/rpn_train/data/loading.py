"""Batches read ahead by loader processes, and a word from the parent when none comes."""

import os
import signal
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from multiprocessing.connection import wait
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from rpn_train.data.batch import Batch, EvalBatches, ReadImage, TrainBatches
from rpn_train.data.index import Index
from rpn_train.errors import DataError
from rpn_train.stop import signals_for_parent

_POLL_S = 5.0  # a killed process whose signal was lost is noticed then


class StalledWarning(UserWarning):
    """No batch has come for long; names the processes and the files that they are reading."""


def load(
    batches: TrainBatches | EvalBatches,
    keys: Sequence[int],
    *,
    workers: int,
    pin: bool,
    patience_s: float = 60.0,
) -> Generator[Batch, None, None]:
    """Batches of `keys` in order, read ahead by `workers` processes (0: by this one).

    Use it with `contextlib.closing`: the processes end when it is closed. When they deliver nothing
    for `patience_s` there is a StalledWarning, and again whenever the wait has doubled.

    Raises:
        DataError: what a batch could not be made for.
        RuntimeError: a process was killed. It comes by a signal, at any place of the program.
    """
    reading = torch.full((workers, 2), -1).share_memory_()  # process id, row of the index or -1
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        # they share the pages of the index, and end when their parent is killed
        multiprocessing_context="fork" if workers else None,
        timeout=min(patience_s, _POLL_S) if workers else 0,
        worker_init_fn=partial(_begin, reading),
    )
    found: Iterator[Batch | DataError] = iter(())
    others, processes = active_children(), []
    try:
        with signals_for_parent():
            found = iter(loader)
        processes = [child for child in active_children() if child not in others]
        while (batch := _next(found, reading, batches.index, patience_s)) is not None:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except (OSError, EOFError) as error:  # what the connection to a process that dies may raise
        if not wait([process.sentinel for process in processes], timeout=1):
            raise
        raise RuntimeError("DataLoader worker ended while it was sending a batch.") from error
    finally:
        # what is left when not all could begin would be waited for when the program ends
        if workers and not processes:
            processes = [child for child in active_children() if child not in others]
        if processes:  # without any, this may be a thread, which must not touch signals
            told = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # none of these ends is a fault
            if all(process.is_alive() for process in processes):
                del found  # ends them, unless an exception refers to it
            for process in processes:  # they may wait for ever for what a killed one held
                process.kill()
            for process in processes:
                process.join()
            signal.signal(signal.SIGCHLD, told)


def _begin(reading: Tensor, worker: int) -> None:
    """In a loader process: from now on its row of `reading` says what it reads."""
    mine = reading[worker].numpy()
    mine[0] = os.getpid()
    info = get_worker_info()
    assert info is not None
    batches = cast(TrainBatches | EvalBatches, info.dataset)  # a copy of the parent's
    batches.read = partial(_read, batches.read, mine)


def _read(read: ReadImage, mine: NDArray[np.int64], row: int) -> Tensor:
    mine[1] = row
    try:
        return read(row)
    finally:
        mine[1] = -1


def _next(
    found: Iterator[Batch | DataError], reading: Tensor, index: Index, patience_s: float
) -> Batch | DataError | None:
    """The next batch, however long it takes; None after the last."""
    started, due_s = time.monotonic(), patience_s
    while True:
        try:
            return next(found, None)
        except RuntimeError as error:  # torch has no class of its own for it
            if not str(error).startswith("DataLoader timed out"):
                raise
        waited_s = time.monotonic() - started
        if waited_s >= due_s:
            warnings.warn(_stalled(waited_s, reading, index), StalledWarning, stacklevel=3)
            due_s = 2 * waited_s


def _stalled(waited_s: float, reading: Tensor, index: Index) -> str:
    """One line for a person who looks for the disk that hangs."""
    readers = [
        f"loader process {process} is reading {index.root / index.file_name(row)}"
        for process, row in reading.tolist()
        if row >= 0
    ]
    idle = f"no loader process is reading (they are {', '.join(map(str, reading[:, 0].tolist()))})"
    return f"no batch for {waited_s:.0f} s: {'; '.join(readers) or idle}; it goes on when one comes"
