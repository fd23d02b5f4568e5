"""Padded batches: shares of processes make up the whole, workers change nothing, faults arrive."""

import dataclasses
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rpn_train.data import batch as batch_module
from rpn_train.data.batch import (
    SUBSTITUTES,
    Batch,
    EvalBatches,
    TrainBatches,
    Unread,
    load_item,
    make_batch,
)
from rpn_train.data.index import Index, build_index
from rpn_train.data.loading import load
from rpn_train.data.sampler import Item, Planner, canvas_of
from rpn_train.data.transforms import flip
from rpn_train.errors import DataError

SIZES = [(40, 61), (53, 37), (30, 30), (20, 59), (47, 31), (33, 44), (29, 64), (45, 45)]
BOXES = [  # (row, x, y, width, height, ignore)
    (0, 10, 5, 20, 30, False),
    (0, -4, 2, 10, 10, False),  # reaches over the left edge
    (0, 50, 30, 5, 5, True),
    (1, 0, 0, 37, 53, False),
    (3, 7, 3, 11, 13, False),
    (5, 1, 1, 9, 9, False),
    (5, 20, 20, 9, 9, False),
]  # rows 2, 4, 6 and 7 have none


def make_index() -> Index:
    table = np.array(BOXES, np.float64)
    return build_index(
        source=Path("instances.json"),
        root=Path("images"),
        image_ids=np.arange(100, 108),
        file_names=[f"{row}.jpg" for row in range(8)],
        sizes=np.array(SIZES),
        box_rows=table[:, 0].astype(np.int64),
        box_ids=np.arange(7),
        boxes_xywh=table[:, 1:5],
        areas=np.full(7, np.nan),
        ignore=table[:, 5].astype(bool),
        keep_empty=True,
    )


