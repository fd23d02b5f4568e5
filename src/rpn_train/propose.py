"""The command `rpn-propose`: proposals of a trained network, written to a file."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png
from tqdm import tqdm

from rpn_train.build import build_eval_batches
from rpn_train.config import TrainConfig
from rpn_train.data.batch import ReadImage
from rpn_train.data.index import Index
from rpn_train.distributed import Ranks
from rpn_train.evaluate import ImageProposals, propose_split
from rpn_train.figures import draw_detections
from rpn_train.model import RPN
from rpn_train.proposal_files import NamedProposals, write_proposals

_DRAWN = 50  # proposals in a picture


def propose(
    model: RPN,
    index: Index,
    read: ReadImage,
    cfg: TrainConfig,
    output: Path,
    *,
    min_score: float,
    draw: Path | None,
    ranks: Ranks,
) -> int:
    """Proposals of all images of an index, written in its order; returns how many there are.

    Memory does not grow with the number of images: every process spills what it finds to disk, and
    the main one then writes the file, the same for any number of processes.

    Args:
        min_score: proposals below this probability are left out.
        draw: folder for a picture of each image with its best proposals; None: no pictures.
    """
    batches = build_eval_batches(cfg, index, read, max(model.grid.strides), ranks)
    lowest = math.log(min_score / (1 - min_score)) if min_score > 0 else -math.inf
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as spill:
        folder = Path(ranks.broadcast(spill))
        found = propose_split(model, batches, cfg, ranks.device)
        if ranks.is_main:
            found = tqdm(found, total=-(-len(index) // ranks.world), unit="image")
        counts = []
        with open(folder / f"{ranks.rank}", "wb") as file:
            for image in found:
                keep = image.logits >= lowest
                rows = np.column_stack([image.boxes[keep], image.logits[keep]])  # [K, 5] float32
                rows.tofile(file)
                counts.append((image.row, len(rows)))
                if draw is not None:
                    write_png(_picture(read(image.row), rows), str(draw / _picture_name(index, image.row)))
        gathered = ranks.gather(counts)
        if gathered is not None:
            write_proposals(output, _in_order(index, folder, gathered))
        ranks.any(False)  # the others keep their spill until it is read
    return sum(n for counts in gathered or [] for _, n in counts)


def _in_order(
    index: Index, folder: Path, counts: list[list[tuple[int, int]]]
) -> Iterator[NamedProposals]:
    """What all processes spilled, by row of the index."""
    where: dict[int, tuple[int, int, int]] = {}
    for rank, of_rank in enumerate(counts):
        start = 0
        for row, count in of_rank:
            where[row] = (rank, start, count)
            start += count
    files = [np.fromfile] and [
        np.memmap(path, np.float32, "r").reshape(-1, 5) if path.stat().st_size else np.zeros((0, 5))
        for path in (folder / f"{rank}" for rank in range(len(counts)))
    ]
    for row in range(len(index)):
        rank, start, count = where[row]
        rows = np.array(files[rank][start : start + count], np.float32)
        yield NamedProposals(
            int(index.image_ids[row]), index.file_name(row), rows[:, :4], rows[:, 4]
        )
