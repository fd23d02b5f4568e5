"""Proposals of images into a file: what `rpn-propose` does."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rpn_train.build import build_eval_batches
from rpn_train.config import TrainConfig
from rpn_train.data.batch import ReadImage
from rpn_train.data.faults import counted
from rpn_train.data.index import Index
from rpn_train.distributed import Ranks
from rpn_train.evaluate import propose_split
from rpn_train.figures import DRAWN_PROPOSALS, draw_detections
from rpn_train.model import RPN
from rpn_train.pretrained import Pretrained, trained_model
from rpn_train.proposal_files import NamedProposals, check_output, write_proposals
from rpn_train.recall_report import save_picture
from rpn_train.splits import open_files, open_split
from rpn_train.stop import stop_on_signals


def propose(
    cfg: TrainConfig,
    source: Pretrained,
    images: str | None,
    output: Path,
    min_score: float,
    draw: Path | None,
    ranks: Ranks,
) -> None:
    """Write the proposals of a network to a file, image by image: memory does not grow.

    Several processes write the very file of one.

    Args:
        images: file, folder or glob, whose boxes refer to the upright image; None: the images of
            `cfg.eval.split` of the data set, whose boxes refer to the pixels as stored.
        output: a file in one of the formats of `proposal_files`.
        min_score: proposals of a lower probability are left out.
        draw: a folder for a picture of each image; None: no pictures.

    Raises:
        UserError: a fault of the images, of the network, or of `output`. There is no half file.
    """
    check_output(output)
    if images is not None:
        index, read = open_files(images, cfg.data)
    else:
        index, read = open_split(cfg, cfg.eval.split, "score")
    if index.left_out and ranks.is_main:
        print(f"left out: {counted(index.left_out)}; first {index.left_out[0]}")
    model = trained_model(cfg, source).to(ranks.device)
    found = named_proposals(cfg, model, index, read, min_score, draw, ranks)
    count = Count()
    if ranks.world == 1:
        write_proposals(output, count.of(found))
    else:
        share = output.with_name(f"{output.name}.{ranks.rank}.tmp")
        try:
            write_share(share, found)
            others = ranks.gather(share)  # all are written
            if others is not None:
                divisor = max(model.grid.strides)
                whole = build_eval_batches(cfg, index, read, divisor, Ranks(0, 1, ranks.device))
                write_proposals(output, count.of(in_order(others, whole.batches, index)))
            ranks.any(False)  # no share goes before it has been read
        finally:
            share.unlink(missing_ok=True)
    if ranks.is_main:
        print(f"{count.proposals} proposals of {len(index)} images written to {output}")


class Count:
    """How many proposals passed."""

    def __init__(self) -> None:
        self.proposals = 0

    def of(self, images: Iterator[NamedProposals]) -> Iterator[NamedProposals]:
        """The images themselves."""
        for image in images:
            self.proposals += len(image.logits)
            yield image


def named_proposals(
    cfg: TrainConfig,
    model: RPN,
    index: Index,
    read: ReadImage,
    min_score: float,
    draw: Path | None,
    ranks: Ranks,
) -> Iterator[NamedProposals]:
    """The proposals of this process's share of the images, drawn along the way."""
    batches = build_eval_batches(cfg, index, read, max(model.grid.strides), ranks)
    lowest = logit(min_score)
    total = sum(len(batch) for batch in batches.batches)
    hide = None if ranks.is_main else True  # None: where there is no terminal
    proposing = closing(propose_split(model, batches, cfg, ranks.device))
    with proposing as found, stop_on_signals() as stop:
        for image in tqdm(found, total=total, unit="image", disable=hide):
            if stop.signal is not None:  # the file in the making is removed on the way out
                raise SystemExit(128 + stop.signal)
            keep = image.logits >= lowest
            boxes, logits = image.boxes[keep], image.logits[keep]
            name = index.file_name(image.row)
            if image.fault:
                tqdm.write(f"not read, and so without proposals: {image.fault}")
            elif draw is not None:
                draw_proposals(read(image.row), boxes, draw / name)
            yield NamedProposals(int(index.image_ids[image.row]), name, boxes, logits)


def write_share(path: Path, images: Iterator[NamedProposals]) -> None:
    """Boxes and logits of the images of one process, one array after the other."""
    with path.open("wb") as file:
        for image in images:
            np.save(file, image.boxes)
            np.save(file, image.logits)


def in_order(
    shares: list[Path], batches: list[list[int]], index: Index
) -> Iterator[NamedProposals]:
    """The proposals of all images, batch by batch in turn, as one process would make them."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in shares]
        for number, rows in enumerate(batches):
            file = files[number % len(files)]
            for row in rows:
                boxes, logits = np.load(file), np.load(file)
                yield NamedProposals(int(index.image_ids[row]), index.file_name(row), boxes, logits)


def draw_proposals(image: Tensor, boxes: NDArray[np.float32], path: Path) -> None:
    """A picture of an image with its best proposals, as PNG."""
    boxes = boxes[:DRAWN_PROPOSALS]
    nothing = torch.zeros(0, 4)
    picture = draw_detections(
        image,
        gt_boxes=nothing,
        gt_ignore=torch.zeros(0, dtype=torch.bool),
        proposals=torch.from_numpy(boxes),
        scores=torch.linspace(1, 0.4, len(boxes)),
    )
    path = path.with_name(path.name + ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(picture, path)


def logit(probability: float) -> float:
    """The logit of a probability in [0, 1]."""
    if probability <= 0 or probability >= 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability / (1 - probability))
