"""Shapes as pixels: their outlines, their textures, and how they are painted over each other.

An image is the same on every machine: pixels come from + - * /, sqrt and comparisons in float32
alone, and rounding to float32 hides in what way libms differ on a sine or a power.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating[Any]]  # float32
Size = tuple[int, int]
Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
Kind = Callable[[Floats, Floats], Floats]
Texture = Callable[["Fill", Floats, Floats], Floats]


class Fill(NamedTuple):
    """Two colours and the texture that mixes them; (cos, sin) is the direction of the texture."""

    colours: tuple[Colour, Colour]
    texture: str  # of TEXTURES
    period_px: float
    cos: float
    sin: float
    seed: int


class Shape(NamedTuple):
    """One figure: centre and half extents in pixels, (cos, sin) of its rotation."""

    kind: str  # of KINDS
    x: float
    y: float
    half_width: float
    half_height: float
    cos: float
    sin: float
    fill: Fill


# Kinds: (u, v) in units of the half extents -> about the distance to the edge, negative inside.
def _ellipse(u: Floats, v: Floats) -> Floats:
    return np.sqrt(u * u + v * v) - 1


def _rectangle(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - 1


def _triangle(u: Floats, v: Floats) -> Floats:
    return np.maximum(v - 1, 0.447214 * (2 * np.abs(u) - v - 1))


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(_ellipse(u, v) + 0.25) - 0.25


def _cross(u: Floats, v: Floats) -> Floats:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1, v - 0.35), np.maximum(u - 0.35, v - 1))


def _star(u: Floats, v: Floats) -> Floats:
    u = np.abs(u)
    for a, b in ((-0.309017, 0.951057), (0.809017, 0.587785)):  # fold five points into the top one
        beyond = 2 * np.maximum(a * u + b * v, 0)
        u, v = u - a * beyond, v - b * beyond
    return 0.951057 * np.abs(u) - 0.309017 * (v + 1)


KINDS: dict[str, Kind] = {
    "ellipse": _ellipse,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
}


# Textures: pixel coordinates x [1, w] and y [h, 1] -> share of the second colour, [h, w] in [0, 1].
def _gradient(fill: Fill, x: Floats, y: Floats) -> Floats:
    """A triangle wave, five times as long as the other textures."""
    phase = (x * fill.cos + y * fill.sin) / (5 * fill.period_px)
    return np.abs(2 * (phase - np.floor(phase)) - 1)


def _stripes(fill: Fill, x: Floats, y: Floats) -> Floats:
    """A square wave with flanks one pixel wide."""
    wave = _gradient(fill, 5 * x, 5 * y)
    return np.clip((wave - 0.5) * (0.5 * fill.period_px) + 0.5, 0, 1)


def _checker(fill: Fill, x: Floats, y: Floats) -> Floats:
    return np.abs(_stripes(fill, x, y) - _stripes(fill, y, -x))


def _noise(fill: Fill, x: Floats, y: Floats) -> Floats:
    """Random values on a lattice, smoothly interpolated along columns, then along rows."""
    x, y = (x - x[0, 0]) / fill.period_px, (y - y[0, 0]) / fill.period_px
    column, row = x[0].astype(np.intp), y[:, 0].astype(np.intp)
    x, y = x - column.astype(np.float32), y - row.astype(np.float32)[:, None]
    x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    lattice = np.random.default_rng(fill.seed).random((row[-1] + 2, column[-1] + 2), np.float32)
    lines = lattice[row] * (1 - y) + lattice[row + 1] * y  # [h, columns of the lattice]
    return lines[:, column] * (1 - x) + lines[:, column + 1] * x


TEXTURES: dict[str, Texture] = {
    "gradient": _gradient,
    "stripes": _stripes,
    "checker": _checker,
    "noise": _noise,
}


def distance_to(shape: Shape, size: Size) -> tuple[slice, slice, Floats]:
    """Rows, columns and about the distance to the edge in pixels, over a window with the shape."""
    a, b, cos, sin = shape.half_width, shape.half_height, shape.cos, shape.sin
    # One pixel more than the rotated extents: the paint fades out over half of it.
    reach_x, reach_y = a * abs(cos) + b * abs(sin) + 1, a * abs(sin) + b * abs(cos) + 1
    rows = slice(max(int(shape.y - reach_y), 0), min(math.ceil(shape.y + reach_y), size[0]))
    columns = slice(max(int(shape.x - reach_x), 0), min(math.ceil(shape.x + reach_x), size[1]))
    # Pixel i covers [i, i + 1]: its centre is at i + 0.5.
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + (0.5 - shape.x)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + (0.5 - shape.y)
    distance = KINDS[shape.kind]((x * cos + y * sin) / a, (y * cos - x * sin) / b)
    return rows, columns, distance * (0.5 * (a + b))


def paint(size: Size, background: Fill, shapes: Iterable[Shape]) -> Tensor:
    """uint8 [3, H, W] RGB: the shapes one over the other, with soft edges and a little grain."""
    height, width = size
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    canvas = np.broadcast_to(_colours(background, x, y), (3, height, width)).copy()
    for shape in shapes:
        rows, columns, distance = distance_to(shape, size)
        cover = np.clip(0.5 - distance, 0, 1)  # half the paint where a pixel's centre is the edge
        window = canvas[:, rows, columns]
        window += cover * (
            _colours(shape.fill, x[:, columns] - shape.x, y[rows] - shape.y) - window
        )
    grain = np.random.default_rng(background.seed).integers(-6, 7, (height, width), np.int8)
    return torch.from_numpy(np.clip(canvas + grain + 0.5, 0, 255).astype(np.uint8))


def _colours(fill: Fill, x: Floats, y: Floats) -> Floats:
    first, second = np.array(fill.colours, np.float32)[:, :, None, None]  # [3, 1, 1] each
    return first + TEXTURES[fill.texture](fill, x, y) * (second - first)
