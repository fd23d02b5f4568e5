"""Misses of images small enough to count by hand, and what stands in the CSV."""

import csv
import math
from pathlib import Path

import numpy as np

from rpn_train.misses import ImageMisses, image_misses, worst_images, write_misses
from rpn_train.recall import ObjectArrays, ProposalArrays, score_recall

# Boxes are 10 px high and start at x = 0 unless said; the IoU of two is the ratio of their widths.
OBJECTS = [
    [],  # no object
    [
        (0, 0, 100, 10, False),  # found by the proposal of 80 px: IoU 0.8
        (0, 50, 30, 10, False),  # missed: 10 of 30 px by the second proposal, IoU 1/3
        (800, 0, 30, 10, False),  # missed, with IoU 0
        (900, 0, 50, 10, True),  # ignored
        (700, 0, 40, 10, False),  # the worst: its proposal is not of the two best, and it is larger
    ],
    [(0, 0, 100, 10, False), (0, 0, 90, 10, False)],  # one proposal for both: see below
    [(5, 5, 0.1, 1 / 3, False)],  # found exactly
    [(0, 0, 7, 9, False)],  # no proposals
]
PROPOSALS = [
    [(0, 0, 50, 10, 0.5)],
    [(700, 0, 40, 10, -1.0), (0, 50, 10, 10, 2.0), (0, 0, 80, 10, 3.0)],
    [(0, 0, 60, 10, 1.0)],  # IoU 0.6 and 0.667: finds the second, the first is missed at 0.6
    [(5, 5, 0.1, 1 / 3, 0.0)],
    [],
]


def arrays() -> tuple[ProposalArrays, ObjectArrays]:
    def flat(images: list[list[tuple[float, ...]]]) -> tuple[np.ndarray, np.ndarray]:
        rows = np.array([row for image in images for row in image], np.float64)
        return rows, np.cumsum([0, *map(len, images)])

    proposals, ends = flat(PROPOSALS)
    objects, object_ends = flat(OBJECTS)
    boxes = objects[:, :4]
    ignore = objects[:, 4].astype(bool)
    return (
        ProposalArrays(proposals[:, :4], proposals[:, 4], ends),
        ObjectArrays(boxes, boxes[:, 2] * boxes[:, 3], ignore, object_ends),
    )


def misses() -> ImageMisses:
    proposals, objects = arrays()
    recall = score_recall(proposals, objects, max_proposals=(2, 1))
    return image_misses(proposals, objects, recall)


def test_hand_counted() -> None:
    found = misses()
    assert found.objects.tolist() == [0, 4, 2, 1, 1]
    assert found.found_iou50.tolist() == [0, 1, 1, 1, 0]
    assert found.found_iou70.tolist() == [0, 1, 0, 1, 0]
    nan = math.nan
    np.testing.assert_array_equal(found.worst_iou, [nan, 0, 0.6, nan, 0])
    none = [nan] * 4
    worst = [none, [700, 0, 40, 10], [0, 0, 100, 10], none, [0, 0, 7, 9]]
    np.testing.assert_array_equal(found.worst_xywh, worst)


def test_the_lowest_iou_comes_before_the_largest_object() -> None:
    boxes = np.array([[0.0, 0, 100, 10], [0, 20, 10, 10], [0, 40, 0, 0]])
    objects = ObjectArrays(boxes, np.array([1000.0, 100, 0]), np.zeros(3, bool), np.array([0, 3]))
    near = np.array([[0.0, 0, 40, 10], [0, 20, 3, 10], [0, 40, 0, 0]])  # IoU 0.4, 0.3; no extent
    proposals = ProposalArrays(near, np.zeros(3), np.array([0, 3]))
    for first in (0, 1):  # without the third, whose IoU is 0, the second is the worst
        ignore = np.array([False, False, first == 1])
        some = ObjectArrays(boxes, objects.areas, ignore, objects.offsets)
        found = image_misses(proposals, some, score_recall(proposals, some))
        np.testing.assert_allclose(found.worst_iou, [(0.0, 0.3)[first]])
        assert found.worst_xywh.tolist() == [boxes[2 - first].tolist()]


def test_no_images_and_no_objects() -> None:
    for num_images in (0, 3):
        offsets, boxes = np.zeros(num_images + 1, np.int64), np.zeros((0, 4))
        proposals = ProposalArrays(boxes, np.zeros(0), offsets)
        objects = ObjectArrays(boxes, np.zeros(0), np.zeros(0, bool), offsets)
        found = image_misses(proposals, objects, score_recall(proposals, objects))
        assert found.objects.tolist() == found.found_iou50.tolist() == [0] * num_images
        assert found.worst_xywh.shape == (num_images, 4)
        assert np.isnan(found.worst_iou).all()
        assert worst_images(found, 5).tolist() == []


def test_the_worst_images_miss_most_then_the_larger_share_then_come_first() -> None:
    objects = np.array([9, 5, 2, 5, 3, 0, 2])
    missed = np.array([2, 3, 2, 3, 0, 0, 2])
    nothing = np.zeros(7)
    rows = ImageMisses(objects, objects - missed, nothing, nothing, np.zeros((7, 4)))
    assert worst_images(rows, 100).tolist() == [1, 3, 2, 6, 0]
    assert worst_images(rows, 2).tolist() == [1, 3]


def test_the_csv_reads_back_to_the_same_numbers_and_names(tmp_path: Path) -> None:
    names = ["a.jpg", 'b,"c".jpg', "d\ne.jpg", "f\rg.jpg", "Grüße 图.jpg"]
    found = misses()
    found.worst_xywh[4] = [1e-7, 1 / 3, 2**53, 0.1]
    path = tmp_path / "misses.csv"
    write_misses(path, found, np.array([7, 2**40, 3, -1, 0]), names)
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert ",".join(header) == (
        "file_name,image_id,objects,found_iou50,found_iou70,"
        "worst_iou,worst_x,worst_y,worst_w,worst_h"
    )
    assert [row[0] for row in rows] == names
    assert rows[0][1:] == ["7", "0", "0", "0", "", "", "", "", ""]
    assert rows[1][1:] == [str(2**40), "4", "1", "1", "0", "700", "0", "40", "10"]
    assert rows[3][1:] == ["-1", "1", "1", "1", "", "", "", "", ""]
    assert rows[4][6] == "0.0000001"  # no exponent
    assert [float(cell) for cell in rows[4][6:]] == [1e-7, 1 / 3, 2**53, 0.1]
    assert [file.name for file in tmp_path.iterdir()] == ["misses.csv"]
