"""Assignments that read every anchor: hand calculations, and plain loops on random cases."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_iou

from rpn_train.anchors import AnchorGrid, grid_anchors
from rpn_train.dense_targets import (
    atss_assign,
    center_region_assign,
    centerness_targets,
    task_aligned_assign,
)

CPU = torch.device("cpu")
# Two levels: three anchors of 10 px in a row, and one of 20 px.
ANCHORS = [[0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10], [0, -5, 20, 15]]
LENGTHS = [3, 1]
FIRST = ANCHORS[0]


def floats(rows):
    return torch.tensor(rows, dtype=torch.float32)


def flags(rows, given_flags, otherwise):
    return torch.tensor([given_flags or [otherwise] * rows])


def atss(gt, *, anchors=ANCHORS, lengths=LENGTHS, valid=None, ignore=None, candidates=2):
    """Labels and matches of one image, as lists."""
    rows = flags(len(gt), valid, True), flags(len(gt), ignore, False)
    options = {"candidates": candidates, "ignore_ioa": 0.5}
    labels, matches = atss_assign(floats(anchors), lengths, floats([gt]), *rows, **options)
    assert (labels.dtype, matches.dtype) == (torch.int8, torch.int64)
    return labels[0].tolist(), matches[0].tolist()


def aligned(scores, boxes, gt, *, anchors=None, valid=None, ignore=None, candidates=2, beta=2.0):
    """Labels, matches and quality of one image, as lists; t = score * IoU^2 unless told."""
    targets = task_aligned_assign(
        floats([scores]),
        floats([boxes]),
        floats(anchors or boxes),
        floats([gt]),
        flags(len(gt), valid, True),
        flags(len(gt), ignore, False),
        candidates=candidates,
        alpha=1.0,
        beta=beta,
        ignore_ioa=0.5,
    )
    assert [t.dtype for t in targets] == [torch.int8, torch.int64, torch.float32]
    return [t[0].tolist() for t in targets]


def test_atss_by_hand():
    """Centre (7, 5): the nearest two of the first level are at 5 and 15, and all of the second.

    IoU 80 / 120, 20 / 180 and 100 / 400: mean .343, sample deviation .289, threshold .632.
    """
    assert atss([[2, 0, 12, 10]])[0] == [1, 0, 0, 0]
    # IoU 1, 0, 1 / 4: .417 + .520 = .937 <= 1; of all three 10 px anchors .3125 + .473 = .786
    assert atss([FIRST])[0] == [1, 0, 0, 0]
    assert atss([FIRST], candidates=9)[0] == [1, 0, 0, 0]
    # IoU .6, .6, 0: .4 + .346
    anchors = [[0, 0, 10, 6], [0, 0, 6, 10], [10, 0, 20, 10]]
    assert atss([FIRST], anchors=anchors, lengths=[3], candidates=3)[0] == [0, 0, 0]


def test_the_deviation_is_that_of_a_sample():
    """IoU .69, .67, .2, .2: mean .44, deviation .277, threshold .717 (of a population .240, .680).

    With .72: mean .4475, deviation .286, threshold .734 (.248, .695); with .8 of .4675 + .312.
    """
    anchors = [[0, 0, 10, 6.9], [0, 0, 10, 6.7], [0, 0, 2, 10], [8, 0, 10, 10]]
    options = {"lengths": [4], "candidates": 4}
    assert atss([FIRST], anchors=anchors, **options)[0] == [0, 0, 0, 0]
    anchors[0] = [0, 0, 10, 7.2]
    assert atss([FIRST], anchors=anchors, **options)[0] == [0, 0, 0, 0]
    anchors[0] = [0, 0, 10, 8]
    assert atss([FIRST], anchors=anchors, **options)[0] == [1, 0, 0, 0]


def test_the_centre_has_to_be_inside():
    """By more than .01 px on each side; the threshold of a single candidate is its own IoU."""
    one = {"anchors": [[0, 0, 10, 10]], "lengths": [1]}
    for box, label in (
        ([4, 0, 10, 10], 1),
        ([6, 0, 10, 10], 0),
        ([5, 0, 10, 10], 0),
        ([4.995, 0, 10, 10], 0),
        ([4.98, 0, 10, 10], 1),
        ([0, 0, 5.005, 10], 0),
        ([0, 0, 5.02, 10], 1),
        ([0, 4.995, 10, 10], 0),
        ([0, 0, 10, 5.005], 0),
        ([0, 0, 10, 5.02], 1),
    ):
        assert atss([box], **one)[0] == [label], box


def test_equal_candidates_are_all_positive():
    """Their threshold is their IoU exactly, in whatever order a device adds them up."""
    for number in range(1, 12):
        for height in (3.3, 5.7, 7, 9.1):
            same = {"anchors": [[0, 0, 10, height]] * number, "lengths": [1] * number}
            assert atss([FIRST], **same)[0] == [1] * number


def test_an_anchor_goes_to_the_object_it_overlaps_most():
    one = {"anchors": [[0, 0, 10, 10]], "lengths": [1]}
    low, high = [0, 0, 10, 8], [0, 0, 10, 9]
    assert atss([low, high], **one) == ([1], [1])
    assert atss([high, low], **one) == ([1], [0])
    assert atss([low, high, high], **one) == ([1], [1])  # the first of equal ones
    assert atss([low, high], **one, valid=[True, False]) == ([1], [0])
    assert atss([low, high], **one, ignore=[False, True]) == ([1], [0])


def test_the_nearest_is_so_in_a_straight_line():
    """Centres (0, 5) and (3, 3) away: 5 > 4.24 px."""
    anchors = [[8, 13, 12, 17], [11, 11, 15, 15]]
    assert atss([[0, 0, 20, 20]], anchors=anchors, lengths=[2], candidates=1)[0] == [0, 1]


def test_equally_near_anchors_are_taken_in_order():
    """Object between anchors 0 and 1, one candidate: the first, though the second is the same."""
    assert atss([[4, 0, 16, 10]], lengths=[4], candidates=1)[0] == [0, 0, 0, 1]  # centre (10, 5)
    assert atss([[4, 0, 16, 10]], anchors=ANCHORS[:3], lengths=[3], candidates=1)[0] == [1, 0, 0]


def test_atss_crowds_padding_and_nothing():
    """Share of the crowd's: 1, .5, 0 of the small anchors and .375 of the large one."""
    crowd = [0, 0, 15, 10]
    assert atss([crowd], ignore=[True])[0] == [-1, -1, 0, 0]
    assert atss([crowd, FIRST], ignore=[True, False]) == ([1, -1, 0, 0], [1, 1, 1, 1])
    nan = float("nan")
    for padding in ([0] * 4, [nan] * 4, crowd):
        for ignore in (False, True):
            gt = [FIRST, padding]
            padded = atss(gt, valid=[True, False], ignore=[False, ignore])
            assert padded[0] == [1, 0, 0, 0]
            assert padded[1][0] == 0
    assert atss([[0] * 4], valid=[False])[0] == [0, 0, 0, 0]
    assert atss([[5, 5, 5, 5]])[0] == [0, 0, 0, 0]  # without extent


