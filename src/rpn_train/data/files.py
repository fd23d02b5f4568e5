"""Images without annotations: a file, a folder, a glob, or those in memory."""

import os
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np

from rpn_train.data.faults import FaultError, LeftOut
from rpn_train.data.headers import MAX_PIXELS, header_size, without_size_warning
from rpn_train.data.index import Index, build_index
from rpn_train.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}  # what `read_image` decodes


def index_files(pattern: str, *, max_pixels: int = MAX_PIXELS) -> Index:
    """Images of a file, a folder with all below it, or a glob; sorted by path, ids from 1.

    Sizes are those of the upright image, as EXIF has it, which is what `read_image(path,
    upright=True)` gives. Only headers are read; a file without that of an image is left out.

    Raises:
        DataError: nothing is there, or no image.
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
    sizes: dict[str, tuple[int, int]] = {}
    left_out = []
    with without_size_warning():
        for found in paths:
            name = str(found.relative_to(root))
            try:
                sizes[name] = header_size(found, upright=True, max_pixels=max_pixels)
            except FaultError as fault:
                left_out.append(LeftOut(name, None, fault.reason, fault.found))
    if not sizes:
        raise DataError(f"images: expected images in {pattern}, got none; {left_out[0]}")
    return _without_boxes(root, [*sizes], [*sizes.values()], left_out)


def index_images(sizes: Sequence[tuple[int, ...]]) -> Index:
    """Images that are in memory, of these (height, width); named by their numbers, ids from 1."""
    return _without_boxes(Path("images"), [str(i) for i in range(len(sizes))], sizes)


def _without_boxes(
    root: Path,
    names: list[str],
    sizes: Sequence[tuple[int, ...]],
    left_out: Sequence[LeftOut] = (),
) -> Index:
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
        left_out=left_out,
    )
