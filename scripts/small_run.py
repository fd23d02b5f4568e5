"""A run of some seconds on drawn images, and the processes it consists of, for other scripts."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SMALL = (
    "schedule=default",
    "backbone=resnet18_c4",
    "anchors=c4",
    "anchors.sizes=[[8,16,32]]",
    "dataset.shapes.size=[64,64]",
    "dataset.shapes.train_images=40",
    "dataset.shapes.val_images=10",
    "image.short_side=64",
    "image.max_side=64",
    "schedule.batch_size=2",
    "eval.max_proposals=[10,100]",
    "eval.pictures=1",
    "workers=2",
)
# Sums are ordered by the number of threads: equal bits need an equal number.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


def command(typed: Sequence[str]) -> list[str]:
    """`rpn-train` with what is typed."""
    return [sys.executable, "-m", "rpn_train", *typed]


def processes(session: int) -> dict[int, str]:
    """Process id -> state letter of all processes of a session, as /proc has them; Z: a zombie."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if int(fields[3]) == session:
            found[int(folder.name)] = fields[0]
    return found
