"""Embedded data set: textured shapes drawn from a seed, with exact boxes and nothing to download.

`layout` decides what is in image number `index`, `draw` paints it.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from torch import Tensor

from rpn_train.data.index import Index, build_index, check_categories
from rpn_train.data.painting import (
    KINDS,
    TEXTURES,
    Colour,
    Fill,
    Shape,
    Size,
    distance_to,
    paint,
)

FIRST_VAL = 1_000_000  # number of the first validation image, beyond any training set
Range = tuple[float, float]


class Style(NamedTuple):
    """What all images of a data set have in common.

    size: (height, width) in pixels, at least 32. max_objects: at least 1. extents: from and to, of
    an object, as shares of the shorter side, 8 px at least. clutter: harder: lines and specks that
    are no objects, stronger textures behind, and objects of which only 40 % are visible.
    """

    size: Size
    max_objects: int
    extents: Range
    clutter: bool


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


def layout(seed: int, index: int, style: Style) -> Scene:
    """Decide what is in image `index`, without painting it.

    One image in 20 holds no object, the others 1 to `max_objects`. An object that would leave an
    earlier one with less than 60 % of its pixels visible (40 % with clutter) is left out.

    Args:
        seed: of the data set, >= 0.
        index: number of the image, >= 0; validation images start at `FIRST_VAL`.
    """
    assert min(style.size) >= 32, "the range of the option"
    rng = np.random.default_rng((seed, index))
    background = _background(rng, style)
    num_distractors = rng.integers(10, 30) if style.clutter else 0
    distractors = [_distractor(rng, style.size) for _ in range(num_distractors)]
    count = 0 if rng.random() < 0.05 else int(rng.integers(1, style.max_objects + 1))
    return Scene(
        style.size, background, tuple(distractors), _objects(rng, style, count, background)
    )


def draw(scene: Scene) -> Tensor:
    """Paint a scene: uint8 [3, H, W] RGB."""
    objects = (placed.shape for placed in scene.objects)
    return paint(scene.size, scene.background, (*scene.distractors, *objects))


def _objects(rng: Generator, style: Style, count: int, background: Fill) -> tuple[Object, ...]:
    min_visible = 0.4 if style.clutter else 0.6
    owner = np.zeros(style.size, np.intp)  # 1 + the object that a pixel shows, 0: background
    objects: list[Object] = []
    visible = np.zeros(0, np.intp)  # pixels of each object
    colours = list(background.colours)
    for _ in range(count):
        shape = _object(rng, style, colours)
        rows, columns, distance = distance_to(shape, style.size)
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


def _background(rng: Generator, style: Style) -> Fill:
    colour = _colour(rng, (0.05, 0.45), (0.2, 0.95))
    contrast = rng.uniform(0.3, 0.6) if style.clutter else rng.uniform(0.1, 0.35)
    texture = ("gradient", "noise", "noise", "stripes", "checker")[rng.integers(5)]
    return _fill(rng, colour, contrast, texture, min(style.size) * rng.uniform(0.1, 0.3))


def _distractor(rng: Generator, size: Size) -> Shape:
    """A thin line or a speck."""
    line = rng.random() < 0.5
    half_width = min(size) * rng.uniform(0.05, 0.3) if line else rng.uniform(0.6, 1.5)
    fill = _fill(rng, _colour(rng, (0, 1), (0, 1)), 0, "gradient", 1)
    return _shape(rng, "rectangle" if line else "ellipse", size, 0, (half_width, 0.8), fill)


def _object(rng: Generator, style: Style, others: list[Colour]) -> Shape:
    """Of four colours the one least like `others`; about a quarter of an extent may be outside."""
    low, high = (max(share * min(style.size), 8.0) for share in style.extents)  # pixels
    side = low * (high / low) ** rng.random()  # log-uniform
    stretch = 2 ** rng.uniform(-0.5, 0.5)  # aspect ratio 1 : 2 to 2 : 1
    colours = [_colour(rng, (0.5, 1), (0.3, 1)) for _ in range(4)]
    unlike = np.abs(np.array(colours)[:, None] - np.array(others)).sum(-1).min(1)  # [4]
    contrast = rng.uniform(0.3, 0.7) if rng.random() < 0.8 else 0
    texture = [*TEXTURES][rng.integers(len(TEXTURES))]
    kind = [*KINDS][rng.integers(len(KINDS))]
    fill = _fill(rng, colours[unlike.argmax()], contrast, texture, side * rng.uniform(0.15, 0.4))
    return _shape(rng, kind, style.size, side / 4, (side / 2 * stretch, side / 2 / stretch), fill)


def _shape(rng: Generator, kind: str, size: Size, margin: float, half: Range, fill: Fill) -> Shape:
    """A shape at a random place; one in three is upright, the others are rotated."""
    x, y = rng.uniform(margin, size[1] - margin), rng.uniform(margin, size[0] - margin)
    angle = rng.uniform(-math.pi, math.pi) if rng.random() < 2 / 3 else 0.0
    return Shape(kind, x, y, *half, math.cos(angle), math.sin(angle), fill)


def _fill(rng: Generator, colour: Colour, contrast: float, texture: str, px: float) -> Fill:
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


def shapes_index(
    seed: int, num_images: int, style: Style, *, first: int, kinds: Collection[str] | None = None
) -> Index:
    """Annotations of images `first` to `first + num_images - 1`; number 12 is "shapes_000012".

    Image ids are the numbers, the `index` of `layout`. No file has these names. Training starts at
    0 and validation, with the same seed, at `FIRST_VAL`. Areas are those of the masks.

    Args:
        kinds: of KINDS, whose objects are annotated; the others are drawn all the same. None: all.

    Raises:
        DataError: `num_images` is 0, or there is no such kind.
    """
    if kinds is not None:
        check_categories([*kinds], KINDS, Path("shapes"))
    ids = range(first, first + num_images)
    found = [
        [
            placed
            for placed in layout(seed, i, style).objects
            if kinds is None or placed.shape.kind in kinds
        ]
        for i in ids
    ]
    objects = [placed for of_image in found for placed in of_image]
    boxes = np.array([placed.box for placed in objects], np.float64).reshape(-1, 4)
    return build_index(
        source=Path("shapes"),
        root=Path(),
        image_ids=np.array(ids, np.int64),
        file_names=[f"shapes_{i:06d}" for i in ids],
        sizes=np.full((num_images, 2), style.size),
        box_rows=np.repeat(np.arange(num_images), [len(of_image) for of_image in found]),
        box_ids=np.arange(len(boxes)),
        boxes_xywh=boxes - np.pad(boxes[:, :2], ((0, 0), (2, 0))),
        areas=np.array([placed.area for placed in objects], np.float64),
        ignore=np.zeros(len(boxes), np.bool_),
        keep_empty=True,
    )


def draw_row(index: Index, row: int, *, seed: int, style: Style) -> Tensor:
    """Draw the image in a row of `shapes_index`, given the same options: uint8 [3, H, W] RGB."""
    return draw(layout(seed, int(index.image_ids[row]), style))
