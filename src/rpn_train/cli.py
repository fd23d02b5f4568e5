"""The commands: what the user typed, composed by Hydra, made into one strict configuration.

Hydra composes the files of `configs/` with the typed overrides; what comes out is checked against
the dataclasses of `config.py`, and no Hydra or OmegaConf object goes further than this module.
Exit codes: 0 done, 1 a fault of the program (with a traceback), 2 a fault of the input (one line),
128 + n stopped by signal n.
"""

import datetime
import difflib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
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
    typed = [_readable(a) for a in arguments if a not in flags]
    if flags & {"-m", "--multirun"}:
        return _sweep(typed)
    cfg = compose_run(typed)
    if "--config" in flags:
        print(yaml.safe_dump(to_mapping(cfg), sort_keys=False), end="")
        return 0
    _check_run(cfg)
    folder = Path(cfg.output_dir) if cfg.output_dir else default_folder(cfg.name)
    if not launched() and (processes := num_processes(cfg)) > 1:
        return _launch([*typed, f"output_dir={_quoted(str(folder))}"], processes)
    return _run(cfg, folder)


def compose_run(typed: Sequence[str]) -> TrainConfig:
    """The configuration of a run; with resume=auto that of its folder, under what was typed."""
    overrides = _parse(typed)
    cfg = from_mapping(TrainConfig, _compose(typed))
    if cfg.resume is None:
        return cfg
    if cfg.output_dir is None:
        raise ConfigError("resume=auto: expected output_dir=FOLDER of the run to go on with")
    return _lay_over(_stored(Path(cfg.output_dir)), overrides, typed)


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
    _check_device(cfg)
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


def _check_device(cfg: TrainConfig) -> None:
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
        signal = train(cfg, folder, ranks)
    return 0 if signal is None else 128 + signal


def _open_folder(cfg: TrainConfig, folder: Path) -> None:
    """Make the run folder and its config.yaml; refuse one that holds another run.

    A run that a fault of the input ended before its first figure does not count.
    """
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    if begun and cfg.resume is None:
        raise ConfigError(
            f"output_dir: {folder} holds a run already; give resume=auto to go on with it, or "
            "another folder"
        )
    _make_folder(folder)
    write_text(folder / "config.yaml", yaml.safe_dump(to_mapping(cfg), sort_keys=False))


def _make_folder(folder: Path) -> None:
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
    for text, override in zip(typed, _parse(typed, sweep=True), strict=True):
        if override.key_or_group == "output_dir":
            parent = Path(str(override.value()))
        elif override.is_sweep_override():
            choices.append(_values(text, override))
        else:
            choices.append([text])
    varied = [i for i, choice in enumerate(choices) if len(choice) > 1]
    runs = []
    for number, combination in enumerate(itertools.product(*choices)):
        label = ",".join(combination[i] for i in varied)
        folder = parent / f"{number}_{label.replace('/', '-')}"
        runs.append((label, [*combination, f"output_dir={_quoted(str(folder))}"]))
    for _, run in runs:  # all faults come first
        _check_run(compose_run(run))
    for number, (label, run) in enumerate(runs, start=1):
        print(f"\nrun {number} of {len(runs)}: {label}", flush=True)
        code = _train(run)
        if code:
            return code
    print(f"compare them: tensorboard --logdir {parent}")
    return 0


def _values(text: str, override: Override) -> list[str]:
    """KEY=VALUE for each value of KEY=VALUE,VALUE,..."""
    try:
        values = list(cast(Any, override).sweep_string_iterator())
    except HydraException as error:  # glob(*)
        raise ConfigError(f"expected KEY=VALUE,VALUE,..., got {text!r}") from error
    return [f"{override.key_or_group}={value}" for value in values]


