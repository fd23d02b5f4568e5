"""The methods side by side: what each costs, and what each finds after the same training.

    python scripts/benchmark_methods.py cost --backbone resnet50_fpn --size 800 1344
    python scripts/benchmark_methods.py train dataset=coco dataset.root=DIR schedule=1x \\
        --seeds 0 1 2 --output runs/methods
    python scripts/benchmark_methods.py train dataset=shapes_hard --output runs/heads \\
        --methods faster_rcnn atss "narrow: atss method.channels=128"

`cost` counts parameters, anchors and multiplications of one image, and times its proposals, the
methods in turns. Each works on its own canvas: the image padded to multiples of its largest stride.
A step of training is one image's share, with the stem and the first stage frozen. The loss of
`faster_rcnn` and `oln` reads sampled anchors, which count as if drawn evenly (those of `oln` lie
closer together): `benchmark_model.py` says how a GPU and a CPU compute them.

`train` runs `rpn-train` for each method and seed with the same overrides. The body's weights, the
images and their order follow from the seed, so they are the same for all methods. What is finished
is not trained again, and what was interrupted goes on: give the same command once more. After each
run the folder has methods.md, methods.json and methods.png of all that are finished.

What is typed behind the name of a method is for that one alone, and what stands before a colon is
what tables, figure and folders call it.
"""

import argparse
import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark_model import count_gflop, count_parameters, counting
from benchmarking import (
    RESNETS,
    WHOLE,
    Bench,
    Stopwatch,
    draw_batch,
    in_turns,
    medians,
    our_proposals,
    spread_outputs,
    write,
)
from matplotlib.figure import Figure
from small_run import command

from rpn_train.cli import compose_run
from rpn_train.compose import quoted, readable
from rpn_train.config import TrainConfig
from rpn_train.curves import AVERAGE, LEGEND_IN, LINES, ROW_IN, WIDTH_IN, figure_to_image
from rpn_train.distributed import Ranks, start
from rpn_train.errors import ConfigError
from rpn_train.options import differences, to_mapping
from rpn_train.recall import SIZES
from rpn_train.recall_report import COLUMNS, save_picture
from rpn_train.report import device_name
from rpn_train.run_folder import make_folder
from rpn_train.run_log import write_json, write_text
from rpn_train.run_state import build_state
from rpn_train.shell import guarded

Table = Mapping[str, Sequence[str]]  # title of a row -> a cell for each method
Summary = dict[str, dict[str, Any]]  # method -> what `summarize` makes of its runs

METHOD_HELP = "a method, or 'LABEL: METHOD KEY=VALUE ...'"
METHODS = ("faster_rcnn", "retina", "atss", "task_aligned", "cascade", "oln")
DETAILED = (100, 1000)  # numbers of proposals at which the table has sizes and single IoUs
TIMES = {"step, s": ("step_s", 3), "image, ms": ("image_ms", 1)}  # title -> key, digits
OWN = {"method": "--methods", "seed": "--seeds", "output_dir": "--output", "resume": "--output"}
FINISHED = "finished"  # left in the folder of a run that came to its end


