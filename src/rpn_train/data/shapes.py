"""Embedded data set: textured shapes drawn from a seed, with exact boxes and nothing to download.

`layout` decides what is in image number `index`, `draw` paints it. An image is the same on every
machine: pixels come from + - * /, sqrt and comparisons in float32 alone, and rounding to float32
hides in what way libms differ on a sine or a power.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from rpn_train.data.index import Index, build_index

FIRST_VAL = 1_000_000  # number of the first validation image, beyond any training set
Floats = NDArray[np.floating[Any]]  # float32
Range = tuple[float, float]
Size = tuple[int, int]
Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
Kind = Callable[[Floats, Floats], Floats]
Texture = Callable[["Fill", Floats, Floats], Floats]


class Fill(NamedTuple):
    """Two colours and the texture that mixes them; (cos, sin) is the direction of the texture."""

    colours: tuple[Colour, Colour]
    texture: Texture
    period_px: float
    cos: float
    sin: float
    seed: int


class Shape(NamedTuple):
    """One figure: centre and half extents in pixels, (cos, sin) of its rotation."""

    kind: Kind
    x: float
    y: float
    half_width: float
    half_height: float
    cos: float
    sin: float
    fill: Fill


class Object(NamedTuple):
    """A shape, the tight box (xyxy) and the number of its pixels in the image, hidden ones too."""

    shape: Shape
    box: tuple[int, int, int, int]  # x2 is the last pixel column + 1
    area: int


class Scene(NamedTuple):
    """All that `draw` needs. A later object lies over an earlier one, distractors under all."""

    size: Size
    background: Fill
    distractors: tuple[Shape, ...]
    objects: tuple[Object, ...]


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


KINDS = (_ellipse, _rectangle, _triangle, _ring, _cross, _star)


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


TEXTURES = (_gradient, _stripes, _checker, _noise)


def layout(seed: int, index: int, *, size: Size, max_objects: int, clutter: bool) -> Scene:
    """Decide what is in image `index`, without painting it.

    One image in 20 holds no object, the others 1 to `max_objects`. An object that would leave an
    earlier one with less than 60 % of its pixels visible is left out.

    Args:
        seed: of the data set, >= 0.
        index: number of the image, >= 0; validation images start at `FIRST_VAL`.
        size: (height, width) in pixels, at least 32.
        max_objects: at least 1.
        clutter: harder: lines and specks that are no objects, stronger textures behind, and
            objects of which only 40 % are visible.
    """
    assert min(size) >= 32, "the range of the option"
    rng = np.random.default_rng((seed, index))
    background = _background(rng, size, clutter)
    distractors = [_distractor(rng, size) for _ in range(rng.integers(10, 30) if clutter else 0)]
    count = 0 if rng.random() < 0.05 else int(rng.integers(1, max_objects + 1))
    objects = _objects(rng, size, count, background, min_visible=0.4 if clutter else 0.6)
    return Scene(size, background, tuple(distractors), objects)


def _objects(
    rng: Generator, size: Size, count: int, background: Fill, *, min_visible: float
) -> tuple[Object, ...]:
    owner = np.zeros(size, np.intp)  # 1 + the object that a pixel shows, 0: background
    objects: list[Object] = []
    visible = np.zeros(0, np.intp)  # pixels of each object
    colours = list(background.colours)
    for _ in range(count):
        shape = _object(rng, size, colours)
        rows, columns, distance = _distance(shape, size)
        y, x = (distance <= 0).nonzero()
        y, x = y + rows.start, x + columns.start
        hidden = np.bincount(owner[y, x], minlength=len(objects) + 1)[1:]
        if np.all(visible - hidden >= [min_visible * placed.area for placed in objects]):
            box = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
            objects.append(Object(shape, box, len(x)))
            visible = np.append(visible - hidden, len(x))
            colours.append(shape.fill.colours[0])
            owner[y, x] = len(objects)
    return tuple(objects)


def _background(rng: Generator, size: Size, clutter: bool) -> Fill:
    colour = _colour(rng, (0.05, 0.45), (0.2, 0.95))
    contrast = rng.uniform(0.3, 0.6) if clutter else rng.uniform(0.1, 0.35)
    texture = (_gradient, _noise, _noise, _stripes, _checker)[rng.integers(5)]
    return _fill(rng, colour, contrast, texture, min(size) * rng.uniform(0.1, 0.3))


def _distractor(rng: Generator, size: Size) -> Shape:
    """A thin line or a speck."""
    line = rng.random() < 0.5
    half_width = min(size) * rng.uniform(0.05, 0.3) if line else rng.uniform(0.6, 1.5)
    fill = _fill(rng, _colour(rng, (0, 1), (0, 1)), 0, _gradient, 1)
    return _shape(rng, _rectangle if line else _ellipse, size, 0, (half_width, 0.8), fill)


def _object(rng: Generator, size: Size, others: list[Colour]) -> Shape:
    """Of four colours the one least like `others`; about a quarter of an extent may be outside."""
    low, high = max(0.08 * min(size), 8.0), 0.75 * min(size)  # pixels
    side = low * (high / low) ** rng.random()  # log-uniform
    stretch = 2 ** rng.uniform(-0.5, 0.5)  # aspect ratio 1 : 2 to 2 : 1
    colours = [_colour(rng, (0.5, 1), (0.3, 1)) for _ in range(4)]
    unlike = np.abs(np.array(colours)[:, None] - np.array(others)).sum(-1).min(1)  # [4]
    contrast = rng.uniform(0.3, 0.7) if rng.random() < 0.8 else 0
    texture, kind = TEXTURES[rng.integers(len(TEXTURES))], KINDS[rng.integers(len(KINDS))]
    fill = _fill(rng, colours[unlike.argmax()], contrast, texture, side * rng.uniform(0.15, 0.4))
    return _shape(rng, kind, size, side / 4, (side / 2 * stretch, side / 2 / stretch), fill)


def _shape(rng: Generator, kind: Kind, size: Size, margin: float, half: Range, fill: Fill) -> Shape:
    """A shape at a random place; one in three is upright, the others are rotated."""
    x, y = rng.uniform(margin, size[1] - margin), rng.uniform(margin, size[0] - margin)
    angle = rng.uniform(-math.pi, math.pi) if rng.random() < 2 / 3 else 0.0
    return Shape(kind, x, y, *half, math.cos(angle), math.sin(angle), fill)


def _fill(rng: Generator, colour: Colour, contrast: float, texture: Texture, px: float) -> Fill:
    """The second colour is the first, moved towards the further one of black and white."""
    goal = 0 if sum(colour) > 3 * 127 else 255
    red, green, blue = (round(c + contrast * (goal - c)) for c in colour)
    angle = rng.uniform(-math.pi, math.pi)
    colours, seed = (colour, (red, green, blue)), int(rng.integers(2**32))
    return Fill(colours, texture, max(px, 3.0), math.cos(angle), math.sin(angle), seed)


def _colour(rng: Generator, saturation: Range, value: Range) -> Colour:
    """A random hue; saturation and value (of HSV) from a range in [0, 1]."""
    hue, s, v = 6 * rng.random(), rng.uniform(*saturation), rng.uniform(*value)
    corners = ((corner + hue) % 6 for corner in (5, 3, 1))
    red, green, blue = (round(255 * v * (1 - s * max(0, min(k, 4 - k, 1)))) for k in corners)
    return red, green, blue


def _distance(shape: Shape, size: Size) -> tuple[slice, slice, Floats]:
    """Rows, columns and about the distance to the edge in pixels, over a window with the shape."""
    a, b, cos, sin = shape.half_width, shape.half_height, shape.cos, shape.sin
    # One pixel more than the rotated extents: the paint fades out over half of it.
    reach_x, reach_y = a * abs(cos) + b * abs(sin) + 1, a * abs(sin) + b * abs(cos) + 1
    rows = slice(max(int(shape.y - reach_y), 0), min(math.ceil(shape.y + reach_y), size[0]))
    columns = slice(max(int(shape.x - reach_x), 0), min(math.ceil(shape.x + reach_x), size[1]))
    # Pixel i covers [i, i + 1]: its centre is at i + 0.5.
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + (0.5 - shape.x)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + (0.5 - shape.y)
    distance = shape.kind((x * cos + y * sin) / a, (y * cos - x * sin) / b)
    return rows, columns, distance * (0.5 * (a + b))


def draw(scene: Scene) -> Tensor:
    """Paint a scene: uint8 [3, H, W] RGB, with soft edges and a little grain."""
    height, width = scene.size
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    canvas = np.broadcast_to(_paint(scene.background, x, y), (3, height, width)).copy()
    for shape in (*scene.distractors, *(placed.shape for placed in scene.objects)):
        rows, columns, distance = _distance(shape, scene.size)
        cover = np.clip(0.5 - distance, 0, 1)  # half the paint where a pixel's centre is the edge
        window = canvas[:, rows, columns]
        window += cover * (_paint(shape.fill, x[:, columns] - shape.x, y[rows] - shape.y) - window)
    grain = np.random.default_rng(scene.background.seed).integers(-6, 7, (height, width), np.int8)
    return torch.from_numpy(np.clip(canvas + grain + 0.5, 0, 255).astype(np.uint8))


def _paint(fill: Fill, x: Floats, y: Floats) -> Floats:
    first, second = np.array(fill.colours, np.float32)[:, :, None, None]  # [3, 1, 1] each
    return first + fill.texture(fill, x, y) * (second - first)


def shapes_index(
    seed: int, num_images: int, *, first: int, size: Size, max_objects: int, clutter: bool
) -> Index:
    """Annotations of images `first` to `first + num_images - 1`; number 12 is "shapes_000012".

    Image ids are the numbers, the `index` of `layout`. No file has these names. Training starts at
    0 and validation, with the same seed, at `FIRST_VAL`. Areas are those of the masks.

    Raises:
        DataError: `num_images` is 0.
    """
    ids = range(first, first + num_images)
    scenes = [layout(seed, i, size=size, max_objects=max_objects, clutter=clutter) for i in ids]
    objects = [placed for scene in scenes for placed in scene.objects]
    boxes = np.array([placed.box for placed in objects], np.float64).reshape(-1, 4)
    return build_index(
        source=Path("shapes"),
        root=Path(),
        image_ids=np.array(ids, np.int64),
        file_names=[f"shapes_{i:06d}" for i in ids],
        sizes=np.full((num_images, 2), size),
        box_rows=np.repeat(np.arange(num_images), [len(scene.objects) for scene in scenes]),
        box_ids=np.arange(len(boxes)),
        boxes_xywh=boxes - np.pad(boxes[:, :2], ((0, 0), (2, 0))),
        areas=np.array([placed.area for placed in objects], np.float64),
        ignore=np.zeros(len(boxes), np.bool_),
        keep_empty=True,
    )


def draw_row(index: Index, row: int, *, seed: int, max_objects: int, clutter: bool) -> Tensor:
    """Draw the image in a row of `shapes_index`, given the same options: uint8 [3, H, W] RGB."""
    size = int(index.sizes[row, 0]), int(index.sizes[row, 1])
    number = int(index.image_ids[row])
    return draw(layout(seed, number, size=size, max_objects=max_objects, clutter=clutter))
