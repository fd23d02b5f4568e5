"""Losses over all anchors: hand calculations, torchvision's values, and a plain loop."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from rpn_train.dense_losses import dense_losses
from rpn_train.dense_targets import centerness_targets
from rpn_train.losses import box_errors
from rpn_train.objectness_losses import OBJECTNESS_LOSSES, focal_loss, quality_focal_loss

OPTIONS = {
    "objectness_kind": "focal",
    "by_centerness": False,
    "box_kind": "giou",
    "beta": 1 / 9,
    "box_weight": 2.0,
    "delta_stds": (0.1, 0.1, 0.2, 0.2),
    "focal_alpha": 0.25,
    "focal_gamma": 2.0,
}
BOX_KINDS = ("smooth_l1", "l1", "iou", "giou", "ciou")
# The probability at a logit of log 3 is 3 / 4.
LOG3 = math.log(3)


def test_focal_by_hand():
    """alpha .25 for positives: .25 x (1/4)^2 x log(4/3); for background .75 x (3/4)^2 x log 4."""
    loss = focal_loss(torch.tensor([LOG3, LOG3]), torch.tensor([1.0, 0.0]), alpha=0.25, gamma=2)
    assert_close(loss, torch.tensor([math.log(4 / 3) / 64, 27 / 64 * math.log(4)]))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
def test_focal_is_torchvisions(gamma):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, generator=generator) * 6
    logits.requires_grad_()
    targets = torch.rand(200, generator=generator)
    targets[:150] = targets[:150].round()
    ours = focal_loss(logits, targets, alpha=0.3, gamma=gamma)
    theirs = sigmoid_focal_loss(logits, targets, alpha=0.3, gamma=gamma)
    assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_quality_focal_by_hand():
    """p = .75, y = .25: .5^2 x (.25 log(4/3) + .75 log 4); nothing where p is right."""
    logits = torch.tensor([LOG3, LOG3, LOG3], requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([0.25, 0.75, 0.0]), alpha=math.nan, gamma=2.0)
    first = (math.log(4 / 3) + 3 * math.log(4)) / 16
    assert_close(loss, torch.tensor([first, 0, 9 / 16 * math.log(4)]))
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_certain_logits_have_finite_gradients():
    logits = torch.tensor([-300.0, -40, 0, 40, 300] * 2, requires_grad=True)
    targets = torch.tensor([0.0] * 5 + [1.0] * 5)
    for loss in OBJECTNESS_LOSSES.values():
        each = loss(logits, targets, alpha=0.25, gamma=2.0)
        (gradient,) = torch.autograd.grad(each.sum(), logits)
        assert each.isfinite().all()
        assert gradient.isfinite().all()


def by_hand(**changed):
    """Four anchors of 10 x 10 px: positive, positive, background, ignored; no change predicted.

    The first object has IoU .8 with its anchor; the second is its anchor.
    """
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    gt = torch.tensor([[[math.nan] * 4, [20, 0, 30, 10], [0, 0, 10, 8]]])
    inputs = {
        "logits": torch.full((1, 4), LOG3),
        "deltas": torch.zeros(1, 4, 4),
        "centerness_logits": None,
        "anchors": anchors,
        "gt_boxes": gt,
        "labels": torch.tensor([[1, 1, 0, -1]], dtype=torch.int8),
        "matches": torch.tensor([[2, 1, 0, 0]]),
        "quality": None,
    }
    losses = dense_losses(**{**inputs, **OPTIONS, "box_kind": "iou", **changed})
    return [term.item() for term in losses]


def test_dense_losses_by_hand():
    """Positives cost log(4/3), background log 4; box 2 x (1 - .8)."""
    expected = [2 * math.log(4 / 3) + math.log(4), 0.4, 0, 2]
    assert by_hand(objectness_kind="bce") == pytest.approx(expected)
    expected[0] = 2 * math.log(4 / 3) / 64 + 27 / 64 * math.log(4)
    assert by_hand() == pytest.approx(expected)
    # dy = -.1 and dh = log .8, over .1 and .2
    expected[1] = 2 * (1 - math.log(0.8) / 0.2)
    assert by_hand(box_kind="l1") == pytest.approx(expected)
    expected[1] -= 2 * 2 * 0.5 / 9
    assert by_hand(box_kind="smooth_l1") == pytest.approx(expected)


def test_centerness_weighs_the_boxes_by_hand():
    """The first centre (5, 5) has 5, 5 and 5, 3 px to its sides: sqrt(.6); the second 1.

    The probability is .75: the cross entropy with y is y log(4/3) + (1 - y) log 4.
    """
    y = math.sqrt(0.6)
    losses = by_hand(centerness_logits=torch.full((1, 4), LOG3), by_centerness=True)
    quality = (1 + y) * math.log(4 / 3) + (1 - y) * math.log(4)
    assert losses[1:] == pytest.approx([0.4 * y / 0.635, quality, 2])
    # of a head that does not predict it, and whatever objectness aims at
    soft = torch.tensor([[0.5, 0.25, 9, 9]])
    weighted = by_hand(quality=soft, by_centerness=True)
    assert weighted[1:] == pytest.approx([0.4 * y / 0.635, 0, 0.75])


def test_soft_targets_by_hand():
    """Quality .5 and .25 (and what stands at other anchors is not read) with p = .75."""
    quality = torch.tensor([[0.5, 0.25, math.nan, 9.0]])
    low, high = math.log(4 / 3), math.log(4)
    first, second = 0.5 * low + 0.5 * high, 0.25 * low + 0.75 * high
    expected = [first / 16 + second / 4 + 9 / 16 * high, 0.4 * 0.5, 0, 0.75]
    assert by_hand(objectness_kind="quality_focal", quality=quality) == pytest.approx(expected)
    expected[0] = first + second + high
    assert by_hand(objectness_kind="bce", quality=quality) == pytest.approx(expected)


def draw_case():
    """Outputs and targets; the second image without positives, unread boxes are no numbers."""
    batch, anchors, objects = 3, 23, 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    def boxes(*shape):
        corners = draw(*shape, 2) * 90
        return torch.cat([corners, corners + 5 + draw(*shape, 2) * 60], dim=-1)

    labels = torch.randint(-1, 2, (batch, anchors), generator=generator).to(torch.int8)
    labels[1].clamp_(max=0)
    gt = boxes(batch, objects)
    gt[1] = math.nan
    return {
        "logits": (draw(batch, anchors) * 4 - 2).requires_grad_(),
        "deltas": (draw(batch, anchors, 4) - 0.5).requires_grad_(),
        "centerness_logits": draw(batch, anchors).requires_grad_(),
        "anchors": boxes(anchors),
        "gt_boxes": gt,
        "labels": labels,
        "matches": torch.randint(objects, (batch, anchors), generator=generator),
        "quality": draw(batch, anchors),
    }


def plain_losses(case, options):
    """The four sums, one anchor after the other."""
    sums = [torch.tensor(0.0)] * 4
    for i, r in torch.cartesian_prod(*map(torch.arange, case["labels"].shape)).tolist():
        label, logit = case["labels"][i, r].item(), case["logits"][i, r]
        if label == -1:
            continue
        soft = 1.0 if case["quality"] is None else case["quality"][i, r].item()
        target = torch.tensor(soft if label == 1 else 0.0)
        kind = {"alpha": options["focal_alpha"], "gamma": options["focal_gamma"]}
        sums[0] = sums[0] + OBJECTNESS_LOSSES[options["objectness_kind"]](logit, target, **kind)
        if label == 0:
            continue
        anchor, gt = case["anchors"][r], case["gt_boxes"][i, case["matches"][i, r]]
        kind = {"kind": options["box_kind"], "beta": options["beta"]}
        one = (case["deltas"][i, r], anchor, gt, torch.tensor(True))
        error = box_errors(*one, **kind, stds=options["delta_stds"])
        central = centerness_targets(anchor, gt)
        weight = central / 0.635 if options["by_centerness"] else target
        if case["centerness_logits"] is not None:
            logit = case["centerness_logits"][i, r]
            sums[2] = sums[2] + F.binary_cross_entropy_with_logits(logit, central)
        sums[1] = sums[1] + options["box_weight"] * weight * error
        sums[3] = sums[3] + target
    return sums


@pytest.mark.parametrize("box_kind", BOX_KINDS)
@pytest.mark.parametrize(
    ("kind", "without"),
    [
        ("bce", "centerness_logits"),
        ("focal", "quality"),
        ("quality_focal", "centerness_logits"),
        ("focal", None),
    ],
)
def test_sums_are_the_plain_ones(box_kind, kind, without):
    """And so are their gradients: exactly 0 where an anchor has no part in a loss."""
    case = draw_case()
    if without:
        case[without] = None
    options = OPTIONS | {"box_kind": box_kind, "objectness_kind": kind}
    options["by_centerness"] = case["centerness_logits"] is not None
    ours, theirs = dense_losses(**case, **options), plain_losses(case, options)
    assert_close(list(ours), theirs)
    outputs = [case[k] for k in ("logits", "deltas", "centerness_logits") if case[k] is not None]
    gradients = [torch.autograd.grad(sum(losses[:3]), outputs) for losses in (ours, theirs)]
    for mine, plain in zip(*gradients, strict=True):
        assert_close(mine, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(mine == 0, plain == 0)


@pytest.mark.parametrize("box_kind", BOX_KINDS)
def test_no_positives_cost_nothing_and_have_gradients(box_kind):
    """Finite though the boxes are no numbers and the unread deltas without measure."""
    case = {k: v if k == "anchors" else v[1:2].detach() for k, v in draw_case().items()}
    deltas = torch.tensor([-1e30, -500.0, 0, 500, 1e30, 1e30]).repeat(23)[: 23 * 4].view(1, 23, 4)
    outputs = {
        k: v.requires_grad_() for k, v in case.items() if k in ("logits", "centerness_logits")
    }
    outputs["deltas"] = deltas.requires_grad_()
    losses = dense_losses(**case | outputs, **OPTIONS | {"box_kind": box_kind})
    assert [term.item() for term in losses[1:]] == [0, 0, 0]
    (losses.objectness + losses.box + losses.centerness).backward()
    assert outputs["logits"].grad.isfinite().all()
    assert torch.equal(outputs["deltas"].grad, torch.zeros(1, 23, 4))
    assert torch.equal(outputs["centerness_logits"].grad, torch.zeros(1, 23))


def test_bfloat16_outputs_are_summed_in_float32():
    case, names = draw_case(), ("logits", "deltas", "centerness_logits")
    case |= {name: case[name].bfloat16() for name in names}
    half = dense_losses(**case, **OPTIONS)
    full = dense_losses(**case | {name: case[name].float() for name in names}, **OPTIONS)
    assert all(term.dtype == torch.float32 for term in half)
    assert_close(half, full, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OBJECTNESS_LOSSES)
@pytest.mark.parametrize("box_kind", BOX_KINDS)
def test_nothing_waits_for_the_numbers(kind, box_kind):
    """On tensors that have shapes alone: what waited for a GPU would ask for a number and fail."""
    case = {name: tensor.detach().to("meta") for name, tensor in draw_case().items()}
    outputs = [case[k].requires_grad_() for k in ("logits", "deltas", "centerness_logits")]
    losses = dense_losses(**case, **OPTIONS | {"objectness_kind": kind, "box_kind": box_kind})
    (losses.objectness + losses.box + losses.centerness).backward()
    assert [tensor.grad.shape for tensor in outputs] == [tensor.shape for tensor in outputs]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("box_kind", BOX_KINDS)
def test_on_a_gpu_nothing_waits(box_kind):
    case = draw_case()
    on_device = {name: tensor.detach().to("cuda") for name, tensor in case.items()}
    outputs = [on_device[k].requires_grad_() for k in ("logits", "deltas", "centerness_logits")]
    options = OPTIONS | {"box_kind": box_kind}
    try:
        torch.cuda.set_sync_debug_mode("error")
        losses = dense_losses(**on_device, **options)
        torch.autograd.grad(losses.objectness + losses.box + losses.centerness, outputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close([term.cpu() for term in losses], list(dense_losses(**case, **options)))
