"""Train this project's RPN and torchvision's side by side and compare losses, recall and time.

    python scripts/compare_torchvision.py dataset=coco dataset.root=DIR schedule.steps=200 \\
        --seeds 0 1 2 --json FILE

The overrides are those of `rpn-train`. Both networks start from the same weights and see the same
batches at the same rates; each batch goes through one and then the other, in alternating order, in
one process. Ours takes the steps of `rpn-train`. torchvision's `RegionProposalNetwork` trains on
the same normalised images as it always does, 2000 proposals per image and step included. Each is
evaluated with its own proposal code; the same code scores both. Only the --json file is written.

The losses agree statistically, not exactly: each network samples its anchors at random in its own
way. What else differs is pinned in `tests/test_parity.py`, but for crowds: torchvision trains on
their pixels as background.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead

from rpn_train.build import build_eval_batches, build_planner
from rpn_train.cli import compose_run
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch, EvalBatches, TrainBatches
from rpn_train.data.loading import load
from rpn_train.distributed import Ranks, start
from rpn_train.errors import ConfigError, DivergedError, UserError
from rpn_train.evaluate import ImageProposals, as_arrays, evaluate, in_stored_pixels, score
from rpn_train.model import RPN, normalize_images
from rpn_train.options import to_mapping
from rpn_train.proposals import Proposals
from rpn_train.report import environment, flatten
from rpn_train.run_log import write_json
from rpn_train.run_state import RunState, build_state
from rpn_train.schedule import build_optimizer
from rpn_train.splits import open_split
from rpn_train.step import Clock, prepare_network, training_step
from rpn_train.stop import StopRequest
from rpn_train.train import due, lr_of

Step = Callable[[Batch, float], Tensor]  # batch, learning rate -> objectness and box loss

SIDES = ("ours", "torchvision")
# Options that keep their defaults here: torchvision's network or this comparison has no other.
FIXED = (
    *("resume", "precision", "compile", "schedule.accumulate", "schedule.ema", "eval.split"),
    *("anchors.rounded", "method.channels", "method.border", "method.force_best"),
    *("method.forced_min_iou", "method.box_loss", "method.smooth_l1_beta", "method.box_weight"),
)


class TorchvisionRPN(nn.Module):
    """torchvision's RPN on a copy of our backbone, with our weights under the same keys."""

    def __init__(self, ours: RPN, cfg: TrainConfig) -> None:
        super().__init__()
        grid, method, top = ours.grid, cfg.method, cfg.proposals
        self.backbone = copy.deepcopy(ours.backbone)
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(grid.sizes, (grid.ratios,) * len(grid.sizes)),
            RPNHead(ours.backbone.out_channels, grid.per_cell, method.num_convs),
            fg_iou_thresh=method.fg_iou,
            bg_iou_thresh=method.bg_iou,
            batch_size_per_image=method.num_samples,
            positive_fraction=method.fg_fraction,
            pre_nms_top_n={"training": top.train.pre_nms, "testing": top.test.pre_nms},
            post_nms_top_n={"training": top.train.post_nms, "testing": top.test.post_nms},
            nms_thresh=top.nms_iou,
        )
        self.rpn.min_size = top.min_size
        # assigned, not copied: so the head gets our device and memory layout, too
        self.load_state_dict(copy.deepcopy(ours.state_dict()), assign=True)

    def forward(self, batch: Batch, device: torch.device) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of a batch from the loader, best first, and its losses in training mode."""
        objects = batch.gt_valid & ~batch.gt_ignore
        pairs = zip(batch.gt_boxes, objects, strict=True)
        targets = [{"boxes": boxes[kept].to(device)} for boxes, kept in pairs]
        images = normalize_images(batch.images.to(device), batch.sizes.to(device))
        features = dict(enumerate(self.backbone(images)))
        sizes = [(height, width) for height, width in batch.sizes.tolist()]
        boxes, losses = self.rpn(ImageList(images, sizes), features, targets)
        return boxes, losses


def our_step(state: RunState, cfg: TrainConfig, ranks: Ranks) -> Step:
    """The training step of `rpn-train`."""
    network = prepare_network(state.model, cfg, ranks)

    def step(batch: Batch, lr: float) -> Tensor:
        training_step(state, network, iter([batch]), cfg, lr, 0.0, Clock(), ranks)
        return state.pending.pop()[:2]

    return step


def torchvision_step(model: TorchvisionRPN, cfg: TrainConfig, device: torch.device) -> Step:
    """The same with torchvision's network and losses."""
    options = cfg.schedule
    optimizer = build_optimizer(
        model.train(),
        name=options.optimizer,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )

    def step(batch: Batch, lr: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = model(batch, device)[1]
        terms = torch.stack([losses["loss_objectness"], losses["loss_rpn_box_reg"]])
        terms.sum().backward()
        if options.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return terms.detach()

    return step


def timed(step: Step, batch: Batch, lr: float) -> list[float]:
    """Objectness loss, box loss and seconds of a step."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    started = time.perf_counter()
    terms = step(batch, lr)
    wait()
    seconds = time.perf_counter() - started
    return [*terms.tolist(), seconds]


def train_both(
    steps: Sequence[Step], loader: Iterator[Batch], cfg: TrainConfig, total: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Train both on each batch, in alternating order; prints mean losses every `log_every` steps.

    Returns:
        The printed rows, and what `timed` measured: float64 [total, 2, 3], steps x SIDES x numbers.
    """
    print(f"\nseed {cfg.seed}: {total} steps of {cfg.schedule.batch_size} images; mean losses")
    print("  step |" + "".join(f"{side:>12} objectness     box |" for side in SIDES), flush=True)
    measured, rows, since = np.zeros((total, 2, 3)), [], 0
    for step, batch in enumerate(loader, start=1):
        torch.manual_seed(int(batch.seeds[0]))  # torchvision samples by the global random state
        for side in (0, 1) if step % 2 else (1, 0):
            measured[step - 1, side] = timed(steps[side], batch, lr_of(cfg, step, total))
        if not np.isfinite(measured[step - 1]).all():
            ours, theirs = measured[step - 1, :, :2].tolist()
            raise DivergedError(
                f"seed {cfg.seed}, step {step}: expected finite losses, got {ours} (ours) and "
                f"{theirs} (torchvision); lower schedule.lr"
            )
        if due(step, cfg.log_every, total):
            means = measured[since:step, :, :2].mean(axis=0).tolist()
            since = step
            named = [{"objectness": objectness, "box": box} for objectness, box in means]
            rows.append({"step": step, **dict(zip(SIDES, named, strict=True))})
            cells = (f"{a + b:12.4f} {a:10.4f} {b:7.4f} |" for a, b in means)
            print(f"{step:6} |" + "".join(cells), flush=True)
    return rows, measured


@torch.no_grad()
def evaluate_torchvision(
    theirs: TorchvisionRPN, batches: EvalBatches, cfg: TrainConfig, device: torch.device
) -> list[ImageProposals]:
    """torchvision's own proposals of all images of a split, in the order of its index."""
    theirs.eval()
    found: list[ImageProposals] = []
    with closing(load(batches, range(len(batches)), workers=cfg.workers, pin=False)) as loader:
        for batch in loader:
            # it keeps its scores to itself, but the order says as much
            boxes = theirs(batch, device)[0]
            ranked = [Proposals(of_image, -torch.arange(len(of_image))) for of_image in boxes]
            found += in_stored_pixels(batch, ranked, batches.index)
    return sorted(found, key=lambda image: image.row)


def compare(cfg: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Train and evaluate both networks with one seed."""
    index, read = open_split(cfg, "train", "train")
    val_index, val_read = open_split(cfg, "val", "score")
    state = build_state(cfg, ranks.device)
    theirs = TorchvisionRPN(state.model, cfg)
    divisor = max(state.model.grid.strides)
    planner = build_planner(cfg, index, divisor)
    total = cfg.schedule.steps or max(1, round(cfg.schedule.epochs * planner.steps_per_epoch))
    batches = TrainBatches(index, read, planner, rank=0, world=1, accumulate=1)
    loader = load(batches, range(total), workers=cfg.workers, pin=ranks.device.type == "cuda")
    steps = our_step(state, cfg, ranks), torchvision_step(theirs, cfg, ranks.device)
    with closing(loader):
        rows, measured = train_both(steps, loader, cfg, total)
    val_batches = build_eval_batches(cfg, val_index, val_read, divisor, ranks)
    found = [
        evaluate(state.model, val_batches, cfg, StopRequest(), ranks) or [],
        evaluate_torchvision(theirs, val_batches, cfg, ranks.device),
    ]
    figures: dict[str, dict[str, float]] = {}
    for i, side in enumerate(SIDES):
        limits = cfg.eval.max_proposals
        recall = score(as_arrays(found[i], val_index), val_index, cfg.eval).figures()
        keys = [*(f"ar_{n}" for n in limits), f"recall_{max(limits)}_iou50"]
        figures[side] = {key: recall[key] for key in keys} | {
            "mean_loss": float(measured[:, i, :2].sum(axis=1).mean()),
            "median_step_s": float(np.median(measured[:, i, 2])),
        }
    return {"seed": cfg.seed, "losses": rows, "figures": figures}


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means of the seeds' figures and, of ours less torchvision's, mean and range."""
    summary = {}
    for key in results[0]["figures"]["ours"]:
        values = np.array([[r["figures"][side][key] for side in SIDES] for r in results])
        gaps = values[:, 0] - values[:, 1]
        numbers = (*values.mean(axis=0), gaps.mean(), gaps.min(), gaps.max())
        names = (*SIDES, "difference", "lowest", "highest")
        summary[key] = dict(zip(names, map(float, numbers), strict=True))
    return summary


def print_summary(title: str, summary: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:18}{'ours':>9}{'torchvision':>13}{'difference':>12} (lowest .. highest)")
    for key, figure in summary.items():
        ours, theirs, mean, low, high = figure.values()
        print(f"{key:18}{ours:9.4f}{theirs:13.4f}{mean:+12.4f} ({low:+.4f} .. {high:+.4f})")
    seconds = summary["median_step_s"]
    ratio = seconds["torchvision"] / seconds["ours"]
    print(f"a step of torchvision's takes {ratio:.2f} times as long as one of ours", flush=True)


def compose(overrides: Sequence[str]) -> TrainConfig:
    """The configuration of a run that both networks can do."""
    cfg = compose_run(overrides)
    given, defaults = flatten(to_mapping(cfg)), flatten(to_mapping(TrainConfig()))
    for key in FIXED:
        if given[key] != defaults[key]:
            raise ConfigError(f"{key}: expected {defaults[key]} to compare, got {given[key]}")
    return cfg


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 an error in one line on stderr, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Compare with torchvision's RPN.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of rpn-train")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run each; default: seed=")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    args = parser.parse_intermixed_args(argv)
    seeds = [[f"seed={seed}"] for seed in args.seeds or ()] or [[]]
    try:
        if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
            raise ConfigError(f"--json: expected a file in a folder that exists, got {args.json}")
        configs = [compose([*args.overrides, *seed]) for seed in seeds]
        with start(configs[0].device) as ranks:
            results = []
            for cfg in configs:
                results.append(compare(cfg, ranks))
                print_summary(f"seed {cfg.seed}", summarize(results[-1:]))
            about = {"config": to_mapping(configs[0]), "environment": environment(ranks)}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    summary = summarize(results)
    if len(results) > 1:
        print_summary(f"mean of {len(results)} seeds", summary)
    if args.json:
        write_json(args.json, {**about, "results": results, "summary": summary})
    return 0


if __name__ == "__main__":
    sys.exit(main())
