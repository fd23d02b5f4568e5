"""Index: order, what is left out, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpn_train.data.faults import NO_OBJECT, FaultError, LeftOut
from rpn_train.data.index import Index, build_index, without_images
from rpn_train.errors import DataError

NAN, INF = float("nan"), float("inf")

# Three images, the middle one without boxes; boxes of the two others come in turn.
IMAGES: dict[str, Any] = {
    "image_ids": np.array([7, 5, 6]),
    "file_names": ["é.jpg", "sub/empty.jpg", "b.png"],
    "sizes": np.array([[11, 13], [5, 7], [480, 641]]),
}
BOXES: dict[str, Any] = {
    "box_rows": np.array([2, 0, 2, 0]),
    "box_ids": np.array([40, 41, 42, 43]),
    "boxes_xywh": np.array([[600.1, 3, 80, 5], [1, 2, 3, 4], [0, 0, 7, 1.5], [-2, 0, 3, 11]]),
    "areas": np.array([9.5, NAN, NAN, 2]),
    "ignore": np.array([False, False, True, True]),
}


def make(*, keep_empty: bool = True, **changes: Any) -> Index:
    arrays = {**IMAGES, **BOXES, **changes}
    return build_index(source=Path("a.json"), root=Path("root"), keep_empty=keep_empty, **arrays)


def one_box(box: list[float], ignore: bool = False) -> dict[str, Any]:
    return {
        "box_rows": np.array([2]),
        "box_ids": np.array([12]),
        "boxes_xywh": np.array([box], np.float64),
        "areas": np.array([NAN]),
        "ignore": np.array([ignore]),
    }


def test_boxes_are_sorted_by_image_and_keep_the_order_of_the_file() -> None:
    index = make()
    assert len(index) == 3
    assert [index.file_name(i) for i in range(3)] == IMAGES["file_names"]
    np.testing.assert_array_equal(index.image_ids, [7, 5, 6])
    np.testing.assert_array_equal(index.sizes, IMAGES["sizes"])
    np.testing.assert_array_equal(index.box_offsets, [0, 2, 2, 4])
    np.testing.assert_array_equal(index.boxes_xywh, BOXES["boxes_xywh"][[1, 3, 0, 2]])
    np.testing.assert_array_equal(index.areas, [3 * 4, 2, 9.5, 7 * 1.5])
    np.testing.assert_array_equal(index.boxes_xyxy(0), np.float32([[1, 2, 4, 6], [-2, 0, 1, 11]]))
    assert index.boxes_xyxy(1).shape == (0, 4)
    # 600.1 + 80 is summed in float64 and then rounded, once.
    assert index.boxes_xyxy(2)[0].tolist() == [np.float32(600.1), 3, np.float32(680.1), 8]
    assert [index.ignored(i).tolist() for i in range(3)] == [[False, True], [], [False, True]]
    assert index.left_out == ()


def test_types_are_compact_and_nothing_handed_out_is_shared() -> None:
    index = make()
    types = {name: value.dtype.name for name, value in vars(index).items() if name[-1] == "s"}
    assert types.pop("name_offsets") == types.pop("box_offsets") == types.pop("image_ids")
    assert types == {"sizes": "int32", "name_bytes": "uint8", "areas": "float64"}
    assert (index.boxes_xywh.dtype, index.ignore.dtype) == (np.float64, np.bool_)
    assert index.boxes_xyxy(1).dtype == np.float32
    index.ignored(0)[:] = True
    index.boxes_xyxy(0)[:] = 0
    assert index.ignored(0).tolist() == [False, True]
    assert index.boxes_xyxy(0)[0].tolist() == [1, 2, 4, 6]
    again = pickle.loads(pickle.dumps(index))  # what a spawned worker is given
    assert again.file_name(0) == "é.jpg"


def test_images_without_an_object_are_left_out_on_request_and_named() -> None:
    ignore = np.array([False, True, False, True])  # image 0 has nothing but boxes to ignore
    assert len(make(ignore=ignore)) == 3
    index = make(ignore=ignore, keep_empty=False)
    assert len(index) == 1
    assert (index.image_ids[0], index.file_name(0)) == (6, "b.png")
    np.testing.assert_array_equal(index.sizes, [[480, 641]])
    np.testing.assert_array_equal(index.box_offsets, [0, 2])
    np.testing.assert_array_equal(index.boxes_xywh, BOXES["boxes_xywh"][[0, 2]])
    names = ("é.jpg", "sub/empty.jpg")
    assert index.left_out == tuple(LeftOut(name, None, NO_OBJECT) for name in names)
    assert not any(one.is_fault for one in index.left_out)


@pytest.mark.parametrize(
    ("box", "reason", "found"),
    [
        ([504, 337, 0, 0], "box without extent", "504, 337, 0, 0"),
        ([504, 337, -3.5, 9], "box without extent", "504, 337, -3.5, 9"),
        ([504, 337, 1e-6, 9], "box without extent", "504, 337, 1e-06, 9"),  # none left in float32
        ([NAN, 0, 1, 1], "box not finite", "nan, 0, 1, 1"),
        ([0, 0, INF, 1], "box not finite", "0, 0, inf, 1"),
        ([0, -INF, 1, INF], "box not finite", "0, -inf, 1, inf"),
        ([0, 0, 1, 1e39], "box not finite", "0, 0, 1, 1e+39"),  # in float32
        ([641, 0, 5, 5], "box outside the image", "641, 0, 5, 5"),
        ([0, 480, 5, 5], "box outside the image", "0, 480, 5, 5"),
        ([-5, 0, 5, 5], "box outside the image", "-5, 0, 5, 5"),
        ([0, -5.5, 5, 5], "box outside the image", "0, -5.5, 5, 5"),
    ],
)
def test_faulty_boxes_are_left_out_and_named(box: list[float], reason: str, found: str) -> None:
    index = make(**one_box(box))
    assert index.left_out == (LeftOut("b.png", 12, reason, found),)
    assert str(index.left_out[0]) == f"annotation 12 of image 'b.png': {reason} ({found})"
    assert index.left_out[0].is_fault
    assert index.boxes_xywh.shape == (0, 4)
    np.testing.assert_array_equal(index.box_offsets, [0, 0, 0, 0])


@pytest.mark.parametrize("box", [[-4, -4, 5, 5], [640, 479, 90, 90], [-9, -9, 999, 999]])
def test_boxes_over_the_border_are_kept_as_annotated(box: list[float]) -> None:
    index = make(**one_box(box))
    assert index.boxes_xywh.tolist() == [box]
    assert index.left_out == ()


def test_what_is_left_out_is_in_the_order_of_the_judges() -> None:
    """The reader's, then boxes, then images without an object: here 'b.png' for a faulty box."""
    boxes = BOXES["boxes_xywh"].copy()
    boxes[0] = 0
    seen = LeftOut("seen.jpg", None, "missing")
    index = make(boxes_xywh=boxes, left_out=[seen], keep_empty=False)
    assert index.left_out == (
        seen,
        LeftOut("b.png", 40, "box without extent", "0, 0, 0, 0"),
        LeftOut("sub/empty.jpg", None, NO_OBJECT),
        LeftOut("b.png", None, NO_OBJECT),
    )
    assert index.image_ids.tolist() == [7]
    assert index.boxes_xywh.tolist() == [[1, 2, 3, 4], [-2, 0, 3, 11]]


