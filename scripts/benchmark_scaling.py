"""How our cost grows with the size of images, their number, objects and anchors.

    python scripts/benchmark_scaling.py --backbone resnet18_fpn --size 256 256 --repeats 3

One quantity at a time differs from the base. The last line of each table is the exponent p of a fit
of time ~ quantity^p: 1 is proportional, 0 is no growth. Targets (assignment and sampling) and step
are those of training, proposals those of evaluation; see `benchmark_step.py`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from benchmarking import (
    FPN,
    WHOLE,
    build,
    describe,
    in_turns,
    medians,
    our_proposals,
    our_step,
    parser,
    write,
)

from rpn_train.config import AnchorsConfig
from rpn_train.data.sampler import canvas_of
from rpn_train.distributed import Ranks, start

Change = tuple[float, dict[str, Any], AnchorsConfig]  # a quantity, and the arguments that give it
COLUMNS = ("targets", "step", "proposals")


def sweeps(args: argparse.Namespace) -> Iterator[tuple[str, list[Change]]]:
    """What is varied: a name, and its values as changes of the base."""
    height, width = args.size
    sizes = [canvas_of([(int(height * f), int(width * f))], 64) for f in (0.5, 0.75, 1, 1.5, 2)]
    yield "pixels", [(h * w, {"size": [h, w]}, FPN) for h, w in sizes]
    yield "images", [(n, {"batch": n}, FPN) for n in (1, 2, 4, 8)]
    yield "objects", [(n, {"boxes": n}, FPN) for n in (1, 10, 100, 1000)]
    scales = ((1.0,), (0.8, 1.0), (0.8, 1.0, 1.25), (0.7, 0.8, 0.9, 1.0, 1.1, 1.25))
    anchors = [
        AnchorsConfig(tuple(tuple(size * s for s in of_cell) for (size,) in FPN.sizes))
        for of_cell in scales
    ]
    yield "anchors per cell", [(len(a.sizes[0]) * len(a.ratios), {}, a) for a in anchors]


def measure(args: argparse.Namespace, ranks: Ranks, anchors: AnchorsConfig) -> dict[str, float]:
    """Medians of `COLUMNS`, ms."""
    bench = build(args, ranks, anchors)
    # with fixed norms it does not matter that the network is now in the mode of evaluation
    timed = {"step": our_step(bench), "proposals": our_proposals(bench)}
    times = in_turns(timed, bench.watch, args.repeats)
    step, proposals = medians(times["step"]), medians(times["proposals"])
    return {"targets": step["targets"], "step": step[WHOLE], "proposals": proposals["proposals"]}


def exponent(rows: Sequence[Mapping[str, float]], quantity: str, column: str) -> float:
    """Slope of the straight line through the logarithms."""
    x, y = (np.log([row[key] for row in rows]) for key in (quantity, column))
    return float(np.polyfit(x, y, 1)[0])


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("Growth of our cost.", backbone="resnet18_fpn", size=256, repeats=3)
    args, results = arguments.parse_args(argv), {}
    with start(args.device) as ranks:
        print(describe(args, ranks))
        for quantity, changes in sweeps(args):
            print(f"\n{quantity:>17}" + "".join(f"{column + ', ms':>15}" for column in COLUMNS))
            rows = []
            for value, changed, anchors in changes:
                changed_args = argparse.Namespace(**{**vars(args), **changed})
                rows.append({quantity: value, **measure(changed_args, ranks, anchors)})
                print(f"{value:17}" + "".join(f"{rows[-1][c]:15.1f}" for c in COLUMNS), flush=True)
            exponents = {column: exponent(rows, quantity, column) for column in COLUMNS}
            print(f"{'exponent':>17}" + "".join(f"{exponents[c]:15.2f}" for c in COLUMNS))
            results[quantity] = {"rows": rows, "exponents": exponents}
        write(args, ranks, results)


if __name__ == "__main__":
    main()
