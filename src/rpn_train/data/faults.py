"""What is left out of a data set and why: recorded and counted, never silent."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

NO_OBJECT = "without object"  # the one reason that is a choice (`dataset.keep_empty`) and no fault


class LeftOut(NamedTuple):
    """An annotation or an image that is not used.

    image: file name as annotated. annotation: its id; None where the image as a whole is meant.
    reason: one of a few, to count by. found: what was found, may be empty.
    """

    image: str
    annotation: int | None
    reason: str
    found: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether something is wrong with it."""
        return self.reason != NO_OBJECT

    @property
    def place(self) -> str:
        """Which annotation of which image, or which image."""
        image = f"image {self.image!r}"
        return image if self.annotation is None else f"annotation {self.annotation} of {image}"

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}{f' ({self.found})' if self.found else ''}"


class FaultError(Exception):
    """Why an image or an annotation cannot be used: the last two of a `LeftOut`."""

    def __init__(self, reason: str, found: str = "") -> None:
        super().__init__(f"{reason}{f' ({found})' if found else ''}")
        self.reason, self.found = reason, found


def counted(left_out: Sequence[LeftOut]) -> str:
    """How many by reason, the most frequent first: '2 x box without extent, 1 x image missing'."""
    reasons = Counter(
        one.reason if one.annotation is not None else f"image {one.reason}" for one in left_out
    )
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