INDEX = make_index()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two retries, without a pause."""
    monkeypatch.setattr(batch_module, "RETRY_AFTER_S", (0, 0))


def read(row: int) -> Tensor:
    """Noise without a zero, so that padding shows."""
    generator = torch.Generator().manual_seed(row)
    return torch.randint(1, 256, (3, *SIZES[row]), generator=generator).byte()


def planner(**changes: Any) -> Planner:
    settings: dict[str, Any] = {
        "sizes": INDEX.sizes,
        "seed": 3,
        "batch_size": 4,
        "short_side": 32,
        "max_side": 48,
        "divisor": 16,
        "flip": 0.5,
        "scale": (0.7, 1.3),
        "photometric": 0.5,
    }
    return Planner(**{**settings, **changes})


def train_batches(
    read: Any = read, rank: int = 0, world: int = 1, accumulate: int = 1, **changes: Any
) -> TrainBatches:
    return TrainBatches(
        INDEX, read, planner(**changes), rank=rank, world=world, accumulate=accumulate
    )


def eval_batches(read: Any = read, rank: int = 0, world: int = 1) -> EvalBatches:
    return EvalBatches(
        INDEX,
        read,
        batch_size=2,
        short_side=32,
        max_side=48,
        divisor=16,
        rank=rank,
        world=world,
    )


def assert_same(a: Batch, b: Batch) -> None:
    for field in dataclasses.fields(Batch):
        first, second = getattr(a, field.name), getattr(b, field.name)
        if field.name == "unread":
            assert first == second
        else:
            assert first.dtype == second.dtype
            assert torch.equal(first, second), field.name


def item(row: int, size: tuple[int, int], flip: bool = False, jitter: bool = False) -> Item:
    return Item(row, size, flip, seed=row + 7, photometric=jitter)


# One batch


def test_a_batch_by_hand() -> None:
    """Row 0 at half size, row 2 (no box) as stored, row 3 mirrored, on a canvas of 48 x 64."""
    items = [item(0, (20, 30)), item(2, (30, 30)), item(3, (20, 59), flip=True)]
    batch = make_batch(INDEX, read, items, (48, 64))
    assert batch.canvas == (48, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (3, 3, 48, 64)
    assert batch.sizes.tolist() == [[20, 30], [30, 30], [20, 59]]
    assert batch.rows.tolist() == [0, 2, 3]
    assert batch.seeds.tolist() == [7, 9, 10]
    x, y = 30 / 61, 0.5
    expected = [
        [
            [10 * x, 5 * y, 30 * x, 35 * y],
            [0, 2 * y, 6 * x, 12 * y],
            [50 * x, 30 * y, 55 * x, 17.5],
        ],
        [[0, 0, 0, 0]] * 3,
        [[59 - 18, 3, 59 - 7, 16], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    assert_close(batch.gt_boxes, torch.tensor(expected))
    assert batch.gt_valid.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert batch.gt_ignore.tolist() == [[False, False, True], [False] * 3, [False] * 3]
    assert torch.equal(batch.images[1, :, :30, :30], read(2))
    assert torch.equal(batch.images[2, :, :20, :59], read(3).flip(-1))


def test_padding_is_zero_and_only_padding() -> None:
    items = [item(0, (40, 61)), item(2, (30, 30))]
    batch = make_batch(INDEX, read, items, (48, 64))
    for image, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True):
        assert (image[:, :height, :width] > 0).all()
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()


def test_a_batch_without_any_box_has_one_row_that_is_not_valid() -> None:
    batch = make_batch(INDEX, read, [item(2, (30, 30)), item(4, (47, 31))], (48, 32))
    assert batch.gt_boxes.shape == (2, 1, 4)
    assert not batch.gt_valid.any()
    assert not batch.gt_ignore.any()


def test_augmentation_is_what_the_item_says() -> None:
    image, boxes, ignore = load_item(INDEX, read, item(5, (33, 44)))
    mirrored, mirrored_boxes, _ = load_item(INDEX, read, item(5, (33, 44), flip=True))
    expected = flip(image, boxes)
    assert torch.equal(mirrored, expected[0])
    assert torch.equal(mirrored_boxes, expected[1])
    jittered, same_boxes, _ = load_item(INDEX, read, item(5, (33, 44), jitter=True))
    assert not torch.equal(jittered, image)
    assert torch.equal(same_boxes, boxes)
    assert ignore.tolist() == [False, False]


def test_a_file_of_another_size_than_annotated_is_refused() -> None:
    def turned(row: int) -> Tensor:
        return read(row).transpose(1, 2)

    message = (
        r"^0\.jpg: of another size than annotated \(40 x 61 px, annotated as 61 x 40; data\.exif"
    )
    with pytest.raises(DataError, match=message):
        load_item(INDEX, turned, item(0, (20, 30)))


# Images that cannot be read


def torn(*rows: int) -> Any:
    def read_others(row: int) -> Tensor:
        if row in rows:
            raise DataError(f"{row}.jpg: torn")
        return read(row)

    return read_others


def test_an_image_that_can_be_read_at_the_third_attempt_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network disk may be back by then; the pauses are as they are told."""
    pauses: list[float] = []
    monkeypatch.setattr(batch_module, "RETRY_AFTER_S", (0.1, 1.0))
    monkeypatch.setattr(batch_module.time, "sleep", pauses.append)
    attempts: list[int] = []

    def late(row: int) -> Tensor:
        attempts.append(row)
        if len(attempts) < works_at:
            raise DataError(f"{row}.jpg: torn")
        return read(row)

    works_at = 3
    batch = make_batch(INDEX, late, [item(0, (40, 61))], (48, 64), "substitute")
    assert_same(batch, make_batch(INDEX, read, [item(0, (40, 61))], (48, 64)))
    assert (attempts, pauses, batch.unread) == ([0] * 3, [0.1, 1.0], ())
    attempts.clear()
    works_at = 4
    with pytest.raises(DataError, match=r"^0\.jpg: torn$"):
        make_batch(INDEX, late, [item(0, (40, 61))], (48, 64))
    assert attempts == [0] * 3


