"""COCO annotation files: `instances_*.json` and a folder of images.

The file is decoded from a memory map into typed records that hold only the fields below: polygons,
nine tenths of the bytes, are skipped without an object being made of them.
"""

import gc
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from rpn_train.data.index import Index, build_index, check_categories, list_folder
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


def read_coco(
    annotations: Path,
    images: Path,
    *,
    categories: Sequence[str] | None,
    keep_empty: bool,
    need_images: bool = True,
) -> Index:
    """Read a split in the COCO format.

    Images keep the order of the file. The boxes of an image come by category, then in the order of
    the file, as in COCOeval, where their order decides between equal IoUs. `iscrowd` makes a box to
    ignore; without `area` it is width x height.

    Args:
        annotations: the JSON file.
        images: the folder its `file_name`s are relative to.
        categories: names whose boxes are read; None for all. Images stay whatever it is.
        keep_empty: keep images without an object (see `build_index`).
        need_images: whether every image must be in its folder.

    Raises:
        DataError: a file is missing, broken or at odds with itself, or a category is unknown.
    """
    on_disk = list_folder(images, "images") if need_images else None
    with _no_collections():
        return _to_index(annotations, images, _decode(annotations), on_disk, categories, keep_empty)


def _to_index(
    annotations: Path,
    images: Path,
    file: _File,
    on_disk: frozenset[str] | None,
    categories: Sequence[str] | None,
    keep_empty: bool,
) -> Index:
    image_ids = _column(file.images, "id", np.int64)
    # All in the order of the file, which is that of the records in memory: half the time.
    found = file.annotations
    ids, box_image_ids, crowd = (
        _column(found, name, np.int64) for name in ("id", "image_id", "iscrowd")
    )
    _check_ids(annotations, image_ids, ids, box_image_ids)
    by_id = np.argsort(image_ids)
    read = _of_categories(annotations, file, categories)
    numbers = chain.from_iterable(map(attrgetter("bbox"), found))
    index = build_index(
        source=annotations,
        root=images,
        image_ids=image_ids,
        file_names=[image.file_name for image in file.images],
        sizes=np.stack([_column(file.images, name, np.int64) for name in ("height", "width")], 1),
        box_rows=by_id[np.searchsorted(image_ids, box_image_ids, sorter=by_id)][read],
        box_ids=ids[read],
        boxes_xywh=np.fromiter(numbers, np.float64, 4 * len(found)).reshape(-1, 4)[read],
        areas=_column(found, "area", np.float64)[read],
        ignore=(crowd != 0)[read],
        keep_empty=keep_empty,
    )
    if on_disk is not None:
        _check_files(annotations, index, on_disk)
    return index


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


def _decode(path: Path) -> _File:
    if not path.is_file():
        given = "a folder" if path.exists() else "nothing"
        raise DataError(f"expected a COCO annotation file, got {given} at {path}")
    if path.stat().st_size == 0:  # which mmap refuses
        raise DataError(f"expected a COCO annotation file, got an empty one: {path}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a COCO annotation file: {error}") from error


def _column(records: Sequence[msgspec.Struct], name: str, kind: type[_T]) -> NDArray[_T]:
    """A field of all records."""
    return np.fromiter(map(attrgetter(name), records), kind, len(records))


def _check_ids(
    path: Path,
    image_ids: NDArray[np.int64],
    ids: NDArray[np.int64],
    box_image_ids: NDArray[np.int64],
) -> None:
    different, counts = np.unique(ids, return_counts=True)
    if len(different) < len(ids):
        twice = different[counts > 1][0]
        raise DataError(f"{path}: expected every annotation id once, got {twice} more than once")
    unknown = np.flatnonzero(~np.isin(box_image_ids, image_ids))
    if len(unknown):
        raise DataError(
            f"{path}: expected annotations of its own images, "
            f"got annotation {ids[unknown[0]]} of image {box_image_ids[unknown[0]]}"
        )


def _of_categories(path: Path, file: _File, categories: Sequence[str] | None) -> NDArray[np.intp]:
    """Rows of the annotations that are read: by category, then in the order of the file."""
    category_ids = _column(file.annotations, "category_id", np.int64)
    order = np.argsort(category_ids, kind="stable")
    if categories is None:
        return order
    check_categories(categories, {category.name for category in file.categories}, path)
    wanted = [category.id for category in file.categories if category.name in categories]
    return order[np.isin(category_ids[order], wanted)]


def _check_files(path: Path, index: Index, on_disk: frozenset[str]) -> None:
    names = index.file_names()
    # The listing answers for flat folders; only a name with a subfolder costs a look at the disk.
    missing = [n for n in names if n not in on_disk and not (index.root / n).is_file()]
    if missing:
        raise DataError(
            f"expected {len(names)} images of {path} in {index.root}, "
            f"{len(missing)} are missing, first {missing[0]!r}"
        )
