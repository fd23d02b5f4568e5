"""VOC folders: exact arrays from small ones, one line for each broken one, counts of real ones."""

from pathlib import Path

import numpy as np
import pytest

from rpn_train.data.faults import NO_OBJECT, LeftOut
from rpn_train.data.index import Index
from rpn_train.data.voc import read_voc
from rpn_train.errors import DataError

SIZE = "<size><width>41</width><height>30</height><depth>3</depth></size>"
PART = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"


def box(xmin: object, ymin: object, xmax: object, ymax: object) -> str:
    """A bndbox, in the order of VOC 2012, where xmax comes first."""
    xs, ys = f"<xmax>{xmax}</xmax><xmin>{xmin}</xmin>", f"<ymax>{ymax}</ymax><ymin>{ymin}</ymin>"
    return f"<bndbox>{xs}{ys}</bndbox>"


def thing(bndbox: str, name: str = "cat", more: str = "") -> str:
    return f"<object><name>{name}</name>{more}{bndbox}</object>"


def image(*objects: str, size: str = SIZE, filename: str = "gone.jpg") -> str:
    body = f"<filename>{filename}</filename>{size}{''.join(objects)}"
    return f"<annotation>{body}</annotation>"


# "b" is named by <filename>, "a" and "c" by their stem; "c" holds a difficult object alone.
FILES = {
    "a": image(
        thing(box(1, 1, 41, 30), more=PART + "<difficult>0</difficult>"),
        thing(box(" 2.5 ", 3, 7, 9), name=" dog "),
        PART,
    ),
    "b": image(filename="other.png"),
    "c": image(thing(box(5, 6, 6, 7), more="<difficult>1</difficult>")),
}
DIFFICULT_YES = "<difficult>yes</difficult>"


def write(folder: Path, files: dict[str, str], split: str) -> None:
    for name in ("Annotations", "JPEGImages", "Main"):
        (folder / name).mkdir(parents=True)
    for name in ("a.jpg", "other.png", "b.jpg", "c.jpeg"):
        (folder / "JPEGImages" / name).touch()
    for stem, text in files.items():
        (folder / "Annotations" / f"{stem}.xml").write_text(text, encoding="utf-8")
    (folder / "Main" / "train.txt").write_bytes(split.encode())


def read(
    folder: Path,
    files: dict[str, str] = FILES,
    split: str = "c\na\nb\n",
    categories: list[str] | None = None,
    keep_empty: bool = True,
) -> Index:
    write(folder, files, split)
    pieces = folder / "Annotations", folder / "JPEGImages", folder / "Main" / "train.txt"
    return read_voc(*pieces, categories=categories, keep_empty=keep_empty)


def test_arrays(tmp_path: Path) -> None:
    index = read(tmp_path)
    assert [index.file_name(i) for i in range(3)] == ["c.jpeg", "a.jpg", "other.png"]
    np.testing.assert_array_equal(index.image_ids, [1, 2, 3])
    np.testing.assert_array_equal(index.sizes, [[30, 41]] * 3)
    np.testing.assert_array_equal(index.box_offsets, [0, 1, 3, 3])
    # Pixels 5 and 6 of a row are the interval from 4 to 6; pixels 1 to 41 all of the image.
    boxes = [[4, 5, 2, 2], [0, 0, 41, 30], [1.5, 2, 5.5, 7]]
    np.testing.assert_array_equal(index.boxes_xywh, boxes)
    np.testing.assert_array_equal(index.boxes_xyxy(0), [[4, 5, 6, 7]])
    np.testing.assert_array_equal(index.areas, [4, 41 * 30, 5.5 * 7])
    np.testing.assert_array_equal(index.ignore, [True, False, False])
    assert index.left_out == ()


def test_an_image_with_a_difficult_object_alone_is_empty(tmp_path: Path) -> None:
    index = read(tmp_path, keep_empty=False)
    assert index.image_ids.tolist() == [2]
    names = ("c.jpeg", "other.png")
    assert index.left_out == tuple(LeftOut(name, None, NO_OBJECT) for name in names)


