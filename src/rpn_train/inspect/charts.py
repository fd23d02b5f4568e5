"""Charts of one look: colours of Okabe and Ito, lengths on a logarithmic axis, legends outside."""

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rpn_train.inspect.panels import unit

BINS_PER_DOUBLING = 2


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


def doublings(lengths: NDArray[np.float32]) -> list[float]:
    """Edges of bins, some for each doubling, that hold lengths [M], M >= 1; px, at least 1."""
    first = math.floor(math.log2(max(1, lengths.min())))
    last = math.floor(math.log2(max(1, lengths.max()))) + 1
    count = BINS_PER_DOUBLING * (last - first) + 1
    edges: list[float] = np.exp2(np.linspace(first, last, count)).tolist()
    return edges


def log_px(axes: Axes, label: str) -> None:
    """Make x an axis of lengths."""
    axes.set(xscale="log", xlabel=label)
    low, high = axes.get_xlim()
    ticks = [2**i for i in range(16) if low <= 2**i <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def mark(
    axes: Axes, values: Iterable[float], label: str, colour: tuple[int, int, int], style: str
) -> None:
    """Upright lines at some values of x."""
    for value in sorted(set(values)):
        axes.axvline(value, color=unit(colour), linestyle=style, linewidth=1.5, label=label)


def legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Below the figure, each name once."""
    handles, names = _named(axes)
    look = {"handlelength": 3.5, "fontsize": 9, "frameon": False}
    figure.legend(handles, names, loc="outside lower center", ncols=columns, **look)


def legend_above(axes: Axes) -> None:
    """Above these axes, each name once."""
    handles, names = _named(axes)
    look = {"ncols": 3, "handlelength": 3, "fontsize": 9, "frameon": False}
    axes.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), **look)


def _named(axes: Axes) -> tuple[list[Artist], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    return [*once.values()], [*once]
