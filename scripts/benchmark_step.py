"""Time of a training step, whole and in parts, beside torchvision's RPN.

    python scripts/benchmark_step.py --backbone resnet50_fpn --size 512 512 --boxes 8 --repeats 9

A step is what happens to a batch that is loaded: input (images normalised), targets (assignment and
sampling), network (forward), proposals (torchvision's alone makes them), losses and backward pass,
update by SGD. First it is checked that both networks give the same outputs, and at the same anchors
the same losses. `benchmarking.py` says what stands against what.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from benchmarking import (
    SIDES,
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

from rpn_train.distributed import start
from rpn_train.model import autocast
from rpn_train.objective import batch_losses
from rpn_train.schedule import build_optimizer


@torch.no_grad()
def check_losses(bench: Bench, theirs: TorchvisionRPN) -> None:
    """With our sample in the place of its own, torchvision's losses are ours, in float32."""
    cfg = replace(bench.cfg, precision="fp32")
    own_sampler = theirs.rpn.fg_bg_sampler
    with torch.backends.cudnn.flags(allow_tf32=False):
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


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("Time of a training step beside torchvision's RPN.", size=512, repeats=9)
    arguments.add_argument("--compile", action="store_true", help="both networks")
    args = arguments.parse_args(argv)
    with start(args.device) as ranks:
        print(describe(args, ranks), flush=True)
        bench = build(args, ranks)
        theirs = TorchvisionRPN(bench)
        check_outputs(bench, theirs)
        check_losses(bench, theirs)
        steps = (
            our_step(bench, compiled=args.compile),
            torchvision_step(bench, theirs, compiled=args.compile),
        )
        times = in_turns(dict(zip(SIDES, steps, strict=True)), bench.watch, args.repeats)
        write(args, ranks, compare(times))


if __name__ == "__main__":
    main()
