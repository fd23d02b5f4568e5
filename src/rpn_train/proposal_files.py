"""Proposals in files, for other programs and from them: the formats, and how they are written.

Boxes are in pixels of the images as stored. `read_proposals` reads all of these, whoever wrote
them.

`.json`: COCO results, a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`. Here
one line for each proposal, the best of an image first. The score is the sigmoid of the logit; where
it saturates, the order of the file is that of the logits. An image without proposals leaves no
trace.

`.npz`: arrays side by side, none of Python objects; the proposals of image i are rows `offsets[i]`
to `offsets[i + 1]`.

    image_ids            int64 [N]
    file_name_bytes      uint8, the UTF-8 file names, one after the other
    file_name_offsets    int64 [N + 1], name of image i: file_name_offsets[i] to [i + 1]
    offsets              int64 [N + 1], from 0 to P
    boxes                float32 [P, 4] xyxy
    logits               float32 [P], higher is better; from others, any score will do

A folder of `.npz`: one file for each image, named like it (`a.npz` for `a.jpg`), with `boxes`
[K, 4] xyxy and `scores` [K]. Read only.

`.pkl`: what Detectron2 reads as precomputed proposals, `{"ids", "boxes", "objectness_logits",
"bbox_mode"}`: lists with one entry for each image; boxes float32 [K, 4] xyxy (mode 0), logits
float32 [K]. Its reader needs numpy 1.26 or newer. Also MMDetection's list of [K, 5], xyxy and
score, in the order of the annotation file. Read only.
"""

import io
import pickle
import shutil
import zipfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rpn_train.errors import ConfigError, DataError
from rpn_train.recall import boxes_to_xywh
from rpn_train.whole_file import replacing


@dataclass(frozen=True, eq=False)
class NamedProposals:
    """Proposals of one image, as they travel.

    Args:
        image_id: as annotated.
        file_name: as annotated.
        boxes: float32 [K, 4] xyxy px of the image as stored.
        logits: float32 [K], best first.

    Raises:
        DataError: NaN or infinity, such as a network gives whose weights overflow.
    """

    image_id: int
    file_name: str
    boxes: NDArray[np.float32]
    logits: NDArray[np.float32]

    def __post_init__(self) -> None:
        assert self.boxes.shape == (len(self.logits), 4)
        assert self.boxes.dtype == self.logits.dtype == np.float32
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.logits).all()):
            raise DataError(f"image {self.file_name!r}: expected finite proposals to write")
        assert (np.diff(self.logits) <= 0).all(), "the order of the file is the ranking"


def write_proposals(path: Path, images: Iterable[NamedProposals]) -> None:
    """Write proposals in the format of the suffix: the whole file or, on any exception, none.

    `.json` and `.npz` are written as the images come, to disk: memory holds one image at a time,
    and of the others no more than id, name and count. `.pkl` is held in memory.

    Raises:
        ConfigError: no such format, or a folder in the way. Before the first image is asked for.
    """
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        WRITERS[path.suffix](file, images)


def check_output(path: Path) -> None:
    """Refuse a file that `write_proposals` would not write."""
    if path.suffix not in WRITERS:
        raise ConfigError(f"expected a file of proposals in {', '.join(WRITERS)}, got {path}")
    if path.is_dir():
        raise ConfigError(f"expected a file of proposals to write, got a folder at {path}")


def _write_json(file: IO[bytes], images: Iterable[NamedProposals]) -> None:
    file.write(b"[")
    separator = b"\n"
    for image in images:
        boxes, scores = boxes_to_xywh(image.boxes), _sigmoid(image.logits)
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
            row = {"image_id": image.image_id, "category_id": 1, "bbox": box, "score": score}
            file.write(separator + msgspec.json.encode(row))  # shortest digits that read the same
            separator = b",\n"
    file.write(b"\n]\n")


def _write_npz(file: IO[bytes], images: Iterable[NamedProposals]) -> None:
    """What `np.savez` writes, but boxes and logits wait on disk until their number is known."""
    ids, ends, names, name_ends = array("q"), array("q", [0]), bytearray(), array("q", [0])
    folder = Path(file.name).parent
    with TemporaryFile(dir=folder) as boxes, TemporaryFile(dir=folder) as logits:
        for image in images:
            ids.append(image.image_id)
            names += image.file_name.encode()
            name_ends.append(len(names))
            ends.append(ends[-1] + len(image.logits))
            boxes.write(image.boxes.tobytes())
            logits.write(image.logits.tobytes())
        with zipfile.ZipFile(file, "w") as archive:
            _add_array(archive, "image_ids", np.int64, (len(ids),), io.BytesIO(ids))
            _add_array(archive, "file_name_bytes", np.uint8, (len(names),), io.BytesIO(names))
            _add_array(
                archive, "file_name_offsets", np.int64, (len(name_ends),), io.BytesIO(name_ends)
            )
            _add_array(archive, "offsets", np.int64, (len(ends),), io.BytesIO(ends))
            _add_array(archive, "boxes", np.float32, (ends[-1], 4), boxes)
            _add_array(archive, "logits", np.float32, (ends[-1],), logits)


def _add_array(
    archive: zipfile.ZipFile, name: str, dtype: type, shape: tuple[int, ...], data: IO[bytes]
) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    data.seek(0)
    # a ZipInfo of its own bears no time of day: equal proposals make equal files
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        shutil.copyfileobj(data, member)


def _write_pickle(file: IO[bytes], images: Iterable[NamedProposals]) -> None:
    content: dict[str, Any] = {"ids": [], "boxes": [], "objectness_logits": [], "bbox_mode": 0}
    for image in images:
        content["ids"].append(image.image_id)
        content["boxes"].append(image.boxes)
        content["objectness_logits"].append(image.logits)
    pickle.dump(content, file, protocol=4)


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """In one form for all signs, which never ranks what the logits do not: equal at most."""
    with np.errstate(over="ignore"):  # below -709 it is 0
        return 1 / (1 + np.exp(-logits.astype(np.float64)))


WRITERS: dict[str, Callable[[IO[bytes], Iterable[NamedProposals]], None]] = {
    ".json": _write_json,
    ".npz": _write_npz,
    ".pkl": _write_pickle,
}