def _launch(typed: Sequence[str], processes: int) -> int:
    """This command again in several processes, by torch's launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "rpn_train", *typed]
    # one thread pool for each process, not one of all cores for each (torchrun would take 1)
    threads = max(1, (os.cpu_count() or 1) // processes)
    return subprocess.run(command, env={"OMP_NUM_THREADS": str(threads), **os.environ}).returncode


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


def _eval(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_EVAL_USAGE, end="")
        return 0
    given = [a for a in arguments if a.startswith("checkpoint=")]
    if len(given) != 1:
        raise ConfigError(
            f"expected checkpoint=RUN_FOLDER_OR_FILE once, got it {len(given)} times; "
            "rpn-eval --help says more"
        )
    path = checkpoint.find(Path(given[0].removeprefix("checkpoint=")).expanduser())
    typed = [_readable(a) for a in arguments if a not in given]
    overrides = _parse(typed)
    saved = checkpoint.load(path)
    cfg = _lay_over({**saved["config"], "output_dir": None}, overrides, typed)
    run = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    folder = Path(cfg.output_dir) if cfg.output_dir else run / "eval"
    _check_device(cfg)
    _make_folder(folder)
    with start(cfg.device) as ranks:
        evaluate_checkpoint(cfg, saved, path, folder, ranks)
    return 0


def _readable(argument: str) -> str:
    """A path with ~ expanded, in quotes where Hydra's grammar asks for them: a=b, (1), ü."""
    key, _, value = argument.partition("=")
    texts = {name for name, hint, *_ in walk(TrainConfig) if hint in (str, str | None)}
    if key not in texts:
        return argument
    value = os.path.expanduser(value)
    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        value = _quoted(value)
    return f"{key}={value}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _parse(typed: Sequence[str], *, sweep: bool = False) -> list[Override]:
    """The typed overrides; what is no KEY=VALUE of a known key or group is refused here."""
    known = {name for name, *_ in walk(TrainConfig)}
    sections = {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    overrides = []
    for text in typed:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            override = None
        # all keys exist, so there is nothing to add (+KEY), to delete (~KEY) or to move (@)
        if not override or override.type is not OverrideType.CHANGE or override.package:
            raise ConfigError(
                f"expected KEY=VALUE or GROUP=CHOICE, got {text!r}; rpn-train --help lists them"
            )
        if override.key_or_group not in known | sections | {"experiment"}:
            raise ConfigError(unknown_key(override.key_or_group))
        if not override.is_sweep_override():
            _check_choice(override.key_or_group, override.value())
        elif not sweep or override.key_or_group == "output_dir":
            raise ConfigError(
                f"{override.key_or_group}: expected one value, got several: {text!r}; "
                "rpn-train -m makes a run of each, quotes within quotes make one value of them"
            )
        overrides.append(override)
    return overrides


def _check_choice(key: str, choice: Any) -> None:
    """Refuse what is no choice of a group."""
    if key not in (groups := _groups()) or choice in groups[key]:
        return
    offered = groups[key]
    if key == "backbone":
        if str(choice).startswith("timm:"):
            return
        offered = [*offered, "timm:<name>"]
    close = difflib.get_close_matches(str(choice), offered, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(f"{key}: expected {' | '.join(map(repr, offered))}, got {choice!r}{hint}")


def _groups() -> dict[str, list[str]]:
    """The groups and their choices: the folders of configs/ and the files in them."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    return {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in folders}


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
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _lay_over(
    base: dict[str, Any], overrides: Sequence[Override], typed: Sequence[str]
) -> TrainConfig:
    """A stored configuration with exactly the typed keys and groups replaced.

    A typed group (dataset=voc) replaces its whole section, a typed key only itself; an experiment
    replaces everything.
    """
    composed = _compose(typed)
    if any(o.key_or_group == "experiment" for o in overrides):
        return from_mapping(TrainConfig, composed)
    for override in overrides:
        *path, last = override.key_or_group.split(".")
        target, source = base, composed
        for part in path:
            target, source = target.setdefault(part, {}), source[part]
        target[last] = source[last]
    return from_mapping(TrainConfig, base)


def _options() -> str:
    """All groups and keys with their choices, defaults and meaning, as a page."""
    lines = ["Groups (files in configs/):"]
    for group, choices in _groups().items():
        lines.append(f"  {group}={', '.join(choices)}")
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
