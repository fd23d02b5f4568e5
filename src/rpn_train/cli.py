"""The command `rpn-train`."""

import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from rpn_train.compose import compose, groups, lay_over, parse, quoted, readable, sweep_values
from rpn_train.config import TrainConfig
from rpn_train.distributed import launched, start
from rpn_train.errors import CheckpointError, ConfigError
from rpn_train.options import describe_range, describe_type, from_mapping, plain, to_mapping, walk
from rpn_train.run_folder import default_folder, run_folder
from rpn_train.shell import check_device, guarded, launch, num_processes
from rpn_train.train import train

_USAGE = """\
usage: rpn-train [-m] [GROUP=CHOICE] [KEY=VALUE] ...

Trains a class-agnostic Region Proposal Network.

  rpn-train                                             drawn shapes, nothing to download
  rpn-train dataset=coco dataset.root=DIR backbone=resnet50_fpn schedule=1x
  rpn-train dataset=voc dataset.root=DIR backbone=vgg16 anchors=paper
  rpn-train experiment=coco_r50_fpn_1x dataset.root=DIR output_dir=runs/a
  rpn-train output_dir=runs/a resume=auto               go on where it stopped
  rpn-train -m anchors=fpn,fpn_small seed=0,1,2         one run for each combination
  rpn-train ... --config                                print the configuration and stop
"""


def train_main() -> None:
    """`rpn-train`."""
    sys.exit(guarded(_train, sys.argv[1:]))


def _train(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE + "\n" + _options())
        return 0
    flags = {"-m", "--multirun", "--config"} & {*arguments}
    typed = readable([a for a in arguments if a not in flags])
    if flags & {"-m", "--multirun"}:
        return _sweep(typed)
    cfg = compose_run(typed)
    if "--config" in flags:
        print(yaml.safe_dump(to_mapping(cfg), sort_keys=False), end="")
        return 0
    _check_run(cfg)
    folder = Path(cfg.output_dir) if cfg.output_dir else default_folder(cfg.name)
    if not launched() and (processes := num_processes(cfg)) > 1:
        return launch("train", [*typed, f"output_dir={quoted(str(folder))}"], processes)
    return _run(cfg, folder)


def compose_run(typed: Sequence[str]) -> TrainConfig:
    """The configuration of a run; with resume=auto that of its folder, under what was typed."""
    overrides = parse(typed)
    cfg = from_mapping(TrainConfig, compose(typed))
    if cfg.resume is None:
        return cfg
    if cfg.output_dir is None:
        raise ConfigError("resume=auto: expected output_dir=FOLDER of the run to go on with")
    return lay_over(_stored(Path(cfg.output_dir)), overrides, typed)


def _stored(folder: Path) -> dict[str, Any]:
    """The configuration that a run folder holds."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"resume=auto: expected a run in {folder}, got no config.yaml there; "
            "leave resume out to start one"
        )
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: expected the configuration of a run, got another file")
    return stored


def _check_run(cfg: TrainConfig) -> None:
    """What only training asks of a configuration, and what it asks of the machine."""
    check_device(cfg)
    if 100 not in cfg.eval.max_proposals:
        raise ConfigError(
            "eval.max_proposals: expected 100 among them (best.pt is that of the best AR@100), "
            f"got {', '.join(map(str, cfg.eval.max_proposals))}"
        )
    processes = num_processes(cfg)
    if cfg.schedule.batch_size % (processes * cfg.schedule.accumulate):
        raise ConfigError(
            f"schedule.batch_size: expected a multiple of {processes} processes x "
            f"schedule.accumulate = {cfg.schedule.accumulate}, got {cfg.schedule.batch_size}"
        )


def _run(cfg: TrainConfig, folder: Path) -> int:
    """One run in this process."""
    with start(cfg.device) as ranks:
        held = run_folder(folder, goes_on=cfg.resume is not None)
        with held if ranks.is_main else nullcontext():
            if ranks.is_main:
                print(f"run       {folder}", flush=True)
            ranks.any(False)  # wait for the folder
            stopped_by = train(cfg, folder, ranks)
    return 0 if stopped_by is None else 128 + stopped_by


def _sweep(typed: Sequence[str]) -> int:
    """One run after the other for every combination of comma-separated values."""
    choices, parent = [], default_folder("sweep")
    for text, override in zip(typed, parse(typed, sweep=True), strict=True):
        if override.key_or_group == "output_dir":
            parent = Path(str(override.value()))
        elif override.is_sweep_override():
            choices.append(sweep_values(text, override))
        else:
            choices.append([text])
    varied = [i for i, choice in enumerate(choices) if len(choice) > 1]
    runs = []
    for number, combination in enumerate(itertools.product(*choices)):
        label = ",".join(combination[i] for i in varied)
        folder = parent / f"{number}_{label.replace('/', '-')}"
        runs.append((label, [*combination, f"output_dir={quoted(str(folder))}"]))
    for _, run in runs:  # all faults come first
        _check_run(compose_run(run))
    for number, (label, run) in enumerate(runs, start=1):
        print(f"\nrun {number} of {len(runs)}: {label}", flush=True)
        code = _train(run)
        if code:
            return code
    print(f"compare them: tensorboard --logdir {parent}")
    return 0


def _options() -> str:
    """All groups and keys with their choices, defaults and meaning, as a page."""
    lines = ["Groups (files in configs/, or GROUP=FILE.yaml, one of your own like them):"]
    for group, choices in groups().items():
        lines.append(f"  {group}={', '.join(choices)}")
    lines.append("\nKeys (KEY=VALUE; lists as '[1,2]', no value as null):")
    section = ""
    for key, hint, default, metadata in walk(TrainConfig):
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        limits = describe_range(metadata)
        kind = describe_type(hint) + (f", {limits}" if limits else "")
        shown = yaml.safe_dump(plain(default), default_flow_style=True).split("\n")[0]
        lines.append(f"  {key}={shown}\n      {metadata['help']} ({kind})")
    return "\n".join(lines)
