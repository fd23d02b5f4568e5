"""What is known of a split, its anchors and its network before anything is trained."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rpn_train.anchors import AnchorGrid, cell_anchors
from rpn_train.build import assignment_rule
from rpn_train.config import TrainConfig
from rpn_train.data.index import Index
from rpn_train.inspect.coverage import (
    Coverage,
    Objects,
    Reach,
    count_positives,
    level_ious,
    object_coverage,
    object_groups,
    reach,
    resized_objects,
    shape_use,
)
from rpn_train.inspect.fit_anchors import AnchorFit, fit_anchors, image_size_advice
from rpn_train.inspect.receptive_field import larger_anchors
from rpn_train.inspect.split_summary import Fault, SplitSummary, Spread, spread, summarize_split
from rpn_train.inspect.views import Views
from rpn_train.method_config import MethodConfig

SMALL_PX = 16.0  # under this an object is a few cells of the finest level
POSITIVES_IMAGES = 500  # in which positive anchors are counted
CURVE_OBJECTS = 50_000  # compared with each level on its own, for a figure


@dataclass(frozen=True)
class PositivesSummary:
    """Positive anchors in some images that have objects, before sampling.

    above_sample: share of images with more than can be sampled; NaN if all are read.
    objects_without: share of objects that no positive anchor is matched with.
    """

    images: int
    per_image: Spread
    above_sample: float
    objects_without: float


@dataclass(frozen=True)
class Level:
    """One level: its anchors, the objects whose best anchor is here, and what its cells see.

    unused: (size, ratio) of anchors that are best for no object. field_px: (height, width); inf
    where a cell sees the whole image; None where it is not known. effective_px: side of the square
    with 95 % of the gradient. out_of_sight: (height, width) of anchors larger than the field.
    """

    stride: int
    sizes: tuple[float, ...]
    largest_anchor_px: tuple[float, float]
    best_for: int
    side_px: Spread
    unused: tuple[tuple[float, float], ...]
    field_px: tuple[float, float] | None
    effective_px: int | None
    out_of_sight: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class FitSummary:
    """Fitted anchors, and size of objects -> what the given and the fitted ones reach."""

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]
    rounded: bool
    before: dict[str, Reach]
    after: dict[str, Reach]


@dataclass(frozen=True)
class Report:
    """All figures, plain.

    source: root or format of the data set. ratios, fg_iou: of the anchors and of the method.
    by_iou: whether training assigns these anchors, and by this IoU. reach: kind of group -> group
    -> figures; see `object_groups`. small: short side of the image -> share of objects under
    `SMALL_PX` there.
    """

    split: str
    source: str
    backbone: str
    short_side: int
    max_side: int
    ratios: tuple[float, ...]
    fg_iou: float
    by_iou: bool
    data: SplitSummary
    reach: dict[str, dict[str, Reach]]
    positives: PositivesSummary
    levels: tuple[Level, ...]
    small: dict[int, float]
    fit: FitSummary | None


@dataclass(frozen=True, eq=False)
class Inspection:
    """The report and what its figures are drawn from.

    per_image: int64 [N] objects. some: int64 [K] rows of objects; level_best: float32 [L, K] their
    best IoU with the anchors of each level.
    """

    report: Report
    method: MethodConfig
    per_image: NDArray[np.int64]
    objects: Objects
    grid: AnchorGrid
    coverage: Coverage
    some: Tensor
    level_best: Tensor
    views: Views
    fit: AnchorFit | None


def inspect_split(
    index: Index,
    grid: AnchorGrid,
    views: Views,
    cfg: TrainConfig,
    *,
    split: str,
    fit: bool,
    files_checked: int,
    files: dict[str, Fault],
) -> Inspection:
    """Everything there is to say of a split before training.

    Args:
        split: its name.
        fit: fit anchors to the objects, too.
        files_checked, files: of `file_faults`.

    Raises:
        DataError: anchors are to be fitted, and there is no object.
    """
    size = {"short_side": cfg.image.short_side, "max_side": cfg.image.max_side}
    objects = resized_objects(index, **size, divisor=max(grid.strides))
    per_image = np.bincount(objects.image.numpy(), minlength=len(index))
    coverage = object_coverage(objects, grid, border=cfg.method.border)
    groups = object_groups(objects)
    fitted = _fit(objects, grid, cfg) if fit else None
    some = torch.tensor(spaced(len(objects.boxes), CURVE_OBJECTS), dtype=torch.int64)
    part = objects._replace(boxes=objects.boxes[some], image=objects.image[some])
    levels = range(len(grid.strides))
    ious = [level_ious(part, grid, level, border=cfg.method.border).amax(0) for level in levels]
    advice = image_size_advice(index, **size, small_px=SMALL_PX)
    report = Report(
        split=split,
        source=cfg.dataset.root or cfg.dataset.format,
        backbone=cfg.backbone.name,
        **size,
        ratios=grid.ratios,
        fg_iou=cfg.method.fg_iou,
        by_iou=cfg.method.assignment == "max_iou" and cfg.method.head != "cascade",
        data=summarize_split(index, objects, per_image, files_checked, files),
        reach={kind: _reach(coverage, of_kind, cfg) for kind, of_kind in groups.items()},
        positives=_positives(objects, grid, per_image, cfg),
        levels=_levels(objects, coverage, grid, views),
        small={size.short_side: size.share for size in advice},
        fit=None if fitted is None else _fit_summary(fitted, groups["area"], cfg),
    )
    return Inspection(
        report,
        cfg.method,
        per_image,
        objects,
        grid,
        coverage,
        some,
        torch.stack(ious),
        views,
        fitted,
    )


def spaced(total: int, count: int) -> list[int]:
    """At most `count` of `total` rows, evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _reach(coverage: Coverage, groups: dict[str, Tensor], cfg: TrainConfig) -> dict[str, Reach]:
    method = cfg.method
    return {
        name: reach(
            coverage.best_iou[rows],
            fg_iou=method.fg_iou,
            force_best=method.force_best,
            forced_min_iou=method.forced_min_iou,
        )
        for name, rows in groups.items()
    }


