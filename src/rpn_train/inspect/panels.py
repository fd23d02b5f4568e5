"""Panels of images with boxes and heat on them, for figures that are read in 1000 px of width.

Colours are those of Okabe and Ito (2008); what matters differs in line style or place, too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke
from torch import Tensor
from torch.nn import functional as F

from rpn_train.curves import REDDISH_PURPLE
from rpn_train.figures import BLACK, BLUISH_GREEN, GREY, ORANGE, SKY_BLUE, VERMILLION
from rpn_train.inspect.walk import Truth

WIDTH_IN, TITLE_IN, LEGEND_IN = 10.0, 0.35, 0.4  # of a figure, and of what is above and below
BAR_IN = 0.9  # of the scale of heat
HIGHEST_IN = 5.0  # of a panel
FADED = 0.55  # the darkest grey of an image that lines are drawn on
HEAT = "cividis"  # made to be read alike with and without colour blindness (Nunez et al. 2018)

Colour = tuple[float, float, float]


class Plate(NamedTuple):
    """A figure with the sentences that belong to it.

    name: of its file, without suffix. sources: functions whose work it shows.
    """

    name: str
    title: str
    text: str
    figure: Figure
    sources: tuple[Callable[..., Any], ...]


class Look(NamedTuple):
    """How boxes are drawn: their name in the legend, and the pen."""

    label: str
    colour: tuple[int, int, int]
    style: str = "-"
    width: float = 1.5


OBJECT = Look("object", BLUISH_GREEN, width=2.5)
NOT_COUNTED = Look("crowd or difficult: ignored", GREY, width=2.5)
POSITIVE_ANCHOR = Look("positive anchor", ORANGE, width=1.8)
FORCED_ANCHOR = Look("positive as an object's best", VERMILLION, "--", 1.8)
IGNORED_ANCHOR = Look("ignored anchor", REDDISH_PURPLE, width=1)
PROPOSAL = Look("proposal", SKY_BLUE, width=1.5)


def unit(colour: tuple[int, int, int]) -> Colour:
    """A colour of 0..255 as matplotlib takes it."""
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def image_panels(
    count: int, size: tuple[int, int], *, columns: int, bar: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of panels for images of (height, width), row by row; places left over are empty.

    Args:
        bar: whether `heat_bar` will need room.
    """
    rows = -(-count // columns)
    height = min((WIDTH_IN - BAR_IN * bar) / columns * size[0] / size[1], HIGHEST_IN)
    total = rows * (height + TITLE_IN) + LEGEND_IN
    figure = Figure(figsize=(WIDTH_IN, total), dpi=100, layout="constrained")
    panels: list[Axes] = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.set(xticks=[], yticks=[], anchor="N")
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def show_image(axes: Axes, image: Tensor, *, faded: bool = False) -> None:
    """An image uint8 [3, h, w], pixel i from i to i + 1; faded to light greys, to be drawn on."""
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).numpy()
    if faded:
        grey = pixels.mean(2) / 255
        pixels = np.repeat((FADED + (1 - FADED) * grey)[:, :, None], 3, 2)
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="antialiased")
    axes.set(xlim=(0, width), ylim=(height, 0))


def show_boxes(axes: Axes, boxes: Tensor, look: Look) -> None:
    """Outlines of boxes [n, 4] px; n = 0 draws, and names, nothing."""
    if len(boxes):
        pen = {"edgecolors": [unit(look.colour)], "linestyles": look.style, "label": look.label}
        _outline(axes, boxes, look.width, **pen)


def show_scored(axes: Axes, boxes: Tensor, scores: Tensor) -> None:
    """Outlines of boxes [n, 4] px in the colours of `show_heat`, by scores [n] of 0..1."""
    if len(boxes):
        _outline(axes, boxes, 1.4, edgecolors=colormaps[HEAT](scores.numpy()))


def _outline(axes: Axes, boxes: Tensor, width: float, **pen: Any) -> None:
    x1, y1, x2, y2 = boxes.unbind(1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1).view(-1, 4, 2)
    outlines = PolyCollection([*corners.numpy()], facecolors="none", linewidths=width, **pen)
    outlines.set_path_effects(_framed(width))
    axes.add_collection(outlines, autolim=False)


def show_objects(axes: Axes, truth: Truth | None) -> None:
    """The ground truth, where it is known."""
    if truth is not None:
        show_boxes(axes, truth.boxes[truth.ignore], NOT_COUNTED)
        show_boxes(axes, truth.boxes[~truth.ignore], OBJECT)


def show_heat(axes: Axes, heat: Tensor, stride: int, size: tuple[int, int]) -> None:
    """Values [h, w] of 0..1 over an image of (height, width) px: of the cell whose anchors are
    centred nearest."""
    heat = F.pad(heat[None], (0, 1, 0, 1), mode="replicate")[0]
    half, (rows, columns) = stride / 2, heat.shape
    extent = (-half, columns * stride - half, rows * stride - half, -half)
    axes.imshow(heat.numpy(), cmap=HEAT, vmin=0, vmax=1, extent=extent)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0))


def show_number(axes: Axes, x: float, y: float, text: str) -> None:
    """A short label that stands out on anything."""
    axes.text(x, y, text, fontsize=9, weight="bold", va="top", path_effects=_framed(1.5, "white"))


def zoom_out(axes: Axes, boxes: Tensor, size: tuple[int, int]) -> None:
    """Widen the view of an image of (height, width) px so that boxes [n, 4] are seen whole."""
    edges = torch.cat([boxes, torch.tensor([[0.0, 0.0, size[1], size[0]]])])
    left, top = edges[:, :2].amin(0).tolist()
    right, bottom = edges[:, 2:].amax(0).tolist()
    margin = 0.03 * max(right - left, bottom - top)
    axes.set(xlim=(left - margin, right + margin), ylim=(bottom + margin, top - margin))
    axes.set_facecolor("white")


def heat_bar(figure: Figure, panels: Sequence[Axes], label: str) -> None:
    """The scale of `show_heat` and `show_scored`, on the right of the panels."""
    scale = ScalarMappable(Normalize(0, 1), HEAT)
    figure.colorbar(scale, ax=[*panels], label=label, fraction=0.03, aspect=30)


def legend_of(figure: Figure, panels: Sequence[Axes], *, columns: int = 5) -> None:
    """Below the figure, each name in any of the panels once."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    look: dict[str, Any] = {"handlelength": 2.5, "fontsize": 10, "frameon": False, "ncols": columns}
    if named:
        figure.legend([*named.values()], [*named], loc="outside lower center", **look)


def _framed(width: float, colour: str | None = None) -> list[AbstractPathEffect]:
    """A thin rim, so that a line is seen on any ground."""
    return [withStroke(linewidth=width + 1, foreground=colour or unit(BLACK), alpha=0.5)]
