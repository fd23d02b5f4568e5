"""The annotations of one split as compact arrays, whatever file format they came from.

This is all that a loader worker holds: with no Python object per image, forked workers share the
pages instead of copying them one reference count at a time.
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rpn_train.data.box_faults import FAULTS, box_faults, check_format, to_corners
from rpn_train.data.faults import NO_OBJECT, FaultError, LeftOut, counted
from rpn_train.errors import DataError

MAX_SIDE_PX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split (N) and their boxes (M), in the order of the annotation file.

    Made by `build_index`, which guarantees: at least one image; image ids and file names differ;
    names stay inside `root`; sizes are positive; every box is finite, has an extent and overlaps
    its image. A box may reach over the border: it is kept as annotated.
    """

    root: Path  # folder the file names are relative to
    image_ids: NDArray[np.int64]  # [N]
    sizes: NDArray[np.int32]  # [N, 2] (height, width) in pixels
    name_bytes: NDArray[np.uint8]  # the UTF-8 file names, one after the other
    name_offsets: NDArray[np.int64]  # [N + 1] name of image i: name_offsets[i] to [i + 1]
    box_offsets: NDArray[np.int64]  # [N + 1] boxes of image i: rows box_offsets[i] to [i + 1]
    boxes_xywh: NDArray[np.float64]  # [M, 4] pixels, not rounded: scores equal pycocotools' exactly
    areas: NDArray[np.float64]  # [M] square pixels: of the annotation, which may be a mask's
    ignore: NDArray[np.bool_]  # [M] crowd or difficult: neither object nor background
    left_out: tuple[LeftOut, ...]  # annotations and images that are not in here, and why

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, i: int) -> str:
        """Name of the file of image `i`, as annotated."""
        return self.name_bytes[self._rows(self.name_offsets, i)].tobytes().decode()

    def file_names(self) -> list[str]:
        """Names of all images, in order."""
        text, offsets = self.name_bytes.tobytes(), self.name_offsets.tolist()
        return [text[start:end].decode() for start, end in pairwise(offsets)]

    def path(self, i: int) -> Path:
        """Path of image `i`, links resolved.

        Raises:
            DataError: a link leads out of `root`.
        """
        # not Path.resolve, which raises where links lead in a circle: that is for who opens it
        path = Path(os.path.realpath(self.root / self.file_name(i)))
        if not path.is_relative_to(self._resolved_root):
            raise DataError(f"expected an image in {self.root}, got a link to {path}")
        return path

    @cached_property
    def _resolved_root(self) -> Path:
        return self.root.resolve()

    def boxes_xyxy(self, i: int) -> NDArray[np.float32]:
        """Boxes of image `i`: float32 [G, 4] in pixels, [0, 4] if it has none. A copy."""
        return to_corners(self.boxes_xywh[self._rows(self.box_offsets, i)])

    def ignored(self, i: int) -> NDArray[np.bool_]:
        """Which boxes of image `i` are neither object nor background: bool [G]. A copy."""
        return self.ignore[self._rows(self.box_offsets, i)].copy()

    def _rows(self, offsets: NDArray[np.int64], i: int) -> slice:
        assert 0 <= i < len(self), "a negative i would silently read as an image without boxes"
        return slice(offsets[i], offsets[i + 1])


def build_index(
    *,
    source: Path,
    root: Path,
    image_ids: NDArray[np.int64],
    file_names: Sequence[str],
    sizes: NDArray[np.int64],
    box_rows: NDArray[np.int64],
    box_ids: NDArray[np.int64],
    boxes_xywh: NDArray[np.float64],
    areas: NDArray[np.float64],
    ignore: NDArray[np.bool_],
    keep_empty: bool,
    left_out: Sequence[LeftOut] = (),
) -> Index:
    """Sort the boxes by image, leave out the faulty ones by name, and check the rest.

    Args:
        source: file that the annotations come from, for messages.
        root: folder the file names are relative to.
        image_ids: [N].
        file_names: [N], relative to `root`.
        sizes: [N, 2] (height, width) in pixels.
        box_rows: [M] row of the image of each box; boxes come in any order and stay in it within
            an image.
        box_ids: [M] what `left_out` calls the annotations.
        boxes_xywh: [M, 4] in pixels.
        areas: [M] in square pixels; NaN where the annotation gives none: width x height.
        ignore: [M] true for crowd and difficult.
        keep_empty: keep images without an object. A box to ignore is not an object.
        left_out: what the reader has left out itself.

    Raises:
        DataError: no image is left, an id or a name occurs twice, a name leaves `root`, a
            size is not positive, or the boxes look like those of another format.
    """
    assert len(image_ids) == len(file_names) == len(sizes)
    assert len(box_rows) == len(box_ids) == len(boxes_xywh) == len(areas) == len(ignore)
    _check_images(source, image_ids, file_names, sizes)
    of_boxes = sizes[box_rows]
    check_format(source, boxes_xywh, of_boxes)
    all_names = np.array(file_names, np.object_)
    faults = box_faults(boxes_xywh, of_boxes)
    faulty = [
        LeftOut(
            all_names[box_rows[m]],
            int(box_ids[m]),
            FAULTS[faults[m]],
            ", ".join(f"{number:.10g}" for number in boxes_xywh[m]),
        )
        for m in np.flatnonzero(faults)
    ]
    sound = np.flatnonzero(faults == 0)
    sound = sound[np.argsort(box_rows[sound], kind="stable")]
    rows = box_rows[sound]
    objects = np.bincount(rows[~ignore[sound]], minlength=len(file_names))  # [N]
    kept = (objects > 0) | keep_empty
    if not kept.any():
        raise DataError(f"expected at least one image with an object, got none: {source}")
    empty = [LeftOut(name, None, NO_OBJECT) for name in all_names[~kept]]
    order = sound[kept[rows]]
    names = [name.encode() for name in all_names[kept]]
    boxes, given = boxes_xywh[order], areas[order]
    return Index(
        root=root,
        image_ids=image_ids[kept],
        sizes=sizes[kept].astype(np.int32),
        name_bytes=np.frombuffer(b"".join(names), np.uint8),
        name_offsets=_offsets([len(name) for name in names]),
        box_offsets=_offsets(np.bincount(rows, minlength=len(kept))[kept]),
        boxes_xywh=boxes,
        areas=np.where(np.isnan(given), boxes[:, 2:].prod(axis=1), given),
        ignore=ignore[order],
        left_out=(*left_out, *faulty, *empty),
    )


