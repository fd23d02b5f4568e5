"""PASCAL VOC: a folder of XML files, a folder of images, and a text file of image stems.

VOC coordinates are pixel numbers that start at 1, both ends included: a box covers the pixels xmin
to xmax, so its edges are at xmin - 1 and xmax.
"""

from collections.abc import Sequence
from contextlib import suppress
from os.path import isfile
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
import numpy as np
from defusedxml import DefusedXmlException
from numpy.typing import NDArray

from rpn_train.data.box_faults import NOT_FOUR_NUMBERS
from rpn_train.data.faults import FaultError, LeftOut
from rpn_train.data.index import (
    MAX_SIDE_PX,
    Index,
    build_index,
    check_categories,
    leaves_root,
    list_folder,
)
from rpn_train.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Object(NamedTuple):
    row: int  # of its image in the split
    number: int  # of the object in its XML file, from 1
    category: str
    corners: tuple[float, ...]  # xmin, ymin, xmax, ymax as annotated
    difficult: bool


def read_voc(
    annotations: Path,
    images: Path,
    split: Path,
    *,
    categories: Sequence[str] | None,
    keep_empty: bool,
) -> Index:
    """Read a split in the PASCAL VOC format.

    Images keep the order of `split`, which numbers them 1 to N; objects keep the order of their
    file. `difficult` makes a box to ignore, a `<part>` is no object, the area is that of the
    box, and entities in the XML are refused. An image whose XML is missing or broken is left out,
    as is an object without a box. Images are not looked at: see `data/headers.py`.

    Args:
        annotations: the folder of XML files.
        images: the folder of images. The file of an image is its `<filename>` or, where there is
            no such file, its stem with .jpg, .jpeg or .png, or .jpg where there is none at all.
        split: text file, the first word of each line a stem (so `ImageSets/Main/train.txt` and
            `cat_train.txt` name the same images).
        categories: names whose boxes are read; None for all. Images stay whatever it is.
        keep_empty: keep images without an object (see `build_index`).

    Raises:
        DataError: a folder or the split is missing, no image can be used, an XML file has
            entities, or no file in `annotations` has such a category.
    """
    list_folder(annotations, "VOC annotations")
    on_disk = list_folder(images, "images")
    rows: list[int] = []
    file_names, sizes, objects = [], [], []
    left_out: list[LeftOut] = []
    for number, stem in enumerate(_read_split(split)):
        try:
            tree = _read_xml(annotations / f"{stem}.xml")
            name, size = _image_name(tree, stem, images, on_disk), _size(tree)
        except FaultError as fault:
            left_out.append(LeftOut(stem, None, fault.reason, fault.found))
            continue
        found, faults = _objects(tree, len(rows), name)
        rows.append(number)
        file_names.append(name)
        sizes.append(size)
        objects += found
        left_out += faults
    if not rows and left_out:
        raise DataError(f"{split}: expected images, got none that can be used; {left_out[0]}")
    if categories is not None:
        objects = _of_categories(objects, categories, annotations)
    return build_index(
        source=split,
        root=images,
        image_ids=np.array(rows, np.int64) + 1,
        file_names=file_names,
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        box_rows=np.array([o.row for o in objects], np.int64),
        box_ids=np.array([o.number for o in objects], np.int64),
        boxes_xywh=_boxes_xywh(objects),
        areas=np.full(len(objects), np.nan),
        ignore=np.array([o.difficult for o in objects], np.bool_),
        keep_empty=keep_empty,
        left_out=left_out,
    )


def _boxes_xywh(objects: Sequence[_Object]) -> NDArray[np.float64]:
    corners = np.array([o.corners for o in objects], np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):  # build_index looks for the infinities
        extent = corners[:, 2:] - corners[:, :2]
    # Pixel xmax is part of the box, so 1 is added; not where xmax <= xmin, which is a fault of the
    # annotation and no box of one pixel: build_index drops what has no extent.
    return np.concatenate([corners[:, :2] - 1, extent + (extent > 0)], axis=1)


def _read_split(split: Path) -> list[str]:
    if not split.is_file():
        there = sorted(
            (path.stem for path in split.parent.glob("*.txt")), key=lambda s: (len(s), s)
        )
        raise DataError(
            f"expected a list of images, got nothing at {split}; "
            f"splits there: {', '.join(there[:8]) or 'none'}{', ...' * (len(there) > 8)}"
        )
    try:
        lines = split.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{split}: not a list of images: {error}") from error
    stems = [line.split()[0] for line in lines if line.strip()]
    for stem in stems:
        if leaves_root(stem):
            raise DataError(f"{split}: expected names of images without folder, got {stem!r}")
    return stems


def _read_xml(path: Path) -> Element:
    try:
        return defusedxml.ElementTree.fromstring(path.read_bytes())
    except FileNotFoundError:
        raise FaultError("without annotation file", path.name) from None
    except DefusedXmlException as error:  # no accident
        raise DataError(f"{path}: not a VOC annotation file: {error}") from error
    except (OSError, ParseError, ValueError, LookupError) as error:  # the last two: encodings
        raise FaultError("with a broken annotation file", f"{path.name}: {error}") from error


def _image_name(tree: Element, stem: str, images: Path, on_disk: frozenset[str]) -> str:
    named = tree.findtext("filename", "").strip()
    if named in on_disk:
        return named
    names = [stem + suffix for suffix in _SUFFIXES]
    there = (name for name in names if name in on_disk or isfile(images / name))  # or below
    return next(there, names[0])


def _size(tree: Element) -> tuple[int, int]:
    """(height, width)"""
    text = tree.findtext("size/height", ""), tree.findtext("size/width", "")
    try:
        height, width = map(int, text)
    except ValueError:
        height = width = 0
    if not (1 <= height <= MAX_SIDE_PX and 1 <= width <= MAX_SIDE_PX):
        raise FaultError("without a size", f"height {text[0]!r}, width {text[1]!r}")
    return height, width


def _objects(tree: Element, row: int, name: str) -> tuple[list[_Object], list[LeftOut]]:
    """The objects of an image, numbered from 1, and those that cannot be read."""
    objects, faults = [], []
    for number, element in enumerate(tree.iterfind("object"), start=1):
        difficult = element.findtext("difficult", "0").strip()
        box = element.find("bndbox")
        try:
            if box is None:
                raise FaultError("without bndbox")
            if difficult not in ("0", "1"):
                raise FaultError("difficult neither 0 nor 1", repr(difficult)[:80])
            corners = _corners(box)
        except FaultError as fault:
            faults.append(LeftOut(name, number, fault.reason, fault.found))
        else:
            objects.append(_Object(row, number, _category(element), corners, difficult == "1"))
    return objects, faults


def _category(element: Element) -> str:
    return element.findtext("name", "").strip()


def _corners(box: Element) -> tuple[float, ...]:
    text = [box.findtext(tag, "").strip() for tag in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return tuple(map(float, text))
    except ValueError:
        raise FaultError(NOT_FOUR_NUMBERS, ", ".join(map(repr, text))[:80]) from None


def _of_categories(
    objects: list[_Object], categories: Sequence[str], annotations: Path
) -> list[_Object]:
    known = {o.category for o in objects}
    if not known.issuperset(categories):  # a small split may lack one that its data set has
        for path in annotations.glob("*.xml"):
            with suppress(FaultError):
                known |= {_category(element) for element in _read_xml(path).iterfind("object")}
    check_categories(categories, known, annotations)
    return [o for o in objects if o.category in categories]
