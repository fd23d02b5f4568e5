"""Files as the world has them: what is read, what is left out by name, and what is refused.

CASES is the policy. Each spoils one thing of a small sound data set, its first image or the box of
annotation 1, and states what comes of it.
"""

import io
import json
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import stopped_at
from PIL import Image

from rpn_train import checkpoint, cli, cli_trained
from rpn_train.build import build_eval_batches, build_model, build_planner, build_train_batches
from rpn_train.config import TrainConfig
from rpn_train.data import batch as batch_module
from rpn_train.data.batch import Batch, Unread, load_item, make_batch
from rpn_train.data.faults import LeftOut, counted
from rpn_train.data.sampler import Item
from rpn_train.data.transforms import read_image
from rpn_train.data_report import plain_report
from rpn_train.distributed import Ranks
from rpn_train.errors import DataError
from rpn_train.evaluate import as_arrays, propose_split, score
from rpn_train.options import from_mapping
from rpn_train.shell import guarded
from rpn_train.splits import open_split
from rpn_train.train import train

COUNT, WIDTH, HEIGHT = 5, 64, 48
COLOUR = (200, 100, 50)
BOXES = [[2, 3, 32, 24], [10, 6, 40, 30]]  # x, y, width, height, in each image
FIRST = "0.png"

TINY: dict[str, Any] = {
    "image": {"short_side": HEIGHT, "max_side": WIDTH},
    "anchors": {"sizes": [[8], [16], [32], [64], [128]]},
    "schedule": {"batch_size": 2, "steps": 5, "lr": 0.04},
    "eval": {"max_proposals": [10, 100], "pictures": 1, "batch_size": 2},
    "log_every": 2,
    "eval_every": 4,
    "save_every": 2,
    "workers": 0,
}
ONE = Ranks(0, 1, torch.device("cpu"))


class DataSet:
    """A sound data set in COCO and in VOC layout, whose pieces a case replaces.

    content, or text in its place, becomes the JSON file; xml the file of the first image.
    """

    def __init__(self, root: Path, *, voc: bool = False) -> None:
        self.root, self.voc = root, voc
        self.images = root / ("JPEGImages" if voc else "train")
        self.images.mkdir(parents=True)
        for i in range(COUNT):
            (self.images / f"{i}.png").write_bytes(encode(solid()))
        self.options: dict[str, Any] = {"max_bad_fraction": 1.0}
        self.text: bytes | None = None
        self.content: dict[str, Any] = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
                for i in range(COUNT)
            ],
            "annotations": [
                {"id": 2 * i + k + 1, "image_id": i, "category_id": 1, "bbox": box}
                for i in range(COUNT)
                for k, box in enumerate(BOXES)
            ],
            "categories": [{"id": 1, "name": "thing"}],
        }
        self.xml: str | None = xml(voc_box(*BOXES[0]), voc_box(*BOXES[1]))
        self.split: bytes | None = "\n".join(map(str, range(COUNT))).encode()

    @property
    def first(self) -> Path:
        return self.images / FIRST

    def annotate(self, number: int = 0, **values: Any) -> None:
        self.content["annotations"][number] |= values

    def image(self, **values: Any) -> None:
        self.content["images"][0] |= values

    def write(self) -> None:
        if self.voc:
            self._write_voc()
            return
        (self.root / "annotations").mkdir()
        text = json.dumps(self.content).encode() if self.text is None else self.text
        (self.root / "annotations" / "instances_train.json").write_bytes(text)

    def _write_voc(self) -> None:
        (self.root / "Annotations").mkdir()
        (self.root / "ImageSets" / "Main").mkdir(parents=True)
        sound = xml(voc_box(*BOXES[0]), voc_box(*BOXES[1]))
        for i, text in enumerate([self.xml] + [sound] * (COUNT - 1)):
            if text is not None:
                (self.root / "Annotations" / f"{i}.xml").write_text(text)
        if self.split is not None:
            (self.root / "ImageSets" / "Main" / "train.txt").write_bytes(self.split)

    def config(self, **options: Any) -> TrainConfig:
        """A tiny network, trained and scored on the same images."""
        split = {"split": "train"}
        dataset = {"format": "voc" if self.voc else "coco", "root": str(self.root)}
        dataset |= {"train": split, "val": split}
        return from_mapping(
            TrainConfig, {**TINY, "dataset": dataset, "data": self.options | options}
        )


# Pieces of files


