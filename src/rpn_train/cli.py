"""The commands: what the user typed, composed by Hydra, made into one strict configuration.

Hydra composes the files of `configs/` with the typed overrides; what comes out is checked against
the dataclasses of `config.py`, and no Hydra or OmegaConf object goes further than this module.
Exit codes: 0 done, 1 a fault of the program (with a traceback), 2 a fault of the input (one line),
128 + n stopped by signal n.
"""

import datetime
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rpn_train import checkpoint
from rpn_train.config import (
    TrainConfig,
    describe_range,
    describe_type,
    from_mapping,
    to_mapping,
    unknown_key,
    walk,
)
from rpn_train.distributed import launched, start
from rpn_train.errors import CheckpointError, ConfigError, UserError
from rpn_train.evaluate_checkpoint import evaluate_checkpoint
from rpn_train.report import environment
from rpn_train.run_log import write_json, write_text
from rpn_train.train import train

CONFIGS = Path(__file__).parent / "configs"  # in an installed package
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parents[2] / "configs"  # in the source tree

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

_EVAL_USAGE = """\
usage: rpn-eval checkpoint=RUN_FOLDER_OR_FILE [GROUP=CHOICE] [KEY=VALUE] ...

Scores the proposals of a trained network. The configuration is that of the checkpoint; anything
typed here, most of all another data set, takes the place of what it says.

  rpn-eval checkpoint=runs/a                            on the validation split of the run
  rpn-eval checkpoint=runs/a dataset=coco dataset.root=DIR eval.max_proposals=[100,300,1000]

Prints a table and writes recall.json to output_dir (default: eval/ in the run folder).
`rpn-train --help` lists the keys.
"""


def train_main() -> None:
    """`rpn-train`."""
    sys.exit(_guarded(_train, sys.argv[1:]))


def eval_main() -> None:
    """`rpn-eval`."""
    sys.exit(_guarded(_eval, sys.argv[1:]))


def _guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of a command; a fault of the user's is one line."""
    try:
        return command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE + "\n" + _options())
        return 0
    flags = {"-m", "--multirun", "--config"} & {*arguments}
    typed = [a for a in arguments if a not in flags]
    if flags & {"-m", "--multirun"}:
        return _sweep(typed)
    cfg = _compose_run(typed)
    if "--config" in flags:
        print(yaml.safe_dump(to_mapping(cfg), sort_keys=False), end="")
        return 0
    folder = Path(cfg.output_dir) if cfg.output_dir else default_folder(cfg.name)
    if not launched() and (processes := num_processes(cfg)) > 1:
        return _launch([*typed, f"output_dir={folder}"], processes)
    return _run(cfg, folder)


def _compose_run(typed: Sequence[str]) -> TrainConfig:
    """The configuration of a run; with resume=auto that of its folder, under what was typed."""
    overrides = _parse(typed)
    cfg = from_mapping(TrainConfig, _compose(typed))
    if cfg.resume is None:
        return cfg
    if cfg.output_dir is None:
        raise ConfigError("resume=auto: expected output_dir=FOLDER of the run to go on with")
    stored = Path(cfg.output_dir) / "config.yaml"
    if not stored.is_file():
        raise CheckpointError(
            f"resume=auto: expected a run in {cfg.output_dir}, got no config.yaml"
        )
    if any(o.key_or_group == "experiment" for o in overrides):
        return cfg  # typed in full
    return _lay_over(yaml.safe_load(stored.read_text()), overrides, typed)


def _run(cfg: TrainConfig, folder: Path) -> int:
    """One run in this process."""
    with start(cfg.device) as ranks:
        if cfg.schedule.batch_size % (ranks.world * cfg.schedule.accumulate):
            raise ConfigError(
                f"schedule.batch_size: expected a multiple of {ranks.world} processes x "
                f"schedule.accumulate = {cfg.schedule.accumulate}, got {cfg.schedule.batch_size}"
            )
        if ranks.is_main:
            _open_folder(cfg, folder)
            print(f"run       {folder}", flush=True)
            write_json(folder / "environment.json", environment(ranks))
        ranks.any(False)  # wait for the folder
        signal = train(cfg, folder, ranks)
    return 0 if signal is None else 128 + signal


def _open_folder(cfg: TrainConfig, folder: Path) -> None:
    """Make the run folder and its config.yaml; refuse one that holds another run."""
    if (folder / "config.yaml").exists() and cfg.resume is None:
        raise ConfigError(
            f"output_dir: {folder} holds a run already; give resume=auto to go on with it, or "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", yaml.safe_dump(to_mapping(cfg), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write to {folder}: {error.strerror}") from error


