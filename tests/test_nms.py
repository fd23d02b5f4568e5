"""Suppression of many lists at once, against torchvision's of one."""

import pytest
import torch
import torchvision

from rpn_train import nms
from rpn_train.nms import suppress


def draw(lists, length, seed):
    """Boxes of 10 to 60 px in 100 x 100 px, of which many overlap."""
    draw = torch.rand(2, lists, length, 2, generator=torch.Generator().manual_seed(seed))
    corners = 100 * draw[0]
    return torch.cat([corners, corners + 10 + 50 * draw[1]], dim=-1)


def one_by_one(boxes, valid, iou):
    kept = torch.zeros_like(valid)
    for i, (of_list, rows) in enumerate(zip(boxes, valid, strict=True)):
        places = rows.nonzero()[:, 0]
        scores = -places.float()  # in order
        kept[i, places[torchvision.ops.nms(of_list[places], scores, iou)]] = True
    return kept


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("block", [1, 2 * 150**2, nms.BLOCK_PAIRS])
def test_what_is_kept_is_what_torchvision_keeps(iou, block, monkeypatch):
    monkeypatch.setattr(nms, "BLOCK_PAIRS", block)
    boxes = draw(5, 150, seed=int(10 * iou))
    valid = torch.rand(5, 150, generator=torch.Generator().manual_seed(9)) < 0.8
    valid[3] = False
    kept = suppress(boxes, valid, iou)
    assert torch.equal(kept, one_by_one(boxes, valid, iou))
    assert kept.any()


@pytest.mark.parametrize("iou", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_an_iou_of_the_very_threshold(iou):
    """Sides of whole pixels have it often; it is compared as on a CPU, in float64."""
    draw = torch.randint(1, 11, (40, 30, 2), generator=torch.Generator().manual_seed(0)).float()
    boxes, valid = torch.cat([0 * draw, draw], dim=-1), torch.ones(40, 30, dtype=torch.bool)
    assert torch.equal(suppress(boxes, valid, iou), one_by_one(boxes, valid, iou))


@pytest.mark.parametrize("length", [1, 2, nms.ROUNDS - 1, nms.ROUNDS, nms.ROUNDS + 1, 99, 100])
def test_a_chain_of_any_length(length):
    """Each box meets its neighbours alone: of the first of a chain every second one is kept."""
    left = 4.0 * torch.arange(length)
    boxes = torch.stack([left, torch.zeros(length), left + 10, torch.ones(length)], dim=-1)[None]
    kept = suppress(boxes, torch.ones(1, length, dtype=torch.bool), 0.2)  # 6 / 14, then 2 / 18
    assert kept[0].tolist() == [i % 2 == 0 for i in range(length)]


def test_boxes_without_extent_or_number_suppress_nothing():
    boxes = torch.tensor([[1.0, 1, 1, 1]] * 2 + [[torch.nan] * 4] * 2 + [[0.0, 0, 2, 2]] * 2)[None]
    kept = suppress(boxes, torch.ones(1, 6, dtype=torch.bool), 0.5)
    assert kept.tolist() == [[True] * 5 + [False]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_suppress(shape):
    kept = suppress(torch.zeros(*shape, 4), torch.ones(shape, dtype=torch.bool), 0.5)
    assert kept.shape == shape
