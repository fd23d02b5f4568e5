"""Proposals against a plain form in Python numbers, one image and one box at a time.

Both ways to make them run here on a CPU: list by list, and as on a GPU all lists at once.
"""

import pytest
import torch
from torch.testing import assert_close

from rpn_train import proposals
from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import decode
from rpn_train.proposals import best_at_once, best_one_by_one, make_proposals

CPU = torch.device("cpu")
GRID = AnchorGrid(((16.0, 24.0), (32.0, 48.0)), (0.5, 2.0), (8, 16), rounded=True)
CANVAS = (48, 64)
SIZES = torch.tensor([[48, 64], [37, 51], [9, 64]])
LENGTHS = GRID.level_lengths(CANVAS)
OPTIONS = {"pre_nms": 50, "post_nms": 40, "nms_iou": 0.5, "min_size": 3.0}


@pytest.fixture(params=[best_one_by_one, best_at_once])
def way(request, monkeypatch):
    monkeypatch.setattr(proposals, "best_one_by_one", request.param)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inter / (sum(areas) - inter)


def plain_proposals(logits, boxes, lengths, size, *, pre_nms, post_nms, nms_iou, min_size):
    """Rows of (logit, clipped box), best first."""
    height, width = size
    boxes = [
        [min(max(v, 0), limit) for v, limit in zip(box, (width, height) * 2, strict=True)]
        for box in boxes
    ]
    kept, start = [], 0
    for length in lengths:
        ranked = sorted(range(start, start + length), key=lambda i: -logits[i])[:pre_nms]
        of_level = []
        for i in ranked:
            large = min(boxes[i][2] - boxes[i][0], boxes[i][3] - boxes[i][1]) >= min_size
            if large and all(iou(boxes[i], boxes[k]) <= nms_iou for k in of_level):
                of_level.append(i)
        kept += of_level
        start += length
    kept.sort(key=lambda i: -logits[i])
    return [(logits[i], boxes[i]) for i in kept[:post_nms]]


def draw(seed):
    torch.manual_seed(seed)
    anchors = grid_anchors(GRID, CANVAS, CPU)
    logits = torch.randperm(3 * len(anchors)).view(3, -1).float()  # no ties
    return logits, torch.randn(3, len(anchors), 4) * 0.4, anchors


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"pre_nms": 1000, "post_nms": 1000},  # more than there are
        {"pre_nms": 1},  # one per level
        {"post_nms": 1},
        {"nms_iou": 0.0, "min_size": 0.001},
        {"nms_iou": 1.0},  # nothing suppressed: post_nms cuts
        {"min_size": 30.0},
    ],
)
def test_proposals_are_the_plain_ones(changed):
    logits, deltas, anchors = draw(seed=len(changed))
    options = OPTIONS | changed
    found = make_proposals(logits, deltas, anchors, LENGTHS, SIZES, **options)
    decoded = decode(deltas, anchors)
    assert len(found) == 3
    for i, (boxes, scores) in enumerate(found):
        expected = plain_proposals(
            logits[i].tolist(), decoded[i].tolist(), LENGTHS, SIZES[i].tolist(), **options
        )
        assert scores.tolist() == [logit for logit, _ in expected]
        assert_close(boxes, torch.tensor([box for _, box in expected]).view(-1, 4))


@pytest.mark.usefixtures("way")
def test_some_image_is_cut_short_in_every_way():
    """Guards the test above: its images do meet the border, NMS and both limits."""
    logits, deltas, anchors = draw(seed=0)
    found = make_proposals(logits, deltas, anchors, LENGTHS, SIZES, **OPTIONS)
    lengths = [len(boxes) for boxes, _ in found]
    assert lengths[:2] == [40, 40]
    assert 0 < lengths[2] < 40
    assert found[1].boxes[:, 3].max() == 37
    assert LENGTHS == [192, 48]


@pytest.mark.usefixtures("way")
def test_ties():
    """Five logits: whatever the order among equals, it is a suppression that keeps the best."""
    _, deltas, anchors = draw(seed=3)
    logits = torch.randint(5, (3, len(anchors))).float()
    length = len(anchors)
    options = OPTIONS | {"pre_nms": length, "post_nms": length, "min_size": 0.001}
    found = make_proposals(logits, deltas, anchors, [length], SIZES, **options)
    again = make_proposals(logits[1:], deltas[1:], anchors, [length], SIZES[1:], **options)
    assert_close(found[1:], again, rtol=0, atol=0)  # nor does it depend on the batch
    for i, (boxes, scores) in enumerate(found):
        assert (scores.diff() <= 0).all()
        kept = boxes.tolist()
        for k, box in enumerate(kept):
            assert all(iou(box, other) <= 0.5 for other in kept[:k])
        for logit, box in plain_proposals(
            logits[i].tolist(),
            decode(deltas[i], anchors).tolist(),
            [length],
            SIZES[i].tolist(),
            **(options | {"nms_iou": 1.0}),
        ):
            assert any(
                iou(box, other) > 0.5 - 1e-6
                for other, score in zip(kept, scores.tolist(), strict=True)
                if score >= logit
            )


@pytest.mark.usefixtures("way")
def test_levels_do_not_suppress_each_other():
    """The same box on two levels stays twice; a level of low logits has its own candidates."""
    anchors = torch.tensor([[0.0, 0, 20, 20]] * 5 + [[30.0, 30, 40, 40]])
    logits = torch.tensor([[9.0, 8, 7, -5, -6, -7]])
    options = OPTIONS | {"pre_nms": 2, "nms_iou": 0.7}
    found = make_proposals(
        logits, torch.zeros(1, 6, 4), anchors, [3, 3], torch.tensor([[40, 40]]), **options
    )
    assert found[0].logits.tolist() == [9, -5]
    assert found[0].boxes.tolist() == [[0, 0, 20, 20]] * 2


@pytest.mark.usefixtures("way")
def test_nothing_left():
    logits, deltas, anchors = draw(seed=0)
    found = make_proposals(logits, deltas, anchors, LENGTHS, SIZES, **OPTIONS | {"min_size": 65})
    assert [(boxes.shape, scores.shape) for boxes, scores in found] == [((0, 4), (0,))] * 3


VALUES = {
    "numbers": None,
    "ties": [0.0, 1.0, 2.0, -0.0],
    "no numbers": [torch.nan, torch.inf, -torch.inf, 0.0, 1.0],
}


@pytest.mark.parametrize("min_size", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_both_ways_are_one(values, min_size):
    """Bit for bit, with levels of any length and boxes without extent or number among them."""
    generator = torch.Generator().manual_seed(0)

    def draw_level(length):
        draw = torch.rand(3, 2, length, 2, generator=generator)
        corners, sides = 30 * draw[0], 20 * draw[1] * (draw[2] > 0.2)
        boxes = torch.cat([corners, corners + sides], dim=-1)
        boxes[torch.rand(2, length, generator=generator) < 0.05] = torch.nan
        logits = torch.randn(2, length, generator=generator)
        if values is not None:
            choice = torch.randint(len(values), (2, length), generator=generator)
            logits = torch.tensor(values)[choice]
        return boxes, logits.sort(dim=1, descending=True).values

    for lengths in ([24, 24], [7], [20, 0, 5], [3, 24, 1]):
        candidates = [draw_level(length) for length in lengths]
        for post_nms, nms_iou in ((1, 0.5), (5, 0.0), (20, 0.7), (1000, 1.0)):
            limits = {"post_nms": post_nms, "nms_iou": nms_iou, "min_size": min_size}
            expected = best_one_by_one(candidates, **limits)
            found = best_at_once(candidates, **limits)
            assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
