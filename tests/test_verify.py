"""The second scoring agrees with the first, and sees the smallest change of any figure."""

import dataclasses
import math

import numpy as np
import pytest

from rpn_train.recall import ObjectArrays, ProposalArrays, Recall, score_recall
from rpn_train.verify import largest_difference

LIMITS = (9, 1, 40)  # not in order, and more than there are proposals


def draw(num_images: int) -> tuple[ProposalArrays, ObjectArrays]:
    """Boxes on a coarse grid with few scores, so full of ties; crowds; no large objects."""
    rng = np.random.default_rng(11)

    def boxes(most: int) -> tuple[np.ndarray, np.ndarray]:
        counts = rng.integers(0, most, num_images) * (rng.random(num_images) < 0.8)
        corners = rng.integers(0, 3, (counts.sum(), 2))
        sides = rng.integers(2, 6, (counts.sum(), 2))
        return np.hstack([corners, sides]) * 0.1, np.cumsum([0, *counts])

    proposals, ends = boxes(30)
    objects, object_ends = boxes(9)
    areas = rng.choice([900.0, 1024.0, 4000.0], len(objects))
    return (
        ProposalArrays(proposals, rng.integers(0, 8, len(proposals)) / 7.0, ends),
        ObjectArrays(objects, areas, rng.random(len(objects)) < 0.2, object_ends),
    )


def changed(recall: Recall, at: tuple[int, int, int], value: float) -> Recall:
    figures = recall.recall.copy()
    figures[at] = value
    return dataclasses.replace(recall, recall=figures)


@pytest.mark.parametrize("block_images", [8, 250])
def test_equal_but_for_a_changed_figure(
    block_images: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rpn_train.verify.BLOCK_IMAGES", block_images)
    proposals, objects = draw(29)
    recall = score_recall(proposals, objects, max_proposals=LIMITS)
    assert np.isnan(recall.recall[:, 3]).all()
    assert 0.1 < recall.recall[0, 0, 1] < recall.recall[0, 0, 0] < recall.recall[0, 0, 2]
    assert largest_difference(proposals, objects, recall) == 0.0
    value = recall.recall[3, 2, 1] - 1e-6
    off = largest_difference(proposals, objects, changed(recall, (3, 2, 1), value))
    assert off == pytest.approx(1e-6, rel=1e-6)
    for at, value in (((0, 0, 0), math.nan), ((9, 3, 2), 0.0)):  # NaN on one side only
        assert largest_difference(proposals, objects, changed(recall, at, value)) == math.inf
    assert capsys.readouterr().out == ""


def test_one_object_found_by_the_first_proposal() -> None:
    """COCOeval would take a match with id 0 for none."""
    box = np.array([[1.0, 2, 30, 40]])
    proposals = ProposalArrays(box, np.zeros(1), np.array([0, 1]))
    objects = ObjectArrays(box, np.array([1200.0]), np.zeros(1, bool), np.array([0, 1]))
    recall = score_recall(proposals, objects)
    assert (recall.recall[:, 0] == 1).all()
    assert largest_difference(proposals, objects, recall) == 0.0


@pytest.mark.parametrize("num_images", [0, 3])
def test_nothing_at_all(num_images: int) -> None:
    offsets, boxes = np.zeros(num_images + 1, np.int64), np.zeros((0, 4))
    proposals = ProposalArrays(boxes, np.zeros(0), offsets)
    objects = ObjectArrays(boxes, np.zeros(0), np.zeros(0, bool), offsets)
    assert largest_difference(proposals, objects, score_recall(proposals, objects)) == 0.0
