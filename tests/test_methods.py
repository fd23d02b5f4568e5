"""Methods as a whole: what a preset says, what its network computes, what a step divides by."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou, deform_conv2d, generalized_box_iou_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from rpn_train import objectness_losses
from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import clip, decode
from rpn_train.build import build_model
from rpn_train.compose import compose, readable
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.dense_losses import dense_losses
from rpn_train.dense_targets import center_region_assign, centerness_targets
from rpn_train.distributed import Ranks
from rpn_train.errors import ConfigError
from rpn_train.evaluate import propose_batch
from rpn_train.heads import (
    PRIOR,
    CascadeHead,
    Outputs,
    TowerHead,
    adaptive_points,
    convolve_at,
    offsets_of,
)
from rpn_train.method_config import MethodConfig
from rpn_train.method_targets import dense_targets, method_at
from rpn_train.model import normalize_images
from rpn_train.objective import batch_losses
from rpn_train.options import differences, from_mapping, to_mapping
from rpn_train.run_state import build_state
from rpn_train.step import Clock, training_step
from rpn_train.targets import POSITIVE

DENSE = ["retina", "atss", "task_aligned"]
ALL = ["faster_rcnn", *DENSE, "cascade", "oln"]
ONE = Ranks(0, 1, torch.device("cpu"))


def preset(method: str, *typed: str) -> TrainConfig:
    small = ["method.channels=64", "method.num_convs=1", "backbone.norm=frozen_bn"]
    few = ["schedule.batch_size=4", "schedule.optimizer=sgd", "schedule.lr=0.04"]
    return from_mapping(TrainConfig, compose([f"method={method}", *small, *few, *typed]))


def draw_batch(images: int = 4, *, empty: int = 0) -> Batch:
    """Images of 128 px with three objects each, but for the first few, which have none."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.rand(images, 3, 2, generator=generator) * 50 + 10
    corners = torch.rand(images, 3, 2, generator=generator) * (128 - sides)
    valid = torch.arange(images)[:, None].expand(-1, 3) >= empty
    return Batch(
        images=torch.randint(256, (images, 3, 128, 128), dtype=torch.uint8, generator=generator),
        sizes=torch.full((images, 2), 128),
        gt_boxes=torch.cat([corners, corners + sides], dim=-1),
        gt_valid=valid,
        gt_ignore=torch.zeros_like(valid),
        seeds=torch.arange(images),
        rows=torch.arange(images),
    )


def part(batch: Batch, rows: slice) -> Batch:
    return replace(batch, **{k: v[rows] for k, v in vars(batch).items() if isinstance(v, Tensor)})


@pytest.mark.parametrize("method", DENSE)
def test_presets_read_every_anchor_of_strides_8_to_128(method: str) -> None:
    cfg = from_mapping(TrainConfig, compose([f"method={method}"]))
    said = (cfg.backbone.pyramid, cfg.method.sampling, cfg.method.head)
    assert said == ("p3_p7", "all", "towers")
    model = build_model(preset(method))
    assert model.grid.strides == (8, 16, 32, 64, 128)
    assert model.grid.per_cell == (9 if method == "retina" else 1)


def test_what_is_typed_wins_over_a_preset(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("sizes: [[9], [18], [36], [72], [144]]\nratios: [0.7, 1.4]\n")
    own, three = (1.0,), (0.5, 1.0, 2.0)
    for typed, first_size, ratios in (
        ("dataset=shapes", 64.0, own),
        ("anchors=fpn_small", 8.0, three),
        ("anchors.ratios=[3]", 64.0, (3.0,)),
        (f"anchors={mine}", 9.0, (0.7, 1.4)),
    ):
        anchors = from_mapping(TrainConfig, compose(readable(["method=atss", typed]))).anchors
        assert (anchors.sizes[0][0], anchors.ratios) == (first_size, ratios)


def test_a_typed_method_wins_over_an_experiment() -> None:
    typed = ["experiment=coco_r50_fpn_1x", "method=atss"]
    cfg, own = (from_mapping(TrainConfig, compose(t)) for t in (typed, ["method=atss"]))
    assert cfg.method == own.method
    assert cfg.method.box_loss == "giou"  # that of the experiment is l1
    assert (cfg.backbone.name, cfg.backbone.pyramid) == ("resnet50_fpn", "p3_p7")
    assert cfg.anchors == own.anchors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assignment": "atss"}, "method.sampling: expected all with method.assignment=atss, got"),
        ({"head": "towers"}, "method.sampling: expected all with method.head=towers, got random"),
        ({"centerness": True, "sampling": "all"}, "method.head: expected towers with"),
        ({"head": "cascade", "sampling": "all"}, "method.sampling: expected random with method.h"),
        ({"head": "cascade", "assignment": "atss"}, "method.assignment: expected max_iou with"),
        (
            {"assignment": "task_aligned", "sampling": "all", "objectness_target": "centerness"},
            "method.objectness_target: expected label or quality with method.assignment=task_a",
        ),
        ({"objectness_loss": "focal"}, "method.sampling: expected all with method.objectness_loss"),
        ({"bg_iou": 0.8}, "method.bg_iou: expected at most method.fg_iou = 0.7, got 0.8"),
    ],
)
def test_what_does_not_go_together_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodConfig(**options)


