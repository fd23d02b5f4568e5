"""The commands on what training made: `rpn-eval` scores proposals, `rpn-propose` writes them."""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rpn_train import checkpoint
from rpn_train.build import build_eval_batches, build_model, open_files, open_split
from rpn_train.config import TrainConfig
from rpn_train.distributed import Ranks
from rpn_train.evaluate import evaluate, propose_split, score, score_arrays
from rpn_train.figures import DRAWN_PROPOSALS, draw_detections
from rpn_train.model import RPN
from rpn_train.proposal_files import NamedProposals, write_proposals
from rpn_train.read_proposals import read_proposals
from rpn_train.recall_report import tell_recall
from rpn_train.stop import stop_on_signals


def evaluate_checkpoint(
    cfg: TrainConfig, saved: dict[str, Any], path: Path, folder: Path, ranks: Ranks
) -> None:
    """Score a checkpoint on `cfg.eval.split`, print the table and write recall.json to `folder`.

    Averaged weights are scored where the checkpoint has some.

    Raises:
        UserError: a fault of the data or of the checkpoint.
    """
    index, read = open_split(cfg.dataset, cfg.eval.split, cfg.seed)
    model = trained_model(cfg, saved, path).to(ranks.device)
    batches = build_eval_batches(cfg, index, read, max(model.grid.strides), ranks)
    with stop_on_signals() as stop:
        found = evaluate(model, batches, cfg, stop, ranks)
    if found is None or not ranks.is_main:
        return
    recall = score(found, index, cfg.eval)
    print(f"{path}, step {saved['step']}, {len(index)} images of {cfg.eval.split}")
    tell_recall({"": recall}, folder, {"step": saved["step"]})


def evaluate_files(cfg: TrainConfig, files: Mapping[str, Path], folder: Path) -> None:
    """Score proposal files, whoever made them, side by side. Missing images count as misses.

    Args:
        files: name in the report -> file; with one file the name may be empty.
    """
    index, _ = open_split(cfg.dataset, cfg.eval.split, cfg.seed)
    recalls = {}
    for name, path in files.items():
        loaded = read_proposals(path, index, match=cfg.eval.match)
        recalls[name] = score_arrays(loaded.proposals, index, cfg.eval)
        print(f"{path}: {len(loaded.proposals.scores)} proposals, {len(index)} images")
        if loaded.missing:
            print(
                f"{path}: {len(loaded.missing)} images have no proposals and count as misses, "
                f"first {index.file_name(loaded.missing[0])!r}"
            )
    tell_recall(recalls, folder, {})


def propose(
    cfg: TrainConfig,
    saved: dict[str, Any],
    path: Path,
    images: str | None,
    output: Path,
    min_score: float,
    draw: Path | None,
    device: torch.device,
) -> None:
    """Write the proposals of a checkpoint to a file, image by image: memory does not grow.

    Args:
        images: file, folder or glob, whose boxes refer to the upright image; None: the images of
            `cfg.eval.split` of the data set, whose boxes refer to the pixels as stored.
        output: a file in one of the formats of `proposal_files`.
        min_score: proposals of a lower probability are left out.
        draw: a folder for a picture of each image; None: no pictures.
    """
    if images is not None:
        index, read = open_files(images)
    else:
        index, read = open_split(cfg.dataset, cfg.eval.split, cfg.seed)
    model = trained_model(cfg, saved, path).to(device)
    batches = build_eval_batches(cfg, index, read, max(model.grid.strides), Ranks(0, 1, device))
    lowest = logit(min_score)
    total = 0

    def named() -> Iterator[NamedProposals]:
        nonlocal total
        with closing(propose_split(model, batches, cfg, device)) as found:
            for image in tqdm(found, total=len(index), unit="image", disable=None):
                keep = image.logits >= lowest
                boxes, logits = image.boxes[keep], image.logits[keep]
                name = index.file_name(image.row)
                if draw is not None:
                    draw_proposals(read(image.row), boxes, draw / name)
                total += len(logits)
                yield NamedProposals(int(index.image_ids[image.row]), name, boxes, logits)

    write_proposals(output, named())
    print(f"{total} proposals of {len(index)} images written to {output}")


def trained_model(cfg: TrainConfig, saved: dict[str, Any], path: Path) -> RPN:
    """The network of a checkpoint, for evaluation, on the CPU; averaged weights if it has some."""
    model = build_model(cfg)
    checkpoint.load_weights(model, saved["ema"] or saved["model"], path)
    return model.eval()


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
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def logit(probability: float) -> float:
    """The logit of a probability in [0, 1]."""
    if probability <= 0 or probability >= 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability / (1 - probability))
