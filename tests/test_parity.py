"""Against torchvision's RegionProposalNetwork: the same numbers, except for deliberate choices."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.backbones import build_backbone
from rpn_train.boxes import decode, take_boxes
from rpn_train.heads import Outputs, RPNHead
from rpn_train.losses import rpn_losses
from rpn_train.model import RPN, autocast, normalize_images
from rpn_train.proposals import make_proposals
from rpn_train.targets import assign, random_keys, sample

CPU = torch.device("cpu")
CANVAS = (64, 192)  # multiples of 64, where torchvision infers the right strides
SIZES = torch.tensor([[48, 128], [48, 150]])  # of the images before padding
PRE_NMS, POST_NMS = 60, 100
RATIOS = (0.5, 1.0, 2.0)
RULE = {
    "fg_iou": 0.7,
    "bg_iou": 0.3,
    "force_best": True,
    "forced_min_iou": 0.0,
    "ignore_ioa": 0.5,
    "border": "use",
}
BOX_OPTIONS = {"box_kind": "smooth_l1", "beta": 1 / 9, "stds": (1.0,) * 4, "box_weight": 1.0}


class C4(nn.Module):
    """torchvision's resnet18 up to its stride of 16, as a backbone for its detector."""

    def __init__(self):
        super().__init__()
        self.body = IntermediateLayerGetter(resnet18(), {"layer3": "0"})
        self.out_channels = 256

    def forward(self, images):
        return self.body(images)


class Pair(NamedTuple):
    ours: RPN
    theirs: FasterRCNN


def torchvision_rpn(anchor_sizes=((32.0,),), ratios=RATIOS, head=None):
    """Their RPN without a network, for its methods on boxes and outputs."""
    generator = AnchorGenerator(anchor_sizes, (ratios,) * len(anchor_sizes))
    top = {"training": PRE_NMS, "testing": PRE_NMS}
    return RegionProposalNetwork(generator, head, 0.7, 0.3, 256, 0.5, top, top, 0.7)


def build_pair(name):
    """Both networks with the same random weights and batch statistics, ready to evaluate."""
    torch.manual_seed(0)
    single = name == "resnet18_c4"
    sizes = ((12.0, 24.0, 48.0),) if single else ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
    backbone = build_backbone(name, weights=None, frozen_stages=0, norm="bn")
    backbone(torch.randn(2, 3, *CANVAS))  # batch statistics of its own
    ours = RPN(
        backbone,
        AnchorGrid(sizes, RATIOS, backbone.strides, rounded=True),
        partial(RPNHead, num_convs=1, channels=None),
    ).eval()
    for parameter in ours.rpn.parameters():
        nn.init.normal_(parameter, std=0.02)  # logits that differ, boxes that move
    theirs = FasterRCNN(
        C4()
        if single
        else resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        ),
        rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        rpn_pre_nms_top_n_test=PRE_NMS,
        rpn_post_nms_top_n_test=POST_NMS,
        box_head=nn.Identity(),
        box_predictor=nn.Identity(),
        min_size=48,
        max_size=1000,
    ).eval()
    theirs.transform.size_divisible = 64
    theirs.load_state_dict(ours.state_dict())  # strict: the same keys, in both directions
    return Pair(ours, theirs)


@pytest.fixture(scope="module", params=["resnet18_fpn", "resnet18_c4"])
def pair(request):
    return build_pair(request.param)


@pytest.fixture
def images():
    """uint8 [2, 3, *CANVAS], padded."""
    torch.manual_seed(1)
    images = torch.randint(256, (2, 3, *CANVAS), dtype=torch.uint8)
    images[:, :, 48:] = 0
    images[0, :, :, 128:] = 0
    images[1, :, :, 150:] = 0
    return images


def torchvision_input(theirs, images):
    cut = zip(images, SIZES.tolist(), strict=True)
    return theirs.transform([image[:, :h, :w] / 255 for image, (h, w) in cut])[0]