# Predictions of IoU .8, .5 and .4 with an object.
PREDICTIONS = [[0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 4]]
INSIDE = [[4, 4, 6, 6]] * 3


def test_task_aligned_by_hand():
    """t = .5 x .64 = .32, 1 x .25 and .25 x .16 = .04; the best has the quality .8, its IoU."""
    scores = [0.5, 1.0, 0.25]
    labels, matches, quality = aligned(scores, PREDICTIONS, [FIRST], anchors=INSIDE)
    assert (labels, matches) == ([1, 1, 0], [0, 0, 0])
    assert quality == pytest.approx([0.8, 0.25 / 0.32 * 0.8, 0])
    labels, _, quality = aligned(scores, PREDICTIONS, [FIRST], anchors=INSIDE, candidates=9)
    assert labels == [1, 1, 1]
    assert quality == pytest.approx([0.8, 0.625, 0.1])
    # t = .064, .25, .04: the highest t is not that of the highest IoU
    _, _, quality = aligned([0.1, 1.0, 0.25], PREDICTIONS, [FIRST], anchors=INSIDE)
    assert quality == pytest.approx([0.064 / 0.25 * 0.8, 0.8, 0])


def test_anchors_outside_take_no_place():
    """The best prediction's own anchor lies outside: the next two are taken."""
    anchors = [[14, 4, 16, 6], *INSIDE[1:]]
    labels, _, quality = aligned([1.0, 1.0, 0.25], PREDICTIONS, [FIRST], anchors=anchors)
    assert labels == [0, 1, 1]
    assert quality == pytest.approx([0, 0.5, 0.04 / 0.25 * 0.5])


