"""Proposals of a model on a split, and their recall."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch

from rpn_train.anchors import grid_anchors
from rpn_train.config import EvalConfig, TrainConfig
from rpn_train.data.batch import Batch, EvalBatches
from rpn_train.data.index import Index
from rpn_train.data.loading import load
from rpn_train.distributed import Ranks
from rpn_train.model import RPN, autocast, normalize_images
from rpn_train.proposals import Proposals, make_proposals
from rpn_train.recall import (
    ObjectArrays,
    ProposalArrays,
    Recall,
    boxes_to_xywh,
    score_recall,
)
from rpn_train.stop import StopRequest


@dataclass(frozen=True)
class ImageProposals:
    """Proposals of one image, best first: boxes float32 [K, 4] xyxy px of the image as stored.

    fault: why there are none, of an image that could not be read; else empty.
    """

    row: int
    boxes: np.ndarray
    logits: np.ndarray
    fault: str = ""


@dataclass
class StageTimes:
    """Where the time of proposing goes: a row (images, network s, proposals s) for each batch."""

    rows: list[tuple[int, float, float]] = field(default_factory=list)

    def per_image_ms(self) -> dict[str, float]:
        """Mean time per image in the network and in making proposals of its outputs, ms.

        Without the first batch, which warms up, unless it is the only one.
        """
        images, network, proposals = np.sum(self.rows[1:] or self.rows, axis=0).tolist()
        return {"network_ms": 1e3 * network / images, "proposals_ms": 1e3 * proposals / images}


def _now(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()  # not inference_mode: the anchors cached here are used in training too
def propose_batch(
    model: RPN, batch: Batch, cfg: TrainConfig, times: StageTimes | None = None
) -> list[Proposals]:
    """Proposals of a batch, in pixels of the resized images.

    Args:
        times: takes the times of this batch, for which a GPU is waited for.
    """
    top = cfg.proposals.train if cfg.eval.split == "train" else cfg.proposals.test
    device = batch.images.device
    started = 0.0 if times is None else _now(device)
    images = normalize_images(batch.images, batch.sizes)
    with autocast(cfg.precision, device):
        # forward() and not a call: a compiled network would be compiled again for every size
        outputs = model.forward(images)
    between = 0.0 if times is None else _now(device)
    proposals = make_proposals(
        outputs.scores,
        outputs.deltas,
        outputs.starting_from(grid_anchors(model.grid, batch.canvas, device)),
        model.grid.level_lengths(batch.canvas),
        batch.sizes,
        pre_nms=top.pre_nms,
        post_nms=top.post_nms,
        nms_iou=cfg.proposals.nms_iou,
        min_size=cfg.proposals.min_size,
    )
    if times is not None:
        times.rows.append((len(images), between - started, _now(device) - between))
    return proposals


def propose_split(
    model: RPN,
    batches: EvalBatches,
    cfg: TrainConfig,
    device: torch.device,
    times: StageTimes | None = None,
) -> Generator[ImageProposals, None, None]:
    """Proposals of every image of this process's share, mapped back to stored pixels."""
    loader = load(batches, range(len(batches)), workers=cfg.workers, pin=device.type == "cuda")
    with closing(loader):
        for batch in loader:
            found = propose_batch(model, batch.to(device), cfg, times)
            yield from in_stored_pixels(batch, found, batches.index)


def in_stored_pixels(
    batch: Batch, found: list[Proposals], index: Index
) -> Iterator[ImageProposals]:
    """Proposals of the images of a batch, mapped back to the images as stored."""
    faults = dict(batch.unread)
    counts = [len(of_image.logits) for of_image in found]
    all_boxes = torch.cat([of_image.boxes for of_image in found]).cpu().split(counts)
    all_logits = torch.cat([of_image.logits for of_image in found]).cpu().split(counts)
    rows, sizes = batch.rows.tolist(), batch.sizes.tolist()
    for row, size, boxes, logits in zip(rows, sizes, all_boxes, all_logits, strict=True):
        stored_height, stored_width = index.sizes[row].tolist()
        factor = torch.tensor([stored_width / size[1], stored_height / size[0]] * 2)
        fault = faults.get(row)
        if fault is not None:
            boxes, logits = boxes[:0], logits[:0]
        yield ImageProposals(row, (boxes * factor).numpy(), logits.numpy(), fault or "")


def as_arrays(found: list[ImageProposals], index: Index) -> ProposalArrays:
    """The proposals of all images of a split, in its order."""
    assert [f.row for f in found] == list(range(len(index)))
    return ProposalArrays(
        boxes_to_xywh(np.concatenate([f.boxes for f in found])),
        np.concatenate([f.logits for f in found]).astype(np.float64),
        np.cumsum([0, *(len(f.logits) for f in found)]),
    )


def objects_of(index: Index) -> ObjectArrays:
    """The objects of a split, as they are scored."""
    return ObjectArrays(index.boxes_xywh, index.areas, index.ignore, index.box_offsets)


def score(proposals: ProposalArrays, index: Index, cfg: EvalConfig) -> Recall:
    """Recall of the objects of a split, by the protocol that is asked for."""
    return score_recall(
        proposals, objects_of(index), max_proposals=cfg.max_proposals, protocol=cfg.protocol
    )


def evaluate(
    model: RPN,
    batches: EvalBatches,
    cfg: TrainConfig,
    stop: StopRequest,
    ranks: Ranks,
    times: StageTimes | None = None,
) -> list[ImageProposals] | None:
    """Proposals of all images of a split, in the order of its index.

    All processes take part; the main one gets the proposals, the others an empty list. None, in
    all, if a stop was requested meanwhile. The model stays in the mode it was in.
    """
    was_training = model.training
    model.eval()
    share = []
    with closing(propose_split(model, batches, cfg, ranks.device, times)) as images:
        for image in images:
            share.append(image)
            if stop:
                break
    model.train(was_training)
    if ranks.any(bool(stop)):
        return None
    shares = ranks.gather(share) or []
    return sorted((image for share in shares for image in share), key=lambda image: image.row)
