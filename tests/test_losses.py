"""Losses against hand calculations and torchvision's, and the properties training relies on."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss

from rpn_train.anchors import AnchorGrid
from rpn_train.boxes import decode, take_boxes
from rpn_train.losses import box_errors, objectness_loss, rpn_losses
from rpn_train.model import normalize_images
from rpn_train.targets import Picks, assign, random_keys, sample

KINDS = ("smooth_l1", "l1", "iou", "giou", "ciou")
ONES = (1.0, 1.0, 1.0, 1.0)
# The difference of 2 and 1 in complete IoU: 4 / pi^2 (atan 2 - atan 1)^2.
RATIOS = (2 / math.pi * (math.atan(2) - math.atan(1))) ** 2
ANCHOR = [0.0, 0, 10, 10]


def box_loss_of(gt, kind, *, deltas=None, positive=True, stds=ONES):
    """Loss of one slot on the anchor of 10 x 10 px, predicting no change unless told."""
    deltas = torch.zeros(4) if deltas is None else torch.tensor(deltas)
    slot = (deltas[None, None], torch.tensor([[ANCHOR]]), torch.tensor([[gt]]))
    options = {"kind": kind, "beta": 1 / 9, "stds": stds}
    return box_errors(*slot, torch.tensor([[positive]]), **options).sum().item()


def test_objectness_by_hand():
    """softplus of -/+ logit for positives / background; the third slot is empty."""
    at = torch.zeros(1, 3, dtype=torch.int64)
    picks = Picks(at, torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]]))
    loss = objectness_loss(torch.tensor([[-1.5, 2.0, 9.0]]), picks)
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.5)) + math.log1p(math.exp(2)))


@pytest.mark.parametrize(
    ("gt", "smooth_l1", "l1", "iou", "giou", "ciou"),
    [
        # dx = .1: the square, .5 x .1 ^ 2 x 9. IoU = hull ratio = 90 / 110; centres 1 px apart in
        # a hull of 11 x 10
        ([1.0, 0, 11, 10], 0.045, 0.1, 2 / 11, 2 / 11, 2 / 11 + 1 / 221),
        # dx = .5, the line: .5 - .5 / 9. IoU 50 / 150
        ([5.0, 0, 15, 10], 0.5 - 1 / 18, 0.5, 2 / 3, 2 / 3, 2 / 3 + 25 / 325),
        # dy = -.25, dh = log .5; centres 2.5 px apart in a hull of 10 x 10
        (
            [0.0, 0, 10, 5],
            0.25 + math.log(2) - 1 / 9,
            0.25 + math.log(2),
            0.5,
            0.5,
            0.5 + 1 / 32 + RATIOS**2 / (0.5 + RATIOS),
        ),
        # apart: union 200 in a hull of 300
        ([20.0, 0, 30, 10], 2 - 1 / 18, 2.0, 1, 1 + 1 / 3, 1 + 400 / 1000),
    ],
)
def test_box_loss_by_hand(gt, smooth_l1, l1, iou, giou, ciou):
    for kind, expected in zip(KINDS, (smooth_l1, l1, iou, giou, ciou), strict=True):
        assert box_loss_of(gt, kind) == pytest.approx(expected, rel=1e-5)
        assert box_loss_of(gt, kind, positive=False) == 0


def test_differences_are_divided_by_their_deviations():
    """dx, dy, dw, dh = .1, -.2, log 2, log .5 over .5, .4, 2, 4: .2 + .5 + .75 log 2."""
    gt = [-4.0, 0.5, 16, 5.5]  # centre (6, 3), 20 x 5 px
    stds = (0.5, 0.4, 2.0, 4.0)
    l1 = 0.7 + 0.75 * math.log(2)
    assert box_loss_of(gt, "l1", stds=stds) == pytest.approx(l1)
    assert box_loss_of(gt, "smooth_l1", stds=stds) == pytest.approx(l1 - 4 * 0.5 / 9)
    for kind in ("iou", "giou", "ciou"):
        assert box_loss_of(gt, kind, stds=stds) == box_loss_of(gt, kind)


@pytest.mark.parametrize(
    ("kind", "theirs"), [("giou", generalized_box_iou_loss), ("ciou", complete_box_iou_loss)]
)
def test_losses_of_boxes_and_their_gradients_are_torchvisions(kind, theirs):
    """Apart, over each other, within each other, and the same."""
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(2, 300, 2, generator=generator) * 30
    sides = 2 + torch.rand(2, 300, 2, generator=generator) * 40
    anchors, gt = torch.cat([corners, corners + sides], dim=-1)
    deltas = (torch.rand(300, 4, generator=generator) - 0.5).requires_grad_()
    gt[:20] = decode(deltas[:20], anchors[:20]).detach()
    positive = torch.ones(300, dtype=torch.bool)
    each = [
        box_errors(deltas, anchors, gt, positive, kind=kind, beta=1.0, stds=ONES),
        theirs(decode(deltas, anchors), gt),
    ]
    assert_close(*each, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), deltas)[0] for loss in each]
    # where two boxes are the same, two sides of a kink meet
    assert_close(gradients[0][20:], gradients[1][20:], rtol=1e-4, atol=1e-5)
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_that_shrank_to_nothing_have_finite_gradients(kind):
    deltas = torch.tensor([[0.0, 0, -500, -500], [0, 0, -500, 0], [0, 0, 0, -500]])
    deltas.requires_grad_()
    positive, anchor = torch.tensor([True] * 3), torch.tensor([ANCHOR] * 3)
    gt = anchor + 1
    box_errors(deltas, anchor, gt, positive, kind=kind, beta=1.0, stds=ONES).sum().backward()
    assert deltas.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_deltas_cost_nothing(kind):
    right = [0.5, -0.25, math.log(2), math.log(3)]  # centre (10, 2.5), 20 x 30 px
    assert box_loss_of([0.0, -12.5, 20, 17.5], kind, deltas=right) == pytest.approx(0, abs=1e-6)


def random_case(batch=4, slots=6, anchors=40, objects=3):
    """Outputs and targets of a batch; the second image has no object, the third an empty slot."""
    torch.manual_seed(0)

    def boxes(*shape):
        corners = torch.rand(*shape, 2) * 90
        return torch.cat([corners, corners + 5 + torch.rand(*shape, 2) * 60], dim=-1)

    at = torch.stack([torch.randperm(anchors)[:slots] for _ in range(batch)])
    positive = torch.arange(slots) < torch.tensor([3, 0, 1, 2])[:batch, None]
    valid = torch.arange(slots) < torch.tensor([6, 6, 5, 6])[:batch, None]
    gt = boxes(batch, objects)
    gt[1] = 0  # padding rows
    return {
        "logits": torch.randn(batch, slots, requires_grad=True),
        "deltas": torch.randn(batch, slots, 4, requires_grad=True),
        "picks": Picks(at, positive, valid),
        "anchors": boxes(anchors)[at],
        "gt_boxes": take_boxes(gt, torch.randint(objects, (batch, slots))),
    }


def test_giou_is_that_of_the_decoded_boxes():
    case = random_case()
    losses = rpn_losses(**case, box_kind="giou", beta=1.0, stds=ONES, box_weight=2.0, normalizer=10)
    total = 0.0
    for i in range(4):
        for slot in case["picks"].positive[i].nonzero().flatten().tolist():
            pred = decode(case["deltas"][i, slot], case["anchors"][i, slot])
            gt = case["gt_boxes"][i, slot]
            total += generalized_box_iou_loss(pred[None], gt[None]).sum()
    assert_close(losses.box, total * 2 / 10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_objects_has_no_box_loss(kind):
    """Exactly 0 with zero gradients, even where the slots hold boxes that are no numbers."""
    case = random_case(batch=2)
    case["gt_boxes"][0, :3] = case["anchors"][0, :3] + 3
    case["gt_boxes"][0, 3:] = case["gt_boxes"][1] = math.nan
    losses = rpn_losses(**case, box_kind=kind, beta=1 / 9, stds=ONES, box_weight=1.0, normalizer=12)
    (losses.objectness + losses.box).backward()
    assert losses.box.isfinite()
    assert (case["deltas"].grad[0, :3] != 0).any(-1).all()
    assert torch.equal(case["deltas"].grad[0, 3:], torch.zeros(3, 4))
    assert torch.equal(case["deltas"].grad[1], torch.zeros(6, 4))

    alone = {k: v[1:] for k, v in case.items() if k != "picks"}
    alone |= {"picks": Picks(*(p[1:] for p in case["picks"]))}
    assert (
        rpn_losses(**alone, box_kind=kind, beta=1, stds=ONES, box_weight=1, normalizer=6).box == 0
    )


def test_empty_slots_have_no_gradient():
    case = random_case()
    losses = rpn_losses(**case, box_kind="l1", beta=1.0, stds=ONES, box_weight=1.0, normalizer=24)
    losses.objectness.backward()
    assert torch.equal(case["logits"].grad == 0, ~case["picks"].valid)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_batch_add_up(kind):
    """With one normaliser: what accumulation and several processes rest on."""
    case = random_case()
    options = {"box_kind": kind, "beta": 1 / 9, "stds": ONES, "box_weight": 1.5, "normalizer": 24}
    whole = rpn_losses(**case, **options)
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        cut = {k: v[part] for k, v in case.items() if k != "picks"}
        picks = Picks(*(p[part] for p in case["picks"]))
        parts.append(rpn_losses(**cut, picks=picks, **options))
    assert_close(parts[0].objectness + parts[1].objectness, whole.objectness)
    assert_close(parts[0].box + parts[1].box, whole.box)


def test_bfloat16_outputs_are_summed_in_float32():
    case = random_case()
    options = {
        "box_kind": "smooth_l1",
        "beta": 1 / 9,
        "stds": ONES,
        "box_weight": 1.0,
        "normalizer": 24,
    }
    case["logits"], case["deltas"] = case["logits"].bfloat16(), case["deltas"].bfloat16()
    losses = rpn_losses(**case, **options)
    case["logits"], case["deltas"] = case["logits"].float(), case["deltas"].float()
    assert (losses.objectness.dtype, losses.box.dtype) == (torch.float32, torch.float32)
    assert_close(losses, rpn_losses(**case, **options), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_numbers(kind):
    """On tensors that have shapes alone: what waited for a GPU would ask for a number and fail."""
    with torch.device("meta"):
        anchors, gt = torch.empty(300, 4), torch.empty(2, 5, 4)
        flags, sizes = torch.empty(2, 5, dtype=torch.bool), torch.empty(2, 2, dtype=torch.int64)
        rule = {"fg_iou": 0.7, "bg_iou": 0.3, "force_best": True, "forced_min_iou": 0.1}
        grid = AnchorGrid(((16.0,),), (1.0,), (16,), rounded=True)
        assignment = assign(
            grid, (240, 320), gt, flags, flags, sizes, **rule, ignore_ioa=0.5, border="ignore"
        )
        keys = random_keys(torch.empty(2, dtype=torch.int64), 300)
        picks = sample(assignment.labels, keys, num_samples=256, fg_fraction=0.5)
        assert normalize_images(torch.empty(2, 3, 8, 9), sizes).shape == (2, 3, 8, 9)
        outputs = [torch.empty(2, 256, *tail, requires_grad=True) for tail in ((), (4,))]
        losses = rpn_losses(
            *outputs,
            picks,
            take_boxes(anchors, picks.at),
            take_boxes(gt, assignment.matches.gather(1, picks.at)),
            box_kind=kind,
            beta=1 / 9,
            stds=ONES,
            box_weight=1.0,
            normalizer=512,
        )
        (losses.objectness + losses.box).backward()
    assert outputs[1].grad.shape == (2, 256, 4)