def test_the_pyramid_is_that_of_torchvisions_retinanet() -> None:
    cfg = preset("atss", "backbone.norm=bn")
    ours = build_model(cfg).backbone.eval()
    theirs = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
        norm_layer=torch.nn.BatchNorm2d,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for a, b in zip(ours(images), theirs(images).values(), strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_towers_put_out_anchors_in_their_order() -> None:
    head = TowerHead(
        8, 2, num_convs=2, channels=16, delta_stds=(0.1, 0.1, 0.2, 0.2), centerness=True
    )
    feature = torch.rand(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    logits, deltas, centerness, _ = head(feature)
    assert (logits.shape, deltas.shape, centerness.shape) == ((3, 40), (3, 40, 4), (3, 40))
    assert_close(logits.sigmoid().mean(), torch.tensor(PRIOR), rtol=0.2, atol=0)
    maps = head.bbox_pred(head.bbox_tower(feature))  # [3, 2 * 4, 4, 5]
    row, column, anchor = 2, 3, 1
    stds = torch.tensor([0.1, 0.1, 0.2, 0.2])
    expected = maps[1, 4 * anchor : 4 * anchor + 4, row, column] * stds
    assert_close(deltas[1, (row * 5 + column) * 2 + anchor], expected)


def test_the_score_is_the_root_of_objectness_times_centerness() -> None:
    logits, centerness = torch.tensor([[0.0, 3.0, -200.0]]), torch.tensor([[0.0, -1.0, 5.0]])
    outputs = Outputs(logits, torch.zeros(1, 3, 4), centerness)
    expected = (logits.sigmoid() * centerness.sigmoid()).sqrt()
    assert_close(outputs.scores.sigmoid(), expected)
    assert outputs.scores.isfinite().all()
    assert outputs._replace(centerness=None).scores is logits


def test_proposals_are_ranked_by_the_score() -> None:
    cfg = preset("atss")
    model, batch = build_model(cfg).eval(), draw_batch(1)
    with torch.no_grad():
        outputs = model(normalize_images(batch.images, batch.sizes))
    (proposals,) = propose_batch(model, batch, cfg)
    assert outputs.centerness is not None
    assert_close(proposals.logits[0], outputs.scores.max())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("empty", [0, 2, 4])
def test_pieces_of_a_batch_add_up_to_the_whole(method: str, empty: int) -> None:
    """So do processes: losses are divided by what the whole batch counts, and not by their own.

    Half of the images have no objects, or all of them: nothing is divided by 0.
    """
    cfg = preset(method, "dataset.shapes.train_images=4")
    batch = draw_batch(empty=empty)
    state = build_state(cfg, ONE.device)
    start = copy.deepcopy(state.model.state_dict())
    training_step(state, state.model, iter([batch]), cfg, 0.01, 0.5, Clock(), ONE)
    pieces = replace(cfg, schedule=replace(cfg.schedule, accumulate=2))
    other = build_state(pieces, ONE.device)
    halves = iter([part(batch, slice(0, 2)), part(batch, slice(2, 4))])
    training_step(other, other.model, halves, pieces, 0.01, 0.5, Clock(), ONE)
    assert_close(state.pending[0], other.pending[0], rtol=1e-4, atol=1e-6)
    assert state.pending[0].isfinite().all()
    moved = 0.0
    for key, value in state.model.state_dict().items():
        assert_close(other.model.state_dict()[key], value, rtol=1e-4, atol=1e-6)
        moved = max(moved, (value - start[key]).abs().max().item())
    assert moved > 1e-5


@pytest.mark.parametrize("method", DENSE)
def test_a_step_is_the_gradient_of_the_sums_over_the_count(method: str) -> None:
    """Written out: the losses of the batch over its positives, or over the sum of their targets."""
    cfg = preset(method)
    state, batch = build_state(cfg, ONE.device), draw_batch()
    model, grid = state.model, state.model.grid
    outputs = model(normalize_images(batch.images, batch.sizes))
    targets = dense_targets(grid, batch, outputs, cfg.method)
    assert (targets.labels == POSITIVE).sum() > 4
    method_cfg = cfg.method
    sums = dense_losses(
        outputs.logits,
        outputs.deltas,
        outputs.centerness,
        grid_anchors(grid, batch.canvas, batch.images.device),
        batch.gt_boxes,
        *targets,
        objectness_kind=method_cfg.objectness_loss,
        by_centerness=method_cfg.centerness,
        box_kind=method_cfg.box_loss,
        beta=method_cfg.smooth_l1_beta,
        box_weight=method_cfg.box_weight,
        delta_stds=method_cfg.delta_stds,
        focal_alpha=method_cfg.focal_alpha,
        focal_gamma=method_cfg.focal_gamma,
    )
    total = (sums.objectness + sums.centerness + sums.box) / sums.divisor
    total.backward()
    expected = model.backbone.fpn.layer_blocks[0][0].weight.grad.clone()
    model.zero_grad()
    captured = []
    state.optimizer.step = lambda *_: captured.append(  # type: ignore[method-assign]
        model.backbone.fpn.layer_blocks[0][0].weight.grad.clone()
    )
    training_step(state, model, iter([batch]), cfg, 0.0, 0.5, Clock(), ONE)
    assert_close(captured[0], expected, rtol=1e-4, atol=1e-7)


def test_task_aligned_begins_as_atss() -> None:
    cfg = preset("task_aligned")
    model, batch = build_model(cfg), draw_batch()
    with torch.no_grad():
        outputs = model(normalize_images(batch.images, batch.sizes))
    early, late, atss = (
        dense_targets(model.grid, batch, outputs, method)
        for method in (
            method_at(cfg.method, 0.3),
            method_at(cfg.method, 0.4),
            replace(cfg.method, assignment="atss"),
        )
    )
    assert torch.equal(early.labels, atss.labels)
    assert not torch.equal(late.labels, atss.labels)
    assert early.quality is None
    # its losses, too: the focal one towards 1, and boxes weighted by centerness
    other = replace(cfg.method, assignment="atss", objectness_loss="focal")
    plain = replace(cfg, method=replace(other, objectness_target="label"))
    aiming = replace(cfg, method=replace(other, objectness_target="centerness"))
    first, plain_losses, weighted = (
        batch_losses(model, model.grid, batch, c, 0.3)[0] for c in (cfg, plain, aiming)
    )
    assert_close((first.objectness, first.divisor), (plain_losses.objectness, plain_losses.divisor))
    assert_close(first.box, weighted.box / 0.635)


def test_the_examples_of_the_page_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    blocks = re.findall(r"```(yaml|python)\n(.*?)```", page.partition("## Add your own")[2], re.S)
    assert [kind for kind, _ in blocks] == ["yaml", "python"]
    (tmp_path / "gfl.yaml").write_text(blocks[0][1])
    cfg, atss = preset(str(tmp_path / "gfl.yaml")), preset("atss")
    changed = differences(to_mapping(atss), to_mapping(cfg))
    keys = {f"method.{key}" for key in ("centerness", "objectness_loss", "objectness_target")}
    assert {*changed} == keys
    names = {**vars(objectness_losses)}  # it says that the function stands in this module
    exec(blocks[1][1], names)
    varifocal = cast(Callable[..., Tensor], names["varifocal_loss"])
    logits, targets = torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.0])
    # ln 2 x the target of a positive, or x 0.25 p^2
    expected = math.log(2) * torch.tensor([0.5, 0.0625])
    assert_close(varifocal(logits, targets, alpha=0.25, gamma=2.0), expected)
    model, batch = build_model(cfg), draw_batch()
    before, _ = batch_losses(model, model.grid, batch, cfg, 0.5)
    monkeypatch.setitem(objectness_losses.OBJECTNESS_LOSSES, "varifocal", varifocal)
    other = replace(cfg.method)
    object.__setattr__(other, "objectness_loss", "varifocal")  # a name that the page adds
    after, _ = batch_losses(model, model.grid, batch, replace(cfg, method=other), 0.5)
    assert after.objectness != before.objectness
    assert (after.box, after.divisor) == (before.box, before.divisor)


