"""The commands on a trained network: `rpn-eval`, `rpn-propose`, `rpn-export`."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rpn_train.compose import compose, lay_over, own_arguments, parse
from rpn_train.config import TrainConfig
from rpn_train.distributed import launched, start
from rpn_train.errors import ConfigError
from rpn_train.export import export_network
from rpn_train.options import from_mapping, option
from rpn_train.pretrained import Pretrained, find_pretrained, trained_model
from rpn_train.propose import propose
from rpn_train.run_folder import make_folder
from rpn_train.scoring import score_files, score_network
from rpn_train.shell import check_device, guarded, launch, num_processes

_EVAL_USAGE = """\
usage: rpn-eval checkpoint=WHERE [GROUP=CHOICE] [KEY=VALUE] ...
       rpn-eval proposals=FILE dataset=CHOICE [KEY=VALUE] ...

Scores proposals: of a trained network, or in files, whoever made them. With a checkpoint the
configuration is the checkpoint's; anything typed here takes the place of what it says.

  rpn-eval checkpoint=runs/a                            on the validation split of the run
  rpn-eval checkpoint=runs/a dataset=coco dataset.root=DIR eval.max_proposals=[100,300,1000]
  rpn-eval checkpoint=torchvision:fasterrcnn_resnet50_fpn dataset=coco dataset.root=DIR
  rpn-eval proposals=a.json dataset=coco dataset.root=DIR
  rpn-eval proposals='{mine: a.npz, other: b.pkl}' dataset=voc dataset.root=DIR eval.match=file_name

checkpoint=      a run folder, a checkpoint in one, or torchvision:BUILDER[:WEIGHTS NAME OR FILE]
proposals=       COCO results (.json), .npz, a folder of .npz, Detectron2's or MMDetection's .pkl
eval.protocol=   greedy matches by IoU alone, as Detectron2 does
eval.verify=true scores a second time, with pycocotools
Prints a table and writes recall.json, recall.md, curves, images.csv and worst.png to output_dir
(default: eval/ in the run folder, or a folder beside the file). `rpn-train --help` lists the keys.
"""

_PROPOSE_USAGE = """\
usage: rpn-propose checkpoint=WHERE output=FILE [images=WHERE] [KEY=VALUE] ...

Writes the proposals of a trained network, best first, in pixels of the images.

  rpn-propose checkpoint=runs/a images=DIR_OR_GLOB_OR_FILE output=proposals.json top=300 draw=DIR
  rpn-propose checkpoint=runs/a dataset=coco dataset.root=DIR split=train output=train.npz