def test_a_neighbour_takes_the_place_of_an_image_that_cannot_be_read() -> None:
    """At its own shape and the short side that was asked for; flip and seed stay."""
    items = [item(2, (30, 30)), item(3, (10, 30), flip=True), item(5, (33, 44))]
    for faulty, substitute in (((3,), 4), ((3, 4), 5)):
        batch = make_batch(INDEX, torn(*faulty), items, (48, 64), "substitute")
        again = make_batch(INDEX, torn(*faulty), items, (48, 64), "substitute")
        assert_same(batch, again)
        assert batch.rows.tolist() == [2, substitute, 5]
        assert batch.seeds.tolist() == [9, 10, 12]
        assert batch.unread == (Unread(3, "3.jpg: torn"),)
    batch = make_batch(INDEX, torn(3), items, (48, 64), "substitute")
    # row 4 is 47 x 31 px, and 47 x 10 / 31 is 15.2
    sound = [items[0], dataclasses.replace(items[1], row=4, size=(15, 10)), items[2]]
    expected = make_batch(INDEX, read, sound, (48, 64))
    assert_same(dataclasses.replace(batch, unread=()), expected)


def test_a_neighbour_fits_on_the_canvas_and_follows_the_last_row() -> None:
    batch = make_batch(INDEX, torn(7), [item(7, (45, 45))], (48, 48), "substitute")
    assert batch.rows.tolist() == [0]
    assert batch.sizes.tolist() == [[31, 48]]  # 40 x 61 px, times 48 / 61
    batch = make_batch(INDEX, torn(7, 0), [item(7, (45, 45))], (48, 48), "substitute")
    assert batch.rows.tolist() == [1]
    assert batch.sizes.tolist() == [[48, 33]]  # 53 x 37 px, times 48 / 53


def test_a_blank_takes_the_place_where_images_are_scored() -> None:
    items = [item(0, (40, 61)), item(5, (33, 44))]
    batch = make_batch(INDEX, torn(0), items, (48, 64), "blank")
    assert not batch.images[0].any()
    assert torch.equal(batch.images[1, :, :33, :44], read(5))
    assert (batch.rows.tolist(), batch.sizes.tolist()) == ([0, 5], [[40, 61], [33, 44]])
    assert batch.gt_valid.tolist() == [[False, False], [True, True]]
    assert batch.unread == (Unread(0, "0.jpg: torn"),)


def test_when_no_neighbour_can_be_read_the_disk_is_gone() -> None:
    attempts: list[int] = []

    def gone(row: int) -> Tensor:
        attempts.append(row)
        raise DataError(f"{row}.jpg: torn")

    with pytest.raises(DataError, match=r"^3\.jpg: torn$"):  # 10 after row 1, of 8
        make_batch(INDEX, gone, [item(1, (53, 37))], (64, 48), "substitute")
    assert len(attempts) == 3 * (1 + SUBSTITUTES)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_with_neighbours_and_names_each(workers: int) -> None:
    batches = train_batches(torn(5))
    batches.unread = "substitute"
    with closing(load(batches, range(2), workers=workers, pin=False)) as loader:
        found = list(loader)
    planned = [[i.row for i in planner().plan(step).items] for step in (1, 2)]
    assert sorted([*planned[0], *planned[1]]) == [*range(8)]
    for batch, rows in zip(found, planned, strict=True):
        assert batch.rows.tolist() == [6 if row == 5 else row for row in rows]
        assert batch.unread == ((Unread(5, "5.jpg: torn"),) if 5 in rows else ())


