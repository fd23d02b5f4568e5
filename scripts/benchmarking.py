"""What the benchmarks share: both networks on the same drawn batch, timed in turns; tables, JSON.

Ours is what `rpn-train` builds with its defaults: folded norms, channels last, `training_step`.
torchvision's is its `resnet_fpn_backbone` (frozen batch norm, three trainable stages) with its
`RegionProposalNetwork` in its own memory layout, with the same weights, anchors and settings. As in
its users' training, it makes proposals in every step. Both normalise the same images.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from rpn_train import evaluate, objective, step
from rpn_train.backbones import BACKBONES
from rpn_train.config import AnchorsConfig, BackboneConfig, ScheduleConfig, TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.data.sampler import canvas_of
from rpn_train.distributed import Ranks
from rpn_train.model import normalize_images
from rpn_train.proposals import Proposals, make_proposals
from rpn_train.report import device_name, environment
from rpn_train.run_log import write_json
from rpn_train.run_state import RunState, build_state

Times = dict[str, float]  # part -> ms
Timed = Callable[[], object]  # leaves its laps on the stopwatch

SIDES = ("ours", "torchvision")
WHOLE = "whole"
FPN = AnchorsConfig()
RESNETS = [name for name in BACKBONES if name.startswith("res") and name.endswith("_fpn")]


class Stopwatch:
    """Times of the parts of something. A GPU is timed by events, and not waited for in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin, once the device is idle."""
        self._wait()
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        """The time since the last mark went into `part`, which may come several times."""
        self._marks.append((part, self._now()))

    def marked(
        self, function: Callable[..., Any], part: str, before: str | None = None
    ) -> Callable[..., Any]:
        """The function with a lap at its end, and one at its start for the part before it."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self.lap(before)
            result = function(*args, **kwargs)
            self.lap(part)
            return result

        return marked

    def read(self) -> Times:
        """The parts in order of their first laps, and their sum."""
        self._wait()
        times: Times = {}
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            on_gpu = self._device.type == "cuda"
            elapsed = begin.elapsed_time(end) if on_gpu else 1e3 * (end - begin)
            times[part] = times.get(part, 0.0) + elapsed
        return {**times, WHOLE: sum(times.values())}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Bench(NamedTuple):
    """Our network in its initial state, and one batch."""

    cfg: TrainConfig
    ranks: Ranks
    watch: Stopwatch
    state: RunState
    batch: Batch


def build(args: argparse.Namespace, ranks: Ranks, anchors: AnchorsConfig = FPN) -> Bench:
    """What the arguments of `parser` ask for.

    The other settings are defaults but for fixed norms and two frozen stages, as with pretrained
    weights. The weights are random: they do not change what a convolution costs.
    """
    cfg = TrainConfig(
        precision=args.precision,
        backbone=BackboneConfig(args.backbone, frozen_stages=2, norm="frozen_bn"),
        anchors=anchors,
        schedule=ScheduleConfig(batch_size=args.batch),
    )
    state = build_state(cfg, ranks.device)
    drawn = draw_batch(tuple(args.size), args.batch, args.boxes, max(state.model.grid.strides))
    bench = Bench(cfg, ranks, Stopwatch(ranks.device), state, drawn.to(ranks.device))
    spread_outputs(bench)
    return bench


def draw_batch(size: tuple[int, int], count: int, boxes: int, divisor: int) -> Batch:
    """Noise with boxes whose sides are drawn log-uniformly from 8 to 400 px, within the image."""
    generator = torch.Generator().manual_seed(0)
    height, width = canvas_of([size], divisor)
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    images[:, :, : size[0], : size[1]].random_(256, generator=generator)
    room = torch.tensor([size[1], size[0]])  # for width and height
    draw = torch.rand(2, count, boxes, 2, generator=generator)
    sides = 8 * (room.clamp(max=400) / 8) ** draw[0]  # [B, G, 2]
    corners = draw[1] * (room - sides)
    valid = torch.ones(count, boxes, dtype=torch.bool)
    return Batch(
        images=images,
        sizes=torch.tensor([size] * count),
        gt_boxes=torch.cat([corners, corners + sides], dim=-1),
        gt_valid=valid,
        gt_ignore=~valid,
        seeds=torch.arange(count),
        rows=torch.arange(count),
    )


