"""What windows hold, and that assignment by windows is the dense one, bit for bit."""

import math
import random

import pytest
import torch
from torchvision.ops import box_iou

from rpn_train import overlaps, windows
from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.boxes import area, plain_iou, shared_area
from rpn_train.targets import assign, assign_dense
from rpn_train.windows import grid_shapes, nearest_anchors, window_pairs

CPU = torch.device("cpu")
FPN = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)
# Grids, each with a canvas of odd numbers of cells where they are large.
CASES = [
    (AnchorGrid(((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), RATIOS, FPN, True), (192, 320)),
    (AnchorGrid(((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)), RATIOS, FPN, False), (64, 192)),
    (AnchorGrid(((32.0, 64.0, 128.0, 256.0, 512.0),), RATIOS, (16,), True), (208, 336)),
    (AnchorGrid(((20.0, 40.3),), (0.3, 1.0, 2.7, 5.0), (11,), False), (209, 143)),
    (AnchorGrid(((4.0,),), (1.0,), (16,), True), (48, 80)),  # gaps between the anchors
    (
        AnchorGrid(((3.0,), (33.0,), (9.0,)), (1.0,), (5, 20, 500), False),
        (60, 100),
    ),  # no coarse one
]


def draw_box(rng, canvas, anchors, others):
    """One of the boxes that matter: usual, thin, tiny, huge, outside, an anchor, one again."""
    height, width = canvas
    kind = rng.randrange(8)
    if kind == 0 and others:
        return rng.choice(others)
    if kind == 1:
        return anchors[rng.randrange(len(anchors))].tolist()
    w, h = (math.exp(rng.uniform(1, 5.5)) for _ in range(2))
    if kind == 2:
        w, h = rng.choice([(w, 2.0), (2.0, h)])
    if kind == 3:
        w, h = rng.choice([(0.3, 0.7), (1.0, 1.0), (1.0, 0.0)])
    if kind == 4:
        w, h = 1.5 * width, 1.2 * height
    x, y = rng.uniform(-w / 2, width - w / 2), rng.uniform(-h / 2, height - h / 2)
    if kind == 5:
        x, y = rng.uniform(-2 * width, 2 * width), rng.uniform(-2 * height, 2 * height)
    if rng.random() < 0.6:  # whole pixels, which make ties
        x, y, w, h = round(x), round(y), math.ceil(w), math.ceil(h)
    return [x, y, x + w, y + h]


def draw_batch(seed):
    """Grid, canvas, boxes [B, G, 4], flags [B, G], sizes [B, 2] and a rule."""
    rng = random.Random(seed)
    grid, canvas = CASES[seed % len(CASES)]
    anchors = grid_anchors(grid, canvas, CPU)
    batch, most = rng.choice([1, 3]), rng.choice([1, 4, 20])
    images = []
    for _ in range(batch):
        images.append([])
        for _ in range(most):
            images[-1].append(draw_box(rng, canvas, anchors, images[-1]))
    flags = [
        torch.tensor([[rng.random() < p for _ in range(most)] for _ in images])
        for p in (0.85, 0.15)
    ]
    sizes = torch.tensor(
        [[canvas[0] - rng.randrange(30), canvas[1] - rng.randrange(30)] for _ in images]
    )
    rule = {
        "fg_iou": rng.choice([0.7, 0.7, 0.5, 1.0, 0.0]),
        "bg_iou": rng.choice([0.3, 0.3, 0.5, 0.7, 0.02, 0.0]),
        "force_best": rng.random() < 0.8,
        "forced_min_iou": rng.choice([0.0, 0.0, 0.1, 0.4]),
        "ignore_ioa": rng.choice([0.5, 0.5, 0.01, 1.0]),
        "border": rng.choice(["use", "use", "ignore"]),
    }
    return grid, canvas, (torch.tensor(images), *flags, sizes), rule


@pytest.mark.parametrize("block", [windows.BLOCK_PAIRS, 40])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_assignment_is_the_dense_one(case, block, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK_PAIRS", block)
    monkeypatch.setattr(overlaps, "BLOCK_PAIRS", block)
    for seed in range(case, 35 * len(CASES), len(CASES)):
        grid, canvas, targets, rule = draw_batch(seed)
        labels, matches = assign(grid, canvas, *targets, **rule)
        dense = assign_dense(grid_anchors(grid, canvas, CPU), *targets, **rule)
        assert torch.equal(labels, dense.labels), seed
        positive = labels == 1
        assert torch.equal(matches[positive], dense.matches[positive]), seed
        assert matches.dtype == torch.int64
        assert matches.min() >= 0
        assert matches.max() < targets[0].shape[1]


def test_dense_in_chunks(monkeypatch):
    """Objects that come later replace earlier ones only where they are better."""
    for seed in range(30):
        grid, canvas, targets, rule = draw_batch(seed)
        anchors = grid_anchors(grid, canvas, CPU)
        whole = assign_dense(anchors, *targets, **rule)
        with monkeypatch.context() as patched:
            patched.setattr(overlaps, "DENSE_PAIRS", 3 * len(anchors))
            chunked = assign_dense(anchors, *targets, **rule)
        assert torch.equal(whole.labels, chunked.labels)
        assert torch.equal(whole.matches, chunked.matches)


def test_arithmetic_is_that_of_torchvision():
    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(2, 300, 4, generator=generator)
    boxes, anchors = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], -1)
    iou = box_iou(boxes, anchors)
    assert 0.05 < (iou > 0).float().mean() < 0.95
    assert torch.equal(plain_iou(boxes[:, None], anchors), iou)
    # 10 x 20 px, of which 10 x 10, nothing, and all
    anchor = torch.tensor([0.0, 0, 10, 20])
    crowds = torch.tensor([[0.0, 0, 10, 10], [10, 0, 11, 4], [-9, -9, 90, 90]])
    shared = shared_area(crowds, anchor) / area(anchor)
    assert shared.tolist() == [0.5, 0.0, 1.0]