def solid(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    return Image.new("RGB", size, COLOUR).convert(mode)


def noise(size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Incompressible, so that a file cut in the middle is cut in its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file from its parts, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        parts = struct.pack(">I", len(content)), kind, content
        return b"".join(parts) + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def voc_box(x: float, y: float, width: float, height: float) -> str:
    corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
    return "<bndbox>" + "".join(f"<{t}>{v}</{t}>" for t, v in corners.items()) + "</bndbox>"


def xml(
    *boxes: str,
    size: str = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>",
    before: str = "",
    more: str = "",
) -> str:
    objects = "".join(f"<object><name>thing</name>{more}{box}</object>" for box in boxes)
    return f"{before}<annotation>{size}{objects}</annotation>"


# What comes of a case


class Refused(NamedTuple):
    """A DataError of one line."""

    message: str


@dataclass
class Sound:
    """Nothing is left out. The first image as training sees it, at the size as stored."""

    size: tuple[int, int] = (HEIGHT, WIDTH)
    corner: tuple[int, int, int] = COLOUR  # RGB of the pixel on top on the left
    tolerance: int = 3  # of JPEG
    boxes: list[list[float]] = field(
        default_factory=lambda: [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    )


def box_left_out(reason: str, found: str = "^$") -> LeftOut:
    return LeftOut(FIRST, 1, reason, found)


def image_left_out(reason: str, found: str = "^$") -> LeftOut:
    return LeftOut(FIRST, None, reason, found)


Spoil = Callable[[DataSet], Any]
NAN, INF = float("nan"), float("inf")
NOT_READABLE = "not readable"
NO_IMAGE = "cannot identify image file"
OTHER_SIZE = "of another size than annotated"


def bbox(value: Any) -> Spoil:
    return lambda data: data.annotate(bbox=value)


def every_box(make: Callable[[float, float, float, float], list[float]]) -> Spoil:
    def spoil(data: DataSet) -> None:
        for one in data.content["annotations"]:
            one["bbox"] = make(*one["bbox"])

    return spoil


def json_text(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(data: DataSet) -> None:
        data.text = change(json.dumps(data.content).encode())

    return spoil


def name(value: str) -> Spoil:
    return lambda data: data.image(file_name=value)


def file(content: bytes, boxes: list[list[float]] | None = None, **values: Any) -> Spoil:
    """The first image file; `values` of its annotation, the boxes of its two objects."""

    def spoil(data: DataSet) -> None:
        data.first.write_bytes(content)
        data.image(**values)
        for number, box in enumerate(boxes or []):
            data.annotate(number, bbox=box)

    return spoil


def options(first: Spoil, **values: Any) -> Spoil:
    def spoil(data: DataSet) -> None:
        first(data)
        data.options |= values

    return spoil


def link(target: str) -> Spoil:
    def spoil(data: DataSet) -> None:
        shutil.copy(data.first, data.root / "outside.png")
        data.first.unlink()
        data.first.symlink_to(target)

    return spoil


def folder_in_its_place(data: DataSet) -> None:
    data.first.unlink()
    data.first.mkdir()


def given(**values: Any) -> Spoil:
    """Values of the DataSet."""

    def spoil(data: DataSet) -> None:
        for key, value in values.items():
            setattr(data, key, value)

    return spoil


GREY = 124  # of COLOUR: 0.299 x 200 + 0.587 x 100 + 0.114 x 50

Outcome = LeftOut | Refused | Sound

COCO_CASES: dict[str, tuple[Spoil, Outcome]] = {
    # Boxes
    "box with NaN": (bbox([1, NAN, 3, 4]), box_left_out("box not finite", "1, nan, 3, 4")),
    "box with Infinity": (bbox([1, 2, INF, 4]), box_left_out("box not finite", "1, 2, inf, 4")),
    "box with -Infinity": (bbox([-INF, 2, 3, 4]), box_left_out("box not finite", "-inf, 2, 3, 4")),
    "box with 1e999": (
        json_text(lambda text: text.replace(b"[2, 3, 32, 24]", b"[2, 3, 1e999, 24]", 1)),
        box_left_out("box not finite", "2, 3, inf, 24"),
    ),
    "box inverted": (bbox([9, 9, -3, 4]), box_left_out("box without extent", "9, 9, -3, 4")),
    "box without width": (bbox([9, 9, 0, 4]), box_left_out("box without extent", "9, 9, 0, 4")),
    "box without height": (bbox([9, 9, 4, 0]), box_left_out("box without extent", "9, 9, 4, 0")),
    "box of three numbers": (bbox([1, 2, 3]), box_left_out("box not of four numbers", "[1, 2, 3]")),
    "box of five numbers": (
        bbox([1] * 5),
        box_left_out("box not of four numbers", "1, 1, 1, 1, 1"),
    ),
    "box of text": (bbox("1 2 3 4"), box_left_out("box not of four numbers", '"1 2 3 4"')),
    "box with text": (bbox([1, 2, 3, "4"]), box_left_out("box not of four numbers", '3, "4"')),
    "box null": (bbox(None), box_left_out("box not of four numbers", "null")),
    "box missing": (
        lambda data: data.content["annotations"][0].pop("bbox"),
        box_left_out("box not of four numbers", "null"),
    ),
    "box wholly outside": (
        bbox([WIDTH, 0, 5, 5]),
        box_left_out("box outside the image", "64, 0, 5, 5"),
    ),
    "box partly outside": (
        file(encode(solid()), [[-5, -6, 10, 10], [50, 40, 99, 99]]),
        Sound(boxes=[[0, 0, 5, 4], [50, 40, WIDTH, HEIGHT]]),
    ),
    "boxes normalised": (
        every_box(lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]),
        Refused(r"instances_train\.json: expected boxes in pixels, got shares of the image"),
    ),
    "boxes as corners": (
        every_box(lambda x, y, w, h: [x + 12, y + 12, x + w + 12, y + h + 12]),
        Refused(
            r"expected boxes as x, y, width, height, got what looks like x1, y1, x2, y2: .*100%"
        ),
    ),
    "more boxes faulty than sound": (
        lambda data: [data.annotate(i, bbox=[1, 1, 0, 1]) for i in range(6)],
        Refused(
            r"got more with: 6 x box without extent, and 4 without; first annotation 1 of image"
        ),
    ),
    "annotation id twice": (
        lambda data: data.annotate(id=10),
        Refused(r"id once, got 10 more than"),
    ),
    "annotation of an unknown image": (
        lambda data: data.annotate(image_id=77),
        LeftOut("id 77", 1, "of an image that the file has not", "^$"),
    ),
    # Images of the annotation file
    "image id twice": (
        lambda data: data.image(id=4),
        Refused(r"every image id once, got 4 more than"),
    ),
    "file_name twice": (
        name("4.png"),
        Refused(r"every file name once, got '4\.png' more than once"),
    ),
    "file_name absolute": (
        name("/etc/a.png"),
        Refused(r"inside the image folder, got '/etc/a\.png'"),
    ),
    "file_name with ..": (name("../a.png"), Refused(r"inside the image folder, got '\.\./a\.png'")),
    "file_name with ..\\": (name("..\\a"), Refused(r"inside the image folder, got '\.\.\\\\a'")),
    "file_name of half a character": (name("\ud800"), Refused(r"surrogates not allowed")),
    "size of zero": (
        lambda data: data.image(height=0),
        Refused(r"got \(0, 64\) for image '0\.png'"),
    ),
    "link out of the root": (
        link("../outside.png"),
        image_left_out("a link out of the image folder"),
    ),
    "link within the root": (link("1.png"), Sound()),
    "link to itself": (link(FIRST), image_left_out(NOT_READABLE, "Too many levels of symbolic")),
    # The annotation file
    "JSON a list": (json_text(lambda text: b"[]"), Refused(r"Expected `object`, got `array`")),
    "JSON empty": (json_text(lambda text: b""), Refused(r"annotation file, got an empty one: ")),
    "JSON cut short": (
        json_text(lambda text: text[:500]),
        Refused(r"was truncated after byte 500$"),
    ),
    "JSON garbage": (
        json_text(lambda text: text[:500] + b"\0" * 9),
        Refused(r"JSON is malformed: .*\(byte 500\)"),
    ),
    "JSON not UTF-8": (json_text(lambda text: text.replace(b"0.png", b"\xff")), Refused("utf-8")),
    "JSON too deep": (json_text(lambda text: b"[" * 9999), Refused("not a COCO annotation file: ")),
    "JSON with a byte order mark": (json_text(lambda text: b"\xef\xbb\xbf" + text), Sound()),
    "JSON without images": (
        lambda data: data.content.update(images=[], annotations=[]),
        Refused(r"expected at least one image, got none: .*instances_train\.json$"),
    ),
    # Image files that their headers tell of
    "image missing": (lambda data: data.first.unlink(), image_left_out("missing")),
    "image empty": (file(b""), image_left_out(NOT_READABLE, NO_IMAGE)),
    "image cut in its header": (file(encode(solid())[:20]), image_left_out(NOT_READABLE, "")),
    "image HTML": (file(b"<html>404</html>" * 99), image_left_out(NOT_READABLE, NO_IMAGE)),
    "image a folder": (folder_in_its_place, image_left_out(NOT_READABLE, "Is a directory")),
    "image BMP": (
        file(encode(solid(), "BMP")),
        image_left_out(NOT_READABLE, "^BMP instead of JPEG"),
    ),
    "image TIFF": (file(encode(solid(), "TIFF")), image_left_out(NOT_READABLE, "^TIFF instead of")),
    "image of another size": (
        file(encode(solid(size=(WIDTH, 47)))),
        image_left_out(OTHER_SIZE, "^64 x 47 px, annotated as 64 x 48$"),
    ),
    "image turned by EXIF, annotated upright": (
        file(encode(solid(size=(HEIGHT, WIDTH)), "JPEG", exif=turned(6))),
        image_left_out(OTHER_SIZE, "48 x 64 px, annotated as 64 x 48; data.exif says whether"),
    ),
    "image turned by EXIF, annotated as stored, with data.exif=apply": (
        options(file(encode(solid(), "JPEG", exif=turned(6))), exif="apply"),
        image_left_out(OTHER_SIZE, "48 x 64 px, annotated as 64 x 48; data.exif says whether"),
    ),
    "decompression bomb": (
        file(png(20_000, 20_000, 8, 2, b""), width=20_000, height=20_000),
        image_left_out("of too many pixels", "400000000 pixels"),
    ),
    "more than data.max_pixels": (
        options(file(encode(solid(size=(65, 48))), width=65), max_pixels=WIDTH * HEIGHT),
        image_left_out("of too many pixels", "^65 x 48, at most 3072$"),
    ),
    # Image files that are read
    "PNG named .jpg": (
        lambda data: (data.first.rename(data.images / "a.jpg"), data.image(file_name="a.jpg")),
        Sound(tolerance=0),
    ),
    "JPEG named .png": (file(encode(solid(), "JPEG")), Sound()),
    "JPEG progressive": (file(encode(solid(), "JPEG", progressive=True)), Sound()),
    "JPEG CMYK": (file(encode(solid("CMYK"), "JPEG")), Sound(tolerance=5)),
    "JPEG grey": (file(encode(solid("L"), "JPEG")), Sound(corner=(GREY,) * 3)),
    "WebP": (file(encode(solid(), "WEBP", lossless=True)), Sound(tolerance=0)),
    "WebP, which is not turned, with data.exif=apply": (
        options(file(encode(solid(), "WEBP", lossless=True, exif=turned(6))), exif="apply"),
        Sound(tolerance=0),
    ),
    "MPO": (
        file(encode(solid(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])),
        Sound(),
    ),
    "PNG grey": (file(encode(solid("L"))), Sound(corner=(GREY,) * 3, tolerance=0)),
    "PNG grey and alpha": (file(encode(solid("LA"))), Sound(corner=(GREY,) * 3, tolerance=0)),
    "PNG RGBA": (
        file(encode(Image.new("RGBA", (WIDTH, HEIGHT), (*COLOUR, 7)))),
        Sound(tolerance=0),
    ),
    "PNG palette": (
        file(encode(solid().quantize(4))),
        Sound(tolerance=0),
    ),
    "PNG palette with a transparent colour": (
        file(encode(solid().quantize(4), transparency=0)),
        Sound(tolerance=0),
    ),
    "PNG of 1 bit": (
        file(encode(Image.new("1", (WIDTH, HEIGHT), 1))),
        Sound(corner=(255,) * 3, tolerance=0),
    ),
    "PNG grey of 16 bits": (
        file(png(WIDTH, HEIGHT, 16, 0, (b"\0" + b"\x01\x01" * WIDTH) * HEIGHT)),
        Sound(corner=(1, 1, 1), tolerance=0),  # 257 / 257
    ),
    "PNG RGB of 16 bits": (
        file(png(WIDTH, HEIGHT, 16, 2, (b"\0" + b"\xff\xff\x00\x00\x80\x80" * WIDTH) * HEIGHT)),
        Sound(corner=(255, 0, 128), tolerance=0),
    ),
    "PNG RGBA of 16 bits": (
        file(png(WIDTH, HEIGHT, 16, 6, (b"\0" + b"\xff\xff\x00\x00\x80\x80\0\7" * WIDTH) * HEIGHT)),
        Sound(corner=(255, 0, 128), tolerance=0),
    ),
    "GIF animated": (
        file(encode(solid(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48))])),
        Sound(tolerance=0),
    ),
    "EXIF orientation, annotated as stored": (
        file(encode(solid(), "JPEG", exif=turned(6))),
        Sound(),
    ),
    "EXIF orientation, annotated upright, with data.exif=apply": (
        options(file(encode(solid(size=(HEIGHT, WIDTH)), "JPEG", exif=turned(6))), exif="apply"),
        Sound(),
    ),
    "image of 1 x 1": (
        file(encode(solid(size=(1, 1))), [[0, 0, 1, 1], [-1, 0, 5, 1]], width=1, height=1),
        Sound(size=(1, 1), boxes=[[0, 0, 1, 1]] * 2, tolerance=0),
    ),
    "image of 20000 x 10": (
        file(
            encode(solid(size=(20_000, 10))),
            [[5, 1, 9e3, 9], [19_999, 9, 2, 2]],
            width=20_000,
            height=10,
        ),
        Sound(size=(10, 20_000), boxes=[[5, 1, 9005, 10], [19_999, 9, 20_000, 10]], tolerance=0),
    ),
}

SOUND_XML = voc_box(*BOXES[0]), voc_box(*BOXES[1])
NO_SIZE = "<size><width>64</width></size>"
HALF_SIZE = "<size><width>64</width><height>47.5</height></size>"
FULL = f"<xmax>{WIDTH}</xmax><ymax>{HEIGHT}</ymax></bndbox>"
ONE_BASED = f"<bndbox><xmin>1</xmin><ymin>1</ymin>{FULL}"
ZERO_BASED = f"<bndbox><xmin>0</xmin><ymin>0</ymin>{FULL}"
FLOATS = "<bndbox><xmin>3.5</xmin><ymin>4</ymin><xmax>34.25</xmax><ymax>2.7e1</ymax></bndbox>"
INVERTED = "<bndbox><xmin>9</xmin><ymin>4</ymin><xmax>5</xmax><ymax>9</ymax></bndbox>"
THREE = "<bndbox><xmin>9</xmin><ymin>4</ymin><xmax>5</xmax></bndbox>"
LAUGHS = "".join(f'<!ENTITY l{i} "{10 * f"&l{i - 1};"}">' for i in range(1, 9))
DTDS = {
    "entity": '<!DOCTYPE a [<!ENTITY e "e">]>',
    "external entity": '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]>',
    "entities of a billion laughs": f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]>',
}


