"""Assignment against hand calculations, sampling against a plain form of itself.

The assignment here is the dense one; that of the CPU is compared with it in `test_windows.py`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpn_train.targets import assign_dense, random_keys, sample

RULE = {
    "fg_iou": 0.7,
    "bg_iou": 0.3,
    "force_best": True,
    "forced_min_iou": 0.0,
    "ignore_ioa": 0.5,
    "border": "use",
}
# Three anchors and an object: IoU 80 / 100 = .8, 80 / 200 = .4 and 0.
ANCHORS = [[0, 0, 10, 10], [0, 0, 10, 20], [50, 50, 60, 60]]
OBJECT = [0, 0, 10, 8]


def label(anchors, gt, *, valid=None, ignore=None, size=(100, 100), **changed):
    """Labels and matches of one image, as lists."""
    rows = len(gt)
    labels, matches = assign_dense(
        torch.tensor(anchors, dtype=torch.float32),
        torch.tensor([gt], dtype=torch.float32),
        torch.tensor([valid or [True] * rows]),
        torch.tensor([ignore or [False] * rows]),
        torch.tensor([size]),
        **{**RULE, **changed},
    )
    assert (labels.dtype, matches.dtype) == (torch.int8, torch.int64)
    return labels[0].tolist(), matches[0].tolist()


def test_positive_ignored_background():
    assert label(ANCHORS, [OBJECT]) == ([1, -1, 0], [0, 0, 0])


def test_the_best_anchor_is_positive_below_the_threshold():
    far = [50, 50, 60, 54]  # IoU .4 with the third anchor
    assert label(ANCHORS, [OBJECT, far]) == ([1, -1, 1], [0, 0, 1])
    assert label(ANCHORS, [OBJECT, far], force_best=False)[0] == [1, -1, -1]
    assert label(ANCHORS, [OBJECT, far], forced_min_iou=0.39)[0] == [1, -1, 1]
    assert label(ANCHORS, [OBJECT, far], forced_min_iou=0.41)[0] == [1, -1, -1]


def test_thresholds_belong_to_the_upper_side():
    half = [0, 0, 10, 5]  # IoU .5 and .25
    assert label(ANCHORS, [half], fg_iou=0.5, force_best=False)[0] == [1, 0, 0]
    assert label(ANCHORS, [half], bg_iou=0.25, force_best=False)[0] == [-1, -1, 0]


def test_tied_best_anchors_are_all_positive():
    between = [5, 0, 15, 10]  # IoU 50 / 150 with both
    assert label([[0, 0, 10, 10], [10, 0, 20, 10], [40, 0, 50, 10]], [between])[0] == [1, 1, 0]


def test_a_forced_positive_keeps_the_object_it_overlaps_most():
    """The second object (IoU .1) forces the first anchor, which goes on with the first (.6)."""
    anchors = [[0, 0, 10, 10], [0, 0, 10, 6]]
    assert label(anchors, [[0, 0, 10, 6], [0, 8, 5, 10]]) == ([1, 1], [0, 0])


def test_border_anchors_can_be_left_out():
    """The object has IoU 60 / 100 with the first anchor, which crosses, and 50 / 110 with the next.

    Two more touch the border without crossing it, and three cross it elsewhere.
    """
    anchors = [[23, 0, 33, 10], [19, 0, 29, 10], [20, 10, 30, 20], [0, 0, 10, 10]]
    anchors += [[-1, 0, 9, 10], [0, -1, 10, 9], [0, 11, 10, 21]]
    options = {"size": (20, 30), "fg_iou": 0.9}
    assert label(anchors, [[24, 0, 30, 10]], **options)[0] == [1, -1, 0, 0, 0, 0, 0]
    options["border"] = "ignore"
    assert label(anchors, [[24, 0, 30, 10]], **options)[0] == [-1, 1, 0, 0, -1, -1, -1]
    assert label(anchors, [[32, 0, 33, 10]], **options)[0] == [-1, 0, 0, 0, -1, -1, -1]


def test_crowds_are_measured_by_the_anchors_area():
    """Shares of 1, .5, .4 and 1; the IoU of the last is .04, and it is ignored all the same."""
    anchors = [[0, 0, 10, 10], [5, 0, 15, 10], [6, 0, 16, 10], [1, 1, 3, 3]]
    crowd = [0, 0, 10, 10]
    assert label(anchors, [crowd], ignore=[True])[0] == [-1, -1, 0, -1]
    both = label(anchors, [crowd, [1, 1, 3, 3]], ignore=[True, False])
    assert both == ([-1, -1, 0, 1], [1, 1, 1, 1])  # positive stays positive, and not with the crowd
    # an object in the crowd's place, and one that only forces (IoU .4)
    assert label(anchors, [crowd, crowd], ignore=[True, False])[0] == [1, -1, 0, -1]
    assert label(anchors[:1], [crowd, [0, 0, 10, 4]], ignore=[True, False])[0] == [1]


def test_padding_rows_do_nothing():
    expected = label(ANCHORS, [OBJECT])
    for ignore in (False, True):
        padded = label(
            ANCHORS, [OBJECT, *ANCHORS], valid=[True] + [False] * 3, ignore=[False] + [ignore] * 3
        )
        assert padded == expected


@pytest.mark.parametrize("border", ["use", "ignore"])
def test_no_objects(border):
    labels, matches = label(ANCHORS, [[0, 0, 0, 0]], valid=[False], border=border)
    assert (labels, matches) == ([0, 0, 0], [0, 0, 0])


def test_an_object_that_no_anchor_overlaps_makes_nothing_positive():
    assert label(ANCHORS, [[80, 80, 90, 90]])[0] == [0, 0, 0]
    assert label(ANCHORS, [[5, 5, 5, 5]])[0] == [0, 0, 0]  # without extent


def test_a_batch_is_its_images():
    anchors = torch.tensor(ANCHORS).float()
    gt = torch.tensor([[OBJECT, [0, 0, 0, 0]], [[50, 50, 60, 59], [0, 0, 9, 10]]]).float()
    valid, ignore = torch.tensor([[True, False], [True, True]]), torch.tensor([[False] * 2] * 2)
    sizes = torch.tensor([[100, 100], [55, 100]])
    rule = {**RULE, "border": "ignore"}
    batch = assign_dense(anchors, gt, valid, ignore, sizes, **rule)
    assert batch.labels.tolist() == [[1, -1, 0], [1, -1, -1]]
    for i in (slice(1), slice(1, 2)):
        labels, matches = assign_dense(anchors, gt[i], valid[i], ignore[i], sizes[i], **rule)
        assert torch.equal(batch.labels[i], labels)
        assert torch.equal(batch.matches[i], matches)


def plain_sample(labels, keys, num_samples, fg_fraction):
    """Anchors in the order they are taken, and how many of them are positive."""
    ranked = sorted(range(len(labels)), key=lambda i: -keys[i])
    positives = [i for i in ranked if labels[i] == 1][: int(num_samples * fg_fraction)]
    background = [i for i in ranked if labels[i] == 0]
    return positives + background[: num_samples - len(positives)], len(positives)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.tuples(*[st.sampled_from([1, 0, -1])] * 2), min_size=1, max_size=24),
    num_samples=st.integers(1, 16),
    fg_fraction=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    seed=st.integers(0, (1 << 62) - 2),
)
def test_sample_is_the_plain_one(labels, num_samples, fg_fraction, seed):
    """Every mix of labels, for two images at once: too few, too many or none of any kind."""
    labels = torch.tensor(labels, dtype=torch.int8).T
    keys = random_keys(torch.tensor([seed, seed + 1]), labels.shape[1])
    picks = sample(labels, keys, num_samples=num_samples, fg_fraction=fg_fraction)
    slots = min(num_samples, labels.shape[1])
    assert picks.at.shape == picks.positive.shape == picks.valid.shape == (2, slots)
    assert picks.at.min() >= 0
    assert picks.at.max() < labels.shape[1]
    for i in range(2):
        taken, num_positive = plain_sample(
            labels[i].tolist(), keys[i].tolist(), num_samples, fg_fraction
        )
        assert picks.valid[i].tolist() == [slot < len(taken) for slot in range(slots)]
        assert picks.positive[i].tolist() == [slot < num_positive for slot in range(slots)]
        assert picks.at[i, : len(taken)].tolist() == taken


def test_sample_counts_of_the_paper():
    """256 slots: 128 + 128, or 3 + 253 where there are no more positives."""
    labels = torch.zeros(2, 1000, dtype=torch.int8)
    labels[0, 100:300] = 1
    labels[1, [0, 500, 999]] = 1
    picks = sample(
        labels, random_keys(torch.tensor([3, 4]), 1000), num_samples=256, fg_fraction=0.5
    )
    assert picks.valid.all()
    assert picks.positive.sum(1).tolist() == [128, 3]
    assert all(row.unique().numel() == 256 for row in picks.at)
    assert torch.equal(labels.gather(1, picks.at) == 1, picks.positive)


SEEDS = torch.tensor([0, 1, 2, 1 << 32, (1 << 62) - 1, 0x123456789ABCDEF])


def test_keys_are_distinct_and_follow_from_the_seed_alone():
    keys = random_keys(SEEDS, 20_000)
    assert keys.dtype == torch.int64
    assert keys.min() >= 0
    assert keys.max() < 1 << 32
    assert all(row.unique().numel() == 20_000 for row in keys)
    assert torch.equal(random_keys(SEEDS[3:4], 20_000), keys[3:4])  # whatever else is in the batch
    assert torch.equal(random_keys(SEEDS, 777), keys[:, :777])


def test_keys_are_those_of_the_plain_hash():
    """A run can be repeated only as long as these stay: "lowbias32" in Python's integers."""

    def hash32(x):
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    expected = [hash32(hash32(hash32(i) ^ 7) ^ 5) for i in range(4)]
    assert random_keys(torch.tensor([5 * 2**32 + 7]), 4).tolist() == [expected]