@pytest.mark.parametrize("split", ["c \r\n\r\na\t\r\nb", "\ufeffc  1\na -1\n\n b  0\n"])
def test_a_split_file_may_have_blanks_and_a_second_column(tmp_path: Path, split: str) -> None:
    assert read(tmp_path, split=split).box_offsets.tolist() == [0, 1, 3, 3]


def test_boxes_of_other_categories_vanish(tmp_path: Path) -> None:
    index = read(tmp_path, categories=["dog"])
    assert index.boxes_xywh.tolist() == [[1.5, 2, 5.5, 7]]
    assert len(index) == 3


def test_a_category_is_known_if_any_file_has_it(tmp_path: Path) -> None:
    assert read(tmp_path, split="c", categories=["dog"]).boxes_xywh.shape == (0, 4)
    with pytest.raises(DataError, match=r"^dataset.categories: .*got 'dgo'; it has 'cat', 'dog'"):
        read(tmp_path / "again", categories=["dgo"])


@pytest.mark.parametrize(
    ("wrong", "reason", "found"),
    [
        (box(7, 3, 7, 3), "box without extent", "6, 2, 0, 0"),
        (box(7, 3, 9, 3), "box without extent", "6, 2, 3, 0"),
        (box(7, 3, 4, 5), "box without extent", "6, 2, -3, 3"),
        (box("nan", 3, 9, 9), "box not finite", "nan, 2, nan, 7"),
        (box("-inf", 3, "-inf", 9), "box not finite", "-inf, 2, nan, 7"),
        (box("-1e308", 3, "1e308", 9), "box not finite", "-1e+308, 2, inf, 7"),
        (box(42, 3, 44, 9), "box outside the image", "41, 2, 3, 7"),
        (box(1, "x", 2, 2), "box not of four numbers", "'1', 'x', '2', '2'"),
        ("<bndbox/>", "box not of four numbers", "'', '', '', ''"),
        ("", "without bndbox", ""),
        (DIFFICULT_YES + box(1, 1, 2, 2), "difficult neither 0 nor 1", "'yes'"),
    ],
)
def test_faulty_objects_are_left_out_and_named(
    tmp_path: Path, wrong: str, reason: str, found: str
) -> None:
    index = read(tmp_path, FILES | {"a": image(thing(box(1, 1, 2, 2)), thing(wrong))})
    assert index.left_out == (LeftOut("a.jpg", 2, reason, found),)
    assert index.boxes_xyxy(1).tolist() == [[0, 0, 2, 2]]


BROKEN, NO_SIZE = "with a broken annotation file", "without a size"


@pytest.mark.parametrize(
    ("text", "reason", "found"),
    [
        ("", BROKEN, "a.xml: no element found: line 1, column 0"),
        (image()[:-9], BROKEN, "a.xml: unclosed token: line 1, column 106"),
        (f'<?xml version="1.0" encoding="no"?>{image()}', BROKEN, "a.xml: unknown encoding: no"),
        (f'<?xml version="1.0" encoding="big5"?>{image()}', BROKEN, "a.xml: multi-byte"),
        (image(size=""), NO_SIZE, "height '', width ''"),
        (image(size=SIZE.replace("41", "0")), NO_SIZE, "height '30', width '0'"),
        (image(size=SIZE.replace("30", "x")), NO_SIZE, "height 'x', width '41'"),
        (image(size=SIZE.replace("30", str(2**31))), NO_SIZE, "height '2147483648', width '41'"),
    ],
)
def test_an_image_whose_file_says_nothing_is_left_out_and_named(
    tmp_path: Path, text: str, reason: str, found: str
) -> None:
    index = read(tmp_path, FILES | {"a": text})
    (fault,) = index.left_out
    assert (fault.image, fault.annotation, fault.reason) == ("a", None, reason)
    assert fault.found.startswith(found)
    assert "\n" not in str(fault)
    assert index.file_names() == ["c.jpeg", "other.png"]
    assert index.image_ids.tolist() == [1, 3]  # as the split numbers them
    assert index.box_offsets.tolist() == [0, 1, 1]