def of_stem(reason: str, found: str) -> LeftOut:
    """An image whose annotations cannot be read: nobody knows the name of its file."""
    return LeftOut("0", None, reason, found)


VOC_CASES: dict[str, tuple[Spoil, Outcome]] = {
    "nothing": (given(), Sound(tolerance=0)),
    "size without height": (
        given(xml=xml(*SOUND_XML, size=NO_SIZE)),
        of_stem("without a size", "height '', width '64'"),
    ),
    "size with a fraction": (
        given(xml=xml(*SOUND_XML, size=HALF_SIZE)),
        of_stem("without a size", "height '47.5', width '64'"),
    ),
    "object without bndbox": (given(xml=xml("", *SOUND_XML)), box_left_out("without bndbox")),
    "bndbox of three numbers": (
        given(xml=xml(THREE, *SOUND_XML)),
        box_left_out("box not of four numbers", "^'9', '4', '5', ''$"),
    ),
    "bndbox inverted": (
        given(xml=xml(INVERTED, *SOUND_XML)),
        box_left_out("box without extent", "^8, 3, -4, 6$"),
    ),
    "bndbox of floats": (
        given(xml=xml(FLOATS, SOUND_XML[1])),
        Sound(boxes=[[2.5, 3, 34.25, 27], [10, 6, 50, 36]]),
    ),
    "bndbox from 1 to the size": (
        given(xml=xml(ONE_BASED, SOUND_XML[1])),
        Sound(boxes=[[0, 0, WIDTH, HEIGHT], [10, 6, 50, 36]]),
    ),
    "bndbox from 0 to the size": (
        given(xml=xml(ZERO_BASED, SOUND_XML[1])),
        Sound(boxes=[[0, 0, WIDTH, HEIGHT], [10, 6, 50, 36]]),
    ),
    "difficult maybe": (
        given(xml=xml(SOUND_XML[0], more="<difficult>maybe</difficult>")),
        box_left_out("difficult neither 0 nor 1", "^'maybe'$"),
    ),
    "XML cut short": (
        given(xml=xml(*SOUND_XML)[:-20]),
        of_stem("with a broken annotation file", r"^0\.xml: "),
    ),
    "XML empty": (given(xml=""), of_stem("with a broken annotation file", "no element found")),
    "XML missing": (given(xml=None), of_stem("without annotation file", r"^0\.xml$")),
    **{
        f"XML with an {kind}": (given(xml=xml(before=dtd)), Refused(r"0\.xml: .*EntitiesForbidden"))
        for kind, dtd in DTDS.items()
    },
    "VOC image missing": (
        lambda data: data.first.unlink(),
        LeftOut("0.jpg", None, "missing", "^$"),
    ),
    "VOC image HTML": (file(b"<html>404</html>" * 99), image_left_out(NOT_READABLE, NO_IMAGE)),
    "VOC link out of the root": (
        link("../outside.png"),
        image_left_out("a link out of the image folder"),
    ),
    "split with CRLF": (given(split=b"0\r\n1\r\n2\r\n3\r\n4\r\n"), Sound(tolerance=0)),
    "split with blanks": (given(split=b"\n0\n\n 1\n2\n\n\n3\n4\n\n"), Sound(tolerance=0)),
    "split with trailing spaces": (given(split=b"0  \n1\t\n2 \n3\n4"), Sound(tolerance=0)),
    "split with a byte order mark": (given(split=b"\xef\xbb\xbf0\n1\n2\n3\n4"), Sound(tolerance=0)),
    "split empty": (given(split=b""), Refused(r"at least one image, got none: .*train\.txt$")),
    "split of blanks": (given(split=b" \r\n\n"), Refused(r"at least one image, got none: .*txt$")),
    "split not UTF-8": (given(split=b"\xff"), Refused(r"train\.txt: not a list of images: ")),
    "split with ..": (
        given(split=b"../0"),
        Refused(r"names of images without folder, got '\.\./0'"),
    ),
    "split with an image twice": (
        given(split=b"0\n0"),
        Refused(r"every file name once, got '0\.png'"),
    ),
    "split missing": (
        given(split=None),
        Refused(r"got nothing at .*train\.txt; splits there: none$"),
    ),
}

