"""Time and memory of anchor assignment and sampling on the CPU, beside torchvision's.

    python scripts/benchmark_assignment.py --json FILE

For each canvas and number of boxes, both assign and sample the anchors of a feature pyramid for the
same batch, in alternating order in one process. Then each does so once for one image with many
boxes, in a process of its own: the memory is how far that raises the peak of the process. The
anchors are made beforehand. Labels and the boxes of positives must be equal.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.targets import Assignment, assign, random_keys, sample

SIDES = ("ours", "torchvision")
GRID = AnchorGrid(
    sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
    ratios=(0.5, 1.0, 2.0),
    strides=(4, 8, 16, 32, 64),
    rounded=True,
)
CANVASES = ((512, 512), (800, 1088))
BOXES = (8, 60)
FG_IOU, BG_IOU, NUM_SAMPLES, FG_FRACTION = 0.7, 0.3, 256, 0.5


def draw_boxes(images: int, boxes: int, canvas: tuple[int, int]) -> Tensor:
    """[images, boxes, 4] with sides from 8 to 400 px, their logarithms uniform, as in COCO."""
    generator = torch.Generator().manual_seed(0)
    limits = torch.tensor([math.log(8), math.log(400)])
    sides = torch.exp(limits[0] + limits.diff() * torch.rand(images, boxes, 2, generator=generator))
    room = torch.tensor([canvas[1], canvas[0]]) - sides
    corners = torch.rand(images, boxes, 2, generator=generator) * room
    return torch.cat([corners, corners + sides], dim=-1)


def ours(boxes: Tensor, canvas: tuple[int, int], anchors: Tensor) -> Callable[[], Assignment]:
    """Assignment and sampling of `rpn-train`."""
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    sizes = torch.tensor([canvas] * len(boxes))

    def run() -> Assignment:
        assignment = assign(
            GRID,
            canvas,
            boxes,
            valid,
            ~valid,
            sizes,
            fg_iou=FG_IOU,
            bg_iou=BG_IOU,
            force_best=True,
            forced_min_iou=0.0,
            ignore_ioa=0.5,
            border="use",
        )
        keys = random_keys(torch.arange(len(boxes)), len(anchors))
        sample(assignment.labels, keys, num_samples=NUM_SAMPLES, fg_fraction=FG_FRACTION)
        return assignment

    return run


def torchvision(
    boxes: Tensor, canvas: tuple[int, int], anchors: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same by the methods of its `RegionProposalNetwork`; labels and boxes of the anchors."""
    top_n: dict[str, int] = {}  # of proposals, which are not made here
    options = (FG_IOU, BG_IOU, NUM_SAMPLES, FG_FRACTION, top_n, top_n, 0.7)
    rpn = RegionProposalNetwork(AnchorGenerator(), None, *options)
    targets = [{"boxes": of_image} for of_image in boxes]

    def run() -> tuple[Tensor, Tensor]:
        labels, matched = rpn.assign_targets_to_anchors([anchors] * len(boxes), targets)
        rpn.fg_bg_sampler(labels)
        return torch.stack(labels), torch.stack(matched)

    return run


def check(boxes: Tensor, assignment: Assignment, theirs: tuple[Tensor, Tensor]) -> None:
    """Assert that the two agree."""
    matched = boxes.gather(1, assignment.matches[..., None].expand(-1, -1, 4))
    positive = assignment.labels == 1
    assert torch.equal(assignment.labels.float(), theirs[0])
    assert torch.equal(matched[positive], theirs[1][positive])


def compare(images: int, boxes: int, canvas: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Median seconds of each side over alternating runs."""
    drawn = draw_boxes(images, boxes, canvas)
    anchors = grid_anchors(GRID, canvas, torch.device("cpu"))
    our_run, their_run = ours(drawn, canvas, anchors), torchvision(drawn, canvas, anchors)
    check(drawn, our_run(), their_run())
    seconds: list[list[float]] = [[], []]
    for i in range(2 * repeats):
        side = (i + i // 2) % 2  # ours, theirs, theirs, ours, ...
        start = time.perf_counter()
        (our_run, their_run)[side]()
        seconds[side].append(time.perf_counter() - start)
    medians = dict(zip(SIDES, map(statistics.median, seconds), strict=True))
    return {"canvas": canvas, "boxes": boxes, "anchors": len(anchors), "seconds": medians}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(side: str, boxes: int) -> dict[str, Any]:
    """One run for one image; in a process of its own."""
    canvas = CANVASES[-1]
    drawn = draw_boxes(1, boxes, canvas)
    anchors = grid_anchors(GRID, canvas, torch.device("cpu"))
    prepare: Callable[..., Callable[[], object]] = ours if side == "ours" else torchvision
    prepare(drawn[:, :1], canvas, anchors)()  # what is loaded or cached by the first call
    run, before, start = prepare(drawn, canvas, anchors), peak_mib(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {"side": side, "seconds": seconds, "mib": peak_mib() - before, "peak_mib": peak_mib()}


def run_apart(*arguments: str | int) -> str:
    """This program in a new process."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def print_timings(results: list[dict[str, Any]]) -> None:
    print(
        f"{'canvas':>10} {'anchors':>8} {'boxes':>6} {'ours ms':>9} {'theirs ms':>10} {'ratio':>6}"
    )
    for result in results:
        mine, theirs = (result["seconds"][side] for side in SIDES)
        height, width = result["canvas"]
        print(
            f"{f'{height}x{width}':>10} {result['anchors']:8} {result['boxes']:6} "
            f"{1e3 * mine:9.2f} {1e3 * theirs:10.2f} {theirs / mine:6.1f}"
        )


def print_many(results: list[dict[str, Any]]) -> None:
    print(f"{'':>11} {'seconds':>9} {'MiB more':>9} {'peak MiB':>9}")
    for result in results:
        print(
            f"{result['side']:>11} {result['seconds']:9.3f} {result['mib']:9.0f} "
            f"{result['peak_mib']:9.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of anchor assignment and sampling.")
    parser.add_argument("--images", type=int, default=2, help="of a batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--many", type=int, default=1000, help="boxes of the crowded image; 0: none"
    )
    parser.add_argument("--skip-torchvision", action="store_true", help="of the crowded image: GBs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    parser.add_argument("--work", choices=SIDES, help=argparse.SUPPRESS)  # see run_apart
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.work:
        print(json.dumps(work(args.work, args.many)))
        return
    many = []
    if args.many:  # first: a process starts with the peak of the one that started it
        sides = SIDES[:1] if args.skip_torchvision else SIDES
        common = ("--many", args.many, "--threads", args.threads)
        many = [json.loads(run_apart(*common, "--work", side)) for side in sides]
    cases = [(boxes, canvas) for canvas in CANVASES for boxes in BOXES]
    results = [compare(args.images, boxes, canvas, args.repeats) for boxes, canvas in cases]
    print(f"{args.images} images, {args.threads} thread(s), median of {args.repeats}")
    print_timings(results)
    if many:
        print(f"\none image with {args.many} boxes")
        print_many(many)
    if args.json:
        about = {"images": args.images, "repeats": args.repeats, "threads": args.threads}
        found = {**about, "results": results, "many": {"boxes": args.many, "results": many}}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
