"""Charts of one look: colours of Okabe and Ito, lengths on a logarithmic axis, legends outside."""

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

BINS_PER_DOUBLING = 2

Colour = tuple[float, float, float]


def new_figure(
    width_in: float, height_in: float, columns: int, *, rows: int = 1
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of 100 dpi and its rows of axes; a second row is low, and shares x."""
    figure = Figure(figsize=(width_in, height_in), dpi=100, layout="constrained")
    panels = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex="col" if rows > 1 else "none",
        height_ratios=[4, 1][:rows],
    )
    return figure, panels.tolist()


def unit(colour: tuple[int, int, int]) -> Colour:
    """A colour of 0..255 as matplotlib takes it."""
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def doublings(lengths: NDArray[np.float32]) -> NDArray[np.float64]:
    """Edges of bins, some for each doubling, that hold lengths [M], M >= 1; px, at least 1."""
    first = math.floor(math.log2(max(1, lengths.min())))
    last = math.floor(math.log2(max(1, lengths.max()))) + 1
    return 2.0 ** np.linspace(first, last, BINS_PER_DOUBLING * (last - first) + 1)


def log_px(axes: Axes, label: str) -> None:
    """Make x an axis of lengths."""
    low, high = axes.get_xlim()
    axes.set(xscale="log", xlabel=label)
    ticks = [2**i for i in range(16)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)


def mark(
    axes: Axes, values: Iterable[float], label: str, colour: tuple[int, int, int], style: str
) -> None:
    """Upright lines at some values of x."""
    for value in sorted(set(values)):
        axes.axvline(value, color=unit(colour), linestyle=style, linewidth=1.5, label=label)


def legend(axes: Axes, columns: int = 2) -> None:
    """Above the axes, each name once."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(
        [*once.values()],
        [*once],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
