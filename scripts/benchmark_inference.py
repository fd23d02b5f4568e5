"""Time of proposals for images, whole and in parts, beside torchvision's RPN.

    python scripts/benchmark_inference.py --backbone resnet50_fpn --size 512 512 --repeats 15

The parts are input (images normalised), network, and the proposals made of its outputs. First it is
checked that both networks give the same outputs and, but for near-ties, the same proposals.
`benchmarking.py` says what stands against what.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from benchmarking import (
    SIDES,
    Bench,
    TorchvisionRPN,
    build,
    check_outputs,
    compare,
    describe,
    in_turns,
    our_proposals,
    parser,
    their_canvas,
    write,
)

from rpn_train.distributed import start
from rpn_train.model import autocast


@torch.no_grad()
def check_proposals(bench: Bench, theirs: TorchvisionRPN) -> float:
    """Share of torchvision's proposals that are ours, too, to 0.1 px, in float32: over 98 %.

    The outputs differ by rounding, which now and then decides what NMS keeps of two boxes.
    """
    exact = bench._replace(cfg=replace(bench.cfg, precision="fp32"))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, expected = our_proposals(exact)(), theirs.eval()(bench.batch)[0]
    shares = []
    for found, boxes in zip(ours, expected, strict=True):
        apart = torch.cdist(boxes, found.boxes, p=torch.inf)  # [K, K]
        shares.append(float((apart.amin(1) < 0.1).float().mean()))
        shares[-1] *= min(1.0, len(boxes) / len(found.boxes))  # ours may not be more either
    if min(shares) < 0.98:
        raise AssertionError(f"expected torchvision's proposals, got {min(shares):.1%} of them")
    return sum(shares) / len(shares)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("Time of proposals beside torchvision's RPN.", size=512, repeats=15)
    args = arguments.parse_args(argv)
    with start(args.device) as ranks:
        print(describe(args, ranks), flush=True)
        bench = build(args, ranks)
        theirs = TorchvisionRPN(bench)
        check_outputs(bench, theirs)
        equal = check_proposals(bench, theirs)
        batch = their_canvas(bench.batch)

        def propose() -> object:
            with torch.inference_mode(), autocast(args.precision, ranks.device):
                return theirs(batch)

        timed = dict(zip(SIDES, (our_proposals(bench), propose), strict=True))
        results = compare(in_turns(timed, bench.watch, args.repeats))
        print(f"equal proposals: {equal:.2%}")
        write(args, ranks, {**results, "equal": equal})


if __name__ == "__main__":
    main()