def test_contested_anchors_go_to_the_higher_iou():
    """The first prediction has IoU .8 and .9 (72 / 80) with the objects, so the second has it.

    What is left of the first object is the prediction of .5: its t and IoU are its highest.
    """
    gt = [FIRST, [0, 0, 9, 8]]
    labels, matches, quality = aligned([1.0, 1.0], PREDICTIONS[:2], gt, anchors=INSIDE[:2])
    # second prediction: IoU .5 and 45 / 77 = .584
    assert (labels, matches) == ([1, 1], [1, 1])
    assert quality == pytest.approx([0.9, (45 / 77 / 0.9) ** 2 * 0.9])
    labels, matches, quality = aligned(
        [1.0, 1.0], PREDICTIONS[:2], gt, anchors=INSIDE[:2], candidates=1
    )
    assert (labels, matches) == ([1, 0], [1, 1])  # both objects want the first
    assert quality == pytest.approx([0.9, 0])
    gt = [FIRST, [0, 0, 10, 8]]
    anchors = [INSIDE[0], [4, 8.5, 6, 9]]  # the second inside the first object alone
    labels, matches, quality = aligned([1.0, 0.5], PREDICTIONS[:2], gt, anchors=anchors)
    assert (labels, matches) == ([1, 1], [1, 0])
    assert quality == pytest.approx([1.0, 0.5])
    assert aligned([1.0], [FIRST], [FIRST, FIRST])[:2] == [[1], [0]]  # the first of equal ones


def test_equally_aligned_anchors_are_taken_in_order_and_zero_is_none():
    predictions = [FIRST] * 5
    labels, _, quality = aligned([0.5] * 5, predictions, [FIRST], candidates=3)
    assert labels == [1, 1, 1, 0, 0]
    assert quality == pytest.approx([1, 1, 1, 0, 0])
    assert aligned([0, 0, 0, 0.1, 0], predictions, [FIRST], candidates=3)[0] == [0, 0, 0, 1, 0]
    far = [[80, 0, 90, 10]] * 5
    nothing = aligned([1] * 5, far, [FIRST], anchors=predictions)
    assert (nothing[0], nothing[2]) == ([0] * 5, [0] * 5)
    nan = [float("nan")] * 4
    assert aligned([1, 1], [nan, FIRST], [FIRST], anchors=[FIRST] * 2, candidates=1)[0] == [0, 1]


def test_task_aligned_crowds_and_padding():
    gt = [FIRST, FIRST]
    boxes = [FIRST, FIRST]
    options = {"candidates": 1, "valid": [True, True], "ignore": [True, False]}
    assert aligned([1, 0.5], boxes, gt, **options) == [[1, -1], [1, 1], [1.0, 0.0]]
    assert aligned([1, 0.5], boxes, gt, **options | {"ignore": [True, True]})[0] == [-1, -1]
    assert aligned([1, 0.5], boxes, gt, **options | {"valid": [False, True]})[0] == [1, 0]
    nothing = aligned([1, 0.5], boxes, gt, **options | {"valid": [False, False]})
    assert (nothing[0], nothing[2]) == ([0, 0], [0, 0])


