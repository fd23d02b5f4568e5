"""What the network does with an image: feature maps, the window that slides over them, anchors."""

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from rpn_train.anchors import cell_anchors, grid_anchors
from rpn_train.backbones import Backbone
from rpn_train.curves import LINES
from rpn_train.data.sampler import canvas_of
from rpn_train.data.transforms import fit_size
from rpn_train.figures import ORANGE, VERMILLION
from rpn_train.inspect.panels import (
    Look,
    Plate,
    image_panels,
    legend_of,
    show_boxes,
    show_image,
    show_objects,
    unit,
    zoom_out,
)
from rpn_train.inspect.receptive_field import ReceptiveField, receptive_fields
from rpn_train.inspect.walk import Walk

CHANNELS = 4  # of each level that are drawn, those that vary most
CORNER_PX, MARGIN_PX = 136, 8  # of the image, where the centres of anchors are drawn
SMOOTH = 96  # drawn cells beside each other at least
FIELD = Look("receptive field: all that the window depends on", VERMILLION, "--", 2)


def image_plate(walk: Walk) -> Plate:
    """The image as the network is given it, padded."""
    figure, [axes] = image_panels(1, walk.canvas, columns=1)
    canvas = torch.full((3, *walk.canvas), 205, dtype=torch.uint8)
    height, width = walk.size
    canvas[:, :height, :width] = walk.image
    show_image(axes, canvas)
    show_objects(axes, walk.truth)
    legend_of(figure, [axes])
    stored, resized, padded = (
        f"{height} x {width}" for height, width in (walk.stored.shape[1:], walk.size, walk.canvas)
    )
    text = f"The image has {stored} px (height x width, as everywhere here)"
    text += f", and is resized to {resized}" * (resized != stored) + ". "
    if padded != resized:
        text += f"Padding (grey) makes it {padded}"
    else:
        text += "It needs no padding"
    text += f": both sides are multiples of {max(walk.grid.strides)}, the largest stride."
    if walk.truth is not None:
        text += (
            " The network never sees the boxes of the objects: they tell which answers are right."
        )
    return Plate("image", "The image", text, figure, (fit_size, canvas_of))


def features_plate(walk: Walk) -> Plate:
    """Some channels of the feature maps of every level."""
    count = len(walk.levels)
    figure, panels = image_panels(count, walk.canvas, columns=min(count, 3))
    for axes, level in zip(panels, walk.levels, strict=True):
        channels, rows, columns = level.feature.shape
        axes.imshow(_tiled(level.feature).numpy(), cmap="gray", interpolation="nearest")
        title = f"stride {level.stride}: {channels} channels of {rows} x {columns}"
        axes.set_title(title, fontsize=10)
    strides = ", ".join(str(level.stride) for level in walk.levels)
    return Plate(
        "features",
        "Feature maps",
        f"The backbone ({walk.cfg.backbone.name}) turns the image into a map for each level: a "
        f"grid of cells, {strides} px apart, with a number for each channel in each cell. Drawn "
        f"are the {CHANNELS} channels of each level that vary most, from low (black) to high "
        "(white). The coarser a level, the less it says of where, and the more of what.",
        figure,
        (Backbone,),
    )


