"""`data_report.json` of a run: what was left out of its data, and what could not be read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpn_train.data.batch import Unread
from rpn_train.data.faults import LeftOut
from rpn_train.data.index import Index
from rpn_train.errors import DataError
from rpn_train.run_log import RunLog, write_json

FILE_NAME = "data_report.json"
_CONSEQUENCE = {  # split -> what becomes of an image that cannot be read
    "training": "another image takes its place",
    "evaluation": "its objects count as missed",
}


class DataReport:
    """What is wrong with the data of a run, kept in its folder, also when it is resumed.

    Args:
        log: the run's own; tells of each image once.
        folder: of the run; None: nothing is written.
        training, evaluation: what is trained on, and what is scored.
        max_bad_fraction: of the images of each, that may turn out to be unreadable.
        resumed: whether the run goes on; else what an earlier attempt left in the folder is void.
    """

    def __init__(
        self,
        log: RunLog,
        folder: Path | None,
        training: Index,
        evaluation: Index,
        max_bad_fraction: float,
        *,
        resumed: bool,
    ) -> None:
        self._log, self._max_bad_fraction = log, max_bad_fraction
        self._splits = {"training": training, "evaluation": evaluation}
        self._unread: dict[str, dict[str, Any]] = {name: {} for name in self._splits}
        self._path = None if folder is None else folder / FILE_NAME
        if resumed and self._path is not None and self._path.is_file():
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self._unread = {name: known[name]["unread"] for name in self._splits}
        self._write()

    def note(self, split: str, unread: Sequence[Unread]) -> None:
        """Count images of "training" or "evaluation" that could not be read.

        Raises:
            DataError: they have become too many.
        """
        if not unread:
            return
        index, known = self._splits[split], self._unread[split]
        for row, reason in unread:
            name = index.file_name(row)
            if name not in known:
                self._log.line(f"not read: {reason}; {_CONSEQUENCE[split]}")
                known[name] = {"times": 0, "reason": reason}
            known[name]["times"] += 1
        self._write()
        check_unread(len(known), unread[-1].reason, len(index), split, self._max_bad_fraction)

    def _write(self) -> None:
        if self._path is not None:
            report = {
                name: {**plain_report(index), "unread": self._unread[name]}
                for name, index in self._splits.items()
            }
            write_json(self._path, report)


def check_unread(
    unread: int, reason: str, images: int, split: str, max_bad_fraction: float
) -> None:
    """Raise DataError where too many of the images of a split could not be read."""
    if unread > max_bad_fraction * images:
        raise DataError(
            f"expected at most {max_bad_fraction:.2%} of {images} images of {split} to be "
            f"unreadable (data.max_bad_fraction), got {unread}; last: {reason}"
        )


def plain_report(index: Index) -> dict[str, Any]:
    """What is in a split, and what is not, by reason."""
    return {
        "images": len(index),
        "objects": int((~index.ignore).sum()),
        "ignored": int(index.ignore.sum()),
        "left_out": _by_reason(index.left_out),
    }


def _by_reason(left_out: Iterable[LeftOut]) -> Mapping[str, Any]:
    reasons: dict[str, list[dict[str, Any]]] = {}
    for one in left_out:
        entry = {"image": one.image, "annotation": one.annotation, "found": one.found}
        reasons.setdefault(one.reason, []).append(entry)
    return {
        reason: {"count": len(entries), "entries": entries} for reason, entries in reasons.items()
    }
