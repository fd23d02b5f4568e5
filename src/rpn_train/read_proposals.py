"""Proposals from a file, made by anything. `proposal_files` describes the formats."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rpn_train.array_pickle import load_arrays
from rpn_train.coco_results import read_results
from rpn_train.data.index import Index
from rpn_train.errors import ConfigError, DataError
from rpn_train.recall import Floats, Ints, ProposalArrays, boxes_to_xywh

Match = Literal["id", "file_name"]
_Numbers = NDArray[Any]


class LoadedProposals(NamedTuple):
    """Proposals of the images of an index, in its order."""

    proposals: ProposalArrays  # best first within an image, equal scores as in the file
    missing: tuple[int, ...]  # rows of the index that the file does not name: no proposals


class _Found(NamedTuple):
    """What a file holds: the proposals of I images, of each in the order of the file."""

    keys: Sequence[int] | Sequence[str]  # [I] image ids, or file names or their stems
    owners: Ints  # [P] whose each proposal is, from 0 to I - 1
    boxes_xywh: Floats  # [P, 4]
    scores: Floats  # [P]


def read_proposals(path: Path, index: Index, *, match: Match) -> LoadedProposals:
    """Read the proposals of the images of `index`.

    Boxes may reach out of their image or lie outside it: they are scored as they are, as COCOeval
    does. An image with an entry but no proposals is not missing; in `.json` there is no telling.

    Args:
        path: a file in one of the formats of `proposal_files`, or a folder of `.npz` files.
        index: the images to read for.
        match: how an entry says whose it is: by "id", or by "file_name" or its stem. A folder of
            `.npz` goes by stems and MMDetection's list by order, whatever it is.

    Raises:
        ConfigError: no such format.
        DataError: the file is missing, broken, or would run code; it names an image that `index`
            has not, or one twice; a box or score is NaN or infinite, or a box has a side < 0.
    """
    found = _read(path, index, match)
    _check_numbers(path, found)
    rows = _rows(path, found.keys, index)  # [I]
    owners = rows[found.owners]  # [P]
    order = np.lexsort((-found.scores, owners))  # stable
    offsets = np.cumsum([0, *np.bincount(owners, minlength=len(index))])
    missing = np.setdiff1d(np.arange(len(index)), rows)
    return LoadedProposals(
        ProposalArrays(found.boxes_xywh[order], found.scores[order], offsets),
        tuple(missing.tolist()),
    )


def _read(path: Path, index: Index, match: Match) -> _Found:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise DataError(f"expected a file or a folder of proposals, got nothing at {path}")
    if path.stat().st_size == 0:
        raise DataError(f"expected a file of proposals, got an empty one: {path}")
    if path.suffix == ".json":
        return _read_json(path, match)
    if path.suffix == ".npz":
        return _read_npz(path, match)
    if path.suffix == ".pkl":
        return _read_pickle(path, index, match)
    raise ConfigError(f"expected proposals in .json, .npz, .pkl, or a folder of .npz, got {path}")


def _check_numbers(path: Path, found: _Found) -> None:
    wrong = ~np.isfinite(found.boxes_xywh).all(axis=1) | (found.boxes_xywh[:, 2:] < 0).any(axis=1)
    wrong |= ~np.isfinite(found.scores)
    if wrong.any():
        p = int(wrong.argmax())
        box = ", ".join(f"{number:.10g}" for number in found.boxes_xywh[p])
        raise DataError(
            f"{path}: expected finite scores and finite boxes with sides >= 0, got x y w h "
            f"({box}) of score {found.scores[p]:.10g} for image {found.keys[found.owners[p]]!r}"
        )


def _rows(path: Path, keys: Sequence[int] | Sequence[str], index: Index) -> Ints:
    """Row [I] in the index of each image."""
    by_key = dict(zip(index.image_ids.tolist(), range(len(index)), strict=True))
    by_key |= _rows_by_name(index)
    unknown = [key for key in keys if key not in by_key]
    if unknown:
        raise DataError(
            f"{path}: expected proposals of the {len(index)} images of the split, "
            f"got {len(unknown)} of others, first image {unknown[0]!r}"
        )
    rows = np.array([by_key[key] for key in keys], np.int64)
    if (rows < 0).any():
        stem = keys[int((rows < 0).argmax())]
        raise DataError(f"{path}: expected whole file names, got {stem!r}, a stem of several")
    firsts = np.unique(rows, return_index=True)[1]
    if len(firsts) < len(rows):
        again = keys[np.setdiff1d(np.arange(len(rows)), firsts)[0]]
        raise DataError(f"{path}: expected every image once, got {again!r} more than once")
    return rows


def _rows_by_name(index: Index) -> dict[int | str, int]:
    """Row of each file name and of each stem; -1 for a stem of several images."""
    names = index.file_names()
    rows: dict[int | str, int] = {}
    for row, name in enumerate(names):
        stem = PurePosixPath(name).stem
        rows[stem] = -1 if stem in rows else row
    return rows | {name: row for row, name in enumerate(names)}


def _checked_keys(path: Path, keys: Sequence[Any], match: Match) -> Sequence[Any]:
    expected, other = (int, "file_name") if match == "id" else (str, "id")
    for key in keys:
        if type(key) is not expected:
            raise DataError(
                f"{path}: expected {expected.__name__} for matching by {match}, got image {key!r}; "
                f"try matching by {other}"
            )
    return keys


def _read_json(path: Path, match: Match) -> _Found:
    results = read_results(path)
    keys = _checked_keys(path, results.image_ids, match)
    return _Found(keys, results.owners, results.boxes_xywh, results.scores)


def _read_npz(path: Path, match: Match) -> _Found:
    named = ["image_ids"] if match == "id" else ["file_name_bytes", "file_name_offsets"]
    offsets, boxes, logits, *names = _load_npz(path, ["offsets", "boxes", "logits", *named])
    boxes = _array(path, "boxes", boxes, (None, 4))
    logits = _array(path, "logits", logits, (len(boxes),))
    offsets = _offsets(path, "offsets", offsets, len(boxes))
    if match == "id":
        keys = _array(path, "image_ids", names[0], (None,), "iu").tolist()
    else:
        keys = _names(path, names[0], names[1])
    if len(keys) != len(offsets) - 1:
        raise DataError(f"{path}: expected {len(keys) + 1} offsets, got {len(offsets)}")
    owners = np.repeat(np.arange(len(keys)), np.diff(offsets))
    return _Found(keys, owners, _to_xywh(boxes), logits.astype(np.float64))


def _read_folder(path: Path) -> _Found:
    files = sorted(path.glob("*.npz"))
    if not files:
        raise DataError(f"expected a folder of .npz files, one for each image, got none in {path}")
    all_boxes, all_scores = [], []
    for file in files:
        boxes, scores = _load_npz(file, ["boxes", "scores"])
        all_boxes.append(_to_xywh(_array(file, "boxes", boxes, (None, 4))))
        all_scores.append(_array(file, "scores", scores, (len(all_boxes[-1]),)))
    return _joined([file.stem for file in files], all_boxes, all_scores)


def _read_pickle(path: Path, index: Index, match: Match) -> _Found:
    content = load_arrays(path)
    if isinstance(content, dict):
        return _from_detectron2(path, content, match)
    if isinstance(content, list):
        return _from_mmdetection(path, content, index)
    raise DataError(
        f"{path}: expected Detectron2's dict or MMDetection's list of proposals, "
        f"got {type(content).__name__}"
    )


def _from_detectron2(path: Path, content: dict[Any, Any], match: Match) -> _Found:
    for old, name in (("indexes", "ids"), ("scores", "objectness_logits")):  # Detectron's
        if old in content:
            content[name] = content.pop(old)
    columns = [content[name] for name in ("ids", "boxes", "objectness_logits") if name in content]
    whole = len(columns) == 3 and all(isinstance(column, list) for column in columns)
    if not whole or len({len(column) for column in columns}) > 1:
        raise DataError(
            f"{path}: expected Detectron2's lists ids, boxes and objectness_logits, "
            f"all of the same length, got {', '.join(map(str, content)) or 'nothing'}"
        )
    mode = content.setdefault("bbox_mode", 0)  # as Detectron2 takes it
    if type(mode) is not int or mode not in (0, 1):
        raise DataError(f"{path}: expected bbox_mode 0 (xyxy) or 1 (xywh), got {mode!r}")
    keys = _checked_keys(path, columns[0], match)
    boxes, scores = [], []
    for key, box, score in zip(*columns, strict=True):
        box = _array(path, f"boxes of image {key!r}", box, (None, 4))
        boxes.append(box if mode == 1 else _to_xywh(box))
        scores.append(_array(path, f"objectness_logits of image {key!r}", score, (len(box),)))
    return _joined(keys, boxes, scores)


def _from_mmdetection(path: Path, content: list[Any], index: Index) -> _Found:
    if len(content) != len(index):
        raise DataError(
            f"{path}: expected MMDetection's list with an entry for each of the {len(index)} "
            f"images, got {len(content)}"
        )
    arrays = [
        _array(path, f"proposals of image {index.file_name(row)!r}", array, (None, 5))
        for row, array in enumerate(content)
    ]
    boxes, scores = [_to_xywh(array[:, :4]) for array in arrays], [array[:, 4] for array in arrays]
    return _joined(index.image_ids.tolist(), boxes, scores)


def _joined(
    keys: Sequence[int] | Sequence[str], boxes: Sequence[_Numbers], scores: Sequence[_Numbers]
) -> _Found:
    """From the boxes_xywh [K, 4] and scores [K] of each image."""
    owners = np.repeat(np.arange(len(keys)), [len(column) for column in scores])
    none = np.empty((0, 4))
    return _Found(
        keys, owners, np.concatenate([none, *boxes]), np.concatenate([none[:, 0], *scores])
    )


def _load_npz(path: Path, names: Sequence[str]) -> list[_Numbers]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except KeyError as error:
        raise DataError(f"{path}: expected arrays {', '.join(names)}: {error.args[0]}") from error
    except Exception as error:  # a torn or foreign file can break the reader in any way
        raise DataError(
            f"{path}: expected an .npz file of numbers, got a broken or another one "
            f"({type(error).__name__})"
        ) from error


def _array(
    path: Path, name: str, array: Any, shape: tuple[int | None, ...], kinds: str = "fiu"
) -> _Numbers:
    """`array`, if it is one of this shape, None for any, and of such numbers."""
    wanted = str(list(shape)).replace("None", "K")
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected array {wanted} of {name}, got {type(array).__name__}")
    fits = len(shape) == array.ndim and all(
        side in (None, given) for side, given in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in kinds:
        numbers = "whole numbers" if kinds == "iu" else "numbers"
        raise DataError(
            f"{path}: expected {numbers} {wanted} as {name}, got {array.dtype} {[*array.shape]}"
        )
    return np.asarray(array)


def _offsets(path: Path, name: str, array: Any, total: int) -> Ints:
    offsets = _array(path, name, array, (None,), "iu").astype(np.int64)
    whole = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == total
    if not whole or (np.diff(offsets) < 0).any():
        raise DataError(f"{path}: expected {name} that rise from 0 to {total}")
    return offsets


def _names(path: Path, name_bytes: Any, name_offsets: Any) -> list[str]:
    text = _array(path, "file_name_bytes", name_bytes, (None,), "u").astype(np.uint8).tobytes()
    offsets = _offsets(path, "file_name_offsets", name_offsets, len(text))
    try:
        return [text[start:end].decode() for start, end in pairwise(offsets.tolist())]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected file names in UTF-8: {error}") from error


def _to_xywh(boxes: _Numbers) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # _check_numbers names their image
        return boxes_to_xywh(boxes)