def test_center_region_by_hand():
    """Anchors of 10 px every 10 px, of 20 px every 20 px; objects of 14 px and less choose 10."""
    fine = [[x, y, x + 10, y + 10] for y in (-5, 5, 15) for x in (-5, 5, 15)]  # centres 0, 10, 20
    coarse = [[x, -10, x + 20, 10] for x in (-10, 10)]  # centres (0, 0) and (20, 0)

    def labels_of(gt, share, **given):
        rows = flags(len(gt), given.get("valid"), True), flags(len(gt), given.get("ignore"), False)
        options = {"share": share, "ignore_ioa": 0.5}
        anchors = floats(fine + coarse)
        found = center_region_assign(anchors, [9, 2], [10, 20], floats([gt]), *rows, **options)
        positive = [i for i, label in enumerate(found.labels[0].tolist()) if label == 1]
        ignored = [i for i, label in enumerate(found.labels[0].tolist()) if label == -1]
        return positive, ignored, found.matches[0, positive].tolist()

    small = [4, 4, 15, 15]  # its middle fifth is from 8.4 to 10.6, in the cell of (10, 10)
    assert labels_of([small], 0.2) == ([4], [], [0])
    assert labels_of([[3, 3, 17, 11]], 0.2)[0] == [4]  # centre (10, 7)
    wide = [-4, 8, 24, 12]  # area 112: the fine level; x from -4 to 24, y from 8 to 12
    assert labels_of([wide], 1.0)[0] == [3, 4, 5]
    assert labels_of([wide], 0.5)[0] == [3, 4, 5]  # from 3 to 17: into the cells from -5 and to 25
    assert labels_of([wide], 0.3)[0] == [4]  # from 5.8 to 14.2
    large = [0, -10, 19, 10]  # area 380: the coarse level; centre (9.5, 0), of the cell to 10
    assert labels_of([large], 0.02)[0] == [9]
    assert labels_of([large], 0.2)[0] == [9, 10]  # to 11.4
    # centre (26, 21), where there are no cells: the nearest is positive, if they meet at all
    assert labels_of([[18, 18, 34, 24]], 0.02)[0] == [8]
    assert labels_of([[60, 0, 70, 10]], 0.2)[0] == []
    # of two objects that want an anchor the one of higher IoU has it
    assert labels_of([[1, 1, 14, 14], [5, 5, 15, 15]], 0.8) == ([0, 1, 3, 4], [], [0, 0, 0, 1])
    nothing = labels_of([small], 0.2, valid=[False])
    assert (nothing[0], nothing[1]) == ([], [])
    assert labels_of([[5, 5, 15, 15]], 0.2, ignore=[True])[:2] == ([], [4])


def test_centerness_by_hand():
    """Centre (5, 5): l, r, t, b = 5, 5, 5, 5; 2, 8, 5, 5; 1, 4, 1, 9; on a side; outside."""
    boxes = [FIRST, [3, 0, 13, 10], [4, 4, 9, 14], [5, 0, 9, 9], [6, 6, 9, 9], [7, 0, 9, 10]]
    expected = floats([1, 0.5, 1 / 6, 0, 0, 0])
    assert_close(centerness_targets(floats([FIRST]), floats(boxes)), expected)
    # a box without extent, on the centre
    assert centerness_targets(floats(FIRST), floats([5, 5, 5, 5])) == 0


GRID = AnchorGrid(((16.0,), (32.0,), (64.0,)), (1.0,), (8, 16, 32), rounded=False)
CANVAS = (40, 56)
coordinate = st.integers(-4, 60)
extent = st.sampled_from([0, 1, 3, 8, 16, 30, 64])
box = st.tuples(coordinate, coordinate, extent, extent).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
row = st.tuples(box, st.sampled_from(["object"] * 4 + ["crowd", "padding", "ignored padding"]))


def unpack(rows):
    """The tensors of one image and the numbers of its objects and crowds."""
    kinds = [kind for _, kind in rows]
    gt = floats([[b for b, _ in rows]])
    valid = torch.tensor([["padding" not in kind for kind in kinds]])
    ignore = torch.tensor([[kind in ("crowd", "ignored padding") for kind in kinds]])
    numbers = [[g for g, k in enumerate(kinds) if k == kind] for kind in ("object", "crowd")]
    return (gt, valid, ignore), *numbers


