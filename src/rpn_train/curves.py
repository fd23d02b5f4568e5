"""Curves of recall (Hosang et al. 2016): against the number of proposals, and against the IoU.

Lines differ in colour (those of Okabe and Ito, 2008), style and marker, so that colour-blind
readers and prints in grey can tell them apart.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from rpn_train.figures import BLACK, BLUE, BLUISH_GREEN, GREY, ORANGE, SKY_BLUE, VERMILLION
from rpn_train.recall import IOU_THRESHOLDS, SIZES, Floats, Protocol, Recall

REDDISH_PURPLE = (204, 121, 167)

LINES = (  # colour, dashes (on, off, ... in line widths) and marker, in turn
    (BLUE, (), "o"),
    (VERMILLION, (5, 1.5), "s"),
    (BLUISH_GREEN, (6, 1.5, 1, 1.5), "^"),
    (ORANGE, (1.5, 1), "D"),
    (BLACK, (3, 1), "v"),
    (SKY_BLUE, (6, 1, 1, 1, 1, 1), "P"),
    (REDDISH_PURPLE, (9, 2), "X"),
    (GREY, (4, 1, 4, 1, 1, 1), "*"),
)
SHOWN_NUMBERS = (300, 1000, 2000)  # of proposals: Figure 4 of Ren et al. (2015)
SHOWN_IOUS = (0, 5, 8)  # indices in IOU_THRESHOLDS
AVERAGE = f"average recall, IoU {IOU_THRESHOLDS[0]:.2f} to {IOU_THRESHOLDS[-1]:.2f}"
RECALL = "recall (share of objects)"
WIDTH_IN, ROW_IN, LEGEND_IN = 14.0, 3.5, 0.25  # of a figure, a row of panels, a row of the legend
LEGEND_CHARACTERS, LINE_CHARACTERS = 190, 14  # in a row of the legend; as wide as a line in it

Line = tuple[Floats, Floats]  # x [K] and, for each size, y [A, K]
Lines = Mapping[str, Line]


def recall_by_number(recalls: Mapping[str, Recall], protocol: Protocol) -> Figure:
    """Recall against the number of proposals, a panel for each size.

    With several recalls a line for each: the average recall. With one, a line for each of three
    IoU thresholds and their average. Under "coco" every point of a line is exact, under "greedy"
    those marked: there the matching at one N says nothing about another.

    Args:
        recalls: name -> recall, at least one, of the same objects; one alone may have the name "".
        protocol: the one they were scored with.
    """
    curves = {name: _by_number(recall, protocol) for name, recall in recalls.items()}
    if len(recalls) > 1:
        label = AVERAGE.replace(", ", "\n")
        lines = {name: (numbers, y.mean(axis=0)) for name, (numbers, y) in curves.items()}
    else:
        label = RECALL
        numbers, y = next(iter(curves.values()))
        lines = {f"IoU {IOU_THRESHOLDS[t]:.2f}": (numbers, y[t]) for t in SHOWN_IOUS}
        lines[AVERAGE] = (numbers, y.mean(axis=0))
    figure, panels = _panels(recalls, [(label, lines)])
    every = np.concatenate([numbers for numbers, _ in curves.values()])
    ticks = [n * 10**e for e in range(9) for n in (1, 3) if n * 10**e <= every.max()]
    if protocol == "greedy":
        ticks = np.unique(every).tolist()
    for axes in panels[-1]:
        axes.set(xlabel="proposals per image", xscale="log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
    return figure


def recall_by_iou(recalls: Mapping[str, Recall]) -> Figure:
    """Recall against the IoU threshold, a panel for each size.

    At those of 300, 1000 and 2000 proposals that were scored, else at the three largest numbers
    that were. With one recall a line for each number, with several a row of panels for each.

    Args:
        recalls: name -> recall, at least one, of the same objects at the same numbers of
            proposals; one alone may have the name "".
    """
    first = next(iter(recalls.values()))
    limits = sorted(set(first.max_proposals))
    limits = [limit for limit in limits if limit in SHOWN_NUMBERS] or limits[-3:]

    def line(recall: Recall, limit: int) -> Line:
        return IOU_THRESHOLDS, recall.recall[:, :, recall.max_proposals.index(limit)].T

    if len(recalls) > 1:
        rows = [
            (
                f"recall at {limit:,} proposals\n(share of objects)",
                {name: line(recall, limit) for name, recall in recalls.items()},
            )
            for limit in limits
        ]
    else:
        rows = [(RECALL, {f"{limit:,} proposals": line(first, limit) for limit in limits})]
    figure, panels = _panels(recalls, rows)
    for axes in panels[-1]:
        axes.set(xlabel="IoU threshold", xticks=IOU_THRESHOLDS[::2])
    return figure


def figure_to_image(figure: Figure) -> Tensor:
    """A matplotlib figure as uint8 [3, H, W] RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())[:, :, :3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _by_number(recall: Recall, protocol: Protocol) -> tuple[Floats, Floats]:
    """Numbers of proposals [K], and the recall [T, A, K] at each that is known exactly."""
    if protocol == "greedy":
        order = np.argsort(recall.max_proposals)
        return np.array(recall.max_proposals, np.float64)[order], recall.recall[:, :, order]
    limit = max(recall.max_proposals)
    found = [
        [np.bincount(rank[rank >= 0], minlength=limit) for rank in ranks]
        for ranks in recall.matched_rank
    ]
    counts = np.array([recall.num_objects[size] or np.nan for size in SIZES])
    return np.arange(1.0, limit + 1), np.cumsum(found, axis=-1) / counts[:, None]


def _panels(
    recalls: Mapping[str, Recall], rows: Sequence[tuple[str, Lines]]
) -> tuple[Figure, np.ndarray]:
    """A row of panels, one for each size, for each label and its lines; a legend under all."""
    num_objects = next(iter(recalls.values())).num_objects
    labels = list(rows[0][1])
    columns = max(1, LEGEND_CHARACTERS // (LINE_CHARACTERS + max(map(len, labels))))
    legend_rows = -(-len(labels) // columns)
    height = ROW_IN * len(rows) + LEGEND_IN * (legend_rows + 1)
    figure = Figure(figsize=(WIDTH_IN, height), dpi=100, layout="constrained")
    panels = figure.subplots(len(rows), len(SIZES), sharex=True, sharey=True, squeeze=False)
    for (ylabel, lines), row in zip(rows, panels, strict=True):
        row[0].set(ylabel=ylabel, ylim=(0, 1.02))
        for a, (size, axes) in enumerate(zip(SIZES, row, strict=True)):
            if num_objects[size]:
                _plot(axes, lines, a)
            else:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "no objects", ha="center", transform=axes.transAxes)
    for size, axes in zip(SIZES, panels[0], strict=True):
        axes.set_title(_title(size, num_objects[size]), fontsize=10)
    if num_objects["all"]:
        _legend(figure, panels[0, 0].lines, columns)
    if len(recalls) == 1:
        figure.suptitle(next(iter(recalls)), parse_math=False)
    return figure, panels


def _plot(axes: Axes, lines: Lines, a: int) -> None:
    for i, (label, (x, y)) in enumerate(lines.items()):
        colour, dashes, marker = LINES[i % len(LINES)]
        # Of many points a few are marked, on no two lines the same, so that equal lines show.
        marked = (0.03 * (i % len(LINES)), 0.24) if len(x) > 20 else None
        (line,) = axes.plot(x, y[a], marker, color=[c / 255 for c in colour], label=label)
        line.set(linestyle="-", markevery=marked, markersize=6)
        line.set_dashes(dashes)
    axes.grid(alpha=0.3)


def _title(size: str, count: int) -> str:
    low, high = SIZES[size]
    bounds = {
        (False, False): "",
        (False, True): f", area ≤ {high**0.5:g}² px²",
        (True, True): f", area {low**0.5:g}² to {high**0.5:g}² px²",
        (True, False): f", area ≥ {low**0.5:g}² px²",
    }[low > 0, high < SIZES["all"][1]]
    return f"{size}, {count:,} object{'s' * (count != 1)}{bounds}"


def _legend(figure: Figure, lines: Sequence[Line2D], columns: int) -> None:
    """Names as they are: matplotlib would leave out "_a" and read "$a$" as a formula."""
    legend = figure.legend(
        lines, ["-"] * len(lines), ncols=columns, loc="outside lower center", handlelength=4
    )
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set(text=line.get_label(), parse_math=False)
