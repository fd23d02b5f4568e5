"""The command `rpn-inspect`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rpn_train.build import build_model
from rpn_train.cli_trained import configured
from rpn_train.compose import compose, own_arguments, parse
from rpn_train.config import TrainConfig
from rpn_train.data.batch import ReadImage
from rpn_train.data.index import Index
from rpn_train.errors import ConfigError, DataError, UserError
from rpn_train.inspect.figures import inspection_figures, montage
from rpn_train.inspect.findings import findings
from rpn_train.inspect.fit_anchors import anchors_yaml
from rpn_train.inspect.inspection import Inspection, inspect_split, spaced
from rpn_train.inspect.page import (
    markdown_page,
    page_sections,
    page_title,
    plain_page,
    report_mapping,
)
from rpn_train.inspect.receptive_field import ReceptiveField, receptive_fields
from rpn_train.inspect.split_summary import file_faults
from rpn_train.inspect.story import write_story
from rpn_train.inspect.views import Views, measured_fields
from rpn_train.inspect.walk import walk
from rpn_train.model import RPN
from rpn_train.options import from_mapping, option
from rpn_train.pretrained import find_pretrained, trained_model
from rpn_train.recall_report import save_picture
from rpn_train.run_folder import make_folder
from rpn_train.run_log import write_json, write_text
from rpn_train.shell import check_device, guarded
from rpn_train.splits import open_files, open_split

_USAGE = """\
usage: rpn-inspect [dataset=CHOICE dataset.root=DIR] [GROUP=CHOICE] [KEY=VALUE] ...
       rpn-inspect checkpoint=WHERE [image=FILE] [KEY=VALUE] ...

Tells before training what is in the data, which objects the anchors reach, and what the network
sees. Takes what rpn-train takes: image sizes, anchors, backbone and method are those of the run to
be. With a checkpoint the configuration is the checkpoint's. With an image, too, it is followed
through the network instead, from its pixels to the proposals.

  rpn-inspect dataset=coco dataset.root=DIR backbone=resnet50_fpn
  rpn-inspect dataset=voc dataset.root=DIR image.short_side=600 image.max_side=1000 fit=true
  rpn-inspect checkpoint=runs/a effective=true
  rpn-inspect checkpoint=runs/a image=photo.jpg

