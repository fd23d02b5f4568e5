"""Resized images kept for the next epoch, where all loader processes find them."""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rpn_train.errors import ConfigError

Size = tuple[int, int]  # (height, width) px

# The dimensions of [3, h, w] from the outermost in memory to the innermost. Files are decoded
# pixel by pixel, shapes drawn plane by plane, and sums over an image depend on it in the last bit.
_ORDERS = tuple(permutations(range(3)))


class ImageCache:
    """Images of one split after resizing, before any augmentation: uint8, each at a fixed place.

    Of the rows to be kept the first that fit into the limit get a place. A byte for each row says
    whether its image is there; it is written after the pixels. Two processes may write an image at
    once: they write the same bytes.

    num_rows: rows that should be kept. num_kept, num_bytes: those with a place, and their pixels.
    """

    def __init__(
        self, sizes: Sequence[Size], rows: Iterable[int], *, limit: int, folder: Path | None
    ) -> None:
        """An empty cache, which processes forked from this one share. It ends with the last.

        Args:
            sizes: of each row of the index, after resizing.
            rows: those to be kept, best first.
            limit: bytes.
            folder: where a file without a name takes the images; None: memory, page by page as
                they come.

        Raises:
            ConfigError: there is no room for it in the folder or in memory.
        """
        wanted = np.fromiter(rows, np.int64)
        self._sizes = np.array(sizes, np.int64).reshape(-1, 2)  # [N, 2]
        ends = np.cumsum(3 * self._sizes[wanted].prod(axis=1))  # [num_rows]
        self.num_rows, self.num_kept = len(wanted), int((ends <= limit).sum())
        self.num_bytes = int(ends[self.num_kept - 1]) if self.num_kept else 0
        kept = wanted[: self.num_kept]
        self._starts = np.full(len(self._sizes), -1)  # [N] first byte of each row, -1: no place
        self._starts[kept] = np.append(0, ends)[: self.num_kept]
        memory = np.frombuffer(_shared(len(sizes) + self.num_bytes, folder), np.uint8)
        self._state = memory[: len(sizes)]  # [N] 0: not there, 1 + its place in _ORDERS: there
        self._pixels = torch.from_numpy(memory[len(sizes) :])

    def image(self, row: int, size: Size, make: Callable[[], Tensor]) -> Tensor:
        """The image of a row at a size: the kept one, or else what `make` gives, kept from then on.

        At another size than that of its place an image is always made and never kept.

        Returns:
            uint8 [3, h, w] with the strides of what was made; a kept one must not be written to.
        """
        start = int(self._starts[row])
        if start < 0 or size != tuple(self._sizes[row].tolist()):
            return make()
        shape = (3, *size)
        place = self._pixels[start : start + 3 * size[0] * size[1]]
        state = int(self._state[row])
        if state:
            order = _ORDERS[state - 1]
            stored = place.view([shape[dim] for dim in order])
            return stored.permute([order.index(dim) for dim in range(3)])
        image = make()
        for state, order in enumerate(_ORDERS, start=1):
            if image.permute(order).is_contiguous():
                place.copy_(image.permute(order).view(-1))
                self._state[row] = state
                break
        return image


def _shared(length: int, folder: Path | None) -> mmap.mmap:
    try:
        if folder is None:
            return mmap.mmap(-1, length)
        with tempfile.TemporaryFile(dir=folder) as file:
            # all at once: where the disk is full, a write to a hole in a mapped file would kill
            os.posix_fallocate(file.fileno(), 0, length)
            return mmap.mmap(file.fileno(), length)
    except OSError as error:
        kind, where = ("ram", "of memory") if folder is None else ("disk", f"in {folder}")
        raise ConfigError(
            f"data.cache={kind}: expected {length / 1e9:.2g} GB {where}, got: {error.strerror}; "
            "make room, or lower data.cache_gb"
        ) from error
