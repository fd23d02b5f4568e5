"""Figures of `rpn-inspect`: the data, what the anchors reach, what the network sees.

Colours are those of Okabe and Ito (2008); what matters differs in line style or place, too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from rpn_train.curves import LINES, REDDISH_PURPLE, figure_to_image
from rpn_train.data.batch import ReadImage
from rpn_train.data.index import Index
from rpn_train.data.transforms import fit_size, resize
from rpn_train.figures import (
    BLACK,
    BLUE,
    BLUISH_GREEN,
    CELL_PX,
    GREY,
    ORANGE,
    SHEET_COLUMNS,
    SKY_BLUE,
    VERMILLION,
    contact_sheet,
    draw_detections,
)
from rpn_train.inspect.charts import doublings, legend, legend_above, log_px, mark, new_figure
from rpn_train.inspect.inspection import Inspection
from rpn_train.inspect.level_figures import effective_figure, levels_figure
from rpn_train.inspect.panels import unit
from rpn_train.recall import SIZES

BEST_IOU_BINS = 40
FEWEST = 5  # objects in a bin of which a mean is drawn
SIDE = "side of an object, sqrt(width x height), px after resizing"

Floats = NDArray[np.float32]


def inspection_figures(inspection: Inspection) -> dict[str, Tensor]:
    """File name without suffix -> figure, uint8 [3, H, W].

    Without objects there is none but of the levels; without effective fields none of these.
    """
    figures = {}
    if len(inspection.objects.boxes):
        figures["data"] = data_figure(inspection)
        figures["best_iou"] = best_iou_figure(inspection)
        figures["reach_by_size"] = reach_figure(inspection)
    figures["levels"] = levels_figure(inspection)
    if inspection.views.effective is not None:
        figures["effective_field"] = effective_figure(inspection)
    return {name: figure_to_image(figure) for name, figure in figures.items()}


def data_figure(inspection: Inspection) -> Figure:
    """Histograms of sides, of ratios and of objects per image, with the anchors marked."""
    objects, grid = inspection.objects, inspection.grid
    width, height = (side.numpy() for side in objects.width_height())
    sides, areas = objects.sides().numpy().clip(1), objects.areas.numpy()
    figure, [(left, middle, right)] = new_figure(14, 4.2, 3)
    named = {name: limits for name, limits in SIZES.items() if name != "all"}
    groups = [sides[(areas >= low) & (areas < high)] for low, high in named.values()]
    colours = [unit(c) for c in (ORANGE, SKY_BLUE, BLUE)]
    labels = [f"{name}: {len(g):,}" for name, g in zip(named, groups, strict=True)]
    left.hist(groups, doublings(sides), stacked=True, color=colours, label=labels)
    log_px(left, SIDE)
    ratios = (height / width).clip(1 / 16, 16)
    middle.hist(ratios, np.geomspace(1 / 16, 16, 49).tolist(), color=unit(SKY_BLUE))
    middle.set(xscale="log", xlabel="height / width of an object")
    middle.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    middle.minorticks_off()
    grids = [("anchors", grid, BLACK, "--")]
    if inspection.fit is not None:
        grids.append(("fitted anchors", inspection.fit.grid, VERMILLION, ":"))
    for name, of, colour, style in grids:
        mark(left, [s for level in of.sizes for s in level], name, colour, style)
        mark(middle, of.ratios, name, colour, style)
    most = int(inspection.per_image.max())
    step = max(1, -(-most // 40))
    bins = np.arange(-0.5, most + step, step).tolist()
    right.hist(inspection.per_image, bins, color=unit(SKY_BLUE))
    right.set(xlabel="objects in an image", ylabel="images")
    for axes in (left, middle):
        axes.set(ylabel="objects")
        legend_above(axes)
    return figure


def training_kinds(inspection: Inspection) -> NDArray[np.int64]:
    """Of each object: 0 untrained, 1 forced, 2 positive; int64 [M]."""
    method, best = inspection.method, inspection.coverage.best_iou.numpy()
    forced = method.force_best & (best > 0) & (best >= method.forced_min_iou)
    return np.where(best >= method.fg_iou, 2, forced.astype(np.int64))


def best_iou_figure(inspection: Inspection) -> Figure:
    """Histogram of the best IoU of each object, by how it trains."""
    report, best = inspection.report, inspection.coverage.best_iou.numpy()
    everything = report.reach["area"]["all"]
    figure, [[axes]] = new_figure(9, 4.2, 1)
    bins = np.linspace(0, 1, BEST_IOU_BINS + 1).tolist()
    kind = training_kinds(inspection)
    kinds = [
        (best[kind == 0], "untrained", VERMILLION),
        (best[kind == 1], "forced: the best anchors alone train", ORANGE),
        (best[kind == 2], f"positive: IoU {report.fg_iou:g} or more", BLUISH_GREEN),
    ]
    kinds = [kind for kind in kinds if len(kind[0])]
    axes.hist(
        [values for values, *_ in kinds],
        bins,
        stacked=True,
        weights=[np.full(len(values), 100 / len(best)) for values, *_ in kinds],
        color=[unit(colour) for *_, colour in kinds],
        label=[f"{label}: {100 * len(v) / len(best):.1f} %" for v, label, _ in kinds],
    )
    if inspection.fit is not None:
        after = inspection.fit.after.best_iou.numpy()
        counts = np.histogram(after, bins)[0] * (100 / len(after))
        axes.stairs(counts, bins, color=unit(BLACK), linewidth=1.8, label="fitted anchors")
    axes.set(
        xlabel="IoU of an object with the anchor that overlaps it most",
        ylabel="objects, %",
        xlim=(0, 1),
        xticks=np.linspace(0, 1, 11),
        title=f"{everything.num_objects:,} objects, mean best IoU {everything.mean_iou:.3f}",
    )
    legend(figure, axes, columns=4)
    return figure


def reach_figure(inspection: Inspection) -> Figure:
    """Best IoU, and the share that reaches fg_iou, by side of the object: a line per level."""
    fg_iou = inspection.report.fg_iou
    sides = inspection.objects.sides()[inspection.some].numpy().clip(1)
    edges = doublings(sides)
    bins = np.digitize(sides, edges) - 1
    counts = np.bincount(bins, minlength=len(edges) - 1)
    enough = np.flatnonzero(counts >= FEWEST)
    centres = np.sqrt(np.multiply(edges[1:], edges[:-1]))[enough]
    figure, rows = new_figure(14, 5.2, 2, rows=2)
    quantities: dict[str, Callable[[Floats], Floats]] = {
        "mean best IoU": lambda best: best,
        f"share with IoU {fg_iou:g} or more": lambda best: (best >= fg_iou).astype(np.float32),
    }
    for (label, of), top, bottom in zip(quantities.items(), *rows, strict=True):
        for name, best, style in _reach_lines(inspection):
            means = np.bincount(bins, of(best), len(counts))[enough] / counts[enough]
            seen = np.flatnonzero(means > 0).tolist()  # no marks along zero
            top.plot(centres, means, label=name, markevery=seen, markersize=5, **style)
        top.set(ylabel=label, ylim=(0, 1.02))
        top.grid(alpha=0.3)
        bottom.stairs(counts, edges, fill=True, color=unit(GREY))
        bottom.set(ylabel="objects")
        log_px(bottom, SIDE)
    rows[0][0].axhline(fg_iou, color=unit(BLACK), linewidth=1, linestyle=":")
    legend(figure, rows[0][0], columns=8)
    return figure


def _reach_lines(inspection: Inspection) -> list[tuple[str, Floats, dict[str, Any]]]:
    """Name, best IoUs [K] and look of each line."""
    lines: list[tuple[str, Floats, dict[str, Any]]] = []
    of_levels = inspection.level_best.numpy()
    if len(of_levels) > 1:
        look = {"color": unit(GREY), "linewidth": 6, "alpha": 0.6, "solid_capstyle": "round"}
        lines.append(("all levels", of_levels.max(axis=0), look))
    for i, (stride, best) in enumerate(zip(inspection.grid.strides, of_levels, strict=True)):
        colour, dashes, marker = LINES[i % len(LINES)]
        look = {"color": unit(colour), "linewidth": 1.8, "marker": marker, "dashes": dashes}
        lines.append((f"stride {stride}", best, look))
    if inspection.fit is not None:
        fitted = inspection.fit.after.best_iou[inspection.some].numpy()
        look = {"color": unit(REDDISH_PURPLE), "linewidth": 3, "dashes": (1, 1)}
        lines.append(("fitted anchors, all levels", fitted, look))
    return lines


def montage(index: Index, read: ReadImage, count: int) -> Tensor:
    """Images evenly spaced over a split with their boxes, those to ignore in grey: [3, H, W].

    Raises:
        DataError: an image is missing or broken.
    """
    cells = []
    for row in np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).astype(int)):
        stored = read(int(row))
        height, width = stored.shape[1:]
        scale = min(CELL_PX[0] / width, CELL_PX[1] / height)
        size = fit_size((height, width), scale * min(height, width), max(CELL_PX))
        image, boxes = resize(stored, torch.from_numpy(index.boxes_xyxy(int(row))), size)
        ignored = torch.from_numpy(index.ignored(int(row)))
        nothing = torch.zeros(0, 4)
        cells.append(
            draw_detections(
                image,
                gt_boxes=boxes,
                gt_ignore=ignored,
                proposals=nothing,
                scores=nothing[:, 0],
                enlarge=False,
            )
        )
    return contact_sheet(cells, SHEET_COLUMNS)
