"""Recall against COCOeval, to the last bit, and against a plain form of the greedy protocol."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rpn_train.errors import ConfigError, DataError
from rpn_train.recall import (
    IOU_THRESHOLDS,
    SIZES,
    ObjectArrays,
    ProposalArrays,
    boxes_to_xywh,
    score_recall,
)

LIMITS = (10, 1, 3, 1000)  # not in order, and more than there are proposals


def draw(seed, num_images, most_proposals=30, most_objects=9, unit=1.0):
    """Coarse grid and few scores: ties everywhere. Crowds, empty images, areas on the borders.

    With a unit like 0.1 the ties are those of real arithmetic: rounding decides, and has to be that
    of pycocotools.
    """
    rng = np.random.default_rng(seed)

    def boxes(counts):
        corners = rng.integers(0, 3, (counts.sum(), 2))
        return np.hstack([corners, rng.integers(2, 6, (counts.sum(), 2))]) * unit

    def counts(most):
        return rng.integers(0, most + 1, num_images) * (rng.random(num_images) < 0.85)

    def offsets(counts):
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    of_proposals, of_objects = counts(most_proposals), counts(most_objects)
    scores = rng.integers(0, 8, of_proposals.sum()) / 7.0
    areas = rng.choice([0.0, 900.0, 1024.0, 4000.0, 9216.0, 2e4, 1e10, 2e10], of_objects.sum())
    ignore = rng.random(of_objects.sum()) < 0.2
    return (
        ProposalArrays(boxes(of_proposals), scores, offsets(of_proposals)),
        ObjectArrays(boxes(of_objects), areas, ignore, offsets(of_objects)),
    )


def coco(images, annotations):
    made = COCO()
    made.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
    made.createIndex()
    return made


def coco_eval(proposals, objects, max_proposals):
    """COCOeval's recall [T, A, N], and the rank [T, A, M] of the match of each object of a size."""
    # Ids start at 1: COCOeval stores the id of the match, so that an object with id 0 counts as
    # missed even when found. Ours has no ids.
    num_images = len(objects.offsets) - 1
    images = [{"id": i} for i in range(num_images)]
    owner = np.repeat(np.arange(num_images), np.diff(objects.offsets)).tolist()
    columns = (owner, objects.boxes_xywh.tolist(), objects.areas.tolist(), objects.ignore.tolist())
    truth = [
        {"id": j, "image_id": i, "category_id": 1, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for j, (i, box, area, crowd) in enumerate(zip(*columns, strict=True), start=1)
    ]
    owner = np.repeat(np.arange(num_images), np.diff(proposals.offsets)).tolist()
    columns = (owner, proposals.boxes_xywh.tolist(), proposals.scores.tolist())
    found = [
        {"id": j, "image_id": i, "category_id": 1, "bbox": box, "area": 1.0, "score": score}
        for j, (i, box, score) in enumerate(zip(*columns, strict=True), start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco(images, truth), coco(images, found), "bbox")
        evaluator.params.useCats = 0
        evaluator.params.maxDets = list(max_proposals)
        evaluator.evaluate()
        evaluator.accumulate()
    rank = np.full((len(IOU_THRESHOLDS), len(SIZES), len(truth)), -1)
    for i, image in enumerate(evaluator.evalImgs):  # sizes one after the other
        if image is None:
            continue
        rank_of = {0: -1} | {d: rank for rank, d in enumerate(image["dtIds"])}
        counted = np.array(image["gtIgnore"]) == 0
        columns = np.array(image["gtIds"], int)[counted] - 1
        matches = np.vectorize(rank_of.get, otypes=[int])(image["gtMatches"][:, counted])
        rank[:, i // num_images, columns] = matches
    order = [sorted(max_proposals).index(n) for n in max_proposals]
    recall = evaluator.eval["recall"][:, 0][:, :, order]
    return np.where(recall == -1, np.nan, recall), rank


def assert_equals_coco(proposals, objects, max_proposals):
    ours = score_recall(proposals, objects, max_proposals=max_proposals)
    recall, rank = coco_eval(proposals, objects, max_proposals)
    np.testing.assert_array_equal(ours.recall, recall)
    np.testing.assert_array_equal(ours.matched_rank, rank)


@pytest.mark.parametrize(("unit", "block_size"), [(1.0, 1), (0.1, 500), (0.37, 10**9)])
def test_equals_cocoeval_with_ties_crowds_and_empty_images(unit, block_size, monkeypatch):
    monkeypatch.setattr("rpn_train.recall.BLOCK_SIZE", block_size)
    assert_equals_coco(*draw(5, num_images=131, unit=unit), LIMITS)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 12), st.integers(0, 12),
    st.lists(st.integers(1, 15), min_size=1, max_size=3, unique=True),
)  # fmt: skip
def test_equals_cocoeval_on_small_sets(seed, num_images, proposals, objects, max_proposals):
    assert_equals_coco(*draw(seed, num_images, proposals, objects), max_proposals)


def test_equals_cocoeval_on_real_objects(data_root):
    """Real annotations; proposals are their boxes, shifted and scaled, in float32."""
    file = data_root / "coco_mini" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    rows = sorted(content["annotations"], key=lambda a: (a["image_id"], a["category_id"]))
    ids = sorted(image["id"] for image in content["images"])
    boxes = np.array([row["bbox"] for row in rows])
    owner = np.array([row["image_id"] for row in rows])
    crowd = np.array([row["iscrowd"] for row in rows], bool)
    offsets = np.append(np.searchsorted(owner, ids), len(rows))
    objects = ObjectArrays(boxes, np.array([float(row["area"]) for row in rows]), crowd, offsets)
    rng = np.random.default_rng(3)
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    noise = rng.normal(0, 0.15, (len(rows), 7, 4)) * np.tile(boxes[:, None, 2:], 2)
    corners = (corners[:, None] + noise).astype(np.float32).reshape(-1, 4)
    scores = rng.normal(size=len(corners)).astype(np.float32).astype(np.float64)
    assert_equals_coco(
        ProposalArrays(boxes_to_xywh(corners), scores, offsets * 7), objects, (3, 10, 100)
    )


def greedy_recall(proposals, objects, limit, size):
    """Recall [T] of one size at one N, as Detectron2's loop has it, plainly."""
    low, high = SIZES[size]
    covered = []
    for i in range(len(objects.offsets) - 1):
        mine = slice(proposals.offsets[i], proposals.offsets[i + 1])
        best = sorted(range(mine.start, mine.stop), key=lambda p: -proposals.scores[p])[:limit]
        here = [
            g
            for g in range(objects.offsets[i], objects.offsets[i + 1])
            if not objects.ignore[g] and low <= objects.areas[g] <= high
        ]
        iou = np.zeros((len(best), len(here)))
        for j, p in enumerate(best):
            for k, g in enumerate(here):
                x, y, w, h = proposals.boxes_xywh[p]
                u, v, a, b = objects.boxes_xywh[g]
                width, height = min(x + w, u + a) - max(x, u), min(y + h, v + b) - max(y, v)
                overlap = max(width, 0) * max(height, 0)
                iou[j, k] = overlap / (w * h + a * b - overlap)
        taken = []
        for _ in range(min(iou.shape)):
            g = iou.max(axis=0).argmax()
            p = iou[:, g].argmax()
            taken.append(iou[p, g])
            iou[p, :] = iou[:, g] = -1
        covered += taken + [0.0] * (len(here) - len(taken))
    return [np.mean(np.array(covered) >= t) if covered else np.nan for t in IOU_THRESHOLDS]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_the_plain_loop(seed):
    proposals, objects = draw(seed, num_images=67, most_proposals=12, most_objects=12)
    ours = score_recall(proposals, objects, max_proposals=LIMITS, protocol="greedy")
    for a, size in enumerate(SIZES):
        for n, limit in enumerate(LIMITS):
            plain = greedy_recall(proposals, objects, limit, size)
            np.testing.assert_allclose(ours.recall[:, a, n], plain, rtol=0, atol=1e-12)
    found = (ours.matched_rank >= 0).sum(axis=2)
    np.testing.assert_allclose(found / [*ours.num_objects.values()], ours.recall[:, :, -1])


# Two objects and two proposals, 10 px high, from x = 0; widths and IoUs, best proposal first:
#                       object 0 (100 px)   object 1 (280 px)
# proposal 0 (160 px)    100/160 = .625      160/280 = .571
# proposal 1 (72 px)      72/100 = .72        72/280 = .257
TWO_PROPOSALS = ProposalArrays(
    np.array([[0.0, 0, 72, 10], [0, 0, 160, 10]]), np.array([-2.0, 3.0]), np.array([0, 2])
)
TWO_OBJECTS = ObjectArrays(
    np.array([[0.0, 0, 100, 10], [0, 0, 280, 10]]),
    np.array([1000.0, 2800.0]),
    np.zeros(2, bool),
    np.array([0, 2]),
)


def test_hand_computed_coco():
    """Proposal 0 takes object 0 up to t = .6, which leaves proposal 1 with nothing."""
    result = score_recall(TWO_PROPOSALS, TWO_OBJECTS, max_proposals=(1, 2))
    assert result.matched_rank.dtype == np.int32
    assert result.matched_rank[:, 0].T.tolist() == [[0] * 3 + [1] * 2 + [-1] * 5, [-1] * 10]
    assert result.num_objects == {"all": 2, "small": 1, "medium": 1, "large": 0}
    figures = result.figures()
    assert len(figures) == 2 * 4 * (1 + 3) + 1 + 4
    assert (figures["num_images"], figures["num_objects"]) == (1, 2)
    assert figures["ar_1"] == pytest.approx(0.15)  # half of the objects at 3 of 10 thresholds
    assert figures["ar_2"] == pytest.approx(0.25)
    assert figures["ar_2_small"] == pytest.approx(0.5)
    assert figures["ar_2_medium"] == pytest.approx(0.2)  # proposal 0 is free for object 1 here
    assert np.isnan(figures["ar_2_large"])
    assert [figures[f"recall_1_iou{t}"] for t in (50, 70, 75)] == [0.5, 0.0, 0.0]
    assert [figures[f"recall_2_iou{t}"] for t in (50, 70, 75)] == [0.5, 0.5, 0.0]
    assert [figures[f"recall_2_iou{t}_medium"] for t in (50, 70, 75)] == [1.0, 0.0, 0.0]


def test_hand_computed_greedy():
    """Proposal 1 goes to object 0 (.72) first, which leaves proposal 0 to object 1 (.571)."""
    result = score_recall(TWO_PROPOSALS, TWO_OBJECTS, max_proposals=(1, 2), protocol="greedy")
    assert result.matched_rank[:, 0].T.tolist() == [[1] * 5 + [-1] * 5, [0] * 2 + [-1] * 8]
    assert result.figures()["ar_1"] == pytest.approx(0.15)
    assert result.figures()["ar_2"] == pytest.approx(0.35)  # (2 x 1 + 3 x .5) / 10


NO_BOXES = np.zeros((0, 4))


@pytest.mark.parametrize("protocol", ["coco", "greedy"])
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_nothing_at_all(protocol, num_images):
    offsets = np.zeros(num_images + 1, np.int64)
    proposals = ProposalArrays(NO_BOXES, np.zeros(0), offsets)
    objects = ObjectArrays(NO_BOXES, np.zeros(0), np.zeros(0, bool), offsets)
    result = score_recall(proposals, objects, max_proposals=(5,), protocol=protocol)
    assert np.isnan(result.recall).all()
    assert result.recall.shape == (10, 4, 1)
    assert result.matched_rank.shape == (10, 4, 0)
    assert (result.num_images, result.num_objects["all"]) == (num_images, 0)


@pytest.mark.parametrize("protocol", ["coco", "greedy"])
def test_objects_in_an_image_without_proposals_are_missed(protocol):
    """Two images, each with one object; the only proposal, in the second, is that object's box."""
    box = np.array([[1.0, 2, 30, 40]])
    objects = ObjectArrays(
        box.repeat(2, axis=0), np.full(2, 1200.0), np.zeros(2, bool), np.array([0, 1, 2])
    )
    proposals = ProposalArrays(box, np.zeros(1), np.array([0, 0, 1]))
    result = score_recall(proposals, objects, max_proposals=(1,), protocol=protocol)
    assert (result.recall[:, 0] == 0.5).all()
    assert result.matched_rank[:, 0].tolist() == [[-1, 0]] * 10
    none = ProposalArrays(NO_BOXES, np.zeros(0), np.zeros(3, np.int64))
    assert (score_recall(none, objects, protocol=protocol).recall[:, 0] == 0).all()


def test_boxes_without_extent_match_nothing():
    flat = np.array([[3.0, 3, 0, 5], [3, 3, 0, 0]])
    objects = ObjectArrays(flat, np.zeros(2), np.zeros(2, bool), np.array([0, 2]))
    proposals = ProposalArrays(flat, np.zeros(2), np.array([0, 2]))
    assert (score_recall(proposals, objects).recall[:, 0] == 0).all()


def test_boxes_to_xywh_subtracts_in_double():
    boxes = np.array([[0.1, 2, 1000.7, 5]], np.float32)
    width = float(boxes[0, 2]) - float(boxes[0, 0])
    assert width != float(boxes[0, 2] - boxes[0, 0])  # float32 would round
    converted = boxes_to_xywh(boxes)
    assert converted.dtype == np.float64
    assert converted.tolist() == [[float(boxes[0, 0]), 2.0, width, 3.0]]
    assert boxes_to_xywh(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_wrong_input_is_named():
    box, one = np.zeros((1, 4)), np.zeros(1)
    with pytest.raises(DataError, match="proposals: expected one score"):
        ProposalArrays(box, np.array([np.nan]), np.array([0, 1]))
    with pytest.raises(DataError, match="proposals: expected float64 boxes"):
        ProposalArrays(box.astype(np.float32), one, np.array([0, 1]))
    with pytest.raises(DataError, match="proposals: expected finite boxes"):
        ProposalArrays(box + np.inf, one, np.array([0, 1]))
    with pytest.raises(DataError, match="sides >= 0"):
        ProposalArrays(box - 1, one, np.array([0, 1]))
    for offsets in ([], [0], [1, 1], [0, 2], [0, 1, 0, 1]):
        with pytest.raises(DataError, match="proposals: expected offsets"):
            ProposalArrays(box, one, np.array(offsets, np.int64))
    with pytest.raises(DataError, match="objects: expected one area"):
        ObjectArrays(box, np.zeros(2), np.zeros(1, bool), np.array([0, 1]))
    with pytest.raises(DataError, match="objects: expected bool ignore"):
        ObjectArrays(box, one, np.zeros(1, np.uint8), np.array([0, 1]))
    two_images = ProposalArrays(box, one, np.array([0, 1, 1]))
    with pytest.raises(DataError, match="expected those of 1 images, got 2"):
        score_recall(two_images, TWO_OBJECTS)
    for limits in ((), (10, 0)):
        with pytest.raises(ConfigError, match="max_proposals: expected numbers >= 1"):
            score_recall(TWO_PROPOSALS, TWO_OBJECTS, max_proposals=limits)
    with pytest.raises(ConfigError, match=r"protocol: expected coco \| greedy, got 'voc'"):
        score_recall(TWO_PROPOSALS, TWO_OBJECTS, protocol="voc")
