"""What was missed in each image: a table to sort and filter, and the images worth a look."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpn_train.recall import (
    NAMED_IOUS,
    Bools,
    Floats,
    Ints,
    ObjectArrays,
    ProposalArrays,
    Recall,
)
from rpn_train.run_log import write_text

ALL = 0  # index in SIZES
COLUMNS = (
    *("file_name", "image_id", "objects", "found_iou50", "found_iou70"),
    *("worst_iou", "worst_x", "worst_y", "worst_w", "worst_h"),
)


@dataclass(frozen=True, eq=False)
class ImageMisses:
    """What the proposals found and missed in each of N images, at the largest number scored.

    Args:
        objects: [N] int64, those that count.
        found_iou50, found_iou70: [N] int64, how many of them were found at these thresholds.
        worst_iou: [N] float64, IoU of the worst missed object with the proposal that overlaps it
            most; NaN where all are found. Worst, of those not found at IoU 0.5, is the one for
            which it is lowest; of several the largest. It may exceed 0.5: the proposal found
            another object.
        worst_xywh: [N, 4] float64, the box of that object in pixels; NaN where all are found.
    """

    objects: Ints
    found_iou50: Ints
    found_iou70: Ints
    worst_iou: Floats
    worst_xywh: Floats


def image_misses(proposals: ProposalArrays, objects: ObjectArrays, recall: Recall) -> ImageMisses:
    """Count the objects found in each image and pick the worst that was missed.

    Args:
        proposals, objects: those that `recall` is of.
    """
    num_images = len(objects.offsets) - 1
    owner = np.repeat(np.arange(num_images), np.diff(objects.offsets))  # [M] image of each object
    counted = objects.in_size()[ALL]
    found = recall.matched_rank[:, ALL] >= 0  # [T, M]

    def per_image(which: Bools) -> Ints:
        return np.bincount(owner[which], minlength=num_images)

    missed = np.flatnonzero(counted & ~found[NAMED_IOUS["iou50"]])
    ious = _best_ious(proposals, objects, owner, missed, max(recall.max_proposals))
    order = np.lexsort((-objects.areas[missed], ious, owner[missed]))
    images, first = np.unique(owner[missed][order], return_index=True)
    worst_iou = np.full(num_images, np.nan)
    worst_iou[images] = ious[order[first]]
    worst_xywh = np.full((num_images, 4), np.nan)
    worst_xywh[images] = objects.boxes_xywh[missed[order[first]]]
    return ImageMisses(
        objects=per_image(counted),
        found_iou50=per_image(found[NAMED_IOUS["iou50"]]),
        found_iou70=per_image(found[NAMED_IOUS["iou70"]]),
        worst_iou=worst_iou,
        worst_xywh=worst_xywh,
    )


def worst_images(misses: ImageMisses, count: int) -> Ints:
    """Rows of the `count` images that miss most objects at IoU 0.5, the worst first.

    Of equals the one that misses the larger share comes first, then the earlier one. An image
    that misses nothing is never among them, so there may be fewer.
    """
    missed = misses.objects - misses.found_iou50
    # Of equally many missed, the larger share is that of fewer objects.
    order = np.lexsort((misses.objects, -missed))
    return order[missed[order] > 0][:count]


def write_misses(
    path: Path, misses: ImageMisses, image_ids: Ints, file_names: Sequence[str]
) -> None:
    """Write a CSV file (RFC 4180, UTF-8) with a header and a row for each image, in their order.

    Where all objects are found the cells of the worst are empty. Numbers are the shortest that
    read back to the same float64. The file is written whole or not at all.

    Args:
        image_ids: [N].
        file_names: [N].
    """
    numbers = np.column_stack([misses.worst_iou, misses.worst_xywh])  # [N, 5]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for name, image_id, objects, iou50, iou70, worst in zip(
        file_names, image_ids, misses.objects, misses.found_iou50, misses.found_iou70, numbers,
        strict=True,
    ):  # fmt: skip
        writer.writerow([name, image_id, objects, iou50, iou70, *map(_cell, worst)])
    write_text(path, text.getvalue())


def _cell(number: float) -> str:
    return "" if np.isnan(number) else np.format_float_positional(number, trim="-")


def _best_ious(
    proposals: ProposalArrays, objects: ObjectArrays, owner: Ints, chosen: Ints, limit: int
) -> Floats:
    """The highest IoU of each chosen object, rising rows [K], with the `limit` best proposals."""
    ious = np.zeros(len(chosen))
    starts = np.flatnonzero(np.diff(owner[chosen], prepend=-1))
    for mine in map(slice, starts, [*starts[1:], len(chosen)]):
        image = owner[chosen[mine.start]]
        rows = slice(*proposals.offsets[image : image + 2])
        best = np.argsort(-proposals.scores[rows], kind="stable")[:limit]
        boxes = objects.boxes_xywh[chosen[mine]]
        ious[mine] = _ious(boxes, proposals.boxes_xywh[rows][best]).max(axis=1, initial=0.0)
    return ious


def _ious(objects: Floats, proposals: Floats) -> Floats:
    """IoU [G, P] of boxes [G, 4] and [P, 4], xywh; 0 where neither has an extent."""
    gx, gy, gw, gh = objects.T[:, :, None]
    x, y, w, h = np.ascontiguousarray(proposals.T)
    overlap_w = np.minimum(x + w, gx + gw) - np.maximum(x, gx)  # [G, P]
    overlap_h = np.minimum(y + h, gy + gh) - np.maximum(y, gy)
    overlap = np.maximum(overlap_w, 0.0) * np.maximum(overlap_h, 0.0)
    union = w * h + gw * gh - overlap
    return overlap / np.where(union > 0, union, 1.0)
