"""PASCAL VOC: a folder of XML files, a folder of images, and a text file of image stems.

VOC coordinates are pixel numbers that start at 1, both ends included: a box covers the pixels xmin
to xmax, so its edges are at xmin - 1 and xmax.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
import numpy as np

from rpn_train.data.index import Index, build_index, check_categories, leaves_root, list_folder
from rpn_train.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Object(NamedTuple):
    row: int  # of its image in the split
    number: int  # of the object in its XML file, from 1
    category: str
    corners: tuple[float, ...] | None  # xmin, ymin, xmax, ymax as annotated; None: no bndbox
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
    box, and entities in the XML are refused.

    Args:
        annotations: the folder of XML files.
        images: the folder of images. The file of an image is its `<filename>` or, where there is
            no such file, its stem with .jpg, .jpeg or .png.
        split: text file, the first word of each line a stem (so `ImageSets/Main/train.txt` and
            `cat_train.txt` name the same images).
        categories: names whose boxes are read; None for all. Images stay whatever it is.
        keep_empty: keep images without an object (see `build_index`).

    Raises:
        DataError: a file is missing or broken, or no file in `annotations` has such a category.
    """
    list_folder(annotations, "VOC annotations")
    on_disk = list_folder(images, "images")
    file_names, sizes, objects = [], [], []
    for row, stem in enumerate(_read_split(split)):
        path = annotations / f"{stem}.xml"
        tree = _read_xml(path)
        file_names.append(_image_name(tree, stem, images, on_disk))
        sizes.append(_size(tree, path))
        objects += _objects(tree, path, row)
    if categories is not None:
        objects = _of_categories(objects, categories, annotations)
    boxed = [o for o in objects if o.corners is not None]
    corners = np.array([o.corners for o in boxed], np.float64).reshape(-1, 4)
    extent = corners[:, 2:] - corners[:, :2]
    # Pixel xmax is part of the box, so 1 is added; not where xmax <= xmin, which is a fault of the
    # annotation and no box of one pixel: build_index drops what has no extent.
    boxes_xywh = np.concatenate([corners[:, :2] - 1, extent + (extent > 0)], axis=1)
    return build_index(
        source=split,
        root=images,
        image_ids=np.arange(1, len(file_names) + 1),
        file_names=file_names,
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        box_rows=np.array([o.row for o in boxed], np.int64),
        box_ids=np.array([o.number for o in boxed], np.int64),
        boxes_xywh=boxes_xywh,
        areas=np.full(len(boxed), np.nan),
        ignore=np.array([o.difficult for o in boxed], np.bool_),
        keep_empty=keep_empty,
        dropped=[
            f"annotation {o.number} of image {file_names[o.row]!r}: no bndbox"
            for o in objects
            if o.corners is None
        ],
    )


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
    if not path.is_file():
        raise DataError(f"expected a VOC annotation file, got nothing at {path}")
    try:
        return defusedxml.ElementTree.fromstring(path.read_bytes())
    except (ParseError, ValueError, LookupError) as error:  # the last two: entities, encodings
        raise DataError(f"{path}: not a VOC annotation file: {error}") from error


def _image_name(tree: Element, stem: str, images: Path, on_disk: frozenset[str]) -> str:
    named = tree.findtext("filename", "").strip()
    if named in on_disk:
        return named
    for name in (stem + suffix for suffix in _SUFFIXES):
        if name in on_disk or (images / name).is_file():  # a stem may have a subfolder
            return name
    raise DataError(f"expected image {stem}.jpg (.jpeg, .png) in {images}, got nothing")


def _size(tree: Element, path: Path) -> tuple[int, int]:
    """(height, width)"""
    text = tree.findtext("size/height"), tree.findtext("size/width")
    try:
        height, width = int(text[0] or ""), int(text[1] or "")
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise DataError(f"{path}: expected <size> with height and width in pixels, got {text}")
    return height, width


def _objects(tree: Element, path: Path, row: int) -> list[_Object]:
    return [
        _Object(
            row,
            number,
            _category(element),
            _corners(element, path, number),
            _difficult(element, path, number),
        )
        for number, element in enumerate(tree.iterfind("object"), start=1)
    ]


def _category(element: Element) -> str:
    return element.findtext("name", "").strip()


def _corners(element: Element, path: Path, number: int) -> tuple[float, ...] | None:
    box = element.find("bndbox")
    if box is None:
        return None
    text = [box.findtext(tag, "") for tag in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return tuple(map(float, text))
    except ValueError:
        raise DataError(
            f"{path}: expected numbers xmin, ymin, xmax, ymax in object {number}, got {text}"
        ) from None


def _difficult(element: Element, path: Path, number: int) -> bool:
    text = element.findtext("difficult", "0").strip()
    if text not in ("0", "1"):
        raise DataError(f"{path}: expected difficult 0 or 1 in object {number}, got {text!r}")
    return text == "1"


def _of_categories(
    objects: list[_Object], categories: Sequence[str], annotations: Path
) -> list[_Object]:
    known = {o.category for o in objects}
    if not known.issuperset(categories):  # a small split may lack one that its data set has
        for path in annotations.glob("*.xml"):
            known |= {_category(element) for element in _read_xml(path).iterfind("object")}
    check_categories(categories, known, annotations)
    return [o for o in objects if o.category in categories]
