"""Batches read ahead by loader processes."""

from collections.abc import Generator, Sequence

from torch.utils.data import DataLoader, Dataset

from rpn_train.data.batch import Batch
from rpn_train.errors import DataError
from rpn_train.stop import leave_signals_to_parent


def load(
    batches: Dataset[Batch | DataError], keys: Sequence[int], *, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """Batches of `keys` in order, read ahead by `workers` processes (0: by this one).

    Use it with `contextlib.closing`: the processes end when it is closed.

    Raises:
        DataError: what a batch could not be made for.
        RuntimeError: a process was killed. It comes by a signal, at any place of the program.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals_to_parent,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