def random_objects(seed, batch, most):
    """Boxes, some on whole pixels and some twice (ties), and which rows are no padding."""
    generator = torch.Generator().manual_seed(seed)
    height, width = CANVAS
    corners = torch.rand(batch, most, 2, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(2), corners.amax(2) + 1], dim=-1)
    boxes[:, ::2] = boxes[:, ::2].round()
    boxes[:, 3::4] = boxes[:, :1]
    counts = torch.randint(most + 1, (batch, 1), generator=generator)
    counts[:3, 0] = torch.tensor([0, 1, most])[:batch]
    return boxes, torch.arange(most) < counts


def as_targets(boxes, valid):
    return [{"boxes": b[v]} for b, v in zip(boxes, valid, strict=True)]


def test_anchors(pair, images):
    feature_shapes = [(CANVAS[0] // s, CANVAS[1] // s) for s in pair.ours.grid.strides]
    features = [torch.empty(1, 1, *shape) for shape in feature_shapes]
    image_list = ImageList(images, [(0, 0)])
    theirs = pair.theirs.rpn.anchor_generator(image_list, features)[0]
    assert torch.equal(grid_anchors(pair.ours.grid, CANVAS, CPU), theirs)


def test_normalized_images(pair, images):
    theirs = torchvision_input(pair.theirs, images)
    assert theirs.image_sizes == [tuple(size) for size in SIZES.tolist()]
    ours = normalize_images(images, SIZES)
    assert_close(ours, theirs.tensors, rtol=0, atol=1e-6)
    assert torch.equal(ours == 0, theirs.tensors == 0)  # exact zeros in the padding


@pytest.mark.parametrize("most", [1, 6, 40])
def test_assignment(most):
    grid = AnchorGrid(((16.0,), (40.0,), (100.0,)), RATIOS, (8, 16, 32), rounded=True)
    anchors = grid_anchors(grid, CANVAS, CPU)
    batch = 20
    boxes, valid = random_objects(most, batch, most)
    ignore, sizes = torch.zeros_like(valid), torch.tensor([CANVAS] * batch)
    ours = assign(grid, CANVAS, boxes, valid, ignore, sizes, **RULE)
    labels, matched = torchvision_rpn().assign_targets_to_anchors(
        [anchors] * batch, as_targets(boxes, valid)
    )
    assert torch.equal(ours.labels.float(), torch.stack(labels))
    positive = ours.labels == 1
    assert positive.any(1).tolist() == valid.any(1).tolist()
    matches = boxes.gather(1, ours.matches[..., None].expand(-1, -1, 4))
    assert torch.equal(matches[positive], torch.stack(matched)[positive])


def fixed_sampler(picks, num_anchors):
    """In the place of torchvision's: masks of the anchors that we sampled."""

    def masks(chosen):
        mask = torch.zeros(len(chosen), num_anchors, dtype=torch.bool)
        for row, at, which in zip(mask, picks.at, chosen, strict=True):
            row[at[which]] = True
        return list(mask)

    return lambda labels: (masks(picks.positive), masks(picks.valid & ~picks.positive))


def test_losses_and_gradients(pair, images):
    ours, theirs = pair
    boxes, valid = random_objects(5, 2, 9)
    valid[:] = torch.tensor([[True] * 9, [False] * 9])  # the second image has no objects
    anchors = grid_anchors(ours.grid, CANVAS, CPU)
    assignment = assign(ours.grid, CANVAS, boxes, valid, torch.zeros_like(valid), SIZES, **RULE)
    keys = random_keys(torch.tensor([3, 4]), len(anchors))
    picks = sample(assignment.labels, keys, num_samples=256, fg_fraction=0.5)
    assert picks.valid.all()
    assert picks.positive[0].sum() >= 9

    ours.zero_grad()
    logits, deltas, *_ = ours(normalize_images(images, SIZES), at=picks.at)
    losses = rpn_losses(
        logits,
        deltas,
        picks,
        anchors[picks.at],
        take_boxes(boxes, assignment.matches.gather(1, picks.at)),
        **BOX_OPTIONS,
        normalizer=256 * 2,
    )
    (losses.objectness + losses.box).backward()

    theirs.zero_grad()
    theirs.rpn.train()
    theirs.rpn.fg_bg_sampler = fixed_sampler(picks, len(anchors))
    image_list = torchvision_input(theirs, images)
    features = theirs.backbone(image_list.tensors)
    their_losses = theirs.rpn(image_list, features, as_targets(boxes, valid))[1]
    sum(their_losses.values()).backward()
    theirs.rpn.eval()

    assert_close(losses.objectness, their_losses["loss_objectness"], rtol=1e-5, atol=0)
    assert_close(losses.box, their_losses["loss_rpn_box_reg"], rtol=1e-5, atol=0)
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = their_parameters[name].grad
        largest = gradient.abs().max().item()
        assert largest > 0, name
        assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_proposals(pair, images):
    ours, theirs = pair
    with torch.no_grad():
        outputs = ours(normalize_images(images, SIZES))
        image_list = torchvision_input(theirs, images)
        expected = theirs.rpn(image_list, theirs.backbone(image_list.tensors))[0]
    found = make_proposals(
        outputs.logits,
        outputs.deltas,
        grid_anchors(ours.grid, CANVAS, CPU),
        ours.grid.level_lengths(CANVAS),
        SIZES,
        pre_nms=PRE_NMS,
        post_nms=POST_NMS,
        nms_iou=0.7,
        min_size=1e-3,
    )
    for (boxes, logits), their_boxes, (height, width) in zip(
        found, expected, SIZES.tolist(), strict=True
    ):
        assert 10 < len(boxes) <= POST_NMS
        assert logits.std() > 0.05  # the order means something
        assert_close(boxes, their_boxes, rtol=1e-5, atol=1e-4)
        assert boxes.amax(0)[2:].tolist() == [width, height]  # cut at the image, not the canvas


# The deliberate differences. torchvision's side is pinned too: a change there shows.


def test_strides_are_given_and_not_inferred():
    """800 px: the coarsest of five levels has 13 rows, and 800 // 13 = 61, not 64."""
    sizes = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    generator = AnchorGenerator(sizes, ((1.0,),) * 5)
    features = [torch.empty(1, 1, n, n) for n in (200, 100, 50, 25, 13)]
    theirs = generator(ImageList(torch.empty(1, 3, 800, 800), [(800, 800)]), features)[0][-169:]
    grid = AnchorGrid(sizes, (1.0,), (4, 8, 16, 32, 64), rounded=True)
    ours = grid_anchors(grid, (832, 832), CPU)[-169:]
    assert theirs[-1].tolist() == [12 * 61 - 256, 12 * 61 - 256, 12 * 61 + 256, 12 * 61 + 256]
    assert (ours[-1] - theirs[-1]).tolist() == [36] * 4
    assert torch.equal(ours[0], theirs[0])


def test_an_unreachable_object_makes_no_anchor_positive():
    """A box between small anchors: torchvision makes all six positive."""
    grid = AnchorGrid(((4.0,),), (1.0,), (16,), rounded=True)
    anchors = grid_anchors(grid, (32, 48), CPU)
    boxes = torch.tensor([[[6.0, 6, 9, 9]]])
    valid, sizes = torch.tensor([[True]]), torch.tensor([[32, 48]])
    labels = torchvision_rpn().assign_targets_to_anchors([anchors], as_targets(boxes, valid))[0]
    assert labels[0].tolist() == [1] * 6
    ours = assign(grid, (32, 48), boxes, valid, ~valid, sizes, **RULE)
    assert ours.labels.tolist() == [[0] * 6]


def test_boxes_are_float32_under_autocast():
    """torchvision's anchors take the type of the features: 8 bits do not hold a pixel."""
    grid = AnchorGrid(((32.0,),), RATIOS, (16,), rounded=True)
    canvas = (32, 1344)
    features = torch.empty(1, 1, 2, 84, dtype=torch.bfloat16)
    image_list = ImageList(torch.empty(1, 3, *canvas), [canvas])
    theirs = torchvision_rpn(((32.0,),)).anchor_generator(image_list, [features])[0]
    assert theirs.dtype == torch.bfloat16
    with autocast("bf16", CPU):
        grid_anchors.cache_clear()
        anchors = grid_anchors(grid, canvas, CPU)
    assert anchors.dtype == torch.float32
    assert anchors.frac().eq(0).all()
    assert (theirs.float() - anchors).abs().max() >= 2

    torch.manual_seed(0)
    deltas = (0.1 * torch.randn(1, len(anchors), 4)).bfloat16()
    exact = decode(deltas.double(), anchors.double())
    with autocast("bf16", CPU):
        found = make_proposals(
            torch.arange(len(anchors))[None].float(),
            deltas,
            anchors,
            [len(anchors)],
            torch.tensor([[10_000, 10_000]]),
            pre_nms=1000,
            post_nms=1000,
            nms_iou=1.0,
            min_size=0,
        )
        off = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(deltas[0], [theirs])[:, 0]
    assert_close(found[0].boxes, exact[0].flip(0).clamp(min=0).float(), rtol=1e-5, atol=1e-4)
    assert (off.float() - exact[0]).abs().max() > 2


def test_the_normaliser_does_not_count():
    """An image of 12 anchors fills 12 of 256 slots: torchvision divides by 12, we by 256."""
    torch.manual_seed(0)
    grid = AnchorGrid(((16.0,),), (1.0,), (16,), True)
    anchors = grid_anchors(grid, (48, 64), CPU)
    boxes, valid = torch.tensor([[[1.0, 2, 17, 21]]]), torch.tensor([[True]])
    sizes = torch.tensor([[48, 64]])
    assignment = assign(grid, (48, 64), boxes, valid, ~valid, sizes, **RULE)
    picks = sample(
        assignment.labels, random_keys(torch.tensor([0]), 12), num_samples=256, fg_fraction=0.5
    )
    usable = int(picks.valid.sum())
    assert usable == int((assignment.labels >= 0).sum()) == 12
    outputs = Outputs(torch.randn(1, 12), torch.randn(1, 12, 4))
    ours = rpn_losses(
        outputs.logits.gather(1, picks.at),
        outputs.deltas[0, picks.at],
        picks,
        anchors[picks.at],
        take_boxes(boxes, assignment.matches.gather(1, picks.at)),
        **BOX_OPTIONS,
        normalizer=256,
    )
    theirs = torchvision_rpn()
    labels, matched = theirs.assign_targets_to_anchors([anchors], as_targets(boxes, valid))
    objectness, box = theirs.compute_loss(
        outputs.logits.flatten(),
        outputs.deltas[0],
        labels,
        theirs.box_coder.encode(matched, [anchors]),
    )
    assert_close(ours.objectness * 256 / 12, objectness)
    assert_close(ours.box * 256 / 12, box)


def test_saturated_logits_keep_their_order():
    """The sigmoids of 30 and 40 are both 1: torchvision then ranks by level."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    logits = torch.tensor([[30.0, 40.0]])
    theirs = torchvision_rpn().eval()
    boxes, scores = theirs.filter_proposals(anchors[None], logits, [(50, 50)], [1, 1])
    assert scores[0].tolist() == [1, 1]
    assert torch.equal(boxes[0], anchors)
    found = make_proposals(
        logits,
        torch.zeros(1, 2, 4),
        anchors,
        [1, 1],
        torch.tensor([[50, 50]]),
        pre_nms=2,
        post_nms=2,
        nms_iou=0.7,
        min_size=0,
    )
    assert found[0].logits.tolist() == [40, 30]
    assert torch.equal(found[0].boxes, anchors.flip(0))
