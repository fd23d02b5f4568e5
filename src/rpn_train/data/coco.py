"""COCO annotation files: `instances_*.json` and a folder of images.

The file is decoded from a memory map into typed records that hold only the fields below: polygons,
nine tenths of the bytes, are skipped without an object being made of them.
"""

import gc
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from rpn_train.data.box_faults import NOT_FOUR_NUMBERS
from rpn_train.data.faults import LeftOut
from rpn_train.data.index import Index, build_index, check_categories
from rpn_train.errors import DataError

_T = TypeVar("_T", np.int64, np.float64)
_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # fits int64


class _Image(msgspec.Struct, gc=False):
    id: _Int
    file_name: str
    height: _Int
    width: _Int


class _Annotation(msgspec.Struct, gc=False):
    id: _Int
    image_id: _Int
    category_id: _Int
    bbox: tuple[float, float, float, float]
    area: float = float("nan")  # JSON has no NaN, so this says absent
    iscrowd: _Int = 0


class _Category(msgspec.Struct, gc=False):
    id: _Int
    name: str


class _File(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category] = []


class _LooseAnnotation(msgspec.Struct, gc=False):
    id: _Int
    image_id: _Int
    category_id: _Int
    bbox: Any = None
    area: float = math.nan
    iscrowd: _Int = 0


class _LooseFile(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_LooseAnnotation]
    categories: list[_Category] = []


def read_coco(
    annotations: Path,
    images: Path,
    *,
    categories: Sequence[str] | None,
    keep_empty: bool,
) -> Index:
    """Read a split in the COCO format.

    Images keep the order of the file. The boxes of an image come by category, then in the order of
    the file, as in COCOeval, where their order decides between equal IoUs. `iscrowd` makes a box to
    ignore; without `area` it is width x height. Images are not looked at: see `data/headers.py`.

    Args:
        annotations: the JSON file.
        images: the folder its `file_name`s are relative to.
        categories: names whose boxes are read; None for all. Images stay whatever it is.
        keep_empty: keep images without an object (see `build_index`).

    Raises:
        DataError: the file is missing, broken or at odds with itself, or a category is unknown.
    """
    with _no_collections():
        file, faults = _decode(annotations)
        return _to_index(annotations, images, file, faults, categories, keep_empty)


def _to_index(
    annotations: Path,
    images: Path,
    file: _File,
    faults: list[LeftOut],
    categories: Sequence[str] | None,
    keep_empty: bool,
) -> Index:
    image_ids = _column(file.images, "id", np.int64)
    # All in the order of the file, which is that of the records in memory: half the time.
    found = file.annotations
    ids, box_image_ids, crowd = (
        _column(found, name, np.int64) for name in ("id", "image_id", "iscrowd")
    )
    _check_ids(annotations, ids)
    known = np.isin(box_image_ids, image_ids)
    faults += [
        LeftOut(f"id {box_image_ids[m]}", int(ids[m]), "of an image that the file has not")
        for m in np.flatnonzero(~known)
    ]
    by_id = np.argsort(image_ids)
    read = _of_categories(annotations, file, categories)
    read = read[known[read]]
    numbers = chain.from_iterable(map(attrgetter("bbox"), found))
    return build_index(
        source=annotations,
        root=images,
        image_ids=image_ids,
        file_names=[image.file_name for image in file.images],
        sizes=np.stack([_column(file.images, name, np.int64) for name in ("height", "width")], 1),
        box_rows=by_id[np.searchsorted(image_ids[by_id], box_image_ids[read])],
        box_ids=ids[read],
        boxes_xywh=np.fromiter(numbers, np.float64, 4 * len(found)).reshape(-1, 4)[read],
        areas=_column(found, "area", np.float64)[read],
        ignore=(crowd != 0)[read],
        keep_empty=keep_empty,
        left_out=faults,
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's collector, which would walk through millions of new boxes to free none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _decode(path: Path) -> tuple[_File, list[LeftOut]]:
    """The file, and the annotations of it that cannot be read."""
    if not path.is_file():
        given = "a folder" if path.exists() else "nothing"
        raise DataError(f"expected a COCO annotation file, got {given} at {path}")
    size = path.stat().st_size
    if size == 0:  # which mmap refuses
        raise DataError(f"expected a COCO annotation file, got an empty one: {path}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return msgspec.json.decode(data, type=_File), []
            except msgspec.DecodeError as error:  # of the whole, for the sake of one number perhaps
                whole = _decode_loosely(data[:])
                if whole is None:
                    raise error
                return whole
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        where = f" after byte {size}" if "truncated" in str(error) else ""
        raise DataError(f"{path}: not a COCO annotation file: {error}{where}") from error


def _decode_loosely(data: bytes) -> tuple[_File, list[LeftOut]] | None:
    """A file in which only boxes are at fault, NaN for one, which Python writes and JSON has not.

    None if this is not JSON either.

    Raises:
        msgspec.ValidationError, UnicodeEncodeError: there is more to it.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    file = msgspec.convert(content, _LooseFile)
    names = {image.id: image.file_name for image in file.images}
    "".join(names.values()).encode()  # half of a surrogate pair is no character, for json it is
    sound, faults = [], []
    for one in file.annotations:
        try:
            numbers = tuple(map(_number, one.bbox))
            if len(numbers) != 4:
                raise ValueError("four")
        except (TypeError, ValueError, OverflowError):
            known = one.image_id in names
            name = names[one.image_id] if known else f"id {one.image_id}"
            faults.append(LeftOut(name, one.id, NOT_FOUR_NUMBERS, json.dumps(one.bbox)[:80]))
        else:
            area = one.area if math.isfinite(one.area) else math.nan
            ids = (one.id, one.image_id, one.category_id)
            sound.append(_Annotation(*ids, numbers, area, one.iscrowd))
    return _File(file.images, sound, file.categories), faults


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)


def _column(records: Sequence[msgspec.Struct], name: str, kind: type[_T]) -> NDArray[_T]:
    """A field of all records."""
    return np.fromiter(map(attrgetter(name), records), kind, len(records))


def _check_ids(path: Path, ids: NDArray[np.int64]) -> None:
    different, counts = np.unique(ids, return_counts=True)
    if len(different) < len(ids):
        twice = different[counts > 1][0]
        raise DataError(f"{path}: expected every annotation id once, got {twice} more than once")


def _of_categories(path: Path, file: _File, categories: Sequence[str] | None) -> NDArray[np.intp]:
    """Rows of the annotations that are read: by category, then in the order of the file."""
    category_ids = _column(file.annotations, "category_id", np.int64)
    order = np.argsort(category_ids, kind="stable")
    if categories is None:
        return order
    check_categories(categories, {category.name for category in file.categories}, path)
    wanted = [category.id for category in file.categories if category.name in categories]
    return order[np.isin(category_ids[order], wanted)]
