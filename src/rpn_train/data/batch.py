"""Padded batches, made whole by a loader process: one item of the data set is one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rpn_train.data.index import Index
from rpn_train.data.sampler import Item, Planner, canvas_of, same_canvas_batches
from rpn_train.data.transforms import fit_size, flip, photometric_jitter, resize
from rpn_train.errors import DataError

ReadImage = Callable[[int], Tensor]  # row of an index -> uint8 [3, H, W] RGB


@dataclass(frozen=True)
class Batch:
    """B images padded to one canvas on the right and below, with G rows of boxes each (G >= 1).

    images: uint8 [B, 3, H, W]. sizes: int64 [B, 2] (height, width) px without padding.
    gt_boxes: float32 [B, G, 4] xyxy px of the resized image; gt_valid: bool [B, G], false for
    padding rows; gt_ignore: bool [B, G], crowd and difficult. seeds: int64 [B], of anchor sampling.
    rows: int64 [B], of the index.
    """

    images: Tensor
    sizes: Tensor
    gt_boxes: Tensor
    gt_valid: Tensor
    gt_ignore: Tensor
    seeds: Tensor
    rows: Tensor

    @property
    def canvas(self) -> tuple[int, int]:
        """Padded (height, width) px."""
        height, width = self.images.shape[-2:]
        return height, width

    def to(self, device: torch.device) -> "Batch":
        """On a device; does not wait for the copy."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """In page-locked memory (called by the loader), so that copies to a GPU do not wait."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def load_item(index: Index, read: ReadImage, item: Item) -> tuple[Tensor, Tensor, Tensor]:
    """Image uint8 [3, h, w], boxes [g, 4] px and ignore [g] of one item, augmented."""
    image = read(item.row)
    stored = tuple(index.sizes[item.row].tolist())
    if image.shape[-2:] != stored:
        raise DataError(
            f"{index.file_name(item.row)}: expected {stored} px (height, width) as annotated, "
            f"got {tuple(image.shape[-2:])}"
        )
    image, boxes = resize(image, torch.from_numpy(index.boxes_xyxy(item.row)), item.size)
    if item.flip:
        image, boxes = flip(image, boxes)
    if item.photometric:
        image = photometric_jitter(image, item.seed)
    return image, boxes, torch.from_numpy(index.ignored(item.row))


def make_batch(
    index: Index, read: ReadImage, items: Sequence[Item], canvas: tuple[int, int]
) -> Batch:
    """Items read, augmented and padded to the canvas."""
    most = max(1, *(len(index.ignored(item.row)) for item in items))
    count = len(items)
    # pixel by pixel in memory, as images are decoded: copying them is a tenth of the work then
    images = torch.zeros(count, *canvas, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    gt_boxes = torch.zeros(count, most, 4)
    gt_valid = torch.zeros(count, most, dtype=torch.bool)
    gt_ignore = torch.zeros(count, most, dtype=torch.bool)
    for i, item in enumerate(items):
        image, boxes, ignore = load_item(index, read, item)
        images[i, :, : item.size[0], : item.size[1]] = image
        gt_boxes[i, : len(boxes)] = boxes
        gt_valid[i, : len(boxes)] = True
        gt_ignore[i, : len(boxes)] = ignore
    return Batch(
        images=images,
        sizes=torch.tensor([item.size for item in items]),
        gt_boxes=gt_boxes,
        gt_valid=gt_valid,
        gt_ignore=gt_ignore,
        seeds=torch.tensor([item.seed for item in items]),
        rows=torch.tensor([item.row for item in items]),
    )


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
    ) -> None:
        self.index, self.read, self.planner = index, read, planner
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __getitem__(self, key: int) -> Batch | DataError:
        step, piece = key // self.accumulate + 1, key % self.accumulate
        plan = self.planner.plan(step)
        share = len(plan.items) // (self.world * self.accumulate)
        start = (piece * self.world + self.rank) * share
        try:
            return make_batch(self.index, self.read, plan.items[start : start + share], plan.canvas)
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
    ) -> None:
        self.index, self.read, self.divisor = index, read, divisor
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
            return make_batch(self.index, self.read, items, canvas)
        except DataError as error:
            return error
