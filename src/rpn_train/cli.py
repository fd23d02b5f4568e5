"""The command `rpn-train`, and what all commands share. Only the commands end the process.

Exit codes: 0 done, 1 a fault of the program (with a traceback), 2 a fault of the input (one line),
128 + n stopped by signal n.
"""

import datetime
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from rpn_train.compose import compose, groups, lay_over, parse, quoted, readable, sweep_values
from rpn_train.config import TrainConfig
from rpn_train.distributed import launched, start
from rpn_train.errors import CheckpointError, ConfigError, UserError
from rpn_train.options import describe_range, describe_type, from_mapping, plain, to_mapping, walk
from rpn_train.report import environment
from rpn_train.run_log import write_json
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


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of a command; a fault of the user's is one line."""
    try:
        return command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE + "\n" + _options())
        return 0
    flags = {"-m", "--multirun", "--config"} & {*arguments}
    typed = [readable(a) for a in arguments if a not in flags]
    if flags & {"-m", "--multirun"}:
        return _sweep(typed)
    cfg = compose_run(typed)
    if "--config" in flags:
        print(yaml.safe_dump(to_mapping(cfg), sort_keys=False), end="")
        return 0
    _check_run(cfg)
    folder = Path(cfg.output_dir) if cfg.output_dir else default_folder(cfg.name)
    if not launched() and (processes := num_processes(cfg)) > 1:
        return _launch([*typed, f"output_dir={quoted(str(folder))}"], processes)
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


def check_device(cfg: TrainConfig) -> None:
    """Refuse a device that is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a GPU for 'cuda', found none; device=cpu needs none")


def _run(cfg: TrainConfig, folder: Path) -> int:
    """One run in this process."""
    with start(cfg.device) as ranks:
        if ranks.is_main:
            _open_folder(cfg, folder)
            print(f"run       {folder}", flush=True)
            write_json(folder / "environment.json", environment(ranks))
        ranks.any(False)  # wait for the folder
        stopped_by = train(cfg, folder, ranks)
    return 0 if stopped_by is None else 128 + stopped_by


def _open_folder(cfg: TrainConfig, folder: Path) -> None:
    """Make the run folder; refuse one that holds another run.

    A run that a fault of the input ended before its first figure does not count.
    """
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    if begun and cfg.resume is None:
        raise ConfigError(
            f"output_dir: {folder} holds a run already; give resume=auto to go on with it, or "
            "another folder"
        )
    make_folder(folder)


def make_folder(folder: Path) -> None:
    """Make a folder to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"output_dir: expected a folder to write to, got {folder}: {error.strerror}"
        ) from error


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


def _launch(typed: Sequence[str], processes: int) -> int:
    """This command again in several processes, by torch's launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "rpn_train", *typed]
    # one thread pool for each process, not one of all cores for each (torchrun would take 1)
    threads = max(1, (os.cpu_count() or 1) // processes)
    started = subprocess.Popen(command, env={"OMP_NUM_THREADS": str(threads), **os.environ})
    came = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGTERM:  # to this process alone; Ctrl-C reaches the others by itself
            started.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    code = started.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return 128 + came[0] if came else code


def num_processes(cfg: TrainConfig) -> int:
    """How many processes a run has: as launched, else `devices`, else one per GPU of the box."""
    if launched():
        return int(os.environ["WORLD_SIZE"])
    gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()
    if gpus and cfg.devices is not None and cfg.devices > gpus:
        raise ConfigError(f"devices: expected at most {gpus}, the GPUs here, got {cfg.devices}")
    return cfg.devices or max(1, gpus)


def default_folder(name: str) -> Path:
    """runs/<date>_<time>_<name>."""
    return Path("runs") / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"


def _options() -> str:
    """All groups and keys with their choices, defaults and meaning, as a page."""
    lines = ["Groups (files in configs/):"]
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
