"""From the configuration to the objects that it describes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpn_train.anchors import AnchorGrid
from rpn_train.backbones import build_backbone
from rpn_train.config import TrainConfig
from rpn_train.data.batch import EvalBatches, ReadImage, TrainBatches
from rpn_train.data.image_cache import ImageCache
from rpn_train.data.index import Index
from rpn_train.data.sampler import Planner
from rpn_train.data.transforms import fit_size
from rpn_train.distributed import Ranks
from rpn_train.errors import ConfigError
from rpn_train.heads import CascadeHead, RPNHead, TowerHead
from rpn_train.method_config import MethodConfig
from rpn_train.model import RPN
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
            pyramid=cfg.backbone.pyramid,
            fpn_norm=cfg.backbone.fpn_norm,
        )
        grid = anchor_grid(cfg, backbone.strides)
        if cfg.method.head == "cascade" and grid.per_cell != 1:
            raise ConfigError(
                "anchors: expected one size and one ratio on every level with method.head=cascade, "
                f"got {grid.per_cell} anchors per cell"
            )
        return RPN(backbone, grid, _head(cfg.method))


def _head(method: MethodConfig) -> Callable[[int, int], nn.Module]:
    """Makes a head of (input channels, anchors per cell)."""
    options: dict[str, Any] = {
        "num_convs": method.num_convs,
        "channels": method.channels,
        "delta_stds": method.delta_stds,
    }
    if method.head == "towers":
        return partial(TowerHead, centerness=method.centerness, **options)
    if method.head == "cascade":
        return partial(CascadeHead, **options)
    return partial(RPNHead, **options)


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


def build_train_batches(
    cfg: TrainConfig, index: Index, read: ReadImage, planner: Planner, ranks: Ranks
) -> TrainBatches:
    """This process's share of the batches of all steps."""
    return TrainBatches(
        index,
        read,
        planner,
        rank=ranks.rank,
        world=ranks.world,
        accumulate=cfg.schedule.accumulate,
        unread="substitute" if cfg.data.on_error == "skip" else "raise",
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
        unread="blank" if cfg.data.on_error == "skip" else "raise",
    )


def add_caches(
    cfg: TrainConfig, batches: TrainBatches, eval_batches: EvalBatches, folder: Path, ranks: Ranks
) -> list[ImageCache]:
    """Give both a cache of their images, if one is asked for; none else.

    Training comes first, and what it leaves of this process's share of the bound is for evaluation.

    Raises:
        ConfigError: there is no room for them.
    """
    if cfg.data.cache is None:
        return []
    short_side, max_side = cfg.image.short_side, cfg.image.max_side
    stored = batches.index.sizes.tolist()
    sizes = [fit_size((height, width), short_side, max_side) for height, width in stored]
    limit = int(1e9 * cfg.data.cache_gb / ranks.world)
    where = folder if cfg.data.cache == "disk" else None
    first = batches.cache = ImageCache(sizes, range(len(sizes)), limit=limit, folder=where)
    mine = sorted(row for rows in eval_batches.batches for row in rows)
    limit -= first.num_bytes
    second = eval_batches.cache = ImageCache(eval_batches.sizes, mine, limit=limit, folder=where)
    return [first, second]
