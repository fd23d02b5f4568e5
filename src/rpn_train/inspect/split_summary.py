"""The data of a split in figures: how much there is, of what sizes, and what is wrong with it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rpn_train.config import DataConfig
from rpn_train.data.headers import header_faults
from rpn_train.data.index import Index
from rpn_train.inspect.coverage import Objects

OVER_BORDER_PX = 1.0  # which rounding does not explain


@dataclass(frozen=True)
class Fault:
    """How often something is wrong, and the first place."""

    count: int
    first: str


@dataclass(frozen=True)
class Spread:
    """Percentiles and the largest of some numbers; NaN where there are none."""

    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    largest: float


@dataclass(frozen=True)
class SplitSummary:
    """The data. Sides, sqrt(width x height), and ratios, height / width, are of resized objects.

    ignored: crowd and difficult boxes, which are no objects. left_out: reason -> annotations and
    images that training leaves out. files: what is wrong with the image files looked at.
    over_border: objects that reach over the border by more than `OVER_BORDER_PX` as annotated.
    repeated: objects with the very box of an earlier one of their image.
    """

    images: int
    empty_images: int
    objects: int
    ignored: int
    left_out: dict[str, Fault]
    files_checked: int
    files: dict[str, Fault]
    over_border: int
    repeated: int
    objects_per_image: Spread
    side_px: Spread
    ratio: Spread


def summarize_split(
    index: Index,
    objects: Objects,
    per_image: NDArray[np.int64],
    files_checked: int,
    files: dict[str, Fault],
) -> SplitSummary:
    """A split whose resized objects are given.

    Args:
        per_image: [N] objects in each image.
        files_checked, files: of `file_faults`.
    """
    width, height = objects.width_height()
    owner = objects.image.numpy()
    boxes = index.boxes_xywh[~index.ignore]
    beyond = np.concatenate([-boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    beyond[:, 2:] -= index.sizes[owner][:, ::-1]
    columns = np.column_stack([owner, boxes])
    columns = columns[np.lexsort(columns.T)]
    return SplitSummary(
        images=len(index),
        empty_images=int((per_image == 0).sum()),
        objects=len(boxes),
        ignored=int(index.ignore.sum()),
        left_out=_faults((one.reason, one.place) for one in index.left_out),
        files_checked=files_checked,
        files=files,
        over_border=int((beyond > OVER_BORDER_PX).any(axis=1).sum()),
        repeated=int((columns[1:] == columns[:-1]).all(axis=1).sum()),
        objects_per_image=spread(per_image),
        side_px=spread(objects.sides().double().numpy()),
        ratio=spread((height / width).double().numpy()),
    )


def file_faults(index: Index, rows: Iterable[int], data: DataConfig) -> dict[str, Fault]:
    """What is wrong with some image files, by their headers: reason -> how often, and where first.

    A file that training could not use, as far as its header says.
    """
    found = header_faults(index, rows, upright=data.exif == "apply", max_pixels=data.max_pixels)
    return _faults((fault.reason, index.file_name(row)) for row, fault in found.items())


def spread(values: NDArray[np.float64] | NDArray[np.int64]) -> Spread:
    """Percentiles of numbers [K]."""
    if not len(values):
        return Spread(*[float("nan")] * 6)
    return Spread(*np.percentile(values, [5, 25, 50, 75, 95, 100]).tolist())


def _faults(found: Iterable[tuple[str, str]]) -> dict[str, Fault]:
    """(reason, place) of each -> reason -> how many, and the first; the most frequent first."""
    faults: dict[str, Fault] = {}
    for reason, place in found:
        first = faults[reason].first if reason in faults else place
        faults[reason] = Fault(faults[reason].count + 1 if reason in faults else 1, first)
    return dict(sorted(faults.items(), key=lambda item: -item[1].count))
