"""Which images make up a step, and how each is augmented: a pure function of (seed, step).

No state, so nothing to restore: a resumed run asks for step t and gets what it would have got.
Augmentation is decided here too, because it sets the image sizes and so the padded size of the
whole batch: every process pads to that, and N processes compute what one would.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rpn_train.data.transforms import fit_size

# Separate random streams of a seed: order of images, augmentation and anchor sampling.
_ORDER, _ITEM = 1, 2


@dataclass(frozen=True)
class Item:
    """One image of a batch: its row in the index, its size after resizing, its random choices."""

    row: int
    size: tuple[int, int]  # (height, width) px
    flip: bool
    seed: int  # of photometric jitter and anchor sampling, in [0, 2^62)
    photometric: bool


@dataclass(frozen=True)
class Plan:
    """The whole batch of a step, over all processes; canvas: its padded (height, width) px."""

    items: tuple[Item, ...]
    canvas: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Planner:
    """Everything a plan depends on besides the step.

    sizes: int [N, 2] (height, width) px of the images as stored. divisor: the canvas is a multiple
    of this (the largest stride). scale: range by which short_side is multiplied.
    """

    sizes: np.ndarray
    seed: int
    batch_size: int
    short_side: int
    max_side: int
    divisor: int
    flip: float
    scale: tuple[float, float]
    photometric: float

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image is seen at least once."""
        return -(-len(self.sizes) // self.batch_size)

    def plan(self, step: int) -> Plan:
        """The batch of `step` (1, 2, ...)."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        rows = epoch_order(self, epoch)[position]
        items = tuple(self._item(int(row), step, i) for i, row in enumerate(rows))
        return Plan(items, canvas_of([item.size for item in items], self.divisor))

    def _item(self, row: int, step: int, position: int) -> Item:
        rng = np.random.default_rng((self.seed, _ITEM, step, position))
        scale = rng.uniform(*self.scale)
        flip, photometric = rng.random(2) < (self.flip, self.photometric)
        height, width = self.sizes[row].tolist()
        size = fit_size((height, width), self.short_side * scale, self.max_side)
        return Item(row, size, bool(flip), int(rng.integers(1 << 62)), bool(photometric))


@lru_cache(maxsize=2)
def epoch_order(planner: Planner, epoch: int) -> np.ndarray:
    """Rows of each step of an epoch: int64 [steps, batch_size].

    A new permutation each epoch, wide and tall images in separate batches so that little is padded
    (at most one batch is mixed). Where the images do not fill the last batch, the first ones of the
    permutation come a second time: every image is seen, and every batch is whole.
    """
    rng = np.random.default_rng((planner.seed, _ORDER, epoch))
    order = np.resize(
        rng.permutation(len(planner.sizes)), planner.steps_per_epoch * planner.batch_size
    )
    height, width = planner.sizes[order].T
    wide, tall = order[width >= height], order[width < height]
    whole = [len(part) // planner.batch_size * planner.batch_size for part in (wide, tall)]
    mixed = np.concatenate([wide[whole[0] :], tall[whole[1] :]])
    batches = np.concatenate([wide[: whole[0]], tall[: whole[1]], mixed])
    return rng.permutation(batches.reshape(-1, planner.batch_size))


def canvas_of(sizes: list[tuple[int, int]], divisor: int) -> tuple[int, int]:
    """Smallest (height, width), multiples of divisor, that holds all sizes."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def same_canvas_batches(
    sizes: list[tuple[int, int]], batch_size: int, divisor: int
) -> Iterator[list[int]]:
    """Rows in batches of images that all pad to the same canvas, for evaluation.

    Padding reaches into the features at an image's edge; so an image is padded as if it were alone,
    and no figure depends on the batch size or on which images come together.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(sizes):
        groups.setdefault(canvas_of([size], divisor), []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]