def test_keys_are_uniform_and_uncorrelated():
    count, bins = 20_000, 32
    keys = random_keys(SEEDS, count)
    for row in keys:
        seen = torch.bincount(row >> 27, minlength=bins).double()
        assert ((seen - count / bins) ** 2 / (count / bins)).sum() < 61.1  # 31 degrees, p = .001
    off_diagonal = torch.corrcoef(keys.double()) - torch.eye(len(SEEDS))
    assert off_diagonal.abs().max() < 4 / count**0.5
    neighbours = torch.stack([keys[0, :-1], keys[0, 1:]]).double()
    assert torch.corrcoef(neighbours)[0, 1].abs() < 4 / count**0.5


def test_keys_of_close_seeds_are_no_rearrangement_of_each_other():
    """A hash of index ^ seed gives anchor i under seed 0 the key of anchor i ^ 1 under seed 1."""
    keys = random_keys(torch.tensor([0, 1, 2, 3, 1 << 32]), 4096)
    assert keys.unique().numel() > keys.numel() - 5


def test_sampling_is_uniform_over_the_positives():
    """40 positives among 200 anchors, 8 taken for each of 2,000 seeds: 400 times each."""
    labels = torch.zeros(2000, 200, dtype=torch.int8)
    labels[:, ::5] = 1
    picks = sample(labels, random_keys(torch.arange(2000), 200), num_samples=16, fg_fraction=0.5)
    taken = torch.bincount(picks.at[picks.positive], minlength=200)[::5].double()
    assert taken.sum() == 2000 * 8
    # a count varies by 2000 x .2 x .8; 39 degrees of freedom, p = .001
    assert ((taken - 400) ** 2 / 320).sum() * 39 / 40 < 72.1
