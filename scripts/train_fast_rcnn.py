"""Train a Fast R-CNN (Girshick 2015) on proposals from files and print its detection AP.

    rpn-train dataset=voc dataset.root=DIR output_dir=runs/a
    rpn-propose checkpoint=runs/a split=train output=train.npz
    rpn-propose checkpoint=runs/a output=val.npz
    python scripts/train_fast_rcnn.py --checkpoint runs/a 'dataset.categories=[cat,dog]' \\
        --train-proposals train.npz --val-proposals val.npz --control

The proposals are fixed: no RPN takes part, and any file that rpn-eval reads will do. The network is
a backbone and torchvision's `RoIHeads`; with --checkpoint, configuration and backbone start as that
run left them. The overrides are those of rpn-train, but images are not mirrored, gradients not
clipped, weights not averaged, and all is float32. The classes are `dataset.categories`; without,
all objects are of one. Crowds and difficult objects count as background in training, and in the AP,
which is pycocotools', not at all. --control trains the same network again with each proposal moved
to a random place of its image: it lacks what the proposals know about the images.
"""

import argparse
import copy
import io
import sys
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_convert, clip_boxes_to_image

from rpn_train.backbones import Backbone
from rpn_train.build import build_eval_batches, build_model, build_planner
from rpn_train.cli import compose_run
from rpn_train.compose import lay_over, parse, readable
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch, ReadImage, TrainBatches
from rpn_train.data.index import Index
from rpn_train.data.loading import load
from rpn_train.distributed import Ranks, start
from rpn_train.errors import DataError
from rpn_train.model import normalize_images
from rpn_train.pretrained import find_pretrained, trained_model
from rpn_train.read_proposals import read_proposals
from rpn_train.schedule import build_optimizer
from rpn_train.shell import guarded
from rpn_train.splits import Use, open_split
from rpn_train.train import due, lr_of


@dataclass(frozen=True, eq=False)
class Split:
    """Images, what is in them and where to look for it; boxes in pixels of the images as stored."""

    index: Index  # whose boxes do not matter
    classes: tuple[Index, ...]  # the same images, each time with the boxes of one class
    read: ReadImage
    proposals: tuple[Tensor, ...]  # of each image: float32 [K, 4] xyxy, best first

    def objects(self, row: int) -> tuple[Tensor, Tensor]:
        """Boxes [G, 4] xyxy to learn from an image, and their labels [G], from 1."""
        boxes = [torch.from_numpy(c.boxes_xyxy(row)[~c.ignored(row)]) for c in self.classes]
        counts = torch.tensor([len(of_class) for of_class in boxes])
        return torch.cat(boxes), torch.arange(1, len(boxes) + 1).repeat_interleave(counts)

    def scattered(self, seed: int) -> "Split":
        """The same with each proposal, as large as it is, at a random place of its image."""
        rng = torch.Generator().manual_seed(seed)
        moved = []
        for boxes, (height, width) in zip(self.proposals, self.index.sizes.tolist(), strict=True):
            extent = boxes[:, 2:] - boxes[:, :2]
            room = torch.tensor([width, height]) - extent
            corner = room * torch.rand(extent.shape, generator=rng)
            moved.append(torch.cat([corner, corner + extent], dim=1))
        return replace(self, proposals=tuple(moved))


def open_classes(cfg: TrainConfig, which: str, path: Path, limit: int) -> Split:
    """A split of the data set with the best `limit` proposals of each image."""
    use: Use = "train" if which == "train" else "score"
    every = replace(cfg.dataset, keep_empty=True)  # the same images for each class
    chosen = [replace(every, categories=(name,)) for name in every.categories or ()] or [every]
    opened = (open_split(replace(cfg, dataset=data), which, use) for data in chosen)
    classes, reads = zip(*opened, strict=True)
    found, missing = read_proposals(path, classes[0], match=cfg.eval.match)
    if missing:  # as in a file of the other split
        raise DataError(f"{path}: expected all {which} images, {len(missing)} are not in it")
    boxes = box_convert(torch.from_numpy(found.boxes_xywh), "xywh", "xyxy").float()
    of_image = boxes.tensor_split(torch.from_numpy(found.offsets[1:-1]))
    return Split(classes[0], classes, reads[0], tuple(best[:limit] for best in of_image))


class FastRCNN(nn.Module):
    """A backbone and torchvision's second stage, its proposals from outside."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        levels = [str(i) for i, s in enumerate(backbone.strides) if s <= 32]  # P6 is for the RPN
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
            TwoMLPHead(backbone.out_channels * 7**2, 1024),
            FastRCNNPredictor(1024, 1 + num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=64,  # as in the paper; torchvision takes 512
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )

    def forward(
        self, batch: Batch, split: Split, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, in pixels of the resized images, or the losses in training mode."""
        proposals, targets = [], []
        for row, size in zip(batch.rows.tolist(), batch.sizes.tolist(), strict=True):
            stored = split.index.sizes[row]
            proposals.append(rescale(split.proposals[row], stored, size).to(device))
            boxes, labels = split.objects(row)
            boxes = rescale(boxes, stored, size).to(device)
            targets.append({"boxes": boxes, "labels": labels.to(device)})
        batch = batch.to(device)
        maps = self.backbone(normalize_images(batch.images, batch.sizes))
        features = {str(i): feature for i, feature in enumerate(maps)}
        # with padding, as torchvision infers the strides from the sizes that it gets
        padded = [batch.canvas] * len(proposals)
        return self.roi_heads(features, proposals, padded, targets if self.training else None)