@torch.no_grad()
def spread_outputs(bench: Bench) -> None:
    """Scale the branches of the untrained head: how long NMS takes depends on what it is given."""
    outputs = bench.state.model(normalize_images(bench.batch.images, bench.batch.sizes))
    head = cast(Any, bench.state.model.rpn["head"])
    head.cls_logits.weight /= outputs.logits.std()
    head.bbox_pred.weight *= 0.2 / outputs.deltas.std()


class TorchvisionRPN(nn.Module):
    """torchvision's backbone and RPN with the weights of ours, under the same keys."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        cfg, ours, watch = bench.cfg, bench.state.model, bench.watch
        grid, method, top = ours.grid, cfg.method, cfg.proposals
        self.watch = watch
        self.backbone = resnet_fpn_backbone(
            backbone_name=cfg.backbone.name.removesuffix("_fpn"),
            weights=None,
            trainable_layers=5 - cfg.backbone.frozen_stages,
        )
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(grid.sizes, (grid.ratios,) * len(grid.sizes)),
            RPNHead(self.backbone.out_channels, grid.per_cell, method.num_convs),
            fg_iou_thresh=method.fg_iou,
            bg_iou_thresh=method.bg_iou,
            batch_size_per_image=method.num_samples,
            positive_fraction=method.fg_fraction,
            pre_nms_top_n={"training": top.train.pre_nms, "testing": top.test.pre_nms},
            post_nms_top_n={"training": top.train.post_nms, "testing": top.test.post_nms},
            nms_thresh=top.nms_iou,
        )
        self.rpn.min_size = top.min_size
        self.load_state_dict(ours.state_dict())
        self.to(bench.ranks.device)
        # the anchors come right after the head, the sampling right after the targets
        self.rpn.anchor_generator.register_forward_pre_hook(lambda *_: watch.lap("network"))
        self.rpn.filter_proposals = watch.marked(self.rpn.filter_proposals, "proposals")
        self.rpn.fg_bg_sampler = watch.marked(self.rpn.fg_bg_sampler, "targets")

    def forward(self, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals, best first, and in training mode the losses."""
        images = normalize_images(batch.images, batch.sizes)
        sizes = [(height, width) for height, width in batch.sizes.tolist()]
        self.watch.lap("input")
        targets = [{"boxes": boxes} for boxes in batch.gt_boxes]
        return self.rpn(ImageList(images, sizes), self.backbone(images), targets)


def their_canvas(batch: Batch) -> Batch:
    """The batch as torchvision pads it: to multiples of 32 px, not of our largest stride."""
    height, width = canvas_of([tuple(size) for size in batch.sizes.tolist()], 32)
    return replace(batch, images=batch.images[:, :, :height, :width].contiguous())


@torch.no_grad()
def check_outputs(bench: Bench, theirs: TorchvisionRPN) -> None:
    """Both networks give the same at every anchor of one canvas, in float32."""
    images = normalize_images(bench.batch.images, bench.batch.sizes)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = bench.state.model(images)
        outputs = theirs.rpn.head([*theirs.backbone(images).values()])
    for our, levels in zip(ours[:2], outputs, strict=True):
        rows = [level.permute(0, 2, 3, 1).flatten(1) for level in levels]  # [B, H * W * A (* 4)]
        their = torch.cat(rows, dim=1).view_as(our)
        assert_close(our, their, rtol=0, atol=1e-3 * float(their.abs().max()))


