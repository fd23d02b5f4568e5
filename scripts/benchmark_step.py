"""Time of a training step, whole and in parts, beside torchvision's RPN.

    python scripts/benchmark_step.py --backbone resnet50_fpn --size 512 512 --boxes 8 --repeats 9
    python scripts/benchmark_step.py --size 800 1344 --batch 16 --precision bf16 --compile \\
        --channels-last

A step is what happens to a batch that is loaded: input (images normalised), targets (assignment and
sampling), network (forward), proposals (torchvision's alone makes them), losses and backward pass,
update by SGD. First it is checked that both networks give the same outputs, and at the same anchors
the same losses. `benchmarking.py` says what stands against what.

On a GPU the images a second come with the operations a second, beside those that a product of large
bf16 matrices reaches there, the memory that a step adds, and how often it waits for the GPU.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from benchmark_model import count_gflop
from benchmarking import (
    SIDES,
    WHOLE,
    Bench,
    Timed,
    TorchvisionRPN,
    build,
    check_outputs,
    compare,
    describe,
    in_turns,
    our_step,
    parser,
    their_canvas,
    write,
)
from torch import Tensor
from torch.testing import assert_close

from rpn_train.build import build_model
from rpn_train.distributed import start
from rpn_train.model import autocast
from rpn_train.objective import batch_losses
from rpn_train.schedule import build_optimizer


@torch.no_grad()
def check_losses(bench: Bench, theirs: TorchvisionRPN) -> None:
    """With our sample in the place of its own, torchvision's losses are ours, in float32."""
    cfg = replace(bench.cfg, precision="fp32")
    own_sampler = theirs.rpn.fg_bg_sampler
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, picks = batch_losses(bench.state.model, bench.state.model.grid, bench.batch, cfg, 0.0)

        def our_sample(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            nowhere = torch.zeros_like(torch.stack(labels), dtype=torch.bool)
            positive = nowhere.scatter(1, picks.at, picks.positive)
            background = nowhere.scatter(1, picks.at, picks.valid & ~picks.positive)
            return list(positive), list(background)

        theirs.rpn.fg_bg_sampler = our_sample
        losses = theirs.train()(bench.batch)[1]
    theirs.rpn.fg_bg_sampler = own_sampler
    assert_close(ours.objectness, losses["loss_objectness"], rtol=1e-3, atol=0)
    assert_close(ours.box, losses["loss_rpn_box_reg"], rtol=1e-3, atol=0)


def torchvision_step(bench: Bench, theirs: TorchvisionRPN, *, compiled: bool) -> Timed:
    """A step as in torchvision's training, with the optimizer of ours."""
    options, watch, batch = bench.cfg.schedule, bench.watch, their_canvas(bench.batch)
    optimizer = build_optimizer(
        theirs.train(),
        name=options.optimizer,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    if compiled:  # what of it is one graph
        theirs.backbone.compile()
        theirs.rpn.head.compile()

    def take() -> None:
        with autocast(bench.cfg.precision, batch.images.device):
            losses = theirs(batch)[1]
        torch.stack([*losses.values()]).sum().backward()
        watch.lap("losses, backward")
        optimizer.step()
        optimizer.zero_grad()
        watch.lap("update")

    return take


def step_gflop(bench: Bench) -> dict[str, float]:
    """Operations of the convolutions in a step on a GPU, 10^9: both sides, each on its own canvas.

    torchvision evaluates its head everywhere.
    """
    model, batch = build_model(bench.cfg).to("meta"), bench.batch.to(torch.device("meta"))
    at = torch.empty(len(batch.images), bench.cfg.method.num_samples, device="meta").long()
    ours = count_gflop(partial(model, batch.images.float(), at))
    theirs = count_gflop(partial(model, their_canvas(bench.batch).images.to("meta").float()))
    return dict(zip(SIDES, (ours, theirs), strict=True))


def product_tflops(device: torch.device) -> float:
    """What a product of 8192 x 8192 bf16 matrices reaches on a GPU, 10^12 operations a second."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * 8192**3 / median(seconds) / 1e12


def gpu_use(take: Timed, device: torch.device) -> dict[str, float]:
    """The most memory that a step adds to what was held before, GB, and its waits for the GPU."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing" in str(warning.message) for warning in caught)
    added = torch.cuda.max_memory_allocated(device) - before
    return {"added memory, GB": added / 1e9, "waits a step": waits}


def print_rates(
    bench: Bench, steps: Mapping[str, Timed], whole_ms: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Images a second of both sides, and how each uses a GPU."""
    device = bench.ranks.device
    gflop = step_gflop(bench) if device.type == "cuda" else {}
    rates = {}
    for side, ms in whole_ms.items():
        rates[side] = {"images/s": 1e3 * len(bench.batch.images) / ms}
        if device.type == "cuda":
            rates[side] |= {"TFLOP/s": gflop[side] / ms, **gpu_use(steps[side], device)}
    for name in rates[SIDES[0]]:
        ours, theirs = (rates[side][name] for side in SIDES)
        print(f"{name:18}{ours:10.2f}{theirs:13.2f}")
    if device.type == "cuda" and bench.cfg.precision == "bf16":
        product = product_tflops(device)
        print(f"a product of large matrices: {product:.0f} TFLOP/s")
        rates["product"] = {"TFLOP/s": product}
    return rates


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("Time of a training step beside torchvision's RPN.", size=512, repeats=9)
    arguments.add_argument("--compile", action="store_true", help="both networks")
    arguments.add_argument("--channels-last", action="store_true", help="torchvision's, too")
    args = arguments.parse_args(argv)
    with start(args.device) as ranks:
        print(describe(args, ranks), flush=True)
        bench = build(args, ranks)
        theirs = TorchvisionRPN(bench)
        if args.channels_last:
            theirs = theirs.to(memory_format=torch.channels_last)
        check_outputs(bench, theirs)
        check_losses(bench, theirs)
        ours = our_step(bench, compiled=args.compile)
        steps = dict(
            zip(SIDES, (ours, torchvision_step(bench, theirs, compiled=args.compile)), strict=True)
        )
        results = compare(in_turns(steps, bench.watch, args.repeats))
        whole = {side: results[side][WHOLE] for side in SIDES}
        write(args, ranks, {**results, "rates": print_rates(bench, steps, whole)})


if __name__ == "__main__":
    main()
