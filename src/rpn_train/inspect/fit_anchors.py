"""Sizes and ratios of anchors, and a size of images, that suit the objects of a data set.

A start by k-means in IoU, then a search that asks the real grid, so that coarse strides count. Both
raise the mean over objects of the best IoU. That is the best possible recall averaged over all IoU
thresholds. Recall at a single one would be raised by giving up the objects far below it, the small
ones first; but at those that are reported the search lets no recall fall much below what it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import NamedTuple

import torch
from torch import Tensor

from rpn_train.anchors import AnchorGrid
from rpn_train.data.index import Index
from rpn_train.errors import DataError
from rpn_train.inspect.coverage import (
    Coverage,
    Objects,
    level_ious,
    object_coverage,
    resized_objects,
)

STEPS = (2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # of the search, in powers of two
ALLOWED_LOSS = 0.005  # of recall: a few odd objects do not hold back all the others
LEAST_GAIN = 1e-5  # in mean IoU, for which a step is taken
ROUNDS = 50  # of k-means, at most: medians need not come to rest
SCALES = (1.0, 1.25, 1.5, 2.0)  # of the image, in `image_size_advice`

Score = tuple[float, float]


@dataclass(frozen=True, eq=False)
class AnchorFit:
    """Fitted anchors; before and after: what the given and the fitted anchors reach, all objects.

    The sizes ascend over all levels, the ratios too; all have three significant digits.
    """

    grid: AnchorGrid
    before: Coverage
    after: Coverage


class SmallObjects(NamedTuple):
    """share: of objects whose side, sqrt(width x height), is below a limit at this image size."""

    short_side: int
    max_side: int
    share: float


def fit_anchors(
    objects: Objects,
    grid: AnchorGrid,
    *,
    sizes_per_level: int,
    num_ratios: int,
    border: str,
    fg_iou: float,
    most_objects: int = 20_000,
) -> AnchorFit:
    """Sizes and ratios for the strides of `grid`. Deterministic.

    Where the given anchors have as many shapes, ascending, the search starts from them too. Then,
    on the objects fitted to, the mean best IoU does not fall, and the best possible recall at IoU
    0.5, 0.7 and fg_iou by at most ALLOWED_LOSS each. With fewer shapes they may lose more: the sum
    of these losses is then made small first.

    Args:
        border, fg_iou: as of `targets.assign`.
        most_objects: fitted to these at most, evenly spaced.

    Raises:
        DataError: no object has an extent.
    """
    before = object_coverage(objects, grid, border=border)
    width, height = objects.width_height()
    rows = ((width > 0) & (height > 0)).nonzero()[:, 0]
    if not len(rows):
        raise DataError("inspect.fit: expected at least one object with an extent, got none")
    count = min(most_objects, len(rows))
    rows = rows[torch.arange(count) * len(rows) // count]
    some = objects._replace(boxes=objects.boxes[rows], image=objects.image[rows])
    sizes, ratios = dimension_clusters(
        width[rows],
        height[rows],
        num_sizes=sizes_per_level * len(grid.strides),
        num_ratios=num_ratios,
    )
    starts = [_with_numbers(grid, [*map(_digits, sizes)], [*map(_digits, ratios)])]
    as_many = (len(grid.sizes[0]), len(grid.ratios)) == (sizes_per_level, num_ratios)
    if as_many and _ascends(grid):
        starts.append(grid)
    score = _scorer(before.best_iou[rows], sorted({0.5, 0.7, fg_iou}))
    found = [_climb(some, start, border, score) for start in starts]
    fitted, _ = max(found, key=lambda grid_and_score: grid_and_score[1])
    return AnchorFit(fitted, before, object_coverage(objects, fitted, border=border))


def dimension_clusters(
    width: Tensor, height: Tensor, *, num_sizes: int, num_ratios: int
) -> tuple[list[float], list[float]]:
    """Sizes and ratios, ascending, of all products of which some box has the highest IoU.

    k-means with the distance 1 - IoU of boxes at a common centre (Redmon & Farhadi 2017, section 2,
    "dimension clusters"). Theirs are free shapes; here a size is the median of the boxes nearest to
    any shape of that size, and so is a ratio. It starts from quantiles.

    Args:
        width, height: float32 [M] px, positive, M >= 1.
    """
    side, ratio = (width * height).sqrt(), height / width
    sizes = side.quantile(torch.arange(1, 2 * num_sizes, 2) / (2 * num_sizes))
    ratios = ratio.quantile(torch.arange(1, 2 * num_ratios, 2) / (2 * num_ratios))
    for _ in range(ROUNDS):
        shape_w = (sizes / ratios[:, None].sqrt()).view(-1, 1)  # [A, 1], ratio-major
        shape_h = (sizes * ratios[:, None].sqrt()).view(-1, 1)
        shared = torch.minimum(width, shape_w) * torch.minimum(height, shape_h)
        nearest = (shared / (width * height + shape_w * shape_h - shared)).argmax(0)  # [M]
        last = sizes, ratios
        sizes = _medians(side, nearest % num_sizes, sizes)
        ratios = _medians(ratio, nearest // num_sizes, ratios)
        if torch.equal(sizes, last[0]) and torch.equal(ratios, last[1]):
            break
    return sizes.sort().values.tolist(), ratios.sort().values.tolist()


def image_size_advice(
    index: Index, *, short_side: int, max_side: int, small_px: float = 16.0
) -> list[SmallObjects]:
    """Share of objects under `small_px` as images are resized now, and larger; max_side in step.

    NaN where there are no objects.
    """
    advice = []
    for scale in SCALES:
        short, longest = round(scale * short_side), round(scale * max_side)
        objects = resized_objects(index, short_side=short, max_side=longest, divisor=1)
        share = (objects.sides() < small_px).double().mean().item()
        advice.append(SmallObjects(short, longest, share))
    return advice


def anchors_yaml(grid: AnchorGrid, comment: str) -> str:
    """The text of a file like those in configs/anchors, with the lines of a comment before it.

    The strides stand in it, since the sizes were chosen for them: another backbone is refused.
    """
    lines = [f"# {line}" for line in comment.splitlines()]
    levels = ", ".join(f"[{_listed(sizes)}]" for sizes in grid.sizes)
    lines += [f"sizes: [{levels}]", f"ratios: [{_listed(grid.ratios)}]"]
    lines += [f"strides: [{_listed(grid.strides)}]", f"rounded: {str(grid.rounded).lower()}"]
    return "\n".join(lines) + "\n"


def _scorer(before: Tensor, thresholds: list[float]) -> Callable[[Tensor], Score]:
    """Of best IoUs [M]: first, how few objects are lost at the thresholds, then the mean."""

    def reached(best: Tensor) -> Tensor:
        return torch.stack([(best >= threshold).sum() for threshold in thresholds])

    least = reached(before) - ALLOWED_LOSS * len(before)

    def score(best: Tensor) -> Score:
        lost = (least - reached(best)).clamp(min=0).sum().item()
        return -lost, best.double().mean().item()

    return score


def _climb(
    objects: Objects, grid: AnchorGrid, border: str, score: Callable[[Tensor], Score]
) -> tuple[AnchorGrid, Score]:
    """Change one number at a time, by ever smaller steps, while that raises the score."""

    def level_best(grid: AnchorGrid, level: int) -> Tensor:
        return level_ious(objects, grid, level, border=border).amax(0)

    levels, count = range(len(grid.strides)), len([*chain(*grid.sizes), *grid.ratios])
    best = [level_best(grid, level) for level in levels]  # L x [M]
    kept, mean = score(torch.stack(best).amax(0))
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for number, factor in product(range(count), (2**step, 2**-step)):
                other = _scaled(grid, number, factor)
                if not _ascends(other):
                    continue
                found = [
                    best[level]
                    if (other.sizes[level], other.ratios) == (grid.sizes[level], grid.ratios)
                    else level_best(other, level)
                    for level in levels
                ]
                candidate = score(torch.stack(found).amax(0))
                if candidate > (kept, mean + LEAST_GAIN):
                    grid, best, (kept, mean), moved = other, found, candidate, True
    return grid, (kept, mean)


def _scaled(grid: AnchorGrid, number: int, factor: float) -> AnchorGrid:
    """With one of its numbers, first all sizes, then all ratios, multiplied."""
    numbers = [*chain(*grid.sizes), *grid.ratios]
    numbers[number] = _digits(numbers[number] * factor)
    split = len(numbers) - len(grid.ratios)
    return _with_numbers(grid, numbers[:split], numbers[split:])


def _with_numbers(grid: AnchorGrid, sizes: list[float], ratios: list[float]) -> AnchorGrid:
    count = len(sizes) // len(grid.strides)
    levels = tuple(tuple(sizes[i : i + count]) for i in range(0, len(sizes), count))
    return replace(grid, sizes=levels, ratios=tuple(ratios))


def _ascends(grid: AnchorGrid) -> bool:
    sizes, ratios = [*chain(*grid.sizes)], [*grid.ratios]
    return sizes == sorted(sizes) and ratios == sorted(ratios)


def _medians(values: Tensor, group: Tensor, empty: Tensor) -> Tensor:
    """Median of the values of each group, `empty` [K] where it has none: [K]."""
    members = [values[group == k] for k in range(len(empty))]
    return torch.stack([m.median() if len(m) else e for m, e in zip(members, empty, strict=True)])


def _digits(number: float) -> float:
    return float(f"{number:.3g}")


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