fit=true       propose sizes and ratios of anchors, and write them to anchors_fitted.yaml
effective=true measure the effective receptive field, too, on a few images: seconds to minutes
split=         train (default) or val
pictures=      images drawn with their boxes (12); 0: none
files=         image files whose headers are compared with the annotations (1000); 0: none
checkpoint=    a run folder, a checkpoint in one, or torchvision:BUILDER[:WEIGHTS NAME OR FILE]
image=         an image of the split, by its file name, whose objects are known, or any file
Prints a page and writes inspect.json, inspect.md and figures to output_dir (default: inspect/ in
the run folder, or <data set>_<split>_inspect); with an image image.md and its figures (default: in
a folder of its name there). `rpn-train --help` lists the other keys.
"""

PICTURES = {  # what inspect.md says of them
    "data": "Sizes, ratios and objects per image",
    "best_iou": "Best IoU of the anchors with each object",
    "reach_by_size": "Reach by object size, level by level",
    "levels": "What each level serves, has and sees",
    "effective_field": "Effective receptive fields",
    "montage": "Images with their objects (green) and boxes to ignore (grey)",
}


@dataclass(frozen=True)
class InspectArguments:
    """What only `rpn-inspect` understands."""

    checkpoint: str | None = option(None, "run folder, checkpoint or torchvision:BUILDER")
    image: str | None = option(None, "image of the split, or file, to follow through the network")
    split: Literal["train", "val"] = option("train", "of the data set")
    fit: bool = option(False, "propose anchors")
    effective: bool = option(False, "measure the effective receptive field")
    pictures: int = option(12, "images drawn with their boxes", low=0)
    files: int = option(1000, "image files whose headers are looked at", low=0)


def inspect_main() -> None:
    """`rpn-inspect`."""
    sys.exit(guarded(_inspect, sys.argv[1:]))


def _inspect(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(_USAGE, end="")
        return 0
    own, typed = own_arguments(InspectArguments, arguments)
    if own.image is not None:
        return _follow(own.image, own, typed)
    cfg, model, folder = _network(own, typed)
    index, read = open_split(cfg, own.split, "annotations")
    make_folder(folder)
    rows = spaced(len(index), 0 if cfg.dataset.format == "shapes" else own.files)
    views, notes = _views(model, index, read, cfg, own.effective)
    if cfg.method.assignment != "max_iou":
        notes.append(
            "which anchors are positive, and how many, is told of method.assignment=max_iou; "
            f"{cfg.method.assignment} chooses otherwise and reaches objects below its IoU"
        )
    if cfg.method.head == "cascade":
        notes.append(
            "which anchors are positive, and how many, is told of anchors that no first stage has "
            "moved; those of a cascade are assigned after that"
        )
    inspection = inspect_split(
        index,
        model.grid,
        views,
        cfg,
        split=own.split,
        fit=own.fit,
        files_checked=len(rows),
        files=file_faults(index, rows, cfg.data),
    )
    pictures = inspection_figures(inspection)
    try:
        if own.pictures:
            pictures["montage"] = montage(index, read, own.pictures)
    except DataError as error:  # annotations alone are enough for all the rest
        notes.append(f"montage.png is not drawn: {error}")
    _tell(inspection, notes, folder, pictures)
    return 0


def _network(own: InspectArguments, typed: Sequence[str]) -> tuple[TrainConfig, RPN, Path]:
    """The configuration, the network that it describes, and the folder to write to."""
    source = None if own.checkpoint is None else find_pretrained(own.checkpoint)
    if source is None:
        parse(typed)
        cfg = from_mapping(TrainConfig, compose(typed))
        check_device(cfg)
        # weights would be fetched, and only what is measured depends on them
        weights = cfg.backbone.weights if own.effective else None
        model = build_model(replace(cfg, backbone=replace(cfg.backbone, weights=weights)))
    else:
        cfg = configured(source, typed)
        model = trained_model(cfg, source)
    if cfg.output_dir is not None:
        return cfg, model, Path(cfg.output_dir)
    if source is not None and source.brings_data:
        return cfg, model, source.folder.with_name("inspect")
    root = cfg.dataset.root
    name = Path(root).expanduser().resolve().name if root else cfg.dataset.format
    return cfg, model, Path(f"{name}_{own.split}_inspect")


def _views(
    model: RPN, index: Index, read: ReadImage, cfg: TrainConfig, effective: bool
) -> tuple[Views, list[str]]:
    """What the cells see, and what there is to note of it."""
    fields, notes = _fields(model)
    measured = measured_fields(_on_device(model, cfg), index, read, cfg) if effective else None
    return Views(fields, measured), notes


def _fields(model: RPN) -> tuple[list[ReceptiveField] | None, list[str]]:
    try:
        return receptive_fields(model), []
    except ConfigError as error:  # an operator that it does not know; nothing else needs to
        return None, [f"what cells see in theory is not known: {error}"]


def _on_device(model: RPN, cfg: TrainConfig) -> RPN:
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    return model.to("cuda" if on_gpu else "cpu")


def _follow(image: str, own: InspectArguments, typed: Sequence[str]) -> int:
    """Follow one image through a trained network."""
    if own.checkpoint is None:
        raise ConfigError("image: expected checkpoint=WHERE, the network to follow it through, too")
    if own.fit or own.effective:
        raise ConfigError("image: expected neither fit nor effective, which look at a whole split")
    source = find_pretrained(own.checkpoint)
    cfg = configured(source, typed, needs_data=False)
    has_data = source.brings_data or any(t.startswith("dataset") for t in typed)
    index, read, row, known = find_image(image, own.split if has_data else None, cfg)
    name = Path(index.file_name(row)).stem
    folder = Path(f"{name}_inspect")
    if source.brings_data:
        folder = source.folder.with_name("inspect") / name
    folder = Path(cfg.output_dir) if cfg.output_dir is not None else folder
    make_folder(folder)
    model = trained_model(cfg, source)
    fields, notes = _fields(model)
    seen = walk(_on_device(model, cfg), index, read, row, cfg, truth=known, seed=cfg.seed)
    if seen.truth is None:
        notes.append(
            "its objects are not known, so what training makes of the anchors is not drawn"
        )
    written = write_story(seen, fields, [f"Through {source.name}.", *notes], folder)
    print("\n".join([f"{seen.name} through {source.name}", *(f"  * {note}" for note in notes)]))
    print(f"written to {folder}: {', '.join(written)}")
    return 0


def find_image(
    image: str, split: str | None, cfg: TrainConfig
) -> tuple[Index, ReadImage, int, bool]:
    """The index and row of an image, how to read it, and whether its objects are known.

    Args:
        image: file name, or path, of an image of the split; or any image file.
        split: "train" or "val"; None: there is no data set.

    Raises:
        ConfigError: it is neither.
    """
    path, reason = Path(image).expanduser(), ""
    if split is not None:
        try:
            index, read = open_split(cfg, split, "annotations")
        except UserError as error:  # data that is not here any more: files need none
            reason = f" ({split}: {error})"
        else:
            names, root = index.file_names(), index.root.resolve()
            row = next((i for i, name in enumerate(names) if name == image), None)
            if row is None and path.is_file() and path.resolve().is_relative_to(root):
                below = path.resolve().relative_to(root).as_posix()
                row = next((i for i, name in enumerate(names) if name == below), None)
            if row is not None:
                return index, read, row, True
            reason = f"; the {split} split (split=) has {names[0]!r} and {len(names) - 1:,} others"
    if not path.is_file():
        raise ConfigError(f"image: expected a file, or an image of the data, got {image!r}{reason}")
    index, read = open_files(str(path), cfg.data)
    return index, read, 0, False


def _tell(
    inspection: Inspection, notes: Sequence[str], folder: Path, pictures: Mapping[str, Tensor]
) -> None:
    """Write the page, its figures, and fitted anchors, to the folder; then print the page."""
    report = inspection.report
    title, sections = page_title(report), page_sections(report)
    found = [*findings(report), *notes]
    write_json(folder / "inspect.json", report_mapping(report))
    shown = {f"{name}.png": PICTURES[name] for name in pictures}
    write_text(folder / "inspect.md", markdown_page(title, found, sections, shown))
    for name, picture in pictures.items():
        save_picture(picture, folder / f"{name}.png")
    written = ["inspect.md", "inspect.json", *shown]
    lines = [plain_page(title, found, sections), ""]
    if inspection.fit is not None:
        file = folder / "anchors_fitted.yaml"
        write_text(file, anchors_yaml(inspection.fit.grid, f"Fitted by rpn-inspect to {title}."))
        lines.append(f"train with the fitted anchors: rpn-train anchors={file} ...")
        written.append(file.name)
    print("\n".join([*lines, f"written to {folder}: {', '.join(written)}"]))