def is_inside(anchor, gt):
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    return min(x - gt[0], gt[2] - x, y - gt[1], gt[3] - y) > 0.01


def plain_labels(anchors, gt, crowds, taken):
    """Labels, given the matches of the positives."""
    labels = [0] * len(anchors)
    for r, (x1, y1, x2, y2) in enumerate(anchors):
        for g in crowds:
            width = max(0, min(x2, gt[g][2]) - max(x1, gt[g][0]))
            height = max(0, min(y2, gt[g][3]) - max(y1, gt[g][1]))
            if width * height / ((x2 - x1) * (y2 - y1)) >= 0.5:
                labels[r] = -1
        if r in taken:
            labels[r] = 1
    return labels


def resolve(wanted, iou):
    """Of (object, anchor) in the order of objects, the object of each anchor."""
    taken = {}
    for g, r in wanted:
        if r not in taken or iou[g][r] > iou[taken[r]][r]:
            taken[r] = g
    return taken


def plain_atss(anchors, lengths, iou, gt, objects, candidates):
    wanted = []
    for g in objects:
        chosen, first = [], 0
        for length in lengths:

            def distance(r, g=g):
                centers = [(b[i] + b[i + 2]) / 2 for i in (0, 1) for b in (anchors[r], gt[g])]
                return (centers[0] - centers[1]) ** 2 + (centers[2] - centers[3]) ** 2

            chosen += sorted(range(first, first + length), key=distance)[:candidates]
            first += length
        values = [iou[g][r] for r in chosen]
        threshold = statistics.mean(values) + statistics.stdev(values)
        wanted += [
            (g, r) for r in chosen if iou[g][r] >= threshold and is_inside(anchors[r], gt[g])
        ]
    return resolve(wanted, iou)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rows=st.lists(row, min_size=1, max_size=6), candidates=st.sampled_from([1, 2, 5, 9]))
def test_atss_is_the_plain_one(rows, candidates):
    """Objects with many equally near anchors, without any inside, of one place, without extent."""
    anchors = grid_anchors(GRID, CANVAS, CPU)
    targets, objects, crowds = unpack(rows)
    lengths = GRID.level_lengths(CANVAS)
    labels, matches = atss_assign(anchors, lengths, *targets, candidates=candidates, ignore_ioa=0.5)
    plain, gt = anchors.tolist(), targets[0][0].tolist()
    iou = box_iou(targets[0][0], anchors).tolist()
    taken = plain_atss(plain, lengths, iou, gt, objects, candidates)
    assert labels[0].tolist() == plain_labels(plain, gt, crowds, taken)
    assert {r: matches[0, r] for r in taken} == taken
    assert matches.min() >= 0
    assert matches.max() < len(rows)


