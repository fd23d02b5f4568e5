"""One image followed through a network: every number that the figures of its way show.

All of them come from the functions that train and propose, in one forward pass.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import clip, decode
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch, ReadImage, make_batch
from rpn_train.data.index import Index
from rpn_train.data.sampler import Item, canvas_of
from rpn_train.data.transforms import fit_size
from rpn_train.evaluate import propose_batch
from rpn_train.heads import CascadeHead, Outputs, RPNHead, TowerHead, join_levels
from rpn_train.method_config import MethodConfig
from rpn_train.method_targets import dense_targets, sampled_targets
from rpn_train.model import RPN
from rpn_train.proposals import Proposals, make_proposals
from rpn_train.targets import IGNORED, POSITIVE

# Part of the network -> sizes of the maps that it puts out, fine to coarse, without the batch.
Shapes = dict[str, list[tuple[int, ...]]]

PARTS = ("body", "backbone", "logits", "deltas", "hidden")


class Level(NamedTuple):
    """One level of the network.

    feature: float32 [C, h, w]. logits: float32 [A, h, w], of the anchors of each cell. first: index
    of its first anchor among all. candidates: what goes into NMS, best first; kept: what is left.
    """

    stride: int
    feature: Tensor
    logits: Tensor
    first: int
    candidates: Proposals
    kept: Proposals

    @property
    def objectness(self) -> Tensor:
        """float32 [h, w]: the highest probability of the anchors of each cell."""
        return self.logits.amax(0).sigmoid()


class Targets(NamedTuple):
    """What training by the method makes of the anchors: labels int8 [R].

    read: int64 [n], those that the loss reads.
    """

    labels: Tensor
    read: Tensor

    def rows(self, label: int) -> Tensor:
        """int64 [n]: the anchors of a label."""
        return (self.labels == label).nonzero()[:, 0]

    @property
    def read_of(self) -> tuple[Tensor, Tensor]:
        """The positive and the background anchors among those that are read."""
        positive = self.labels[self.read] == POSITIVE
        return self.read[positive], self.read[~positive]


class Truth(NamedTuple):
    """The objects: boxes float32 [G, 4] px of the resized image, ignore bool [G]; targets."""

    boxes: Tensor
    ignore: Tensor
    targets: Targets


@dataclass(frozen=True, eq=False)
class Walk:
    """What the network makes of an image; everything on the CPU, boxes in px of the resized image.

    name: of the image. stored: uint8 [3, H, W]; image: the same resized, without padding; canvas:
    (height, width) with it. placed, anchors, boxes: float32 [R, 4], the anchors of the grid, the
    same as a first stage moves them, and after regression. objectness, logits: float32 [R], of that
    branch, and what ranks: the same where no other branch has a say. shapes: of what "body",
    "backbone" and the branches "logits" and "deltas" put out, and of what goes into the first
    ("hidden"). kernel: side of the convolutions of the branches. truth: None where it is not known.
    """

    name: str
    cfg: TrainConfig
    stored: Tensor
    image: Tensor
    canvas: tuple[int, int]
    grid: AnchorGrid
    placed: Tensor
    anchors: Tensor
    objectness: Tensor
    logits: Tensor
    boxes: Tensor
    levels: tuple[Level, ...]
    proposals: Proposals
    shapes: Shapes
    kernel: int
    truth: Truth | None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the resized image, px."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def head(self) -> type[RPNHead | TowerHead | CascadeHead]:
        """What the network has for a head."""
        heads = {"towers": TowerHead, "cascade": CascadeHead, "shared": RPNHead}
        return heads[self.cfg.method.head]

    def behind(self, count: int) -> Tensor:
        """int64 [n]: the anchors that the best proposals were made of, n <= count."""
        boxes, logits = (part[:count] for part in self.proposals)
        if not len(logits):
            return torch.zeros(0, dtype=torch.int64)
        far = (self.boxes[:, None] - boxes).abs().amax(-1)  # [R, n]
        return torch.where(self.logits[:, None] == logits, far, math.inf).argmin(0)

    def cell_of(self, anchor: int) -> tuple[int, int, int]:
        """Level, row and column of an anchor."""
        level = max(i for i, of in enumerate(self.levels) if of.first <= anchor)
        cell = (anchor - self.levels[level].first) // self.grid.per_cell
        return level, *divmod(cell, self.levels[level].logits.shape[2])

    def anchors_at(self, level: int, row: int, column: int) -> Tensor:
        """float32 [A, 4]: the anchors of a cell, where they were placed."""
        of, per_cell = self.levels[level], self.grid.per_cell
        first = of.first + (row * of.logits.shape[2] + column) * per_cell
        return self.placed[first : first + per_cell]


def walk(
    model: RPN,
    index: Index,
    read: ReadImage,
    row: int,
    cfg: TrainConfig,
    *,
    truth: bool,
    seed: int = 0,
) -> Walk:
    """Follow one image of an index through the network, on the model's device.

    The model stays in the mode it was in, and no random state is touched.

    Args:
        truth: whether the boxes of the index are the objects; those of mere files are not known.
        seed: of anchor sampling.

    Raises:
        DataError: the image is missing or broken.
    """
    stored = read(row)
    height, width = index.sizes[row].tolist()
    size = fit_size((height, width), cfg.image.short_side, cfg.image.max_side)
    item = Item(row, size, flip=False, seed=seed, photometric=False)
    canvas = canvas_of([size], max(model.grid.strides))
    batch = make_batch(index, lambda _: stored, [item], canvas)
    batch = batch.to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with _listening(model) as heard:
            (proposals,) = propose_batch(model, batch, cfg)
    finally:
        model.train(training)
    outputs = join_levels(heard["head"])
    logits, deltas = outputs.scores, outputs.deltas
    placed = grid_anchors(model.grid, canvas, logits.device)
    anchors = outputs.starting_from(placed).expand_as(deltas)[0]
    boxes = clip(decode(deltas[0], anchors), batch.sizes)
    return Walk(
        name=index.file_name(row),
        cfg=cfg,
        stored=stored,
        image=batch.images[0, :, : size[0], : size[1]].cpu(),
        canvas=canvas,
        grid=model.grid,
        placed=placed.cpu(),
        anchors=anchors.cpu(),
        objectness=outputs.logits[0].cpu(),
        logits=logits[0].cpu(),
        boxes=boxes.cpu(),
        levels=_levels(model.grid, batch, heard["backbone"], logits, deltas, anchors, cfg),
        proposals=_on_cpu(proposals),
        kernel=cast(RPNHead | TowerHead | CascadeHead, model.rpn["head"]).cls_logits.kernel_size[0],
        shapes={name: [tuple(m.shape[1:]) for m in heard[name]] for name in PARTS},
        truth=_truth(model.grid, batch, cfg, outputs) if truth else None,
    )


@contextmanager
def _listening(model: RPN) -> Iterator[dict[str, list[Any]]]:
    """What the parts of the network put out meanwhile, level by level."""
    head = cast(RPNHead | TowerHead | CascadeHead, model.rpn["head"])
    modules = (model.backbone.body, model.backbone, head.cls_logits, head.bbox_pred, head)
    heard: dict[str, list[Any]] = {name: [] for name in (*PARTS, "head")}

    def hear(name: str, inputs: Any, output: Any) -> None:
        if name == "body" and isinstance(output, dict):
            output = [*output.values()]
        heard[name] += output if isinstance(output, list) else [output]
        heard["hidden"] += inputs if name == "logits" else ()

    with ExitStack() as stack:
        for name, module in zip((*PARTS[:-1], "head"), modules, strict=True):
            hook = module.register_forward_hook(
                lambda _, inputs, output, name=name: hear(name, inputs, output)
            )
            stack.callback(hook.remove)
        yield heard


def _levels(
    grid: AnchorGrid,
    batch: Batch,
    features: list[Tensor],
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    cfg: TrainConfig,
) -> tuple[Level, ...]:
    """Each level by itself, with what NMS is given there and what it leaves."""
    top = cfg.proposals.train if cfg.eval.split == "train" else cfg.proposals.test
    levels, start = [], 0
    for stride, feature, length in zip(
        grid.strides, features, grid.level_lengths(batch.canvas), strict=True
    ):
        here = slice(start, start + length)
        before, after = (
            make_proposals(
                logits[:, here],
                deltas[:, here],
                anchors[here],
                [length],
                batch.sizes,
                pre_nms=top.pre_nms,
                post_nms=post_nms,
                nms_iou=nms_iou,
                min_size=cfg.proposals.min_size,
            )[0]
            # no two boxes overlap by more than infinity, so none goes
            for nms_iou, post_nms in (
                (math.inf, top.pre_nms),
                (cfg.proposals.nms_iou, top.post_nms),
            )
        )
        of_cells = logits[0, here].view(*feature.shape[2:], grid.per_cell).permute(2, 0, 1).cpu()
        candidates, kept = _on_cpu(before), _on_cpu(after)
        levels.append(Level(stride, feature[0].float().cpu(), of_cells, start, candidates, kept))
        start += length
    return tuple(levels)


def _truth(grid: AnchorGrid, batch: Batch, cfg: TrainConfig, outputs: Outputs) -> Truth:
    """The objects and the targets of the image."""
    valid = batch.gt_valid[0]
    boxes, ignore = batch.gt_boxes[0, valid].cpu(), batch.gt_ignore[0, valid].cpu()
    return Truth(boxes, ignore, _targets(grid, batch, cfg.method, outputs))


def _targets(grid: AnchorGrid, batch: Batch, method: MethodConfig, outputs: Outputs) -> Targets:
    if method.sampling == "all":
        labels = dense_targets(grid, batch, outputs, method).labels[0].cpu()
        return Targets(labels, (labels != IGNORED).nonzero()[:, 0])
    assignment, picks = sampled_targets(grid, batch, method, outputs.anchors)
    return Targets(assignment.labels[0].cpu(), picks.at[0, picks.valid[0]].cpu())


def _on_cpu(proposals: Proposals) -> Proposals:
    return Proposals(*(part.cpu() for part in proposals))