def test_images_with_a_fault_are_taken_out_with_their_boxes() -> None:
    whole = make(left_out=[LeftOut("seen.jpg", None, "missing")])
    index = without_images(whole, {0: FaultError("missing"), 1: FaultError("not readable", "gif")})
    assert index.left_out == (
        LeftOut("seen.jpg", None, "missing"),
        LeftOut("é.jpg", None, "missing"),
        LeftOut("sub/empty.jpg", None, "not readable", "gif"),
    )
    assert (len(index), index.file_names(), index.image_ids.tolist()) == (1, ["b.png"], [6])
    assert index.sizes.tolist() == [[480, 641]]
    assert index.boxes_xywh.tolist() == [[600.1, 3, 80, 5], [0, 0, 7, 1.5]]
    assert (index.areas.tolist(), index.ignore.tolist()) == ([9.5, 7 * 1.5], [False, True])
    assert without_images(index, {}) is index
    assert without_images(whole, {1: FaultError("missing")}).box_offsets.tolist() == [0, 2, 4]


def test_images_with_a_fault_may_keep_their_objects() -> None:
    whole = make()
    index = without_images(whole, {2: FaultError("missing")}, keep_objects=True)
    assert index.left_out == (LeftOut("b.png", None, "missing"),)
    for name, value in vars(whole).items():
        assert name == "left_out" or getattr(index, name) is value


