"""COCO results: a list of `{"image_id", "bbox", "score"}` in JSON, of any length."""

import mmap
import re
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from rpn_train.errors import DataError
from rpn_train.recall import Floats, Ints

BLOCK_BYTES = 2**22  # decoded at once: some 30,000 rows

_OPENING = re.compile(rb"[ \t\r\n]*\[")
_BETWEEN = re.compile(rb"\}[ \t\r\n]*,[ \t\r\n]*\{")


class Results(NamedTuple):
    """The rows of a file, P, in its order."""

    image_ids: list[int | str]  # [I] in the order of their first rows
    owners: Ints  # [P] which of them each row is of
    boxes_xywh: Floats  # [P, 4] as in the file
    scores: Floats  # [P]


class _Row(msgspec.Struct, gc=False):
    image_id: int | str
    bbox: tuple[float, float, float, float]
    score: float


def read_results(path: Path) -> Results:
    """Read a file of results; what else its rows hold, like a category or a mask, is skipped.

    Raises:
        DataError: the file is empty, cut short, or no list of such rows; says where.
    """
    numbers: dict[int | str, int] = {}  # of each image
    owners, boxes, scores = array("q"), array("d"), array("d")
    for block in _blocks(path):
        owners.extend(numbers.setdefault(row.image_id, len(numbers)) for row in block)
        boxes.extend(chain.from_iterable(row.bbox for row in block))
        scores.extend(row.score for row in block)
    return Results(
        list(numbers), np.asarray(owners), np.asarray(boxes).reshape(-1, 4), np.asarray(scores)
    )


def _blocks(path: Path) -> Iterator[list[_Row]]:
    """The rows of the file, some at a time: as objects, all of them need not fit into memory.

    A block ends between a `}` and a `{`. That this is the end of a row, and no place within one or
    within a string, is proved by decoding it: only then are all brackets and quotes closed. If it
    does not decode, a longer one is tried, up to the end of the file.
    """
    decoder = msgspec.json.Decoder(list[_Row])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        opening = _OPENING.match(data)
        if opening is None:
            raise DataError(f"{path}: expected a list of COCO results, got {bytes(data[:20])!r}")
        start, size, num_rows = opening.end(), BLOCK_BYTES, 0
        while True:
            between = _BETWEEN.search(data, start + size)
            end, closing = (between.start() + 1, b"]") if between else (len(data), b"")
            try:
                block = decoder.decode(b"[%b%b" % (data[start:end], closing))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if between and type(error) is msgspec.DecodeError:
                    size *= 2
                    continue
                raise _fault(path, data, start, num_rows, str(error)) from error
            yield block
            if between is None:
                return
            start, size, num_rows = between.end() - 1, BLOCK_BYTES, num_rows + len(block)


def _fault(path: Path, data: mmap.mmap, start: int, num_rows: int, reason: str) -> DataError:
    """The decoder's error in the block at `start`, with its place in the file."""
    if found := re.search(r" - at `\$\[(\d+)\](.*)`", reason):
        place = f"in row {num_rows + int(found[1])}{found[2]}"
    elif found := re.search(r" \(byte (\d+)\)", reason):
        at = start - 1 + int(found[1])
        place = f"at byte {at}, after {bytes(data[max(at - 60, 0) : at])!r}"
    else:
        place = f"between byte {start} and the end at {len(data)}"
    what = reason[: found.start()] if found else reason
    return DataError(
        f"{path}: expected COCO results, a list of {{image_id, bbox [x, y, w, h], score}}, "
        f"got a fault {place}: {what}"
    )