CASES = [
    pytest.param(spoil, outcome, layout == "voc", id=f"{layout}: {what}")
    for layout, cases in (("coco", COCO_CASES), ("voc", VOC_CASES))
    for what, (spoil, outcome) in cases.items()
]


def of(*kinds: type) -> list[Any]:
    return [case for case in CASES if isinstance(case.values[1], kinds)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two retries, without a pause."""
    monkeypatch.setattr(batch_module, "RETRY_AFTER_S", (0, 0))


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Spoil, bool], DataSet]:
    def spoilt(spoil: Spoil, is_voc: bool = False) -> DataSet:
        data = DataSet(tmp_path / "data", voc=is_voc)
        spoil(data)
        data.write()
        return data

    return spoilt


Make = Callable[..., DataSet]


@pytest.mark.parametrize(("spoil", "outcome", "is_voc"), of(Sound))
def test_what_is_read(make: Make, spoil: Spoil, outcome: Sound, is_voc: bool) -> None:
    index, read = open_split(make(spoil, is_voc).config(on_error="raise"), "train", "train")
    assert (len(index), len(index.areas), index.left_out) == (COUNT, 2 * COUNT, ())
    item = Item(0, outcome.size, flip=False, seed=0, photometric=False)
    image, boxes, _ = load_item(index, read, item)
    assert (image.dtype, image.shape) == (torch.uint8, (3, *outcome.size))
    difference = image[:, 0, 0].int() - torch.tensor(outcome.corner)
    assert difference.abs().max() <= outcome.tolerance, image[:, 0, 0]
    assert boxes.tolist() == outcome.boxes


@pytest.mark.parametrize(("spoil", "outcome", "is_voc"), of(Refused))
def test_what_is_refused(make: Make, spoil: Spoil, outcome: Refused, is_voc: bool) -> None:
    cfg = make(spoil, is_voc).config()
    for use in ("train", "score"):
        with pytest.raises(DataError, match=outcome.message) as error:
            open_split(cfg, "train", use)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("spoil", "outcome", "is_voc"), of(LeftOut))
def test_what_is_left_out(make: Make, spoil: Spoil, outcome: LeftOut, is_voc: bool) -> None:
    """It, by name, and nothing else; or the run stops at it, if that is what is wanted."""
    data = make(spoil, is_voc)
    index, read = open_split(data.config(), "train", "train")
    (one,) = index.left_out
    assert (one.image, one.annotation, one.reason) == outcome[:3]
    assert re.search(outcome.found, one.found), one.found
    is_image = one.annotation is None
    assert len(index) == COUNT - is_image
    assert (outcome.image in index.file_names()) == (outcome.image == FIRST and not is_image)
    if not is_voc:
        assert len(index.areas) == 2 * COUNT - (2 if is_image else 1)
    for row in range(len(index)):
        read(row)

    report = plain_report(index)["left_out"]
    entry = {"image": one.image, "annotation": one.annotation, "found": one.found}
    assert report == {outcome.reason: {"count": 1, "entries": [entry]}}
    assert json.loads(json.dumps(report)) == report
    assert counted(index.left_out) == f"1 x {'image ' * is_image}{outcome.reason}"

    with pytest.raises(DataError) as error:
        open_split(data.config(on_error="raise"), "train", "train")
    assert str(error.value) == f"{one}; with data.on_error=skip it would be left out"
    assert "\n" not in str(error.value)


OF_FILES = [
    case
    for case in of(LeftOut)
    if case.values[1].annotation is None and case.values[1].image != "0"  # which is its XML
]


@pytest.mark.parametrize(("spoil", "outcome", "is_voc"), OF_FILES)
def test_where_images_are_scored_their_objects_stay(
    make: Make, spoil: Spoil, outcome: LeftOut, is_voc: bool
) -> None:
    """And the image is blank. Of the annotations alone nothing is wrong."""
    cfg = make(spoil, is_voc).config()
    index, read = open_split(cfg, "val", "score")
    (one,) = index.left_out
    assert (one.image, one.annotation, one.reason) == outcome[:3]
    assert (len(index), len(index.areas)) == (COUNT, 2 * COUNT)
    item = Item(0, (HEIGHT, WIDTH), flip=False, seed=0, photometric=False)
    batch = make_batch(index, read, [item], (HEIGHT, WIDTH), "blank")
    assert [row for row, _ in batch.unread] == [0]
    assert not batch.images.any()
    alone, _ = open_split(cfg, "val", "annotations")
    assert (len(alone), len(alone.areas), alone.left_out) == (COUNT, 2 * COUNT, ())


def test_the_limit_of_faulty_images(tmp_path: Path) -> None:
    """One of a hundred is 1 %, which is not more than 1 %; boxes do not count."""
    data = DataSet(tmp_path / "data")
    for i in range(COUNT, 100):
        shutil.copy(data.first, data.images / f"{i}.png")
        image = {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
        data.content["images"].append(image)
    data.annotate(3, bbox=[1, 1, 0, 1])
    data.annotate(5, bbox=[1, 1, 1])
    data.write()
    (data.images / "17.png").write_bytes(b"")
    data.options = {}
    index, _ = open_split(data.config(), "train", "train")
    assert (len(index), len(index.left_out)) == (99, 3)
    (data.images / "4.png").unlink()
    for use in ("train", "score"):
        with pytest.raises(DataError) as error:
            open_split(data.config(), "train", use)
        assert str(error.value) == (
            "expected at most 1.00% of 100 images to be faulty (data.max_bad_fraction), got "
            "1 x image missing, 1 x image not readable; first image '4.png': missing"
        )
    assert len(open_split(data.config(), "train", "annotations")[0]) == 100
    assert len(open_split(data.config(max_bad_fraction=0.02), "train", "train")[0]) == 98


# Images whose headers are sound and whose pixels are not

TORN = {
    "JPEG": encode(noise(), "JPEG")[:-900],
    "PNG": encode(noise())[:-900],
    "GIF": encode(noise(), "GIF")[:1000],
}


@pytest.mark.parametrize("kind", TORN)
def test_a_torn_image_is_named_and_replaced(make: Make, kind: str) -> None:
    data = make(file(TORN[kind]))
    cfg = data.config()
    index, read = open_split(cfg, "train", "train")
    assert (len(index), index.left_out) == (COUNT, ())  # nobody has looked at the pixels yet
    with pytest.raises(
        DataError, match=r"0\.png: expected a readable image, got: [^\n]+$"
    ) as error:
        read(0)
    named = (Unread(0, str(error.value)),)
    planner = build_planner(cfg, index, 32)
    plan = [item.row for item in planner.plan(1).items] + [i.row for i in planner.plan(2).items]
    batches = build_train_batches(cfg, index, read, planner, ONE)
    found: list[int] = []
    for key in range(2):
        batch, again = batches[key], batches[key]
        assert isinstance(batch, Batch)
        assert isinstance(again, Batch)
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.gt_boxes, again.gt_boxes)
        assert len(batch.images) == 2
        assert batch.unread == (named if 0 in plan[2 * key : 2 * key + 2] else ())
        found += batch.rows.tolist()
    assert found == [row or 1 for row in plan]
    strict = build_train_batches(data.config(on_error="raise"), index, read, planner, ONE)
    refused = strict[plan.index(0) // 2]
    assert isinstance(refused, DataError)
    assert str(refused) == named[0].reason


def test_a_torn_image_has_no_proposals_where_it_is_scored(make: Make) -> None:
    cfg = make(file(TORN["JPEG"])).config()
    index, read = open_split(cfg, "val", "score")
    batches = build_eval_batches(cfg, index, read, 32, ONE)
    model = build_model(cfg).eval()
    found = sorted(propose_split(model, batches, cfg, ONE.device), key=lambda one: one.row)
    assert [one.row for one in found] == [*range(COUNT)]
    torn, *others = found
    assert (torn.boxes.shape, torn.logits.shape) == ((0, 4), (0,))
    assert torn.fault.startswith(f"{index.path(0)}: expected a readable image, got: ")
    assert all(len(one.boxes) and one.fault == "" for one in others)
    recall = score(as_arrays(found, index), index, cfg.eval)
    assert recall.matched_rank.shape[-1] == 2 * COUNT  # two of them missed
    assert (recall.matched_rank[0, 0, :2] == -1).all()


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "data_report.json").read_text())


def test_a_run_with_faults_tells_of_them_and_is_resumed_exactly(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 images are 2 epochs: the torn one comes twice. It is scored at the steps 0, 4 and 5."""

    def spoil(data: DataSet) -> None:
        data.first.write_bytes(TORN["JPEG"])
        data.annotate(2, bbox=[1, 1, 0, 1])
        (data.images / "4.png").unlink()

    data = make(spoil)
    cfg = data.config()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(cfg, whole, ONE) is None
    told = capsys.readouterr().out
    left_out = "left out: 1 x box without extent, 1 x image missing; data_report.json names them"
    assert told.count(left_out) == 2  # of what is trained on, and of what is scored
    assert told.count(f"not read: {data.first}: expected a readable image, got: ") == 2
    report = report_of(whole)
    training, evaluation = report["training"], report["evaluation"]
    assert (training["images"], training["objects"]) == (COUNT - 1, 2 * COUNT - 3)
    assert (evaluation["images"], evaluation["objects"]) == (COUNT, 2 * COUNT - 1)
    box = {"image": "1.png", "annotation": 3, "found": "1, 1, 0, 1"}
    image = {"image": "4.png", "annotation": None, "found": ""}
    for split in (training, evaluation):
        assert split["left_out"] == {
            "box without extent": {"count": 1, "entries": [box]},
            "missing": {"count": 1, "entries": [image]},
        }
    assert training["unread"].keys() == {FIRST}
    assert training["unread"][FIRST]["reason"].startswith(f"{data.first}: expected a readable")
    assert evaluation["unread"].keys() == {FIRST, "4.png"}
    assert {name: one["times"] for name, one in evaluation["unread"].items()} == {
        FIRST: 3,
        "4.png": 3,
    }
    assert json.loads((whole / "recall.json").read_text())["num_objects"] == 2 * COUNT - 1

    with stopped_at(3):
        assert train(cfg, parts, ONE) == signal.SIGTERM
    assert train(cfg, parts, ONE) is None
    for name in ("metrics.jsonl", "recall.json", "data_report.json"):
        assert (parts / name).read_text() == (whole / name).read_text()
    first, second = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (whole, parts))
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key