def draw_predictions(anchors, seed):
    """Scores and boxes of two images, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(-1, 2, (2, len(anchors), 4), generator=generator) * 8
    scores = torch.randint(5, (2, len(anchors)), generator=generator) / 4
    boxes = anchors + shifts
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2])
    return scores, boxes


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    rows=st.lists(row, min_size=1, max_size=6),
    candidates=st.sampled_from([1, 2, 5, 13, 999]),
    seed=st.integers(0, 999),
    beta=st.sampled_from([1.0, 6.0]),
)
def test_task_aligned_is_the_plain_one(rows, candidates, seed, beta):
    """Two images of the same objects and different predictions."""
    anchors = grid_anchors(GRID, CANVAS, CPU)
    targets, objects, crowds = unpack(rows)
    scores, boxes = draw_predictions(anchors, seed)
    options = {"candidates": candidates, "alpha": 0.5, "beta": beta, "ignore_ioa": 0.5}
    pairs = [t.expand(2, *t.shape[1:]) for t in targets]
    found = task_aligned_assign(scores, boxes, anchors, *pairs, **options)
    plain, gt = anchors.tolist(), targets[0][0].tolist()
    for i in range(2):
        iou = box_iou(targets[0][0], boxes[i])
        t = (iou.pow(beta) * scores[i].pow(0.5)).tolist()
        iou = iou.tolist()
        wanted = []
        for g in objects:
            inside = [r for r in range(len(plain)) if is_inside(plain[r], gt[g]) and t[g][r] > 0]
            wanted += [(g, r) for r in sorted(inside, key=lambda r, g=g: -t[g][r])[:candidates]]
        taken = resolve(wanted, iou)
        quality = [0.0] * len(plain)
        for r, g in taken.items():
            own = [other for other in taken if taken[other] == g]
            highest = max(t[g][other] for other in own)
            quality[r] = t[g][r] / highest * max(iou[g][other] for other in own)
        assert found.labels[i].tolist() == plain_labels(plain, gt, crowds, taken)
        assert {r: found.matches[i, r] for r in taken} == taken
        assert_close(found.quality[i], floats(quality))


def draw_batch():
    """Five images with up to 7 rows of each kind."""
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(5, 7, 2, generator=generator) * 50
    gt = torch.cat([corners, corners + 3 + torch.rand(5, 7, 2, generator=generator) * 40], dim=-1)
    valid = torch.arange(7) < torch.tensor([7, 0, 1, 4, 5])[:, None]
    return gt, valid, torch.rand(5, 7, generator=generator) < 0.3


def assign_both(anchors, gt, valid, ignore, scores, boxes):
    """Results of all assignments, seven tensors."""
    lengths = GRID.level_lengths(CANVAS)
    middle = center_region_assign(
        anchors, lengths, GRID.strides, gt, valid, ignore, share=0.4, ignore_ioa=0.5
    )
    fixed = atss_assign(anchors, lengths, gt, valid, ignore, candidates=9, ignore_ioa=0.5)
    options = {"candidates": 13, "alpha": 1.0, "beta": 6.0, "ignore_ioa": 0.5}
    learned = task_aligned_assign(scores, boxes, anchors, gt, valid, ignore, **options)
    return *middle, *fixed, *learned


def draw_inputs():
    anchors = grid_anchors(GRID, CANVAS, CPU)
    scores, boxes = (t.repeat(3, *[1] * (t.ndim - 1))[:5] for t in draw_predictions(anchors, 4))
    return anchors, *draw_batch(), scores, boxes


def test_a_batch_is_its_images():
    anchors, *inputs = draw_inputs()
    batch = assign_both(anchors, *inputs)
    for i in range(5):
        for whole, alone in zip(
            batch, assign_both(anchors, *(t[i : i + 1] for t in inputs)), strict=True
        ):
            assert torch.equal(whole[i : i + 1], alone)


def test_half_precision_predictions_are_compared_in_float32():
    *rest, scores, boxes = draw_inputs()
    half = assign_both(*rest, scores.bfloat16(), boxes.bfloat16())
    full = assign_both(*rest, scores.bfloat16().float(), boxes.bfloat16().float())
    assert_close(half, full, rtol=0, atol=0)


def test_nothing_waits_for_the_numbers():
    """On tensors that have shapes alone: what waited for a GPU would ask for a number and fail."""
    inputs = draw_inputs()
    expected = assign_both(*inputs)
    for result, like in zip(assign_both(*(t.to("meta") for t in inputs)), expected, strict=True):
        assert (result.shape, result.dtype, result.device.type) == (like.shape, like.dtype, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_waits_and_the_labels_are_the_same():
    inputs = draw_inputs()
    on_device = [tensor.to("cuda") for tensor in inputs]
    assign_both(*on_device)  # kernels are loaded
    try:
        torch.cuda.set_sync_debug_mode("error")
        results = assign_both(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, expected in zip(results, assign_both(*inputs), strict=True):
        if expected.is_floating_point():
            assert_close(result.cpu(), expected)
        else:
            assert torch.equal(result.cpu(), expected)