def rescale(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Boxes [N, 4] of an image resized from `old` to `new` (height, width), cut to it."""
    factor = torch.tensor([new[1] / old[1], new[0] / old[0]] * 2, dtype=torch.float32)
    return clip_boxes_to_image(boxes * factor, (int(new[0]), int(new[1])))


def train(model: FastRCNN, split: Split, cfg: TrainConfig, device: torch.device) -> list[float]:
    """Train by `cfg.schedule`, print mean losses every `log_every` steps, return all losses."""
    options = cfg.schedule
    planner = replace(build_planner(cfg, split.index, max(model.backbone.strides)), flip=0.0)
    total = options.steps or max(1, round(options.epochs * planner.steps_per_epoch))
    batches = TrainBatches(split.index, split.read, planner, rank=0, world=1, accumulate=1)
    optimizer = build_optimizer(
        model.train(),
        name=options.optimizer,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    losses: list[float] = []
    with closing(load(batches, range(total), workers=cfg.workers, pin=False)) as loader:
        for step, batch in enumerate(loader, start=1):
            for group in optimizer.param_groups:
                group["lr"] = lr_of(cfg, step, total)
            torch.manual_seed(int(batch.seeds[0]))  # torchvision samples by the global random state
            loss = torch.stack([*model(batch, split, device)[1].values()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if due(step, cfg.log_every, total):
                mean = np.mean(losses[-cfg.log_every :])
                print(f"step {step:5} of {total}, loss {mean:.4f}", flush=True)
    return losses


@torch.no_grad()
def detect(model: FastRCNN, split: Split, cfg: TrainConfig, ranks: Ranks) -> Tensor:
    """Detections [M, 7] in stored pixels: row of the image, x, y, width, height, score, label."""
    model.eval()
    divisor = max(model.backbone.strides)
    batches = build_eval_batches(cfg, split.index, split.read, divisor, ranks)
    detections = []
    with closing(load(batches, range(len(batches)), workers=cfg.workers, pin=False)) as loader:
        for batch in loader:
            found = model(batch, split, ranks.device)[0]
            places = zip(batch.rows.tolist(), batch.sizes.tolist(), strict=True)
            for (row, size), one in zip(places, found, strict=True):
                boxes = rescale(one["boxes"].cpu(), size, split.index.sizes[row])
                boxes = box_convert(boxes, "xyxy", "xywh")
                judged = torch.column_stack([one["scores"], one["labels"]]).cpu()
                image = torch.full((len(boxes), 1), row)
                detections.append(torch.column_stack([image, boxes, judged]))
    return torch.cat(detections)


def average_precision(split: Split, detections: Tensor) -> list[float]:
    """AP, AP50 and AP75 of `detect` by pycocotools; -1 where there is no object."""
    if not len(detections):  # which pycocotools refuses
        return [0.0, 0.0, 0.0]
    rows: list[dict[str, Any]] = []
    for category, index in enumerate(split.classes, start=1):
        owners = np.repeat(np.arange(len(index)), np.diff(index.box_offsets))
        columns = (owners, index.boxes_xywh, index.areas, index.ignore.astype(int))
        for values in zip(*(column.tolist() for column in columns), strict=True):
            row = dict(zip(("image_id", "bbox", "area", "iscrowd"), values, strict=True))
            rows.append({**row, "category_id": category, "id": len(rows) + 1})  # 0 means unmatched
    truth = COCO()
    truth.dataset = {"images": [{"id": row} for row in range(len(split.index))]}
    truth.dataset["categories"] = [{"id": 1 + i} for i in range(len(split.classes))]
    truth.dataset["annotations"] = rows
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(detections.double().numpy()), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[:3].tolist()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Train a Fast R-CNN on proposals from files.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of rpn-train")
    parser.add_argument("--train-proposals", type=Path, metavar="FILE", required=True)
    parser.add_argument("--val-proposals", type=Path, metavar="FILE", required=True)
    parser.add_argument("--checkpoint", metavar="RUN", help="an RPN to start from, as of rpn-eval")
    parser.add_argument("--limit", type=int, default=300, help="proposals per image, best first")
    parser.add_argument("--control", action="store_true", help="train on scattered boxes, too")
    args = parser.parse_intermixed_args(argv)
    typed = readable(args.overrides)
    if args.checkpoint is None:
        cfg = compose_run(typed)
        backbone = build_model(cfg).backbone
    else:
        source = find_pretrained(args.checkpoint)
        cfg = lay_over(source.config, parse(typed), typed)
        backbone = trained_model(cfg, source).backbone
    seen = open_classes(cfg, "train", args.train_proposals, args.limit)
    val = open_classes(cfg, "val", args.val_proposals, args.limit)
    runs = {"proposals": (seen, val)}
    if args.control:
        runs["scattered"] = (seen.scattered(cfg.seed), val.scattered(cfg.seed))
    lines = [f"\n{'boxes':12}{'AP untrained':>13}{'AP':>13}{'AP50':>13}{'AP75':>13}"]
    with start(cfg.device) as ranks:
        for name, (seen, val) in runs.items():
            torch.manual_seed(cfg.seed)
            model = FastRCNN(copy.deepcopy(backbone), len(val.classes)).to(ranks.device)
            figures = average_precision(val, detect(model, val, cfg, ranks))[:1]
            train(model, seen, cfg, ranks.device)
            figures += average_precision(val, detect(model, val, cfg, ranks))
            lines.append(f"{name:12}" + "".join(f"{figure:13.4f}" for figure in figures))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