def as_text(methods: Sequence[str], table: Table) -> str:
    """Methods as columns, for a terminal."""
    first = max(map(len, table))
    rows = {"": methods, **table}
    widths = [2 + max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    return "\n".join(
        f"{title:{first}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        for title, cells in rows.items()
    )


def as_markdown(methods: Sequence[str], table: Table) -> str:
    """The same in Markdown."""
    head = [f"| | {' | '.join(methods)} |", "|---" + "|---:" * len(methods) + "|"]
    rows = [f"| {title} | {' | '.join(cells)} |" for title, cells in table.items()]
    return "\n".join([*head, *rows])


def with_range(middle: float, low: float, high: float, *, digits: int) -> str:
    """A number, with its range where it has one."""
    if np.isnan(middle):
        return "-"
    shown = f"{middle:.{digits}f}"
    return shown if low == high else f"{shown} ({low:.{digits}f} .. {high:.{digits}f})"


def read_methods(texts: Sequence[str]) -> dict[str, list[str]]:
    """Label -> what is typed for the method, of texts like METHOD_HELP says."""
    methods: dict[str, list[str]] = {}
    for text in texts:
        label, colon, rest = text.partition(": ")
        typed = shlex.split(rest if colon else text)
        if not typed or not label:
            raise ConfigError(f"--methods: expected {METHOD_HELP}, got {text!r}")
        if label in methods:
            raise ConfigError(f"--methods: expected each once, got {label!r} again")
        methods[label] = readable([f"method={typed[0]}", *typed[1:]])
    return methods


def build_bench(
    method: Sequence[str], args: argparse.Namespace, ranks: Ranks, watch: Stopwatch
) -> Bench:
    """The network of what is typed for a method with random weights, and one drawn image."""
    fixed = ("dataset=coco", "backbone.frozen_stages=2", "backbone.norm=frozen_bn")
    common = (f"backbone={args.backbone}", f"precision={args.precision}")
    cfg = compose_run([*common, *fixed, *method])
    state = build_state(cfg, ranks.device)
    batch = draw_batch(tuple(args.size), 1, args.boxes, max(state.model.grid.strides))
    bench = Bench(cfg, ranks, watch, state, batch.to(ranks.device))
    spread_outputs(bench)
    return bench


def gmac(forward: Callable[[], object]) -> float:
    """10^9 multiplications, each with its addition."""
    with torch.no_grad(), counting() as counter:
        forward()
    return counter.get_total_flops() / 2e9


def count(bench: Bench) -> dict[str, Any]:
    """What follows from the network and the size of the image."""
    model, method = copy.deepcopy(bench.state.model).to("meta"), bench.cfg.method
    anchors = sum(model.grid.level_lengths(bench.batch.canvas))
    images = torch.empty(bench.batch.images.shape, device="meta")
    body = gmac(lambda: model.backbone.body(images))
    features = gmac(lambda: model.backbone(images))
    whole = gmac(lambda: model(images))
    if method.sampling == "all" or method.head == "cascade":
        on_gpu = on_cpu = count_gflop(partial(model, images)) / 2
    else:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(anchors, (1, method.num_samples), generator=generator)
        real = copy.deepcopy(bench.state.model).cpu()
        on_gpu = count_gflop(partial(model, images, drawn.to("meta"))) / 2
        on_cpu = count_gflop(partial(real, torch.zeros(images.shape), drawn)) / 2
    return {
        "canvas": bench.batch.canvas,
        "anchors": anchors,
        "parameters": count_parameters(model)["all"],
        "head_parameters": count_parameters(model.rpn)["all"],
        "inference_gmac": {
            "whole": whole,
            "body": body,
            "pyramid": features - body,
            "head": whole - features,
        },
        "step_gmac": {"GPU": on_gpu, "CPU": on_cpu},
    }


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is counted and measured, a cell for each method."""
    table: dict[str, list[str]] = {}
    for of in costs.values():
        whole = [rounds[WHOLE] for rounds in of["rounds_ms"]]
        cells = {
            "canvas, px": "{} x {}".format(*of["canvas"]),
            "anchors": f"{of['anchors']:,}",
            "parameters, M": f"{of['parameters'] / 1e6:.2f}",
            "of the head": f"{of['head_parameters'] / 1e6:.2f}",
            **{f"inference, GMAC, {part}": f"{n:.1f}" for part, n in of["inference_gmac"].items()},
            **{f"step, GMAC, {device}": f"{n:.1f}" for device, n in of["step_gmac"].items()},
            "inference, ms": with_range(of["ms"][WHOLE], min(whole), max(whole), digits=1),
            **{f"{part}, ms": f"{of['ms'][part]:.1f}" for part in ("network", "proposals")},
        }
        for title, cell in cells.items():
            table.setdefault(title, []).append(cell)
    return table


def cost(argv: Sequence[str]) -> int:
    """The subcommand `cost`."""
    parser = argparse.ArgumentParser("benchmark_methods.py cost", description="Cost of an image.")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="M", help=METHOD_HELP)
    parser.add_argument("--backbone", choices=RESNETS, default="resnet50_fpn")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1344], metavar=("H", "W"))
    parser.add_argument("--boxes", type=int, default=8, help="objects in the image")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    args = parser.parse_args(argv)
    with start(args.device) as ranks:
        watch = Stopwatch(ranks.device)
        methods = read_methods(args.methods)
        benches = {label: build_bench(of, args, ranks, watch) for label, of in methods.items()}
        costs = {method: count(bench) for method, bench in benches.items()}
        timed = {method: our_proposals(bench) for method, bench in benches.items()}
        for method, rounds in in_turns(timed, watch, args.repeats).items():
            costs[method] |= {"ms": medians(rounds), "rounds_ms": rounds}
        height, width = args.size
        device = device_name(ranks.device)
        print(f"{args.backbone}, 1 image of {height} x {width}, {args.precision}, {device}\n")
        print((as_markdown if args.markdown else as_text)([*costs], cost_table(costs)))
        write(args, ranks, costs)
    return 0


class Run(NamedTuple):
    """A run of `rpn-train`: its folder, and what is typed to begin it.

    method: what the tables call it.
    """

    method: str
    seed: int
    folder: Path
    typed: list[str]
    cfg: TrainConfig


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs, all checked before the first begins."""
    given, methods = readable(args.overrides), read_methods(args.methods)
    of_methods = (text for typed in methods.values() for text in typed[1:])
    for key in (text.partition("=")[0] for text in (*given, *of_methods)):
        if key in OWN:
            raise ConfigError(f"{key}: expected {OWN[key]} to set it, got it among KEY=VALUE")
    runs: list[Run] = []
    for seed in args.seeds:
        for label, method in methods.items():
            folder = args.output / f"{re.sub('[^A-Za-z0-9.]+', '_', label)}_{seed}"
            if any(folder == run.folder for run in runs):
                raise ConfigError(f"--methods: {label!r} would share the folder {folder}")
            typed = [*given, *method, f"seed={seed}", f"output_dir={quoted(str(folder))}"]
            runs.append(Run(label, seed, folder, typed, compose_run(typed)))
            check_stored(runs[-1])
    return runs


def check_stored(run: Run) -> None:
    """Refuse a folder with a run of other options: the table would mix them."""
    if not (run.folder / "config.yaml").is_file():
        return
    stored = compose_run([run.typed[-1], "resume=auto"])
    changed = differences(to_mapping(stored), to_mapping(run.cfg))
    changed.pop("resume")
    if changed:
        told = "; ".join(f"{key}: {change}" for key, change in changed.items())
        raise ConfigError(
            f"--output: {run.folder} holds a run of other options ({told}); give another folder"
        )


def complete(run: Run) -> str | None:
    """Train to the end, from where the folder is; what went wrong, in one line, or None."""
    if (run.folder / FINISHED).exists():
        return None
    resumed = (run.folder / "config.yaml").is_file()
    typed = [run.typed[-1], "resume=auto"] if resumed else run.typed
    log = Path(f"{run.folder}.log")
    print(f"{run.folder.name}: {'goes on' if resumed else 'begins'}, {log}", flush=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(command(typed), stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # which has reached the run, too: it saves and ends
            process.wait()
            raise
    if code:
        told = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing said"]
        return f"exit code {code}: {told[-1]}"
    (run.folder / FINISHED).touch()
    return None


def read_run(run: Run) -> dict[str, Any]:
    """What a finished run has in its folder; NaN where there is no such object."""
    recall = json.loads((run.folder / "recall.json").read_text(encoding="utf-8"))
    lines = (run.folder / "timing.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]  # each the mean of `log_every` steps
    speed = float(np.median([row["train/images_per_s"] for row in rows]))
    times = {
        "step_s": run.cfg.schedule.batch_size / speed,
        "image_ms": 1e3 / speed,
        "data_wait": float(np.median([row["train/data_wait"] for row in rows])),
        "memory_mb": max(row["train/memory_mb"] for row in rows),
    }
    return {
        "method": run.method,
        "seed": run.seed,
        "environment": json.loads((run.folder / "environment.json").read_text(encoding="utf-8")),
        "config": to_mapping(run.cfg),
        "figures": {k: np.nan if v is None else v for k, v in recall.items()} | times,
    }


def summarize(results: Sequence[Mapping[str, Any]]) -> Summary:
    """Of each method its seeds, and of each figure mean, lowest and highest."""
    summary: Summary = {}
    for method in dict.fromkeys(result["method"] for result in results):
        of_method = [result for result in results if result["method"] == method]
        summary[method] = {"seeds": [result["seed"] for result in of_method]}
        for key in of_method[0]["figures"]:
            values = np.array([result["figures"][key] for result in of_method], float)
            numbers = (values.mean(), values.min(), values.max())
            names = ("mean", "lowest", "highest")
            summary[method][key] = dict(zip(names, map(float, numbers), strict=True))
    return summary


def train_table(summary: Summary, numbers: Sequence[int]) -> dict[str, list[str]]:
    """Recall and times, a cell for each method."""

    def row(key: str, digits: int = 4) -> list[str]:
        return [with_range(*of[key].values(), digits=digits) for of in summary.values()]

    table = {"seeds": [", ".join(map(str, of["seeds"])) for of in summary.values()]}
    table |= {f"AR@{n}": row(f"ar_{n}") for n in numbers}
    for n in (n for n in DETAILED if n in numbers):
        for title, key in [*COLUMNS.items()][1:]:
            what = "recall" if title.startswith("IoU") else "AR"
            table[f"{what}@{n}, {title}"] = row(key.format(n=n))
    return table | {title: row(key, digits) for title, (key, digits) in TIMES.items()}


def curves(summary: Summary, numbers: Sequence[int]) -> Figure:
    """Average recall against the number of proposals: means, and bands from lowest to highest."""
    figure = Figure(figsize=(WIDTH_IN, ROW_IN + 2 * LEGEND_IN), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(SIZES), sharex=True, sharey=True)
    for size, axes in zip(SIZES, panels, strict=True):
        suffix = f"_{size}".replace("_all", "")
        for i, (method, of) in enumerate(summary.items()):
            colour, dashes, marker = LINES[i % len(LINES)]
            rgb = [c / 255 for c in colour]
            ar = np.array([[*of[f"ar_{n}{suffix}"].values()] for n in numbers])  # [N, 3]
            axes.fill_between(numbers, ar[:, 1], ar[:, 2], color=rgb, alpha=0.2, linewidth=0)
            (line,) = axes.plot(numbers, ar[:, 0], marker, color=rgb, label=method, markersize=6)
            line.set(linestyle="-")
            line.set_dashes(dashes)
        if np.isnan(ar).all():
            axes.text(0.5, 0.5, "no objects", ha="center", transform=axes.transAxes)
        axes.set_title(size, fontsize=10)
        axes.set(xlabel="proposals per image", xscale="log", ylim=(0, 1.02))
        axes.set_xticks(numbers, [f"{n:,}" for n in numbers], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=AVERAGE.replace(", ", "\n"))
    figure.legend(
        handles=panels[0].lines, ncols=len(summary), loc="outside lower center", handlelength=4
    )
    return figure


def write_results(folder: Path, results: Sequence[dict[str, Any]], typed: str) -> str:
    """The table, all numbers and the figure of the finished runs; returns the table as text."""
    summary = summarize(results)
    config = results[0]["config"]
    numbers = sorted(config["eval"]["max_proposals"])
    table = train_table(summary, numbers)
    seen = {result["environment"]["device"] for result in results}
    seen |= {f"commit {result['environment']['commit']}" for result in results}
    about = (
        f"Means of the seeds (lowest .. highest); {results[0]['figures']['step']} steps of "
        f"{config['schedule']['batch_size']} images, {config['backbone']['name']}, "
        f"{', '.join(sorted(seen))}:\n\n    {typed}\n"
    )
    write_text(folder / "methods.md", f"{as_markdown([*summary], table)}\n\n{about}")
    write_json(
        folder / "methods.json", {"command": typed, "methods": summary, "runs": list(results)}
    )
    save_picture(figure_to_image(curves(summary, numbers)), folder / "methods.png")
    return as_text([*summary], table)


def train(argv: Sequence[str]) -> int:
    """The subcommand `train`; returns 1 if a run failed."""
    parser = argparse.ArgumentParser("benchmark_methods.py train", description="Methods x seeds.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of rpn-train")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="M", help=METHOD_HELP)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, metavar="FOLDER", required=True)
    args = parser.parse_intermixed_args(argv)
    runs = plan(args)
    make_folder(args.output)
    typed = shlex.join(["python", "scripts/benchmark_methods.py", "train", *argv])
    results, table = [], "no run was finished"
    for run in runs:
        fault = complete(run)
        if fault is not None:
            print(f"{run.folder.name}: failed with {fault}", file=sys.stderr, flush=True)
            continue
        results.append(read_run(run))
        table = write_results(args.output, results, typed)
    print(table)
    return 0 if len(results) == len(runs) else 1


def main(argv: Sequence[str]) -> int:
    """Return the exit code."""
    commands = {"cost": cost, "train": train}
    parser = argparse.ArgumentParser(description="The methods of rpn-train side by side.")
    parser.add_argument("command", choices=commands, help="COMMAND --help says more")
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