def test_that_no_image_can_be_used_counts_the_faults() -> None:
    faults = {row: FaultError("missing") for row in range(3)}
    message = (
        r"^root: .*got none that can be used: 3 x image missing; first image 'é.jpg': missing$"
    )
    with pytest.raises(DataError, match=message):
        without_images(make(), faults)
    assert len(without_images(make(), faults, keep_objects=True)) == 3


def many(boxes: list[list[float]]) -> dict[str, Any]:
    """Boxes of the image of 641 x 480."""
    count = len(boxes)
    return {
        "box_rows": np.full(count, 2),
        "box_ids": np.arange(count),
        "boxes_xywh": np.array(boxes, np.float64),
        "areas": np.full(count, NAN),
        "ignore": np.zeros(count, np.bool_),
    }


SHARES = [[0.1, 0.2, 0.3, 1.0]]
CORNERS = [[400, 300, 500, 400]]  # as xywh it ends at 900, 700
SOUND = [[0, 0, 10, 10]]  # which is a box in either format


def test_boxes_of_another_format_are_refused_if_there_are_enough_to_tell() -> None:
    with pytest.raises(
        DataError, match=r"^a\.json: expected boxes in pixels, got shares of the im"
    ):
        make(**many(10 * SHARES))
    with pytest.raises(DataError, match=r"got what looks like x1, y1, x2, y2: .*, 30% of them rea"):
        make(**many(3 * CORNERS + 7 * SOUND))
    for sound in [9 * SHARES, 9 * CORNERS, 98 * SHARES + 2 * SOUND, 2 * CORNERS + 8 * SOUND]:
        assert make(**many(sound)).left_out == ()
    tall = [[630, 1, 5, 480]]  # reaches out, and is no (x1, y1, x2, y2): 5 < 630
    assert make(**many(98 * CORNERS + 2 * tall)).left_out == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {key: value[:0] for key, value in {**IMAGES, **BOXES}.items()},
            r"^expected at least one image, got none: a\.json$",
        ),
        (
            {**one_box([1, 1, 1, 1], ignore=True), "keep_empty": False},
            r"^expected at least one image with an object, got none: a\.json$",
        ),
        ({"image_ids": np.array([5, 6, 5])}, r"every image id once, got 5 more than once"),
        ({"file_names": ["a", "b", "a"]}, r"every file name once, got 'a' more than once"),
        ({"file_names": ["a", "/b", "c"]}, r"inside the image folder, got '/b'"),
        ({"file_names": ["a", "b/../../c", "d"]}, r"inside the image folder, got 'b/../../c'"),
        ({"file_names": ["a", "b", "..\\c"]}, r"inside the image folder, got '\.\.\\\\c'"),
        ({"file_names": ["a", "b", ""]}, r"inside the image folder, got ''"),
        ({"file_names": ["a", "b\0", "c"]}, r"inside the image folder, got 'b\\x00'"),
        ({"sizes": np.array([[1, 1], [5, 0], [1, 1]])}, r"got \(5, 0\) for image 'sub/empty.jpg'"),
        ({"sizes": np.array([[1, 1], [1, 1], [2**31, 1]])}, r"got \(2147483648, 1\) for image"),
    ],
)
def test_what_cannot_be_a_split_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        make(**changes)
    assert "\n" not in str(error.value)


def test_dots_in_a_name_are_harmless() -> None:
    assert make(file_names=["a..b", "...", "c/..d"]).file_name(2) == "c/..d"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "in").touch()
    (root / "to_in").symlink_to("in")
    (root / "to_out").symlink_to("../outside")
    (tmp_path / "alias").symlink_to("root")  # the folder itself may be a link
    arrays = {**IMAGES, **BOXES, "file_names": ["in", "to_in", "to_out"]}
    index = build_index(source=Path("a"), root=tmp_path / "alias", keep_empty=True, **arrays)
    assert index.path(0) == index.path(1) == (root / "in").resolve()
    with pytest.raises(DataError, match=r"^expected an image in .*alias, got a link to .*outside$"):
        index.path(2)
