"""Proposals of a network or of files, scored and told: what `rpn-eval` does."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rpn_train.build import build_eval_batches
from rpn_train.config import TrainConfig
from rpn_train.data.batch import ReadImage
from rpn_train.data.faults import counted
from rpn_train.data.index import Index
from rpn_train.data_report import check_unread
from rpn_train.distributed import Ranks
from rpn_train.errors import DataError
from rpn_train.evaluate import StageTimes, as_arrays, evaluate, objects_of, score
from rpn_train.figures import DRAWN_PROPOSALS, ScoredImage, worst_sheet
from rpn_train.misses import image_misses, worst_images, write_misses
from rpn_train.pretrained import Pretrained, trained_model
from rpn_train.read_proposals import read_proposals
from rpn_train.recall import IOU_THRESHOLDS, ProposalArrays, Recall
from rpn_train.recall_report import recall_table, save_picture, write_recall
from rpn_train.report import device_name
from rpn_train.run_log import RunLog, write_json
from rpn_train.splits import open_split
from rpn_train.stop import stop_on_signals
from rpn_train.verify import largest_difference


def score_network(cfg: TrainConfig, source: Pretrained, folder: Path, ranks: Ranks) -> int | None:
    """Score a network on `cfg.eval.split`; prints, and writes to `folder`.

    Returns:
        None, or the signal that stopped it.

    Raises:
        UserError: a fault of the data or of the network.
    """
    index, read = open_split(cfg, cfg.eval.split, "score")
    model = trained_model(cfg, source).to(ranks.device)
    batches = build_eval_batches(cfg, index, read, max(model.grid.strides), ranks)
    times = StageTimes()
    with stop_on_signals() as stop:
        found = evaluate(model, batches, cfg, stop, ranks, times)
    if found is None or not ranks.is_main:
        return stop.signal
    if index.left_out:
        print(f"left out: {counted(index.left_out)}")
    faults = [image.fault for image in found if image.fault]
    for fault in faults:
        print(f"not read: {fault}; its objects count as missed")
    if faults:
        limit = cfg.data.max_bad_fraction
        check_unread(len(faults), faults[-1], len(index), cfg.eval.split, limit)
    trained = "" if source.step is None else f", step {source.step}"
    print(f"{source.name}{trained}, {len(index)} images of {cfg.eval.split}")
    extra = {} if source.step is None else {"step": source.step}
    tell(cfg, {"": as_arrays(found, index)}, index, read, folder, extra)
    per_image = times.per_image_ms()
    print(
        f"time per image: network {per_image['network_ms']:.1f} ms, proposals "
        f"{per_image['proposals_ms']:.1f} ms ({device_name(ranks.device)}, batches of "
        f"{cfg.eval.batch_size})"
    )
    write_json(folder / "timing.json", {"device": device_name(ranks.device), **per_image})
    return None


def score_files(cfg: TrainConfig, files: Mapping[str, Path], folder: Path) -> None:
    """Score proposal files, whoever made them, side by side. Missing images count as misses.

    Args:
        files: name in the report -> file; with one file the name may be empty.

    Raises:
        UserError: a fault of the data or of a file.
    """
    index, read = open_split(cfg, cfg.eval.split, "annotations")
    proposals = {}
    for name, path in files.items():
        loaded = read_proposals(path, index, match=cfg.eval.match)
        proposals[name] = loaded.proposals
        print(f"{path}: {len(loaded.proposals.scores)} proposals, {len(index)} images")
        if loaded.missing:
            print(
                f"{path}: {len(loaded.missing)} images have no proposals and count as misses, "
                f"first {index.file_name(loaded.missing[0])!r}"
            )
    tell(cfg, proposals, index, read, folder, {})


def tell(
    cfg: TrainConfig,
    proposals: Mapping[str, ProposalArrays],
    index: Index,
    read: ReadImage,
    folder: Path,
    extra: Mapping[str, int],
) -> None:
    """Score, print and write everything there is to say of the proposals of a split.

    With one nameless list of proposals, recall.json holds its figures; else those of each name.
    """
    recalls = {name: score(arrays, index, cfg.eval) for name, arrays in proposals.items()}
    figures = {name: recall.figures() for name, recall in recalls.items()}
    for name, values in figures.items():
        print(f"{name}\n{recall_table(values)}" if name else recall_table(values))
    told = figures[""] if {*figures} == {""} else figures
    write_json(folder / "recall.json", {**extra, **told})
    pictures = write_recall(recalls, cfg.eval.protocol, folder)
    for name, arrays in proposals.items():
        pictures |= write_worst(name, arrays, recalls[name], index, read, cfg.eval.pictures, folder)
    log = RunLog(folder, total=0, first=0)
    for tag, picture in pictures.items():
        log.image(tag, 0, picture)
    log.close()
    print(f"written to {folder}: recall.json, recall.md, images.csv, pictures, tensorboard")
    if cfg.eval.verify:
        for name, arrays in proposals.items():
            difference = largest_difference(arrays, objects_of(index), recalls[name])
            of = f" of {name}" if name else ""
            print(f"verified with pycocotools{of}: largest difference {difference:.1e}")


def write_worst(
    name: str,
    proposals: ProposalArrays,
    recall: Recall,
    index: Index,
    read: ReadImage,
    count: int,
    folder: Path,
) -> dict[str, Tensor]:
    """Write images.csv, what was found and missed in each image, and worst.png, those missed most.

    Returns:
        The picture by its name; none where `count` is 0, nothing was missed, or none can be read.
    """
    objects = objects_of(index)
    misses = image_misses(proposals, objects, recall)
    suffix = f"_{name}" if name else ""
    write_misses(folder / f"images{suffix}.csv", misses, index.image_ids, index.file_names())
    worst, faults = [], []
    for row in worst_images(misses, count).tolist():
        try:
            worst.append(scored_image(proposals, recall, index, read, row))
        except DataError as error:  # annotations alone are enough to score files
            faults.append(error)
    if faults:
        of = f"{len(faults)} of {len(faults) + len(worst)} images"
        print(f"worst{suffix}.png: {of} not drawn, first {faults[0]}")
    if not worst:
        return {}
    limit = max(recall.max_proposals)
    sheet = worst_sheet(worst, iou=float(IOU_THRESHOLDS[0]), num_proposals=limit)
    save_picture(sheet, folder / f"worst{suffix}.png")
    return {f"worst{suffix}": sheet}


def scored_image(
    proposals: ProposalArrays, recall: Recall, index: Index, read: ReadImage, row: int
) -> ScoredImage:
    """An image with its objects, found at IoU 0.5 or not, and its best proposals, to be drawn."""
    here = slice(*proposals.offsets[row : row + 2])
    best = np.argsort(-proposals.scores[here], kind="stable")[:DRAWN_PROPOSALS]
    boxes = proposals.boxes_xywh[here][best]
    rank = recall.matched_rank[0, 0, slice(*index.box_offsets[row : row + 2])]
    return ScoredImage(
        file_name=index.file_name(row),
        image=read(row),
        gt_boxes=torch.from_numpy(index.boxes_xyxy(row)),
        gt_ignore=torch.from_numpy(index.ignored(row)),
        found=torch.from_numpy(rank >= 0),
        proposals=torch.from_numpy(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])),
    )
