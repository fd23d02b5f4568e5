"""The order of the images: a pure function of (seed, step), every image once, little padding."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from rpn_train.data.sampler import Plan, Planner, canvas_of, epoch_order, same_canvas_batches
from rpn_train.data.transforms import fit_size


def planner(count: int = 23, **changes: Any) -> Planner:
    """`count` images, wide and tall (rows 0, 3, 6, ... are tall) of different sizes."""
    sizes = [(97 + i, 61) if i % 3 == 0 else (59, 80 + i) for i in range(count)]
    settings: dict[str, Any] = {
        "sizes": np.array(sizes, np.int32),
        "seed": 5,
        "batch_size": 4,
        "short_side": 50,
        "max_side": 90,
        "divisor": 32,
        "flip": 0.5,
        "scale": (0.8, 1.2),
        "photometric": 0.25,
    }
    return Planner(**{**settings, **changes})


def epoch(of: Planner, number: int) -> list[Plan]:
    first = number * of.steps_per_epoch + 1
    return [of.plan(step) for step in range(first, first + of.steps_per_epoch)]


def rows(plans: list[Plan]) -> list[int]:
    return [item.row for plan in plans for item in plan.items]


def test_a_plan_is_a_function_of_seed_and_step() -> None:
    """Whatever was asked before, and by whom."""
    forward = [planner().plan(step) for step in range(1, 20)]
    one = planner()
    backward = [one.plan(step) for step in range(19, 0, -1)]
    assert forward == backward[::-1]
    assert planner().plan(1000) == planner().plan(1000)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    planner().plan(7)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_every_image_once_per_epoch_and_the_filling_ones_twice() -> None:
    plans = epoch(planner(23), 2)
    assert [len(plan.items) for plan in plans] == [4] * 6
    counts = Counter(rows(plans))
    assert counts.keys() == {*range(23)}
    assert sorted(counts.values()) == [1] * 22 + [2]
    assert sorted(rows(epoch(planner(24), 0))) == [*range(24)]


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 8), (3, 8), (5, 3), (8, 8)])
def test_few_images(count: int, batch_size: int) -> None:
    """No matter how few, every batch is whole and every image is in the epoch."""
    plans = epoch(planner(count, batch_size=batch_size), 1)
    assert [len(plan.items) for plan in plans] == [batch_size] * -(-count // batch_size)
    counts = Counter(rows(plans))
    assert counts.keys() == {*range(count)}
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("count", [23, 24, 30, 41])
def test_at_most_one_batch_mixes_wide_and_tall(count: int) -> None:
    of = planner(count)
    for number in range(5):
        kinds = [{item.row % 3 == 0 for item in plan.items} for plan in epoch(of, number)]
        assert sum(len(kind) == 2 for kind in kinds) <= 1


def test_epochs_and_seeds_differ() -> None:
    first, second = rows(epoch(planner(24), 0)), rows(epoch(planner(24), 1))
    other = rows(epoch(planner(24, seed=6), 0))
    assert first != second
    assert first != other
    # another order, and also other images together: not the batches of before shuffled
    batches = [{frozenset(i.row for i in p.items) for p in epoch(planner(24), e)} for e in (0, 1)]
    assert len(batches[0] & batches[1]) < 3
    # wide batches do not all come first
    wide = [epoch(planner(24), e)[0].items[0].row % 3 != 0 for e in range(20)]
    assert 0 < sum(wide) < 20


def test_epoch_order_has_whole_batches() -> None:
    order = epoch_order(planner(23), 0)
    assert order.shape == (6, 4)
    assert planner(23).steps_per_epoch == 6


def test_the_canvas_is_the_smallest_multiple_that_holds_the_batch() -> None:
    assert canvas_of([(1, 1)], 32) == (32, 32)
    assert canvas_of([(32, 33)], 32) == (32, 64)
    assert canvas_of([(10, 70), (40, 20)], 16) == (48, 80)
    for plan in epoch(planner(), 0):
        height, width = (max(side) for side in zip(*(i.size for i in plan.items), strict=True))
        assert plan.canvas[0] % 32 == plan.canvas[1] % 32 == 0
        assert 0 <= plan.canvas[0] - height < 32
        assert 0 <= plan.canvas[1] - width < 32


def test_augmentation_is_drawn_from_its_ranges() -> None:
    of = planner(24, short_side=1000, max_side=10_000)
    items = [item for number in range(50) for plan in epoch(of, number) for item in plan.items]
    scales = np.array([min(item.size) for item in items]) / 1000
    assert scales.min() >= 0.8 - 5e-4
    assert scales.max() <= 1.2 + 5e-4
    # 1,200 draws: of the ends, the mean and the shares, no one is 5 deviations away
    assert scales.min() < 0.805
    assert scales.max() > 1.195
    assert abs(scales.mean() - 1) < 5 * 0.4 / 12**0.5 / 1200**0.5
    assert abs(np.mean([item.flip for item in items]) - 0.5) < 5 * 0.5 / 1200**0.5
    assert abs(np.mean([item.photometric for item in items]) - 0.25) < 5 * 0.433 / 1200**0.5
    assert len({item.seed for item in items}) == 1200
    assert all(0 <= item.seed < 2**62 for item in items)
    for item in items[:24]:  # the shape is kept
        height, width = of.sizes[item.row]
        assert item.size[0] / item.size[1] == pytest.approx(height / width, rel=2e-3)


def test_no_augmentation_is_the_plain_size() -> None:
    of = planner(scale=(1.0, 1.0), flip=0.0, photometric=0.0)
    for item in (item for plan in epoch(of, 0) for item in plan.items):
        assert item.size == fit_size(tuple(of.sizes[item.row].tolist()), 50, 90)
        assert not item.flip
        assert not item.photometric
    always = planner(flip=1.0, photometric=1.0)
    assert all(item.flip and item.photometric for item in always.plan(3).items)


def test_one_image_is_not_augmented_twice_alike() -> None:
    """Neither in two epochs nor at its second place in a batch that it fills."""
    of = planner(1, batch_size=3)
    items = [item for number in range(2) for plan in epoch(of, number) for item in plan.items]
    assert len({item.seed for item in items}) == 6
    assert len({item.size for item in items}) > 1


def test_batches_for_evaluation() -> None:
    sizes = [(20, 30), (33, 10), (32, 32), (1, 1), (40, 32), (31, 2), (60, 31)]
    batches = list(same_canvas_batches(sizes, 3, 32))
    assert batches == [[0, 2, 3], [5], [1, 4, 6]]  # canvas 32x32, the rest of it, 64x32
    for batch in batches:
        alone = {canvas_of([sizes[row]], 32) for row in batch}
        assert alone == {canvas_of([sizes[row] for row in batch], 32)}
    assert list(same_canvas_batches(sizes[:1], 8, 32)) == [[0]]
