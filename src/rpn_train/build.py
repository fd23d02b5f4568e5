"""From the configuration to the objects that it describes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from rpn_train.anchors import AnchorGrid
from rpn_train.backbones import build_backbone
from rpn_train.config import DatasetConfig, MethodConfig, SplitConfig, TrainConfig
from rpn_train.data.batch import EvalBatches, ReadImage
from rpn_train.data.coco import read_coco
from rpn_train.data.files import index_files
from rpn_train.data.index import Index
from rpn_train.data.index_cache import cache_folder, cached_index
from rpn_train.data.sampler import Planner
from rpn_train.data.shapes import FIRST_VAL, draw_row, shapes_index
from rpn_train.data.transforms import read_image
from rpn_train.data.voc import read_voc
from rpn_train.distributed import Ranks
from rpn_train.errors import ConfigError
from rpn_train.model import RPN, RPNHead
from rpn_train.targets import AssignmentRule


def build_model(cfg: TrainConfig) -> RPN:
    """The network with initial weights that follow from the seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        backbone = build_backbone(
            cfg.backbone.name,
            weights=cfg.backbone.weights,
            frozen_stages=cfg.backbone.frozen_stages,
            norm=cfg.backbone.norm,
            norm_eps=cfg.backbone.norm_eps,
            fpn_norm=cfg.backbone.fpn_norm,
        )
        head = partial(RPNHead, num_convs=cfg.method.num_convs, channels=cfg.method.channels)
        return RPN(backbone, anchor_grid(cfg, backbone.strides), head)


def anchor_grid(cfg: TrainConfig, strides: tuple[int, ...]) -> AnchorGrid:
    """The anchors, checked against the strides of the backbone's levels."""
    sizes, given = cfg.anchors.sizes, cfg.anchors.strides
    if len(sizes) == 1:  # of all levels, as in Detectron2
        sizes = sizes * len(strides)
    listed = ", ".join(map(str, strides))
    if len(sizes) != len(strides):
        presets = "anchors=c4 or anchors=paper" if len(strides) == 1 else "anchors=fpn"
        raise ConfigError(
            f"anchors.sizes: {len(sizes)} level(s) given, backbone {cfg.backbone.name} has "
            f"{len(strides)} (strides {listed}); {presets} fits"
        )
    if len({len(level) for level in sizes}) != 1:
        raise ConfigError(
            "anchors.sizes: expected as many sizes on every level (they share one head), got "
            + ", ".join(str(len(level)) for level in sizes)
        )
    if given is not None and given != strides:
        raise ConfigError(
            f"anchors.strides: expected {listed}, the strides of backbone {cfg.backbone.name}, "
            f"got {', '.join(map(str, given))}"
        )
    return AnchorGrid(sizes, cfg.anchors.ratios, strides, cfg.anchors.rounded)


def assignment_rule(method: MethodConfig) -> AssignmentRule:
    """How anchors become targets: the keywords of `assign`."""
    return AssignmentRule(
        fg_iou=method.fg_iou,
        bg_iou=method.bg_iou,
        force_best=method.force_best,
        forced_min_iou=method.forced_min_iou,
        ignore_ioa=method.ignore_ioa,
        border=method.border,
    )


def open_split(
    dataset: DatasetConfig, which: str, seed: int, *, need_images: bool = True
) -> tuple[Index, ReadImage]:
    """The annotations of the "train" or "val" split, and how to read its images.

    With `need_images` false, those of COCO may be missing.

    Raises:
        ConfigError: a path is needed and not given.
        DataError: files are missing or broken.
    """
    split = dataset.train if which == "train" else dataset.val
    keep_empty = dataset.keep_empty or which == "val"
    if dataset.format == "shapes":
        return _open_shapes(dataset, which, seed)
    if dataset.format == "coco":
        images = _path(dataset, which, split, split.images, split.split)
        annotations = _path(
            dataset, which, split, split.annotations, f"annotations/instances_{split.split}.json"
        )
        options: dict[str, Any] = {
            "categories": dataset.categories,
            "keep_empty": keep_empty,
            "need_images": need_images,
        }
        index = cached_index(
            annotations,
            images,
            options=options,
            folder=cache_folder(dataset.cache),
            make=partial(read_coco, annotations, images, **options),
        )
    else:
        index = read_voc(
            _path(dataset, which, split, split.annotations, "Annotations"),
            _path(dataset, which, split, split.images, "JPEGImages"),
            _path(dataset, which, split, None, f"ImageSets/Main/{split.split}.txt"),
            categories=dataset.categories,
            keep_empty=keep_empty,
        )
    return index, lambda row: read_image(index.path(row))


def open_files(pattern: str) -> tuple[Index, ReadImage]:
    """Images without annotations (see `index_files`), upright, and how to read them."""
    index = index_files(pattern)
    # not index.path: that refuses links out of the folder, which are the user's own here
    return index, lambda row: read_image(index.root / index.file_name(row), upright=True)


def _open_shapes(dataset: DatasetConfig, which: str, seed: int) -> tuple[Index, ReadImage]:
    shapes = dataset.shapes
    first, count = (0, shapes.train_images) if which == "train" else (FIRST_VAL, shapes.val_images)
    objects, clutter = shapes.max_objects, shapes.clutter
    index = shapes_index(
        seed, count, size=shapes.size, max_objects=objects, clutter=clutter, first=first
    )
    read = partial(draw_row, index, seed=seed, max_objects=objects, clutter=clutter)
    return index, read


def build_planner(cfg: TrainConfig, index: Index, divisor: int) -> Planner:
    """The order and augmentation of the training images."""
    return Planner(
        sizes=index.sizes,
        seed=cfg.seed,
        batch_size=cfg.schedule.batch_size,
        short_side=cfg.image.short_side,
        max_side=cfg.image.max_side,
        divisor=divisor,
        flip=cfg.augment.flip,
        scale=cfg.augment.scale,
        photometric=cfg.augment.photometric,
    )


def build_eval_batches(
    cfg: TrainConfig, index: Index, read: ReadImage, divisor: int, ranks: Ranks
) -> EvalBatches:
    """This process's share of the images to be scored."""
    return EvalBatches(
        index,
        read,
        batch_size=cfg.eval.batch_size,
        short_side=cfg.image.short_side,
        max_side=cfg.image.max_side,
        divisor=divisor,
        rank=ranks.rank,
        world=ranks.world,
    )


def _path(
    dataset: DatasetConfig,
    which: str,
    split: SplitConfig,
    given: str | None,
    below_root: str | None,
) -> Path:
    """A path given outright, or its place below the root of the standard layout."""
    if given is not None:
        return Path(given).expanduser()
    if dataset.root is None:
        raise ConfigError(
            f"dataset.root: expected a folder in {dataset.format} layout (or "
            f"dataset.{which}.images and dataset.{which}.annotations), got null"
        )
    root = Path(dataset.root).expanduser()
    if not root.is_dir():
        raise ConfigError(f"dataset.root: expected a folder, got nothing at {root}")
    if split.split is None or below_root is None:
        raise ConfigError(f"dataset.{which}.split: expected the name of a split, got null")
    return root / below_root