def shared_areas(boxes, anchors):
    """float64 [N, R]."""
    return shared_area(boxes[:, None].double(), anchors.double())


def shape_of_anchors(shapes, num_anchors):
    """int64 [R], by counting all cells of all shapes: each anchor belongs to one."""
    shape_of = torch.full((num_anchors,), -1)
    for m, ((columns, rows), steps, first) in enumerate(
        zip(shapes.cells.tolist(), shapes.steps.tolist(), shapes.first.tolist(), strict=True)
    ):
        for row in range(rows):
            at = first + row * steps[1] + torch.arange(columns) * steps[0]
            assert (shape_of[at] == -1).all()
            shape_of[at] = m
    assert (shape_of >= 0).all()
    return shape_of


@pytest.mark.parametrize(("grid", "canvas"), CASES)
def test_windows_hold_all_that_share_the_area_and_little_else(grid, canvas):
    anchors, shapes = grid_anchors(grid, canvas, CPU), grid_shapes(grid, canvas)
    shape_of = shape_of_anchors(shapes, len(anchors))
    rng = random.Random(0)
    boxes = torch.tensor([draw_box(rng, canvas, anchors, []) for _ in range(25)])
    shared = shared_areas(boxes, anchors)  # [N, R]
    index = shape_of.expand(len(boxes), -1)
    most = torch.zeros(len(boxes), len(shapes.first)).double()
    most.scatter_reduce_(1, index, shared, "amax")  # [N, M]
    for part in (0.2, 0.9):
        found = torch.zeros_like(shared, dtype=torch.int64)
        pairs = list(window_pairs(boxes, part * most + 1e-6, shapes))
        box, at = map(torch.cat, zip(*pairs, strict=True))
        found.view(-1).index_add_(0, box * len(anchors) + at, torch.ones_like(at))
        assert (box.diff() >= 0).all()
        assert found.max() == 1
        needed = shared >= (part * most + 1e-6).gather(1, index)
        assert needed.any()
        assert (found[needed] == 1).all()
    # an anchor shares all of its area with itself
    own = window_pairs(anchors[-1:], 0.999 * shapes.areas()[None], shapes)
    assert len(anchors) - 1 in [at for _, of_block in own for at in of_block.tolist()]


@pytest.mark.parametrize(("grid", "canvas"), CASES)
def test_the_nearest_anchors_share_the_most(grid, canvas):
    anchors, shapes = grid_anchors(grid, canvas, CPU), grid_shapes(grid, canvas)
    shape_of = shape_of_anchors(shapes, len(anchors))
    rng = random.Random(1)
    boxes = torch.tensor([draw_box(rng, canvas, anchors, []) for _ in range(25)])
    shared = shared_areas(boxes, anchors)
    for border in (None, torch.tensor([canvas[0] - 7, canvas[1] - 13])):
        borders = None if border is None else border.expand(len(boxes), 2)
        nearest = nearest_anchors(boxes, shapes, borders)  # [N, M]
        inside = overlaps._usable(anchors, None if border is None else border[None], 1)[0]
        for m in range(len(shapes.first)):
            assert (shape_of[nearest[:, m]] == m).all()
            usable = inside & (shape_of == m)
            if usable.any():
                assert inside[nearest[:, m]].all()
                most = shared[:, usable].amax(1)
                found = shared.gather(1, nearest[:, m : m + 1])[:, 0]
                torch.testing.assert_close(found, most, rtol=0, atol=1e-2)


def test_work_follows_the_windows(monkeypatch):
    """1,000 objects and 226,083 anchors: 226 million pairs, of which one in 2,000 may count."""
    grid, canvas = CASES[0][0], (832, 1088)
    generator = torch.Generator().manual_seed(0)
    sides = torch.exp(torch.empty(1, 1000, 2).uniform_(2.1, 6, generator=generator))
    corners = torch.rand(1, 1000, 2, generator=generator) * torch.tensor([1088, 832])
    boxes, yes = torch.cat([corners, corners + sides], -1), torch.ones(1, 1000, dtype=torch.bool)
    lengths = []

    def counted(*arguments):
        for box, at in window_pairs(*arguments):
            lengths.append(len(box))
            yield box, at

    monkeypatch.setattr(windows, "BLOCK_PAIRS", 10_000)
    monkeypatch.setattr(overlaps, "window_pairs", counted)
    rule = {"fg_iou": 0.7, "bg_iou": 0.3, "force_best": True, "forced_min_iou": 0.0}
    sizes = torch.tensor([canvas])
    assign(grid, canvas, boxes, yes, ~yes, sizes, **rule, ignore_ioa=0.5, border="use")
    assert 50_000 < sum(lengths) < 130_000
    assert max(lengths) < 11_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_waits_and_the_labels_are_the_same():
    device = torch.device("cuda")
    for seed in range(3 * len(CASES)):
        grid, canvas, targets, rule = draw_batch(seed)
        on_device = [tensor.to(device) for tensor in targets]
        grid_anchors(grid, canvas, device)
        try:
            torch.cuda.set_sync_debug_mode("error")
            labels, matches = assign(grid, canvas, *on_device, **rule)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = assign(grid, canvas, *targets, **rule)
        assert torch.equal(labels.cpu(), expected.labels)
        positive = expected.labels == 1
        assert torch.equal(matches.cpu()[positive], expected.matches[positive])