def _tiled(feature: Tensor) -> Tensor:
    """The channels of [C, h, w] that vary most, two by two, each of them from 0 to 1; gaps NaN."""
    rows, columns = feature.shape[1:]
    spread = feature.flatten(1).std(1, correction=0)
    chosen = feature[spread.topk(min(CHANNELS, len(spread))).indices]
    low, high = chosen.amin((1, 2), keepdim=True), chosen.amax((1, 2), keepdim=True)
    chosen = (chosen - low) / (high - low).clamp(min=1e-12)
    times = -(-SMOOTH // columns)  # so that gaps are narrow beside the cells
    chosen = chosen.repeat_interleave(times, 1).repeat_interleave(times, 2)
    rows, columns = times * rows, times * columns
    gap = columns // 48
    tiles = torch.full((2 * rows + gap, 2 * columns + gap), math.nan)
    for i, channel in enumerate(chosen):
        top, left = i // 2 * (rows + gap), i % 2 * (columns + gap)
        tiles[top : top + rows, left : left + columns] = channel
    return tiles


def window_plate(walk: Walk, fields: list[ReceptiveField] | None) -> Plate:
    """The 3x3 window at one cell: on the map, on the image, and its receptive field.

    Args:
        fields: None: not known for this network.
    """
    level_number, row, column = _focus(walk)
    level = walk.levels[level_number]
    seen = _seen(fields, level_number, row, column)
    count, shape = (2, walk.size) if seen is None else (3, (1, 1))
    figure, panels = image_panels(count, shape, columns=count)
    strength = level.feature.square().mean(0).sqrt()
    panels[0].imshow(strength.numpy(), cmap="gray", interpolation="nearest")
    cells = _window_cells(walk)
    half = torch.tensor([-cells / 2, -cells / 2, cells / 2, cells / 2])
    window = torch.tensor([[column, row, column, row]]) + half  # in cells
    look = Look(f"{cells} x {cells} cells: what the window covers", ORANGE, width=2.5)
    show_boxes(panels[0], window, look)
    panels[0].set_title(f"the map of stride {level.stride}, all channels together", fontsize=10)
    for axes in panels[1:]:
        show_image(axes, walk.image)
        show_boxes(axes, window * level.stride, look)
    panels[1].set_title(f"the same cells on the image, {cells * level.stride} px", fontsize=10)
    if seen is not None:
        zoom_out(panels[2], seen, walk.size)
        show_boxes(panels[2], seen, FIELD)
        high, wide = (seen[0, 2:] - seen[0, :2]).flip(0).tolist()
        panels[2].set_title(f"what it depends on: {high:g} x {wide:g} px", fontsize=10)
    legend_of(figure, panels)
    return Plate(
        "window",
        "The mini network and what it sees",
        f"A small network slides over every cell of every level: {_mini_network(walk)}, the same "
        "weights everywhere. Drawn is the cell behind the best proposal, of stride "
        f"{level.stride}." + _sees(walk, fields, seen),
        figure,
        (walk.head, receptive_fields),
    )


def _sees(walk: Walk, fields: list[ReceptiveField] | None, seen: Tensor | None) -> str:
    """What the answer of a cell depends on, in words."""
    text = " The window, and all that it sees, is that of the first stage." * (
        walk.cfg.method.head == "cascade"
    )
    if seen is not None:
        text += (
            " All pixels that the answer depends on are its receptive field, in theory; most of "
            "its weight is near the middle, and outside of the image there are zeros."
        )
        text += " Group norm adds a little of every other pixel." * (
            walk.cfg.method.head == "towers"
        )
    elif fields is not None:
        text += " The answer depends on the whole image."
    return text


def _window_cells(walk: Walk) -> int:
    """Side of what the convolutions of the head cover, of a cascade those of its first stage."""
    method = walk.cfg.method
    dilation = 3 if method.head == "cascade" else 1
    return 2 * dilation * method.num_convs + walk.kernel


def _mini_network(walk: Walk) -> str:
    """The convolutions of the head, in words."""
    method, last = walk.cfg.method, f"{walk.kernel} x {walk.kernel}"
    count = method.num_convs
    convs = "a 3 x 3 convolution" if count == 1 else f"{count} convolutions of 3 x 3"
    if method.head == "shared":
        return f"{convs}, then two branches of {last}"
    if method.head == "cascade":
        return (
            f"a first stage, {convs} dilated by 3 and a branch of {last}, moves the anchors; a "
            "second looks at nine points spread over the moved anchor instead of at 3 x 3 cells, "
            f"and ends in two branches of {last}"
        )
    ends = "deltas and centerness" if method.centerness else "deltas"
    return f"{convs} and a branch of {last} for objectness, and as many others for {ends}"


def _focus(walk: Walk) -> tuple[int, int, int]:
    """Level, row and column of the cell behind the best proposal, or of the highest logit."""
    best = walk.behind(1).tolist() or [int(walk.logits.argmax())]
    return walk.cell_of(best[0])


def _seen(fields: list[ReceptiveField] | None, level: int, row: int, column: int) -> Tensor | None:
    """The receptive field of a cell as a box [1, 4] px; None if it is not known, or everything."""
    if fields is None or max(fields[level].size) == math.inf:
        return None
    field = fields[level]
    height, width = field.size
    y, x = row * field.stride + field.centre[0], column * field.stride + field.centre[1]
    return torch.tensor([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]])


