"""Padded batches, made whole by a loader process: one item of the data set is one batch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rpn_train.data.headers import size_fault
from rpn_train.data.image_cache import ImageCache
from rpn_train.data.index import Index
from rpn_train.data.sampler import Item, Planner, canvas_of, same_canvas_batches
from rpn_train.data.transforms import (
    fit_size,
    flip,
    photometric_jitter,
    resize_boxes,
    resize_image,
)
from rpn_train.errors import DataError

ReadImage = Callable[[int], Tensor]  # row of an index -> uint8 [3, H, W] RGB
Loaded = tuple[Tensor, Tensor, Tensor]  # image uint8 [3, h, w], boxes [g, 4] px, ignore bool [g]

RETRY_AFTER_S = (0.1, 1.0)  # a network disk may be back by then
SUBSTITUTES = 10  # images tried in the place of one; when none can be read, the disk is gone


class Unread(NamedTuple):
    """An image, by its row in the index, and why it could not be read."""

    row: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """B images padded to one canvas on the right and below, with G rows of boxes each (G >= 1).

    images: uint8 [B, 3, H, W]. sizes: int64 [B, 2] (height, width) px without padding.
    gt_boxes: float32 [B, G, 4] xyxy px of the resized image; gt_valid: bool [B, G], false for
    padding rows; gt_ignore: bool [B, G], crowd and difficult. seeds: int64 [B], of anchor sampling.
    rows: int64 [B], of the index. unread: images that should be in here and could not be read.
    """

    images: Tensor
    sizes: Tensor
    gt_boxes: Tensor
    gt_valid: Tensor
    gt_ignore: Tensor
    seeds: Tensor
    rows: Tensor
    unread: tuple[Unread, ...] = ()

    @property
    def canvas(self) -> tuple[int, int]:
        """Padded (height, width) px."""
        height, width = self.images.shape[-2:]
        return height, width

    def to(self, device: torch.device) -> "Batch":
        """On a device; does not wait for the copy.

        A GPU copies while it computes what it was given before; only what comes after waits.
        """
        if device.type != "cuda":
            return self._each(lambda tensor: tensor.to(device, non_blocking=True))
        copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(copying):
            batch = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        computing.wait_stream(copying)
        for tensor in batch._tensors().values():
            tensor.record_stream(computing)  # its memory is not free before that is done with it
        return batch

    def pin_memory(self) -> "Batch":
        """In page-locked memory (called by the loader), so that copies to a GPU do not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {name: move(value) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def load_item(index: Index, read: ReadImage, item: Item, cache: ImageCache | None = None) -> Loaded:
    """One item, read (or found in the cache) and augmented.

    Raises:
        DataError: the image cannot be read, at the third attempt either, or has another size than
            annotated.
    """
    make = partial(_read_at_size, index, read, item)
    image = make() if cache is None else cache.image(item.row, item.size, make)
    height, width = index.sizes[item.row].tolist()
    boxes = torch.from_numpy(index.boxes_xyxy(item.row))
    boxes = resize_boxes(boxes, (height, width), item.size)
    if item.flip:
        image, boxes = flip(image, boxes)
    if item.photometric:
        image = photometric_jitter(image, item.seed)
    return image, boxes, torch.from_numpy(index.ignored(item.row))


def _read_at_size(index: Index, read: ReadImage, item: Item) -> Tensor:
    image = _read_patiently(read, item.row)
    fault = size_fault(index, item.row, tuple(image.shape[-2:]))
    if fault is not None:
        raise DataError(f"{index.file_name(item.row)}: {fault}")
    return resize_image(image, item.size)


def _read_patiently(read: ReadImage, row: int) -> Tensor:
    for pause_s in RETRY_AFTER_S:
        try:
            return read(row)
        except DataError:
            time.sleep(pause_s)
    return read(row)


def make_batch(
    index: Index,
    read: ReadImage,
    items: Sequence[Item],
    canvas: tuple[int, int],
    unread: Literal["raise", "substitute", "blank"] = "raise",
    cache: ImageCache | None = None,
) -> Batch:
    """Items read, augmented and padded to the canvas.

    Args:
        unread: what becomes of an image that cannot be read: an error, a neighbour in its place,
            or a black image without boxes. The batch names it.
        cache: images that need not be read again.
    """
    used, loaded, missed = [], [], []
    for item in items:
        try:
            one = item, load_item(index, read, item, cache)
        except DataError as error:
            if unread == "raise":
                raise
            missed.append(Unread(item.row, str(error)))
            blank = unread == "blank"
            one = (item, _blank(item)) if blank else _neighbour(index, read, item, canvas, cache)
        used.append(one[0])
        loaded.append(one[1])
    most = max(1, *(len(boxes) for _, boxes, _ in loaded))
    count = len(items)
    # pixel by pixel in memory, as images are decoded: copying them is a tenth of the work then
    images = torch.zeros(count, *canvas, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    gt_boxes = torch.zeros(count, most, 4)
    gt_valid = torch.zeros(count, most, dtype=torch.bool)
    gt_ignore = torch.zeros(count, most, dtype=torch.bool)
    for i, (image, boxes, ignore) in enumerate(loaded):
        height, width = image.shape[1:]
        images[i, :, :height, :width] = image
        gt_boxes[i, : len(boxes)] = boxes
        gt_valid[i, : len(boxes)] = True
        gt_ignore[i, : len(boxes)] = ignore
    return Batch(
        images=images,
        sizes=torch.tensor([item.size for item in used]),
        gt_boxes=gt_boxes,
        gt_valid=gt_valid,
        gt_ignore=gt_ignore,
        seeds=torch.tensor([item.seed for item in used]),
        rows=torch.tensor([item.row for item in used]),
        unread=tuple(missed),
    )


def _neighbour(
    index: Index, read: ReadImage, item: Item, canvas: tuple[int, int], cache: ImageCache | None
) -> tuple[Item, Loaded]:
    """The next image that can be read, in the place of an item, at a size that the canvas holds.

    It follows from the item and the files alone, so that a run that is resumed takes the same.

    Raises:
        DataError: that of the last of `SUBSTITUTES`, none of which can be read.
    """
    for k in range(1, SUBSTITUTES + 1):
        row = (item.row + k) % len(index)
        stored = index.sizes[row].tolist()
        scale = min(canvas[0] / stored[0], canvas[1] / stored[1], min(item.size) / min(stored))
        height, width = (max(1, int(side * scale)) for side in stored)
        other = replace(item, row=row, size=(height, width))
        try:
            return other, load_item(index, read, other, cache)
        except DataError:
            if k == SUBSTITUTES:
                raise
    raise AssertionError


def _blank(item: Item) -> Loaded:
    height, width = item.size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    return image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)


class TrainBatches(Dataset[Batch | DataError]):
    """Batch number `key` (0, 1, ...) of one process: piece key % accumulate of a step.

    Errors of the data are returned, not raised: a loader process would wrap them in a traceback.
    """

    def __init__(
        self,
        index: Index,
        read: ReadImage,
        planner: Planner,
        *,
        rank: int,
        world: int,
        accumulate: int,
        unread: Literal["raise", "substitute"] = "raise",
    ) -> None:
        self.index, self.read, self.planner, self.unread = index, read, planner, unread
        self.cache: ImageCache | None = None  # of what epochs before have read; `build.add_caches`
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __getitem__(self, key: int) -> Batch | DataError:
        step, piece = key // self.accumulate + 1, key % self.accumulate
        plan = self.planner.plan(step)
        share = len(plan.items) // (self.world * self.accumulate)
        start = (piece * self.world + self.rank) * share
        try:
            items = plan.items[start : start + share]
            return make_batch(self.index, self.read, items, plan.canvas, self.unread, self.cache)
        except DataError as error:
            return error


class EvalBatches(Dataset[Batch | DataError]):
    """All images of a split once, unaugmented, in batches of one canvas; every world-th batch."""

    def __init__(
        self,
        index: Index,
        read: ReadImage,
        *,
        batch_size: int,
        short_side: int,
        max_side: int,
        divisor: int,
        rank: int,
        world: int,
        unread: Literal["raise", "blank"] = "raise",
    ) -> None:
        self.index, self.read, self.divisor, self.unread = index, read, divisor, unread
        self.cache: ImageCache | None = None  # of what evaluations before have read
        self.sizes = [
            fit_size((height, width), short_side, max_side)
            for height, width in index.sizes.tolist()
        ]
        self.batches = list(same_canvas_batches(self.sizes, batch_size, divisor))[rank::world]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, key: int) -> Batch | DataError:
        items = [
            Item(row, self.sizes[row], flip=False, seed=0, photometric=False)
            for row in self.batches[key]
        ]
        try:
            canvas = canvas_of([item.size for item in items], self.divisor)
            return make_batch(self.index, self.read, items, canvas, self.unread, self.cache)
        except DataError as error:
            return error
