"""Box arithmetic against values computed by hand."""

import math

import torch
from torch.testing import assert_close
from torchvision.ops import generalized_box_iou_loss

from rpn_train.boxes import clip, decode, encode, generalized_iou

ANCHOR = torch.tensor([0.0, 0, 10, 20])  # centre (5, 10), 10 x 20 px


def random_boxes(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * 300 - 50
    sides = 1 + torch.rand(*shape, 2, generator=generator) * 200
    return torch.cat([corners, corners + sides], dim=-1)


def test_encode_by_hand():
    box = torch.tensor([5.0, 10, 25, 30])  # centre (15, 20), 20 x 20 px
    expected = torch.tensor([10 / 10, 10 / 20, math.log(2), 0.0])
    assert_close(encode(box, ANCHOR), expected)
    assert_close(encode(torch.zeros(4), ANCHOR)[2:], torch.full((2,), -math.inf))


def test_decode_is_the_inverse_of_encode():
    boxes, anchors = random_boxes(2, 7, seed=0), random_boxes(2, 7, seed=1)
    assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=1e-5, atol=1e-4)
    assert_close(decode(torch.zeros(3, 4), ANCHOR), ANCHOR.expand(3, 4))
    assert decode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_decode_limits_growth_only():
    box = decode(torch.tensor([0.0, 0, 100, -100]), ANCHOR)
    assert_close(box, torch.tensor([5 - 312.5, 10, 5 + 312.5, 10]))  # 10 px x 1000 / 16


def test_decode_of_half_precision_is_float32():
    """exp(.5) and a centre of 701 px have no bfloat16: who computes in it is pixels off."""
    anchor = torch.tensor([501.0, 696, 901, 706])
    deltas = torch.tensor([0.25, -0.5, 0.5, 0])  # exact in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        box = decode(deltas.bfloat16(), anchor)
    half = 200 * math.exp(0.5)
    assert_close(box, torch.tensor([801 - half, 691, 801 + half, 701]))


def test_clip():
    boxes = torch.tensor([[-3.0, -4, 50, 60], [1, 2, 3, 4], [70, -9, 80, -1]])
    in_20x30 = [[0.0, 0, 30, 20], [1, 2, 3, 4], [30, 0, 30, 0]]  # the last lay outside
    in_70x40 = [[0.0, 0, 40, 60], [1, 2, 3, 4], [40, 0, 40, 0]]
    assert clip(boxes, torch.tensor([20, 30])).tolist() == in_20x30
    batch = clip(boxes.expand(2, 3, 4), torch.tensor([[20, 30], [70, 40]])[:, None])
    assert batch.tolist() == [in_20x30, in_70x40]


def test_generalized_iou():
    """By hand: the same box, a corner in common, one inside the other, apart."""
    box = torch.tensor([0.0, 0, 10, 10])
    others = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [2, 3, 5, 5], [30, 0, 40, 10]])
    assert_close(generalized_iou(box, others), torch.tensor([1, -0.5, 0.06, -0.5]))


def test_generalized_iou_and_its_gradient_are_torchvisions():
    boxes, others = random_boxes(50, seed=2).requires_grad_(), random_boxes(50, seed=3)
    ours, theirs = generalized_iou(boxes, others), generalized_box_iou_loss(boxes, others)
    assert theirs.min() < 1 < theirs.max()  # some overlap, some do not
    assert_close(1 - ours, theirs)
    weights = torch.linspace(1, 2, 50)
    (gradient,) = torch.autograd.grad(ours, boxes, -weights)
    assert_close(gradient, torch.autograd.grad(theirs, boxes, weights)[0])