def anchors_plate(walk: Walk) -> Plate:
    """The anchors of one cell, those of every level at one place, and where all are centred."""
    grid, (level, row, column) = walk.grid, _focus(walk)
    count = 2 + (len(walk.levels) > 1)
    figure, panels = image_panels(count, walk.size, columns=count)
    for axes in panels:
        show_image(axes, walk.image, faded=True)
    own = walk.anchors_at(level, row, column)
    show_boxes(panels[0], own, _look(walk, level))
    zoom_out(panels[0], own, walk.size)
    panels[0].set_title(f"one cell of stride {grid.strides[level]}: {len(own)}", fontsize=10)
    _draw_centres(panels[-1], walk)
    panels[-1].set_title("centres of anchors, in the corner", fontsize=10)
    if count == 3:
        _draw_levels(panels[1], walk)
        panels[1].set_title("one cell of every level, in the middle", fontsize=10)
    legend_of(figure, [panels[-2]], columns=6)
    sizes = ", ".join("/".join(f"{size:g}" for size in of_level) for of_level in grid.sizes)
    ratios = ", ".join(f"{ratio:g}" for ratio in grid.ratios)
    return Plate(
        "anchors",
        "Anchors",
        f"Every cell has its anchors (here {grid.per_cell}), boxes of fixed size and shape: the "
        f"roots of their areas are {sizes} px{', level by level' * (len(grid.sizes) > 1)}, and "
        f"their height / width is {ratios}. The network makes no boxes out of nothing: of each "
        "anchor it says whether it is an object, and how to move and stretch it."
        + " Here a first stage moves them alone, and a second begins from there. Drawn is where "
        "they are before both." * (walk.cfg.method.head == "cascade"),
        figure,
        (cell_anchors, grid_anchors),
    )


def _look(walk: Walk, level: int) -> Look:
    return Look(f"stride {walk.grid.strides[level]}", LINES[level % len(LINES)][0], width=2)


def _draw_levels(axes: Axes, walk: Walk) -> None:
    """Of every level the anchors of a cell in the middle."""
    shown = []
    for i, level in enumerate(walk.levels):
        rows, columns = level.objectness.shape
        row, column = (round(side / 2 / level.stride) for side in walk.size)
        shown.append(walk.anchors_at(i, min(row, rows - 1), min(column, columns - 1)))
        show_boxes(axes, shown[-1], _look(walk, i))
    zoom_out(axes, torch.cat(shown), walk.size)


def _draw_centres(axes: Axes, walk: Walk) -> None:
    """Where the anchors of every level stand, in a corner of the image."""
    for i, level in enumerate(walk.levels):
        rows, columns = level.objectness.shape
        places = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)) * level.stride
        colour, _, marker = LINES[i % len(LINES)]
        look: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.5}
        axes.plot(*places.T, marker, color=unit(colour), markersize=3 + 2 * i, **look)
    height, width = (min(side, CORNER_PX) for side in walk.canvas)
    axes.set(xlim=(-MARGIN_PX, width), ylim=(height, -MARGIN_PX))
