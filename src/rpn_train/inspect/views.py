"""What the cells of a network see of the images of a split, in theory and measured."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rpn_train.config import TrainConfig
from rpn_train.data.batch import ReadImage, make_batch
from rpn_train.data.index import Index
from rpn_train.data.sampler import Item, canvas_of, same_canvas_batches
from rpn_train.data.transforms import fit_size
from rpn_train.inspect.receptive_field import EffectiveField, ReceptiveField, effective_fields
from rpn_train.model import RPN, normalize_images

EFFECTIVE_IMAGES = 4  # one is enough for the extent, a few for a smooth figure


class Views(NamedTuple):
    """What the cells of each level see: in theory, and measured; None where it is not known."""

    fields: Sequence[ReceptiveField] | None
    effective: Sequence[EffectiveField] | None


def measured_fields(
    model: RPN, index: Index, read: ReadImage, cfg: TrainConfig
) -> list[EffectiveField]:
    """The effective field of each level, over a few images of the most frequent canvas.

    Like `effective_fields` of all these images, but one at a time: gradients take much memory.

    Raises:
        DataError: an image is missing or broken.
    """
    sizes = [
        fit_size((h, w), cfg.image.short_side, cfg.image.max_side) for h, w in index.sizes.tolist()
    ]
    divisor = max(model.grid.strides)
    rows = max(same_canvas_batches(sizes, EFFECTIVE_IMAGES, divisor), key=len)
    heats = []
    for row in rows:
        item = Item(row, sizes[row], flip=False, seed=0, photometric=False)
        batch = make_batch(index, read, [item], canvas_of([item.size], divisor))
        batch = batch.to(next(model.parameters()).device)
        image = normalize_images(batch.images, batch.sizes)
        heats.append(effective_fields(model, image))
    return [
        EffectiveField(torch.stack([f.heat for f in of_level]).mean(0), of_level[0].centre)
        for of_level in zip(*heats, strict=True)
    ]