def test_an_unreliable_disk_changes_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image fails once and is read at the second attempt: nobody counts it."""
    cfg = make(lambda data: None).config(max_bad_fraction=0.0)
    cfg = replace(cfg, eval_at_start=False, schedule=replace(cfg.schedule, steps=3))
    train(cfg, tmp_path / "reliable", ONE)
    seen: dict[Path, int] = {}

    def read_late(path: Path, **settings: Any) -> torch.Tensor:
        seen[path] = seen[path] + 1 if path in seen else 1
        if seen[path] == 1:
            raise DataError(f"{path}: expected an image, got: Stale file handle")
        return read_image(path, **settings)

    monkeypatch.setattr("rpn_train.splits.read_image", read_late)
    train(cfg, tmp_path / "unreliable", ONE)
    assert len(seen) == COUNT
    for name in ("metrics.jsonl", "recall.json", "data_report.json"):
        texts = [(tmp_path / run / name).read_text() for run in ("reliable", "unreliable")]
        assert texts[0] == texts[1]
    assert report_of(tmp_path / "unreliable")["training"]["unread"] == {}


def test_images_that_turn_bad_during_a_run_have_a_limit(make: Make, tmp_path: Path) -> None:
    data = make(file(TORN["PNG"]))
    cfg = data.config(max_bad_fraction=0.19)
    with pytest.raises(DataError) as error:
        train(cfg, tmp_path / "run", ONE)
    assert str(error.value).startswith(
        "expected at most 19.00% of 5 images of evaluation to be unreadable "
        f"(data.max_bad_fraction), got 1; last: {cfg.dataset.root}/train/0.png: expected a readable"
    )
    assert report_of(tmp_path / "run")["evaluation"]["unread"][FIRST]["times"] == 1
    shutil.copy(data.images / "1.png", data.first)
    cfg = replace(cfg, eval_at_start=False, schedule=replace(cfg.schedule, steps=1))
    train(cfg, tmp_path / "run", ONE)  # which had not begun: repaired, nothing is wrong with it
    assert report_of(tmp_path / "run")["evaluation"]["unread"] == {}


def test_one_image_that_cannot_be_read_is_told_of_wherever_images_are(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 5: in the words of each command; the others are scored, drawn and written."""
    data = make(file(b"<html>404 Not Found</html>"))
    cfg, run = data.config(), tmp_path / "run"
    cfg = replace(cfg, eval_at_start=False, schedule=replace(cfg.schedule, steps=1))
    train(cfg, run, ONE)
    capsys.readouterr()
    reason = f"{data.first}: expected an image, got one not readable (cannot identify image file)"

    scored = [f"checkpoint={run}", f"output_dir={tmp_path}/scored"]
    scored += ["eval.max_proposals=[1]", "eval.pictures=5"]  # too few to find all of any image
    assert guarded(cli_trained._eval, scored) == 0
    told = capsys.readouterr().out
    assert f"not read: {reason}; its objects count as missed\n" in told
    assert f"worst.png: 1 of 5 images not drawn, first {reason}\n" in told
    assert (tmp_path / "scored" / "worst.png").is_file()

    images = [f"checkpoint={run}", f"images={data.images}", f"output={tmp_path}/a.npz"]
    assert guarded(cli_trained._propose, images) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "left out: 1 x image not readable; first image '0.png': not readable "
        "(cannot identify image file)"
    )