def without_images(
    index: Index, faults: Mapping[int, FaultError], *, keep_objects: bool = False
) -> Index:
    """The index without the images of some rows, for their faults.

    Args:
        keep_objects: rows and objects stay, to count as missed; the faults are recorded alone.

    Raises:
        DataError: no image is left.
    """
    if not faults:
        return index
    kept = np.ones(len(index), np.bool_)
    kept[[*faults]] = False
    left_out = index.left_out + tuple(
        LeftOut(index.file_name(row), None, fault.reason, fault.found)
        for row, fault in faults.items()
    )
    if keep_objects:
        return replace(index, left_out=left_out)
    if not kept.any():
        lost = left_out[len(index.left_out) :]
        raise DataError(
            f"{index.root}: expected images, got none that can be used: {counted(lost)}; "
            f"first {lost[0]}"
        )
    name_lengths, box_counts = np.diff(index.name_offsets), np.diff(index.box_offsets)
    boxes = np.repeat(kept, box_counts)
    return Index(
        root=index.root,
        image_ids=index.image_ids[kept],
        sizes=index.sizes[kept],
        name_bytes=index.name_bytes[np.repeat(kept, name_lengths)],
        name_offsets=_offsets(name_lengths[kept]),
        box_offsets=_offsets(box_counts[kept]),
        boxes_xywh=index.boxes_xywh[boxes],
        areas=index.areas[boxes],
        ignore=index.ignore[boxes],
        left_out=left_out,
    )


def list_folder(folder: Path, content: str) -> frozenset[str]:
    """Names in a folder.

    Raises:
        DataError: there is no such folder; `content` says what was expected in it.
    """
    if not folder.is_dir():
        given = "a file" if folder.exists() else "nothing"
        raise DataError(f"expected a folder of {content}, got {given} at {folder}")
    return frozenset(os.listdir(folder))


def leaves_root(name: str) -> bool:
    """Whether a file name is no relative path downwards: absolute, empty, or with a '..' in it."""
    parts = name.replace("\\", "/").split("/")
    return not parts[0] or ".." in parts or "\0" in name


def check_categories(wanted: Sequence[str], known: Collection[str], source: Path) -> None:
    """Raise DataError for a category that the annotations do not know, with the nearest they do."""
    if not wanted:
        raise DataError("dataset.categories: expected at least one name, or null for all, got none")
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=3) if len(known) > 10 else []
            near = near or sorted(known)[:10]
            raise DataError(
                f"dataset.categories: expected names from {source}, got {name!r}; "
                f"it has {', '.join(map(repr, near)) or 'none'}{', ...' * (len(near) < len(known))}"
            )


def _check_images(
    source: Path,
    image_ids: NDArray[np.int64],
    file_names: Sequence[str],
    sizes: NDArray[np.int64],
) -> None:
    if not file_names:
        raise DataError(f"expected at least one image, got none: {source}")
    for what, values in (("image id", image_ids.tolist()), ("file name", file_names)):
        twice = next((value for value, count in Counter(values).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"{source}: expected every {what} once, got {twice!r} more than once")
    for name in file_names:
        if leaves_root(name):
            raise DataError(f"{source}: expected file names inside the image folder, got {name!r}")
    wrong = ((sizes < 1) | (sizes > MAX_SIDE_PX)).any(axis=1)
    if wrong.any():
        first = int(wrong.argmax())
        height, width = sizes[first]
        raise DataError(
            f"{source}: expected a positive size (height, width) in pixels, "
            f"got ({height}, {width}) for image {file_names[first]!r}"
        )


def _offsets(counts: Sequence[int] | NDArray[np.intp]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
