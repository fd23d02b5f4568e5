"""The index of an annotation file, kept on disk for the next start.

A second start maps the arrays of the first into memory: nothing is parsed, and the processes of a
machine share the pages. A cache is a folder of plain .npy files whose name is a digest of all that
the index depends on, so a file that has changed has another cache and not an old one.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from rpn_train.data.faults import LeftOut
from rpn_train.data.index import Index

FORMAT = 2  # to be raised when a reader makes another index of the same file: see the tests
_PREFIX = "rpn-train-index-"  # of all that is written, and so of all that is ever deleted
_MIN_BYTES = 10_000_000  # what is smaller is read in 0.1 s
_UNUSED_S = 7 * 24 * 3600  # longer than most runs: another machine may still map the files
_ARRAYS = tuple(f.name for f in fields(Index) if f.name not in {"root", "left_out"})


def cache_folder(given: str | None) -> Path:
    """The folder of the caches: as given, or the user's own (XDG Base Directory Specification)."""
    if given is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rpn-train"


def cached_index(
    annotations: Path,
    images: Path,
    *,
    options: Mapping[str, Any],
    folder: Path,
    make: Callable[[], Index],
) -> Index:
    """What `make()` returns, at the second start from the cache that the first one left.

    Where no cache can be read or written, for whatever reason, it is `make()` as if there were
    none; so it is while images have faults. Caches that nobody has opened for a week are deleted
    when another one is written.

    Args:
        annotations: the file that is read.
        images: the folder of the images, `root` of the index. Both are known by path, time of
            modification and, the file, size. So a file put into the folder or taken out makes
            another cache; one in a subfolder does not.
        options: what else the index depends on, as JSON can say it.
        folder: where the caches are; made if need be.
        make: reads the index. Its errors are passed on.
    """
    cache = _cache_of(annotations, images, options, folder)
    if cache is None:
        return make()
    index = _load(cache, images)
    if index is None:
        shutil.rmtree(cache, ignore_errors=True)  # a broken one
        index = make()
        # A faulty image may be repaired in its place, of which the folder would not tell.
        repairable = any(one.is_fault and one.annotation is None for one in index.left_out)
        # The annotations may have changed while they were read.
        if not repairable and _cache_of(annotations, images, options, folder) == cache:
            with suppress(OSError):  # read-only, full, or another process was faster
                _store(index, cache)
        index = _load(cache, images) or index  # mapped, in the place of this process's own
    return index


def _cache_of(
    annotations: Path, images: Path, options: Mapping[str, Any], folder: Path
) -> Path | None:
    """The place of the cache; None where it is not worth one, or the files are not there."""
    try:
        file, listing = annotations.stat(), images.stat()
        known = (
            FORMAT,
            str(annotations.resolve()),
            file.st_size,
            file.st_mtime_ns,
            str(images.resolve()),
            listing.st_mtime_ns,
            dict(options),
        )
        folder = folder.expanduser()
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, or nobody knows the home
        return None
    if file.st_size < _MIN_BYTES:
        return None
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return folder / (_PREFIX + digest[:32])


def _load(cache: Path, root: Path) -> Index | None:
    """The index in a cache; None if there is no cache, or a broken one."""
    try:
        arrays = {
            # not np.load, which also reads zip files and pickles
            name: np.asarray(open_memmap(cache / f"{name}.npy", mode="r"))
            for name in _ARRAYS
        }
        records = json.loads((cache / "left_out.json").read_bytes())
        left_out = tuple(LeftOut(*record) for record in records)
        index = Index(root=root, left_out=left_out, **arrays)
        if not _is_whole(index):
            return None
    except Exception:  # a torn or foreign file can break the readers in any way
        return None
    with suppress(OSError):
        os.utime(cache)  # still in use
    return index


def _is_whole(index: Index) -> bool:
    """Whether types and lengths are those of an index: no row of it leads out of its arrays.

    The other guarantees of `build_index` held when the cache was written.
    """
    num_images, num_boxes, num_bytes = (
        array.size for array in (index.image_ids, index.areas, index.name_bytes)
    )
    expected = {
        "image_ids": (np.int64, (num_images,)),
        "sizes": (np.int32, (num_images, 2)),
        "name_bytes": (np.uint8, (num_bytes,)),
        "name_offsets": (np.int64, (num_images + 1,)),
        "box_offsets": (np.int64, (num_images + 1,)),
        "boxes_xywh": (np.float64, (num_boxes, 4)),
        "areas": (np.float64, (num_boxes,)),
        "ignore": (np.bool_, (num_boxes,)),
    }
    given = {name: getattr(index, name) for name in _ARRAYS}
    return (
        num_images > 0
        and {name: (array.dtype, array.shape) for name, array in given.items()} == expected
        and all(
            offsets[0] == 0 and offsets[-1] == end and bool((np.diff(offsets) >= 0).all())
            for offsets, end in ((index.name_offsets, num_bytes), (index.box_offsets, num_boxes))
        )
    )


def _store(index: Index, cache: Path) -> None:
    """Write a cache whole or not at all; what another process has written meanwhile stays."""
    temporary = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name in _ARRAYS:
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, getattr(index, name), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        (temporary / "left_out.json").write_text(json.dumps(index.left_out))
        os.rename(temporary, cache)  # fails where there is one
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for other in cache.parent.glob(f"{_PREFIX}*"):
        if time.time() - other.stat().st_mtime > _UNUSED_S:
            shutil.rmtree(other, ignore_errors=True)