def test_an_image_without_annotations_is_left_out_and_named(tmp_path: Path) -> None:
    index = read(tmp_path, split="no\na\n")
    assert index.left_out == (LeftOut("no", None, "without annotation file", "no.xml"),)
    assert (index.file_names(), index.image_ids.tolist()) == (["a.jpg"], [2])
    with pytest.raises(
        DataError, match=r"train\.txt: expected images, got none .*; image 'no': wi"
    ):
        read(tmp_path / "again", split="no\nneither")


def test_an_image_without_a_file_keeps_its_objects(tmp_path: Path) -> None:
    """It is for those who look at images to leave it out; a score counts its objects as missed."""
    index = read(tmp_path, FILES | {"d": image(thing(box(1, 1, 2, 2)))}, "sub/d\nd\n")
    assert index.file_names() == ["d.jpg"]
    assert index.boxes_xyxy(0).tolist() == [[0, 0, 2, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'<!DOCTYPE x [<!ENTITY e "e">]>{image()}', r"a\.xml: not a VOC .*EntitiesForbidden"),
        (
            f'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>{image()}',
            r"a\.xml: not a VOC .*EntitiesForbidden",
        ),
        (image(filename="c.jpeg"), r"every file name once, got 'c\.jpeg' more than once"),
    ],
)
def test_what_is_no_accident_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, FILES | {"a": text})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("", r"^expected at least one image, got none: .*train\.txt$"),
        ("\n \r\n", r"^expected at least one image, got none: .*train\.txt$"),
        ("a\na", r"train\.txt: expected every file name once, got 'a\.jpg' more than once"),
        ("../Main/a", r"train\.txt: expected .*, got '\.\./Main/a'$"),
    ],
)
def test_a_broken_split_is_one_line(tmp_path: Path, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, FILES | {"d": image()}, split)


def test_missing_folders_and_splits_are_named(tmp_path: Path) -> None:
    write(tmp_path, FILES, "a\n")
    (tmp_path / "Main" / "cat_val.txt").touch()
    (tmp_path / "Main" / "val.txt").touch()
    xml, images, split = (
        tmp_path / name for name in ("Annotations", "JPEGImages", "Main/val2.txt")
    )
    for pieces, message in [
        ((tmp_path / "no", images, split), "^expected a folder of VOC annotations, got nothing at"),
        ((xml, tmp_path / "no", split), "^expected a folder of images, got nothing at"),
        ((xml, images, split), r"nothing at .*val2\.txt; splits there: val, train, cat_val$"),
        ((xml, images, tmp_path / "no" / "val.txt"), r"val\.txt; splits there: none$"),
    ]:
        with pytest.raises(DataError, match=message):
            read_voc(*pieces, categories=None, keep_empty=True)


def real(root: Path, split: str) -> Index:
    pieces = root / "Annotations", root / "JPEGImages", root / "ImageSets" / "Main" / f"{split}.txt"
    return read_voc(*pieces, categories=None, keep_empty=True)


@pytest.mark.parametrize(
    ("split", "num_images", "num_boxes", "num_difficult"),
    [("train", 70, 188, 20), ("val", 30, 85, 18)],
)
def test_voc_mini(
    data_root: Path, split: str, num_images: int, num_boxes: int, num_difficult: int
) -> None:
    index = real(data_root / "voc_mini", split)
    assert (len(index), len(index.areas), index.ignore.sum()) == (
        num_images,
        num_boxes,
        num_difficult,
    )
    assert index.left_out == ()


def test_bccd_loses_its_two_boxes_without_extent(data_root: Path) -> None:
    splits = [real(data_root / "bccd_voc", name) for name in ("train", "val", "test")]
    assert [len(index) for index in splits] == [205, 87, 72]
    assert [len(index.left_out) for index in splits] == [1, 1, 0]
    assert sum(len(index.areas) for index in splits) == 4888 - 2
    assert {one for index in splits for one in index.left_out} == {
        LeftOut("BloodImage_00338.jpg", 13, "box without extent", "503, 336, 0, 0"),
        LeftOut("BloodImage_00343.jpg", 4, "box without extent", "180, 328, 0, 0"),
    }