# Training


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_the_shares_make_up_the_batch_of_one_process(world: int, accumulate: int) -> None:
    """Images, boxes, seeds and canvas, in the order of pieces and ranks."""
    for step in (1, 2, 5):
        whole = train_batches()[step - 1]
        shares = [
            train_batches(rank=rank, world=world, accumulate=accumulate)[
                (step - 1) * accumulate + piece
            ]
            for piece in range(accumulate)
            for rank in range(world)
        ]
        assert {share.canvas for share in shares} == {whole.canvas}
        assert {len(share.rows) for share in shares} == {4 // world // accumulate}
        for name in ("images", "sizes", "seeds", "rows"):
            together = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(together, getattr(whole, name)), name
        boxes = [b[v] for s in shares for b, v in zip(s.gt_boxes, s.gt_valid, strict=True)]
        ignore = [i[v] for s in shares for i, v in zip(s.gt_ignore, s.gt_valid, strict=True)]
        for i, valid in enumerate(whole.gt_valid):
            assert torch.equal(boxes[i], whole.gt_boxes[i, valid])
            assert torch.equal(ignore[i], whole.gt_ignore[i, valid])


def test_a_batch_is_the_plan_of_its_step() -> None:
    for key in (0, 1, 9):
        plan = planner().plan(key + 1)
        batch = train_batches()[key]
        assert batch.rows.tolist() == [i.row for i in plan.items]
        assert batch.canvas == plan.canvas
        assert batch.sizes.tolist() == [[*i.size] for i in plan.items]


def test_workers_change_nothing() -> None:
    batches = train_batches()
    alone = list(load(batches, range(3, 8), workers=0, pin=False))
    helped = list(load(batches, range(3, 8), workers=2, pin=False))
    assert len(alone) == len(helped) == 5
    for key, a, b in zip(range(3, 8), alone, helped, strict=True):
        assert_same(a, batches[key])
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_data_is_the_one_line_that_it_was(workers: int) -> None:
    """Not a traceback of a loader process; what came before it is delivered."""

    planned = [[i.row for i in planner().plan(step).items] for step in (1, 2)]
    broken = next(key for key, rows in enumerate(planned) if 5 in rows)
    with closing(load(train_batches(torn(5)), range(2), workers=workers, pin=False)) as found:
        for key in range(broken):
            assert next(found).rows.tolist() == planned[key]
        with pytest.raises(DataError) as caught:
            next(found)
    assert str(caught.value) == "5.jpg: torn"


def test_loader_processes_end_when_the_loader_is_closed() -> None:
    """And not only with this process, which would wait for them: they ignore SIGTERM."""
    with closing(load(train_batches(), range(100), workers=2, pin=False)) as found:
        next(found)
        assert len(active_children()) == 2
    assert active_children() == []


# Evaluation


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_score_every_image_once(world: int) -> None:
    seen = []
    for rank in range(world):
        share = eval_batches(rank=rank, world=world)
        for batch in load(share, range(len(share)), workers=0, pin=False):
            seen += batch.rows.tolist()
    assert sorted(seen) == [*range(8)]


def test_an_image_is_scored_as_if_it_were_alone() -> None:
    """Neither augmented nor padded further for the sake of its company."""
    batches = eval_batches()
    for key in range(len(batches)):
        batch = batches[key]
        assert isinstance(batch, Batch)
        for i, (row, size) in enumerate(
            zip(batch.rows.tolist(), batch.sizes.tolist(), strict=True)
        ):
            assert batch.canvas == canvas_of([tuple(size)], 16)
            image, boxes, _ = load_item(INDEX, read, item(row, tuple(size)))
            assert torch.equal(batch.images[i, :, : size[0], : size[1]], image)
            assert torch.equal(batch.gt_boxes[i, batch.gt_valid[i]], boxes)


def test_more_processes_than_batches_leave_some_without() -> None:
    count = len(eval_batches())
    idle = eval_batches(rank=count, world=count + 1)
    assert len(idle) == 0
    assert list(load(idle, range(0), workers=0, pin=False)) == []


def test_a_fault_in_evaluation_is_a_fault() -> None:
    def missing(row: int) -> Tensor:
        raise DataError(f"expected an image, got nothing at {row}.jpg")

    with pytest.raises(DataError, match=r"^expected an image, got nothing at 0\.jpg$"):
        list(load(eval_batches(missing), range(1), workers=0, pin=False))


def test_moving_a_batch_moves_all_of_it() -> None:
    batch = dataclasses.replace(train_batches()[0], unread=(Unread(3, "torn"),))
    moved = batch.to(torch.device("meta"))
    names = {f.name for f in dataclasses.fields(Batch)} - {"unread"}
    assert all(getattr(moved, name).is_meta for name in names)
    assert moved.unread == (Unread(3, "torn"),)