checkpoint= a run folder, a checkpoint in one, or torchvision:BUILDER[:WEIGHTS NAME OR FILE]
output=     .json (COCO results), .npz, or .pkl (Detectron2's precomputed proposals)
images=     a file, a folder or a glob, upright as EXIF says; else the images of the data set
split=      train or val: of the data set
top=        most proposals of an image
min_score=  proposals of a lower probability are left out
nms=        IoU above which the weaker of two proposals goes
draw=       folder for a picture of each image
`rpn-train --help` lists the other keys.
"""


_EXPORT_USAGE = """\
usage: rpn-export checkpoint=WHERE output=FILE [KEY=VALUE] ...

Writes a trained network as one file that needs nothing of this package: images in, proposals out.

  rpn-export checkpoint=runs/a output=rpn.onnx
  rpn-export checkpoint=runs/a output=rpn.pt2 proposals.test.post_nms=300

checkpoint= a run folder, a checkpoint in one, or torchvision:BUILDER[:WEIGHTS NAME OR FILE]
output=     .onnx (needs pip install 'rpn-train[export]') or .pt2 (torch.export)
`rpn-train --help` lists the other keys.
"""


@dataclass(frozen=True)
class EvalArguments:
    """What only `rpn-eval` understands."""

    checkpoint: str | None = option(None, "run folder, checkpoint or torchvision:BUILDER")
    proposals: str | None = option(None, "file, or {name: file, ...}")


@dataclass(frozen=True)
class ProposeArguments:
    """What only `rpn-propose` understands."""

    checkpoint: str | None = option(None, "run folder, checkpoint or torchvision:BUILDER")
    output: str | None = option(None, "file to write")
    images: str | None = option(None, "file, folder or glob")
    split: str | None = option(None, "train or val")
    top: int | None = option(None, "most proposals of an image", low=1)
    min_score: float = option(0.0, "lowest probability", low=0, high=1)
    nms: float | None = option(None, "IoU", low=0, high=1)
    draw: str | None = option(None, "folder for pictures")


@dataclass(frozen=True)
class ExportArguments:
    """What only `rpn-export` understands."""

    checkpoint: str | None = option(None, "run folder, checkpoint or torchvision:BUILDER")
    output: str | None = option(None, "file to write")


def eval_main() -> None:
    """`rpn-eval`."""
    sys.exit(guarded(_eval, sys.argv[1:]))


def propose_main() -> None:
    """`rpn-propose`."""
    sys.exit(guarded(_propose, sys.argv[1:]))


def export_main() -> None:
    """`rpn-export`."""
    sys.exit(guarded(_export, sys.argv[1:]))


def _eval(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_EVAL_USAGE, end="")
        return 0
    own, typed = own_arguments(EvalArguments, arguments)
    if (own.checkpoint is None) == (own.proposals is None):
        raise ConfigError(
            "expected checkpoint=WHERE or proposals=FILE, one of the two; rpn-eval --help says more"
        )
    if own.proposals is not None:
        parse(typed)
        cfg = from_mapping(TrainConfig, compose(typed))
        files = _named_files(own.proposals)
        first = next(iter(files.values()))
        folder = Path(cfg.output_dir) if cfg.output_dir else first.with_name(f"{first.stem}_recall")
        make_folder(folder)
        score_files(cfg, files, folder)
        return 0
    source = find_pretrained(own.checkpoint)
    cfg = configured(source, typed)
    if not launched() and (processes := num_processes(cfg)) > 1:
        return launch("eval", arguments, processes)
    folder = Path(cfg.output_dir) if cfg.output_dir else source.folder
    make_folder(folder)
    with start(cfg.device) as ranks:
        signal = score_network(cfg, source, folder, ranks)
    return 0 if signal is None else 128 + signal


def _propose(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_PROPOSE_USAGE, end="")
        return 0
    own, typed = own_arguments(ProposeArguments, arguments)
    if own.checkpoint is None or own.output is None:
        raise ConfigError("expected checkpoint=WHERE and output=FILE; rpn-propose --help says more")
    if own.split is not None:
        typed.append(f"eval.split={own.split}")
    if own.nms is not None:
        typed.append(f"proposals.nms_iou={own.nms}")
    if own.top is not None:  # the N of a recall that is not taken must not exceed it
        which = "train" if own.split == "train" else "test"
        typed += [f"proposals.{which}.post_nms={own.top}", f"eval.max_proposals=[{own.top}]"]
    source = find_pretrained(own.checkpoint)
    cfg = configured(source, typed, needs_data=own.images is None)
    output = Path(own.output).expanduser()
    draw = Path(own.draw).expanduser() if own.draw else None
    if not launched() and (processes := num_processes(cfg)) > 1:
        return launch("propose", arguments, processes)
    make_folder(output.parent)
    with start(cfg.device) as ranks:
        propose(cfg, source, own.images, output, own.min_score, draw, ranks)
    return 0


def _export(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_EXPORT_USAGE, end="")
        return 0
    own, typed = own_arguments(ExportArguments, arguments)
    if own.checkpoint is None or own.output is None:
        raise ConfigError("expected checkpoint=WHERE and output=FILE; rpn-export --help says more")
    source = find_pretrained(own.checkpoint)
    cfg = configured(source, typed, needs_data=False)
    output = Path(own.output).expanduser()
    make_folder(output.parent)
    export_network(trained_model(cfg, source), cfg, output, step=source.step)
    print(f"written to {output}: {output.stat().st_size / 1e6:.1f} MB")
    return 0


def configured(source: Pretrained, typed: Sequence[str], needs_data: bool = True) -> TrainConfig:
    """The configuration of a network, under what was typed."""
    overrides = parse(typed)
    if needs_data and not source.brings_data and not any(t.startswith("dataset") for t in typed):
        raise ConfigError(f"expected dataset=CHOICE: {source.name} does not say which to take")
    cfg = lay_over(source.config, overrides, typed)
    check_device(cfg)
    return cfg


def _named_files(text: str) -> dict[str, Path]:
    """{"": FILE} or, of '{name: FILE, ...}', each under its name."""
    if not text.startswith("{"):
        return {"": Path(text).expanduser()}
    try:
        named = yaml.safe_load(text)
    except yaml.YAMLError:
        named = None
    if not isinstance(named, dict) or not named:
        raise ConfigError(f"proposals: expected FILE or '{{name: FILE, ...}}', got {text!r}")
    for name in named:  # it becomes a part of file names
        if not re.fullmatch(r"[\w][\w .+-]*", str(name)):
            raise ConfigError(
                f"proposals: expected names of letters, digits, spaces and _ . + -, got {name!r}"
            )
    return {str(name): Path(str(file)).expanduser() for name, file in named.items()}