@pytest.mark.parametrize("method", ALL)
def test_a_few_steps_on_one_batch_lower_the_loss(method: str) -> None:
    cfg = preset(method, "schedule.optimizer=adamw")
    state, batch = build_state(cfg, ONE.device), draw_batch(2)
    state.model.train()

    def loss() -> float:
        with torch.no_grad():
            losses, _ = batch_losses(state.model, state.model.grid, batch, cfg, 0.1)
        divisor = 1.0 if losses.divisor is None else losses.divisor
        return float((losses.objectness + losses.box) / divisor)

    before = loss()
    for _ in range(20):
        training_step(state, state.model, iter([batch]), cfg, 3e-4, 0.1, Clock(), ONE)
    assert loss() < 0.7 * before


def test_an_adaptive_convolution_spreads_its_points_over_the_moved_anchor() -> None:
    boxes = torch.tensor([[[-8.0, -8, 8, 8]] * 12])  # of 3 x 4 cells of stride 8, all the same
    boxes[0, 6] = torch.tensor([8.0, 2, 20, 20])  # row 1, column 2: centre (14, 11), 12 x 18 px
    points = adaptive_points(boxes, (3, 4), stride=8)
    assert points.shape == (1, 9, 3, 4, 2)
    x, y = points[0, :, 1, 2].mul(8).unbind(-1)
    assert x.tolist() == pytest.approx([8, 14, 20] * 3)
    assert y.tolist() == pytest.approx([2] * 3 + [11] * 3 + [20] * 3)