def _positives(
    objects: Objects, grid: AnchorGrid, per_image: NDArray[np.int64], cfg: TrainConfig
) -> PositivesSummary:
    method = cfg.method
    rule = assignment_rule(method)
    found = count_positives(objects, grid, num_images=POSITIVES_IMAGES, **rule)
    counts = found.per_image.numpy()[per_image[found.images.numpy()] > 0]
    most = int(method.num_samples * method.fg_fraction)
    sampled = method.sampling == "random" and len(counts) > 0
    return PositivesSummary(
        images=len(counts),
        per_image=spread(counts),
        above_sample=float(np.mean(counts > most)) if sampled else float("nan"),
        objects_without=(found.per_object == 0).double().mean().item(),
    )


def _levels(
    objects: Objects, coverage: Coverage, grid: AnchorGrid, views: Views
) -> tuple[Level, ...]:
    level_of = torch.div(coverage.best_shape, coverage.per_cell, rounding_mode="floor")
    sides, uses = objects.sides().double(), shape_use(coverage, grid)
    fields = [f.size for f in views.fields] if views.fields else [None] * len(grid.strides)
    hidden = larger_anchors(grid, [size or (math.inf, math.inf) for size in fields])
    measured = [e.side() for e in views.effective] if views.effective else [None] * len(fields)
    levels = []
    for i, (stride, sizes) in enumerate(zip(grid.strides, grid.sizes, strict=True)):
        cells = cell_anchors(sizes, grid.ratios, grid.rounded)
        width, height = (cells[:, 2:] - cells[:, :2]).amax(0).tolist()
        here = uses[i * grid.per_cell : (i + 1) * grid.per_cell]
        levels.append(
            Level(
                stride=stride,
                sizes=sizes,
                largest_anchor_px=(height, width),
                best_for=sum(use.best_for for use in here),
                side_px=spread(sides[level_of == i].numpy()),
                unused=tuple((use.size, use.ratio) for use in here if not use.best_for),
                field_px=fields[i],
                effective_px=measured[i],
                out_of_sight=tuple(hidden[i]),
            )
        )
    return tuple(levels)


def _fit(objects: Objects, grid: AnchorGrid, cfg: TrainConfig) -> AnchorFit:
    return fit_anchors(
        objects,
        grid,
        sizes_per_level=len(grid.sizes[0]),
        num_ratios=len(grid.ratios),
        border=cfg.method.border,
        fg_iou=cfg.method.fg_iou,
    )


def _fit_summary(fit: AnchorFit, groups: dict[str, Tensor], cfg: TrainConfig) -> FitSummary:
    before, after = _reach(fit.before, groups, cfg), _reach(fit.after, groups, cfg)
    return FitSummary(fit.grid.sizes, fit.grid.ratios, fit.grid.rounded, before, after)
