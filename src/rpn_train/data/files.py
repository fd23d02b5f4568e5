"""Images without annotations: a file, a folder, a glob, or those in memory."""

import os
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from rpn_train.data.index import Index, build_index
from rpn_train.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}  # what `read_image` decodes
_TURNED = {5, 6, 7, 8}  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112  # the EXIF tag


def index_files(pattern: str) -> Index:
    """Images of a file, a folder with all below it, or a glob; sorted by path, ids from 1.

    Sizes are those of the upright image, as EXIF has it, which is what `read_image(path,
    upright=True)` gives. Only headers are read.

    Raises:
        DataError: nothing is there, or a file is not an image.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        root = path
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    else:
        paths = [path] if path.is_file() else sorted(Path(p) for p in glob(str(path)))
        root = Path(os.path.dirname(re.split(r"[*?\[]", str(path))[0]))
    if not paths:
        raise DataError(
            f"images: expected a file, a folder or a glob of {', '.join(sorted(SUFFIXES))}, "
            f"got nothing at {pattern}"
        )
    names = [str(p.relative_to(root)) for p in paths]
    return _without_boxes(root, names, [_upright_size(p) for p in paths])


def index_images(sizes: Sequence[tuple[int, ...]]) -> Index:
    """Images that are in memory, of these (height, width); named by their numbers, ids from 1."""
    return _without_boxes(Path("images"), [str(i) for i in range(len(sizes))], sizes)


def _without_boxes(root: Path, names: list[str], sizes: Sequence[tuple[int, ...]]) -> Index:
    return build_index(
        source=root,
        root=root,
        image_ids=np.arange(1, len(names) + 1),
        file_names=names,
        sizes=np.array(sizes, np.int64),
        box_rows=np.zeros(0, np.int64),
        box_ids=np.zeros(0, np.int64),
        boxes_xywh=np.zeros((0, 4)),
        areas=np.zeros(0),
        ignore=np.zeros(0, np.bool_),
        keep_empty=True,
    )


def _upright_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            width, height = image.size
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: expected a readable image, got another file") from error
    return (width, height) if turned else (height, width)