def test_a_convolution_at_points_is_a_deformable_one() -> None:
    """On the CPU and on a GPU: borders, points beyond the map and a map of one column included."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 5, 3, padding=1)
    for height, width in ((6, 7), (3, 1)):
        feature = torch.rand(2, 4, height, width, generator=generator, requires_grad=True)
        points = torch.rand(2, 9, height, width, 2, generator=generator) * (height + 3) - 2
        found = convolve_at(feature, points, conv)
        expected = deform_conv2d(feature, offsets_of(points), conv.weight, conv.bias, padding=1)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        ours, theirs = (
            torch.autograd.grad(result.square().sum(), [feature, conv.weight])
            for result in (found, expected)
        )
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_cascade_with_anchors_left_alone_is_a_plain_convolution() -> None:
    """Boxes of 2 x 2 cells around each cell: the nine points are the cells themselves."""
    head = CascadeHead(8, 1, num_convs=1, channels=16, delta_stds=(0.05, 0.05, 0.1, 0.1))
    nn.init.zeros_(head.first_bbox_pred.weight)
    grid = AnchorGrid(((16.0,),), (1.0,), (8,), rounded=True)
    anchors = grid_anchors(grid, (32, 40), torch.device("cpu"))
    feature = torch.rand(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    logits, deltas, centerness, moved = head(feature, anchors, 8)
    assert centerness is None
    assert_close(moved, anchors.expand(3, -1, -1))
    hidden = head.conv(head.first_conv(feature)).relu()
    assert_close(logits, head.cls_logits(hidden).flatten(1), rtol=1e-4, atol=1e-6)
    assert_close(deltas.shape, (3, 20, 4))


def test_the_losses_of_a_cascade_written_out() -> None:
    """The first stage by the boxes of its positives, the second on the anchors it has moved."""
    cfg = preset("cascade")
    model, batch = build_model(cfg), draw_batch(2, empty=1)
    outputs = model(normalize_images(batch.images, batch.sizes))
    losses, picks = batch_losses(model, model.grid, batch, cfg, 0.0)
    assert losses.divisor is None
    anchors = grid_anchors(model.grid, batch.canvas, ONE.device)
    flags = batch.gt_valid, batch.gt_ignore
    lengths = model.grid.level_lengths(batch.canvas)
    first = center_region_assign(
        anchors, lengths, model.grid.strides, batch.gt_boxes, *flags, share=0.2, ignore_ioa=0.5
    )
    moving = objectness = box = 0.0
    for i in range(2):
        moved = outputs.anchors[i]
        for row in (first.labels[i] == POSITIVE).nonzero().flatten():
            gt = batch.gt_boxes[i, first.matches[i, row]]
            moving += generalized_box_iou_loss(moved[row], gt)
        iou = box_iou(moved, batch.gt_boxes[i])
        for slot, row in enumerate(picks.at[i]):
            assert picks.valid[i, slot]
            positive, logit = picks.positive[i, slot], outputs.logits[i, row]
            objectness += functional.softplus(-logit if positive else logit)
            if positive:
                pred = decode(outputs.deltas[i, row], moved[row])
                gt = batch.gt_boxes[i, iou[row].argmax()]
                box += generalized_box_iou_loss(pred, gt)
    assert picks.positive.sum(1)[0] == 0
    assert picks.positive.sum(1)[1] >= 3
    assert_close(losses.objectness, objectness / (256 * 4))
    expected = 10 * box / (256 * 4) + 10 * moving / (len(anchors) / 200 * 4)
    assert_close(losses.box, expected, rtol=1e-4, atol=1e-6)


def test_the_second_stage_does_not_move_the_anchors() -> None:
    """Its loss has no gradient in the first; proposals start from the moved anchors."""
    cfg = preset("cascade")
    model, batch = build_model(cfg), draw_batch(1)
    outputs = model(normalize_images(batch.images, batch.sizes))
    moved = outputs.starting_from(torch.zeros(1))
    assert torch.equal(moved, outputs.anchors)
    decode(outputs.deltas, moved).sum().backward()
    head = model.rpn["head"]
    assert head.bbox_pred.weight.grad.abs().sum() > 0
    assert head.first_bbox_pred.weight.grad is None
    best = outputs.logits[0].argmax()
    (proposals,) = propose_batch(model.eval(), batch, cfg)
    with torch.no_grad():
        again = model(normalize_images(batch.images, batch.sizes))
    best = again.logits[0].argmax()
    expected = clip(decode(again.deltas[0, best], again.anchors[0, best])[None], batch.sizes)
    assert_close(proposals.boxes[:1], expected)


@pytest.mark.parametrize("background", [False, True])
def test_the_losses_of_oln_written_out(background: bool) -> None:
    """Objectness aims at centerness, and at 0 if background is learned; 256 anchors per image."""
    cfg = preset("oln", f"method.learn_background={background}".lower())
    model, batch = build_model(cfg), draw_batch(3, empty=1)
    outputs = model(normalize_images(batch.images, batch.sizes))
    losses, picks = batch_losses(model, model.grid, batch, cfg, 0.0)
    anchors = grid_anchors(model.grid, batch.canvas, ONE.device)
    slots = torch.full((3,), 256) if background else picks.positive.sum(1)
    assert torch.equal(picks.valid.sum(1), slots)
    assert not picks.positive[0].any()
    total = boxes = 0.0
    for i, slot in picks.valid.nonzero().tolist():
        row = picks.at[i, slot]
        iou = box_iou(anchors[row][None], batch.gt_boxes[i][batch.gt_valid[i]])[0]
        said = outputs.logits[i, row].sigmoid()
        if not picks.positive[i, slot]:
            assert (iou < 0.1).all()
            total += said
            continue
        assert iou.max() >= 0.3
        gt = batch.gt_boxes[i, iou.argmax()]
        total += (said - centerness_targets(anchors[row], gt)).abs()
        boxes += generalized_box_iou_loss(decode(outputs.deltas[i, row], anchors[row]), gt)
    reached = box_iou(anchors, batch.gt_boxes.flatten(0, 1)).view(len(anchors), 3, -1).amax(2)
    assert picks.positive.sum(1).tolist() == [0, *(reached >= 0.3).sum(0)[1:].tolist()]
    assert picks.positive.sum() > 20
    assert losses.divisor is None
    assert_close(losses.objectness, total / (256 * 4), rtol=1e-4, atol=1e-6)
    assert_close(losses.box, 10 * boxes / (256 * 4), rtol=1e-4, atol=1e-6)


def test_the_classic_may_aim_at_the_iou_of_its_boxes() -> None:
    cfg = preset("faster_rcnn", "method.objectness_target=quality")
    model, batch = build_model(cfg), draw_batch(2)
    losses, picks = batch_losses(model, model.grid, batch, cfg, 0.0)
    outputs = model(normalize_images(batch.images, batch.sizes))
    anchors = grid_anchors(model.grid, batch.canvas, ONE.device)
    total = 0.0
    for i in range(2):
        for slot, row in enumerate(picks.at[i]):
            target = torch.tensor(0.0)
            if picks.positive[i, slot]:
                best = box_iou(anchors[row][None], batch.gt_boxes[i]).argmax()
                pred = decode(outputs.deltas[i, row], anchors[row])
                target = box_iou(pred[None], batch.gt_boxes[i, best][None])[0, 0]
            logit = outputs.logits[i, row]
            total += functional.binary_cross_entropy_with_logits(logit, target.detach())
    assert_close(losses.objectness, total / (256 * 4), rtol=1e-4, atol=1e-6)


def test_thresholds_that_no_assignment_reads_do_not_matter() -> None:
    assert MethodConfig(assignment="atss", sampling="all", fg_iou=0.2).bg_iou == 0.3