def our_step(bench: Bench, *, compiled: bool = False) -> Timed:
    """`training_step` with marks between its parts.

    The rate is 0: the work is the same, and each round meets the same network.
    """
    cfg, ranks, watch, state, batch = bench
    cfg = replace(cfg, compile=compiled)
    network = watch.marked(step.prepare_network(state.model, cfg, ranks), "network")

    normalize = watch.marked(normalize_images, "input", before="targets")

    def take() -> None:
        with patch.object(objective, "normalize_images", normalize):
            called = cast(nn.Module, network)  # and no more than called
            step.training_step(state, called, iter([batch]), cfg, 0.0, 0.0, step.Clock(), ranks)
        watch.lap("update")
        state.pending.clear()

    state.optimizer.register_step_pre_hook(lambda *_: watch.lap("losses, backward"))
    return take


def our_proposals(bench: Bench) -> Callable[[], list[Proposals]]:
    """`propose_batch` with marks between its parts."""
    normalize = bench.watch.marked(normalize_images, "input")
    make = bench.watch.marked(make_proposals, "proposals", before="network")
    model = bench.state.model.eval()

    def take() -> list[Proposals]:
        with patch.multiple(evaluate, normalize_images=normalize, make_proposals=make):
            return evaluate.propose_batch(model, bench.batch, bench.cfg)

    return take


def in_turns(timed: Mapping[str, Timed], watch: Stopwatch, rounds: int) -> dict[str, list[Times]]:
    """Times of each in every round. The order turns around, so that none has the better place.

    A round before does not count: it warms up.
    """
    times: dict[str, list[Times]] = {name: [] for name in timed}
    for i in range(rounds + 1):
        for name in [*timed] if i % 2 else [*timed][::-1]:
            watch.start()
            timed[name]()
            times[name].append(watch.read())
    return {name: rows[1:] for name, rows in times.items()}


def medians(rows: Sequence[Times]) -> Times:
    """Of each part over the rounds; so the parts need not add up to the whole."""
    return {part: median(row[part] for row in rows) for part in rows[0]}


def compare(times: Mapping[str, Sequence[Times]]) -> dict[str, Any]:
    """Print the medians of both sides; returned are these, and the ratio of the whole by rounds."""
    ours, theirs = (medians(times[side]) for side in SIDES)
    print(f"{'ms':18}{SIDES[0]:>10}{SIDES[1]:>13}{'ratio':>9}")
    for part in sorted({**theirs, **ours}, key=[*theirs].index):
        our, their = ours.get(part), theirs[part]
        cells = f"{'-':>10}{their:13.1f}" if our is None else f"{our:10.1f}{their:13.1f}"
        print(f"{part:18}{cells}" + ("" if our is None else f"{their / our:9.2f}"))
    ratios = sorted(b[WHOLE] / a[WHOLE] for a, b in zip(*times.values(), strict=True))
    print(f"torchvision / ours: {median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})")
    return {"ours": ours, "torchvision": theirs, "ratios": ratios, "ratio": median(ratios)}


def parser(
    description: str, *, size: int, repeats: int, backbone: str = "resnet50_fpn"
) -> argparse.ArgumentParser:
    """With the arguments that the benchmarks have in common."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--backbone", choices=RESNETS, default=backbone)
    found.add_argument("--size", type=int, nargs=2, default=[size, size], metavar=("H", "W"))
    found.add_argument("--batch", type=int, default=2, help="images")
    found.add_argument("--boxes", type=int, default=8, help="objects per image")
    found.add_argument("--repeats", type=int, default=repeats, help="rounds, of which the median")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    return found


def describe(args: argparse.Namespace, ranks: Ranks) -> str:
    """What is measured, and on what."""
    height, width = args.size
    return (
        f"{args.backbone}, {args.batch} images of {height} x {width}, {args.boxes} objects each, "
        f"{args.precision}, {device_name(ranks.device)}"
    )


def write(args: argparse.Namespace, ranks: Ranks, results: Any) -> None:
    """The results with what they were measured on and how, if a file is asked for."""
    if args.json:
        arguments = {key: value for key, value in vars(args).items() if key != "json"}
        about = {"arguments": arguments, "environment": environment(ranks)}
        write_json(args.json, {**about, "results": results})
