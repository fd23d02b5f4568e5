"""Whatever is in an annotation file: an index that keeps its word, or a DataError of one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rpn_train.data.coco import read_coco
from rpn_train.data.index import Index, leaves_root
from rpn_train.data.voc import read_voc
from rpn_train.errors import DataError

COCO: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in range(3)],
    "annotations": [
        {"id": 9 - k, "image_id": k % 3, "category_id": 1 + k % 2, "bbox": [k / 2, 3.5, 32.5, 24.5]}
        | {"area": 700.5, "iscrowd": k % 2}
        for k in range(4)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40.5</ymax></bndbox>"
XML = (
    "<annotation><filename>a.png</filename><size><width>64</width><height>48</height></size>"
    f"<object><name>cat</name><difficult>0</difficult>{BOX}</object>"
    f"<object><name>dog</name>{BOX}<part>{BOX}</part></object></annotation>"
)
LONGEST = 251 * "a"  # with .xml a file may have this name, not with .jpeg
STEMS = ["a", "b", "c", "sub/a", "..", "../a", "/a", "a\0", LONGEST, "A", ".", "a.png"]


INTEGERS = [0, -1, 1, 2, 2**31, 2**63, -(2**70), 10**400, True]
FLOATS = [float("nan"), float("inf"), float("-inf"), 0.5, 1e308, -1e308, 1e-320, 1e39]
WORDS = [
    "",
    "x",
    "1",
    "cat",
    "0.png",
    "..",
    "/a",
    "../0.png",
    "a\0",
    "a\nb",
    "\ud800",
    "é",
    "1e999",
]
integers, floats = st.sampled_from(INTEGERS), st.sampled_from(FLOATS)
numbers = integers | floats
words = st.sampled_from(WORDS) | st.text(max_size=5)
junk = st.recursive(
    st.none() | numbers | words,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def like(value: Any) -> st.SearchStrategy[Any]:
    """Odd values of the same type, mostly: those of another type are refused early."""
    if isinstance(value, list):
        return st.lists(numbers, min_size=4, max_size=4) | junk
    same = words if isinstance(value, str) else integers if isinstance(value, int) else numbers
    return st.one_of(same, same, same, junk)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


@st.composite
def coco_files(draw: st.DrawFn) -> bytes:
    """A sound document with a few values replaced, deleted or doubled."""
    tree = copy.deepcopy(COCO)
    for _ in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(places(tree)))
        change = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double"]))
        if change == "delete" and container is not tree:
            container.pop(key)
        elif change == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = draw(like(container[key]))
    return draw(torn(json.dumps(tree).encode()))


@st.composite
def xml_files(draw: st.DrawFn) -> bytes:
    """The same for XML."""
    tree = ElementTree.fromstring(XML)
    for _ in range(draw(st.integers(0, 3))):
        parent, child = draw(st.sampled_from([(p, c) for p in tree.iter() for c in p]))
        change = draw(st.sampled_from(["text", "text", "text", "delete", "double", "tag"]))
        if change == "delete" and parent is not tree:
            parent.remove(child)
        elif change == "double":
            parent.append(copy.deepcopy(child))
        elif change == "tag":
            child.tag = draw(st.sampled_from(["object", "bndbox", "xmin", "size", "filename"]))
        else:
            child.text = draw(numbers.map(lambda n: str(n)[:300]) | words)
    return draw(torn(ElementTree.tostring(tree, "unicode").encode("utf-8", "surrogatepass")))


def torn(text: bytes) -> st.SearchStrategy[bytes]:
    """As it is, mostly, or cut, or with bytes in the place of others."""

    def change(start: int, length: int, new: bytes) -> bytes:
        return text[:start] + new + text[start + length :]

    where = st.integers(0, len(text))
    return st.one_of(
        st.just(text),
        st.just(text),
        where.map(lambda end: text[:end]),
        st.builds(change, where, st.integers(0, 20), st.binary(max_size=4)),
        st.just(b"\xef\xbb\xbf" + text),
    )


def check(index: Index) -> None:
    """What `Index` promises."""
    count, boxes = len(index), index.boxes_xywh
    assert count >= 1
    names = index.file_names()
    assert len({*names}) == len({*index.image_ids.tolist()}) == count
    assert not any(map(leaves_root, names))
    assert names == [index.file_name(i) for i in range(count)]
    assert index.sizes.shape == (count, 2)
    assert (index.sizes > 0).all()
    assert boxes.shape == (len(index.areas), 4) == (len(index.ignore), 4)
    assert not np.isnan(index.areas).any()
    assert index.box_offsets[0] == 0
    assert (np.diff(index.box_offsets) >= 0).all()
    assert index.box_offsets[-1] == len(boxes)
    for i in range(count):
        xyxy, (height, width) = index.boxes_xyxy(i), index.sizes[i].tolist()
        assert np.isfinite(xyxy).all()
        assert (xyxy[:, 2:] > xyxy[:, :2]).all()
        assert ((xyxy[:, 2:] > 0) & (xyxy[:, :2] < [width, height])).all()
    for one in index.left_out:
        assert "\n" not in str(one)
        assert json.dumps(one)


def outcome(read: Callable[..., Index], *pieces: Path, **chosen: Any) -> None:
    try:
        check(read(*pieces, **chosen))
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017


few = settings(max_examples=300, deadline=None, derandomize=True)
categories = st.none() | st.sampled_from([["cat"], ["dog", "cat"], ["zebra"], []])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "images" / "sub").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "sub/a.jpeg"):
        (root / "images" / name).touch()
    (root / "xml" / "sub").mkdir(parents=True)
    for name in ("b", "c", "sub/a", LONGEST):
        (root / "xml" / f"{name}.xml").write_text(XML.replace("a.png", ""))
    return root


raw = st.binary() | st.text().map(str.encode)
raw_json = junk.map(json.dumps).map(str.encode)


@few
@given(st.one_of(*[coco_files()] * 12, raw, raw_json), categories, st.booleans())
@example(json.dumps(COCO).replace("0.png", "\\ud800").encode(), None, True)
@example(json.dumps(COCO).replace("3.5, 32.5", "-Infinity, Infinity").encode(), None, True)
def test_coco(folder: Path, text: bytes, chosen: list[str] | None, keep_empty: bool) -> None:
    (folder / "a.json").write_bytes(text)
    pieces = folder / "a.json", folder / "images"
    outcome(read_coco, *pieces, categories=chosen, keep_empty=keep_empty)


@few
@given(st.one_of(*[xml_files()] * 12, raw), categories, st.booleans())
@example(XML.replace(">1<", ">-inf<").replace(">30<", ">-inf<").encode(), None, True)
@example(XML.replace(">1<", ">-1e308<").replace(">30<", ">1e308<").encode(), None, True)
@example(XML.replace(">0<", ">a\nb<").replace(">30<", ">a\nb<").encode(), None, True)
def test_voc(folder: Path, text: bytes, chosen: list[str] | None, keep_empty: bool) -> None:
    (folder / "xml" / "a.xml").write_bytes(text)
    (folder / "train.txt").write_text("a\nb\n")
    pieces = folder / "xml", folder / "images", folder / "train.txt"
    outcome(read_voc, *pieces, categories=chosen, keep_empty=keep_empty)


lines = st.lists(st.sampled_from(STEMS) | st.text(max_size=5), max_size=5)
splits = st.builds(str.join, st.sampled_from(["\n", "\r\n", " 1\n", " ", "\x0c"]), lines)


@few
@given(splits.map(str.encode) | st.binary(max_size=20))
@example(LONGEST.encode())
def test_split_files(folder: Path, text: bytes) -> None:
    (folder / "xml" / "a.xml").write_text(XML)
    (folder / "train.txt").write_bytes(text)
    pieces = folder / "xml", folder / "images", folder / "train.txt"
    outcome(read_voc, *pieces, categories=None, keep_empty=True)