def test_scoring_has_the_limit_of_training(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make(file(TORN["PNG"])).config()
    cfg = replace(cfg, eval_at_start=False, schedule=replace(cfg.schedule, steps=1))
    train(cfg, tmp_path / "run", ONE)
    typed = [f"checkpoint={tmp_path / 'run'}", "data.max_bad_fraction=0.19", "device=cpu"]
    assert guarded(cli_trained._eval, typed) == 2
    assert capsys.readouterr().err.startswith(
        "error: expected at most 19.00% of 5 images of val to be unreadable"
    )


# As a person meets them: exit code 2 and one line


def wrong_folder(data: DataSet) -> None:
    for path in data.images.iterdir():
        path.unlink()


def all_html(data: DataSet) -> None:
    for path in data.images.iterdir():
        path.write_bytes(b"<html>404 Not Found</html>" * 99)


def all_turned(data: DataSet) -> None:
    """As a telephone takes them and a tool for annotation shows them."""
    for path in data.images.iterdir():
        path.write_bytes(encode(solid(size=(HEIGHT, WIDTH)), "JPEG", exif=turned(6)))


MISTAKES: dict[str, tuple[Spoil, str]] = {
    "wrong folder": (
        wrong_folder,
        r"used: 5 x image missing; first image '0.png': missing$",
    ),
    "boxes as corners": (
        COCO_CASES["boxes as corners"][0],
        r"got what looks like x1, y1, x2, y2: ",
    ),
    "JSON cut short": (
        COCO_CASES["JSON cut short"][0],
        r"instances_train\.json: .*after byte 500$",
    ),
    "HTML saved as images": (
        all_html,
        r"can be used: 5 x image not readable; first image '0.png': not readable \(cannot iden",
    ),
    "images turned by EXIF": (
        all_turned,
        r": of another size than annotated \(48 x 64 px, annotated as 64 x 48; data\.exif says ",
    ),
    "some HTML": (
        file(b"<html>404 Not Found</html>"),
        r"^error: expected at most 1\.00% of 5 images to be faulty \(data\.max_bad_fraction\), got "
        r"1 x image not readable; first image '0\.png': not readable \(cannot identify image file",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_typical_mistake(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, message: str
) -> None:
    data = make(spoil)
    typed = ["dataset=coco", f"dataset.root={data.root}", f"output_dir={tmp_path / 'run'}"]
    typed += ["dataset.train.split=train", "dataset.val.split=train", "device=cpu"]
    assert guarded(cli._train, typed) == 2
    told, fault = capsys.readouterr()
    assert told == f"run       {tmp_path / 'run'}\n"
    assert fault.startswith("error: ")
    assert fault.count("\n") == 1
    assert re.search(message, fault.strip()), fault
