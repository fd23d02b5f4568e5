"""COCO files: exact arrays from small ones, one line for each broken one, pycocotools' on real."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from rpn_train.data.coco import read_coco
from rpn_train.data.faults import NO_OBJECT, LeftOut
from rpn_train.data.index import Index
from rpn_train.errors import DataError

CAT, DOG = 17, 3  # ids need not be in order, nor start at 1


def content() -> dict[str, Any]:
    """Annotations in no order; image 9 has a crowd only, image 2 nothing, annotation 4 no area."""
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 9, "file_name": "nine.jpg", "height": 30, "width": 41, "license": 1},
            {"id": 2, "file_name": "two.jpg", "height": 20, "width": 21},
            {"id": 5, "file_name": "sub/five.jpg", "height": 10, "width": 11},
        ],
        "annotations": [
            {"id": 8, "image_id": 5, "category_id": DOG, "bbox": [1.25, 2, 3, 4.5], "area": 7.5}
            | {"segmentation": [[1, 2, 3, 4, 5, 6]], "iscrowd": 0},
            {"id": 1, "image_id": 9, "category_id": CAT, "bbox": [0, 0, 20, 10], "area": 150}
            | {"segmentation": {"counts": [1], "size": [30, 41]}, "iscrowd": 1},
            {"id": 4, "image_id": 5, "category_id": CAT, "bbox": [0.1, 0.2, 5, 5.5]},
        ],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
    }


def write(folder: Path, file: Any) -> tuple[Path, Path]:
    annotations = folder / "instances.json"
    annotations.write_bytes(file if isinstance(file, bytes) else json.dumps(file).encode())
    return annotations, folder / "images"  # which is not looked at


def read(
    folder: Path, file: Any, categories: list[str] | None = None, keep_empty: bool = True
) -> Index:
    return read_coco(*write(folder, file), categories=categories, keep_empty=keep_empty)


def test_arrays(tmp_path: Path) -> None:
    index = read(tmp_path, content())
    np.testing.assert_array_equal(index.image_ids, [9, 2, 5])
    np.testing.assert_array_equal(index.sizes, [[30, 41], [20, 21], [10, 11]])
    np.testing.assert_array_equal(index.box_offsets, [0, 1, 1, 3])
    boxes = [[0, 0, 20, 10], [1.25, 2, 3, 4.5], [0.1, 0.2, 5, 5.5]]
    np.testing.assert_array_equal(index.boxes_xywh, boxes)
    np.testing.assert_array_equal(index.areas, [150, 7.5, 5 * 5.5])
    np.testing.assert_array_equal(index.ignore, [True, False, False])
    assert index.path(2) == (tmp_path / "images/sub/five.jpg").resolve()
    assert index.left_out == ()


def test_an_image_with_a_crowd_alone_is_empty(tmp_path: Path) -> None:
    index = read(tmp_path, content(), keep_empty=False)
    assert index.image_ids.tolist() == [5]
    names = ("nine.jpg", "two.jpg")
    assert index.left_out == tuple(LeftOut(name, None, NO_OBJECT) for name in names)


def test_boxes_of_other_categories_vanish(tmp_path: Path) -> None:
    index = read(tmp_path, content(), categories=["dog"])
    assert index.image_ids.tolist() == [9, 2, 5]
    assert index.boxes_xywh.tolist() == [[1.25, 2, 3, 4.5]]
    assert index.box_offsets.tolist() == [0, 0, 0, 1]
    assert index.left_out == ()


def test_images_without_annotations(tmp_path: Path) -> None:
    index = read(tmp_path, content() | {"annotations": []})
    assert len(index) == 3
    assert index.boxes_xyxy(2).shape == (0, 4)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in content().items() if name != key}


def changed(group: str, row: int, **values: Any) -> dict[str, Any]:
    file = content()
    file[group][row] |= values
    return file


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", r"^expected a COCO annotation file, got an empty one: .*instances\.json$"),
        (
            json.dumps(content()).encode()[:-9],
            r"instances\.json: .* truncated after byte 675$",
        ),
        (json.dumps(content()).encode()[:-9] + b"}}", r"malformed: .* \(byte 675\)$"),
        (b"\x80" + json.dumps(content()).encode(), r"not a COCO annotation file: .*malformed"),
        (b'{"images": [{"file_name": "\xff"}]}', r"not a COCO annotation file: .*utf-8"),
        (b'{"x": ' + b"[" * 9999, r"not a COCO annotation file: .*recursion"),
        ([], r"Expected `object`, got `array`$"),
        (without("annotations"), r"missing required field `annotations`$"),
        (without("images"), r"missing required field `images`$"),
        (changed("annotations", 2, image_id=2**63), r"`\$\.annotations\[2\]\.image_id`$"),
        (changed("images", 0, file_name=None), r"`str`, got `null`.*images\[0\]\.file_name"),
        (changed("images", 0, height=0), r"instances\.json: .*got \(0, 41\) for image 'nine\.jpg'"),
        (changed("images", 1, id=5), r"every image id once, got 5 more than once"),
        (changed("images", 0, file_name="../x"), r"inside the image folder, got '\.\./x'"),
        (changed("annotations", 0, id=4), r"every annotation id once, got 4 more than once"),
        (content() | {"images": []}, r"at least one image, got none"),
        (content() | {"images": [], "annotations": []}, r"at least one image, got none"),
        (changed("images", 1, file_name="\ud800"), r"instances\.json: .*surrogates not allowed$"),
        (changed("annotations", 1, area="7"), r"`float`, got `str`.*annotations\[1\]\.area`$"),
        (changed("annotations", 1, iscrowd=True), r"`int`, got `bool`.*\[1\]\.iscrowd`$"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, file: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, file)
    assert "\n" not in str(error.value)
    assert "instances.json" in str(error.value)


@pytest.mark.parametrize(
    ("file", "categories", "message"),
    [
        (content(), ["cat", "dgo"], r"got 'dgo'; it has 'cat', 'dog'$"),
        (content(), ["zebra"], r"got 'zebra'; it has 'cat', 'dog'$"),
        (without("categories"), ["cat"], r"got 'cat'; it has none$"),
        (content(), [], r"expected at least one name, or null for all, got none$"),
    ],
)
def test_an_unknown_category_is_refused(
    tmp_path: Path, file: Any, categories: list[str], message: str
) -> None:
    with pytest.raises(DataError, match="^dataset.categories: .*" + message):
        read(tmp_path, file, categories)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for file, given in (
        (tmp_path / "no.json", r"nothing at .*no\.json"),
        (tmp_path, "a folder at"),
    ):
        with pytest.raises(DataError, match=f"^expected a COCO annotation file, got {given}"):
            read_coco(file, tmp_path, categories=None, keep_empty=True)


BOX = "box not of four numbers"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("bbox", "reason", "found"),
    [
        ([1, 2, 3], BOX, "[1, 2, 3]"),
        ([1, 2, 3, 4, 5], BOX, "[1, 2, 3, 4, 5]"),
        ([], BOX, "[]"),
        ([1, 2, 3, "4"], BOX, '[1, 2, 3, "4"]'),
        ([1, 2, 3, None], BOX, "[1, 2, 3, null]"),
        ([1, 2, 3, True], BOX, "[1, 2, 3, true]"),
        ([1, 2, 3, 10**400], BOX, "[1, 2, 3, 1" + "0" * 69),  # no float; cut after 80 characters
        ({"x": 1}, BOX, '{"x": 1}'),
        ("1234", BOX, '"1234"'),
        (None, BOX, "null"),
        (7, BOX, "7"),
        ([1, 2, 3, NAN], "box not finite", "1, 2, 3, nan"),
        ([-INF, 2, INF, 4], "box not finite", "-inf, 2, inf, 4"),
        ([1, 2, 1e308, 1e308], "box not finite", "1, 2, 1e+308, 1e+308"),
    ],
)
def test_a_faulty_box_is_left_out_and_named(
    tmp_path: Path, bbox: Any, reason: str, found: str
) -> None:
    """The rest of the file is read as if it were not there."""
    index = read(tmp_path, changed("annotations", 0, bbox=bbox))
    assert index.left_out == (LeftOut("sub/five.jpg", 8, reason, found),)
    assert index.boxes_xywh.tolist() == [[0, 0, 20, 10], [0.1, 0.2, 5, 5.5]]
    np.testing.assert_array_equal(index.areas, [150, 5 * 5.5])
    assert index.ignore.tolist() == [True, False]


def test_an_annotation_without_a_box_is_left_out_and_named(tmp_path: Path) -> None:
    file = content()
    del file["annotations"][0]["bbox"]
    assert read(tmp_path, file).left_out == (LeftOut("sub/five.jpg", 8, BOX, "null"),)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    index = read(tmp_path, b"\xef\xbb\xbf" + json.dumps(content()).encode())
    assert (len(index), index.left_out) == (3, ())


def test_an_area_that_is_not_finite_is_that_of_the_box(tmp_path: Path) -> None:
    index = read(tmp_path, changed("annotations", 0, area=NAN))
    np.testing.assert_array_equal(index.areas, [150, 3 * 4.5, 5 * 5.5])
    assert index.left_out == ()


@pytest.mark.parametrize("image_id", [6, 99, -1])
def test_an_annotation_of_an_unknown_image_is_left_out_and_named(
    tmp_path: Path, image_id: int
) -> None:
    index = read(tmp_path, changed("annotations", 1, image_id=image_id))
    assert index.left_out == (LeftOut(f"id {image_id}", 1, "of an image that the file has not"),)
    assert index.box_offsets.tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("split", "num_images", "num_empty", "num_boxes", "num_crowd"),
    [("train2017", 185, 2, 1712, 13), ("val2017", 175, 2, 1270, 10)],
)
def test_real_data_is_that_of_pycocotools(
    data_root: Path, split: str, num_images: int, num_empty: int, num_boxes: int, num_crowd: int
) -> None:
    file = data_root / "coco_mini" / "annotations" / f"instances_{split}.json"
    images = data_root / "coco_mini" / split
    index = read_coco(file, images, categories=None, keep_empty=True)
    assert (len(index), len(index.areas), index.ignore.sum()) == (num_images, num_boxes, num_crowd)
    assert index.left_out == ()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(file)
    for i, image_id in enumerate(index.image_ids.tolist()):
        image, rows = coco.imgs[image_id], slice(*index.box_offsets[i : i + 2])
        of_image = sorted(coco.imgToAnns[image_id], key=lambda a: a["category_id"])  # stable
        assert index.file_name(i) == image["file_name"]
        assert index.sizes[i].tolist() == [image["height"], image["width"]]
        assert index.boxes_xywh[rows].tolist() == [a["bbox"] for a in of_image]
        assert index.areas[rows].tolist() == [a["area"] for a in of_image]
        assert index.ignored(i).tolist() == [a["iscrowd"] == 1 for a in of_image]
    assert len(read_coco(file, images, categories=None, keep_empty=False)) == num_images - num_empty
    cats = read_coco(file, images, categories=["cat"], keep_empty=False)
    assert sorted(cats.image_ids) == sorted(coco.getImgIds(catIds=coco.getCatIds(["cat"])))