def _sweep(typed: Sequence[str]) -> int:
    """One run after the other for every combination of comma-separated values."""
    choices = []
    for text, override in zip(typed, _parse(typed), strict=True):
        if override.is_sweep_override():
            values = cast(Any, override).sweep_string_iterator()
            choices.append([f"{override.get_key_element()}={value}" for value in values])
        else:
            choices.append([text])
    combinations = [list(c) for c in itertools.product(*choices)]
    configs = [_compose_run(combination) for combination in combinations]  # all faults come first
    parent = Path(configs[0].output_dir) if configs[0].output_dir else default_folder("sweep")
    varied = [i for i, choice in enumerate(choices) if len(choice) > 1]
    for number, combination in enumerate(combinations):
        label = ",".join(combination[i] for i in varied).replace("/", "-")
        folder = parent / f"{number}_{label}"
        print(f"\nrun {number + 1} of {len(combinations)}: {label}", flush=True)
        code = _train([*combination, f"output_dir={folder}"])
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
    return subprocess.run(command, env={"OMP_NUM_THREADS": str(threads), **os.environ}).returncode


def num_processes(cfg: TrainConfig) -> int:
    """How many processes a run is to have: one per GPU of the box unless `devices` says else."""
    if cfg.devices is not None:
        return cfg.devices
    return 1 if cfg.device == "cpu" else max(1, torch.cuda.device_count())


def default_folder(name: str) -> Path:
    """runs/<date>_<time>_<name>."""
    return Path("runs") / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"


def _eval(arguments: Sequence[str]) -> int:
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(_EVAL_USAGE)
        return 0 if arguments else 2
    given = [a for a in arguments if a.startswith("checkpoint=")]
    if len(given) != 1:
        raise ConfigError("rpn-eval: expected checkpoint=RUN_FOLDER_OR_FILE once")
    path = checkpoint.find(Path(given[0].removeprefix("checkpoint=")))
    typed = [a for a in arguments if a not in given]
    overrides = _parse(typed)
    saved = checkpoint.load(path)
    cfg = _lay_over({**saved["config"], "output_dir": None}, overrides, typed)
    run = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    folder = Path(cfg.output_dir) if cfg.output_dir else run / "eval"
    with start(cfg.device) as ranks:
        evaluate_checkpoint(cfg, saved, path, folder, ranks)
    return 0


def _parse(typed: Sequence[str]) -> list[Override]:
    """The typed overrides; unknown keys are refused here, with the nearest known one."""
    known = {name for name, *_ in walk(TrainConfig)}
    sections = {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    try:
        overrides = OverridesParser.create().parse_overrides(list(typed))
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"expected KEY=VALUE or GROUP=CHOICE, got {reason}") from error
    for override in overrides:
        key = override.key_or_group
        if key not in known | sections | {"experiment"}:
            raise ConfigError(unknown_key(key))
    return overrides


def _compose(typed: Sequence[str]) -> dict[str, Any]:
    """Plain nested data: defaults, then files, then what was typed."""
    # networks of timm have no file of their own
    typed = [
        a.replace("backbone=timm:", "backbone.name=timm:", 1)
        if a.startswith("backbone=timm:")
        else a
        for a in typed
    ]
    ConfigStore.instance().store(name="schema", node=to_mapping(TrainConfig()))
    try:
        with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            composed = compose("train", overrides=[*typed])
        return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").partition("/")
        offered = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
        raise ConfigError(
            f"{group}: expected {' | '.join(map(repr, offered))}, got {choice!r}"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _lay_over(
    base: dict[str, Any], overrides: Sequence[Override], typed: Sequence[str]
) -> TrainConfig:
    """A stored configuration with exactly the typed keys and groups replaced.

    A typed group (dataset=voc) replaces its whole section, a typed key only itself.
    """
    composed = _compose(typed)
    for override in sorted(overrides, key=lambda o: o.key_or_group.count(".")):
        *path, last = override.key_or_group.split(".")
        target, source = base, composed
        for part in path:
            target, source = target.setdefault(part, {}), source[part]
        target[last] = source[last]
    return from_mapping(TrainConfig, base)


def _options() -> str:
    """All groups and keys with their choices, defaults and meaning, as a page."""
    lines = ["Groups (files in configs/):"]
    for folder in sorted(p for p in CONFIGS.iterdir() if p.is_dir()):
        choices = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        lines.append(f"  {folder.name}={choices}")
    lines.append("\nKeys (KEY=VALUE; lists as '[1,2]', no value as null):")
    section = ""
    for key, hint, default, metadata in walk(TrainConfig):
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        limits = describe_range(metadata)
        kind = describe_type(hint) + (f", {limits}" if limits else "")
        shown = yaml.safe_dump(to_mapping_value(default), default_flow_style=True).split("\n")[0]
        lines.append(f"  {key}={shown}\n      {metadata['help']} ({kind})")
    return "\n".join(lines)


def to_mapping_value(value: Any) -> Any:
    """A default as plain data."""
    return [to_mapping_value(v) for v in value] if isinstance(value, tuple) else value
