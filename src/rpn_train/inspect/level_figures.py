"""Figures of the levels of a network: what they serve, which anchors they have, what they see."""

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from rpn_train.anchors import AnchorGrid, cell_anchors
from rpn_train.figures import BLACK, BLUE, ORANGE, SKY_BLUE, VERMILLION
from rpn_train.inspect.charts import legend, log_px, new_figure
from rpn_train.inspect.inspection import Inspection, Level
from rpn_train.inspect.panels import unit


def levels_figure(inspection: Inspection) -> Figure:
    """Of each level: lengths of the objects it serves, of its anchors, and what its cells see."""
    objects, coverage = inspection.objects, inspection.coverage
    level_of = torch.div(coverage.best_shape, coverage.per_cell, rounding_mode="floor")
    width, height = objects.width_height()
    length = torch.maximum(width, height).numpy()
    levels = inspection.report.levels
    figure, [[axes]] = new_figure(11, 1.6 + 0.55 * len(levels), 1)
    for y, level in enumerate(levels):
        _draw_level(axes, y, level, length[level_of.numpy() == y], inspection.grid)
    axes.set_yticks(range(len(levels)), [f"stride {level.stride}" for level in levels])
    axes.set(ylim=(len(levels) - 0.4, -0.6))
    axes.grid(alpha=0.3, axis="x")
    log_px(axes, "longer side, px after resizing")
    legend(figure, axes, columns=4)
    return figure


def _draw_level(
    axes: Axes, y: int, level: Level, served: NDArray[np.float32], grid: AnchorGrid
) -> None:
    """A row: the objects [n] that a level serves by their longer sides, its anchors and fields."""
    if len(served):
        low, high = np.percentile(served, [5, 95])
        axes.plot(
            [low, high],
            [y, y],
            color=unit(SKY_BLUE),
            linewidth=12,
            alpha=0.6,
            solid_capstyle="butt",
            label="objects best reached here, 5 to 95 %",
        )
    cells = cell_anchors(level.sizes, grid.ratios, grid.rounded)
    longest = (cells[:, 2:] - cells[:, :2]).amax(1).tolist()
    axes.plot(longest, [y] * len(longest), "o", color=unit(BLACK), markersize=6, label="anchors")
    if level.field_px is not None and max(level.field_px) < math.inf:
        axes.plot(
            max(level.field_px),
            y,
            "|",
            color=unit(VERMILLION),
            markersize=16,
            markeredgewidth=3,
            label="receptive field",
        )
    if level.effective_px is not None:
        axes.plot(
            level.effective_px,
            y,
            "d",
            color=unit(BLUE),
            markersize=9,
            label="receptive field in effect (95 % of the gradient)",
        )


def effective_figure(inspection: Inspection) -> Figure:
    """Of each level the gradient of its middle cell with respect to the pixels."""
    effective, levels = inspection.views.effective, inspection.report.levels
    assert effective is not None
    figure, [panels] = new_figure(3.2 * len(levels), 3.9, len(levels))
    for field, level, axes in zip(effective, levels, panels, strict=True):
        row, column = field.centre
        height, width = field.heat.shape
        axes.imshow(
            field.heat.numpy(),
            cmap="Greys",
            norm=PowerNorm(0.4),
            extent=(-column, width - column, height - row, -row),
        )
        side = field.side()
        squares = [("in effect", (float(side), float(side)), ORANGE, "-")]
        if level.field_px is not None and max(level.field_px) < math.inf:
            squares.append(("in theory", level.field_px, VERMILLION, "--"))
        squares.append(("largest anchor", level.largest_anchor_px, BLUE, ":"))
        for label, (h, w), colour, style in squares:
            axes.add_patch(
                Rectangle(
                    (-w / 2, -h / 2),
                    w,
                    h,
                    fill=False,
                    edgecolor=unit(colour),
                    linestyle=style,
                    linewidth=2,
                    label=label,
                )
            )
        reachable = 0.55 * max(max(size) for _, size, *_ in squares)
        axes.set(
            xlim=(-reachable, reachable),
            ylim=(reachable, -reachable),
            title=f"stride {level.stride}",
            xlabel="px from the cell",
        )
    legend(figure, panels[0], columns=3)
    return figure
