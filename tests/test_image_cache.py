"""Kept images are those that were made, bit for bit, and there are never more than asked for."""

import dataclasses
import errno
import json
import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stopped_at
from torch import Tensor

from rpn_train import checkpoint
from rpn_train.build import add_caches, build_eval_batches, build_planner, build_train_batches
from rpn_train.config import TrainConfig
from rpn_train.data import batch as batch_module
from rpn_train.data.batch import Batch, EvalBatches, TrainBatches
from rpn_train.data.image_cache import ImageCache
from rpn_train.data.loading import load
from rpn_train.distributed import Ranks
from rpn_train.errors import ConfigError, DataError
from rpn_train.options import from_mapping
from rpn_train.splits import open_split
from rpn_train.train import train

ONE = Ranks(0, 1, torch.device("cpu"))
SIZES = [(2, 3), (5, 7), (4, 1), (1, 1)]  # 18, 105, 12 and 3 bytes
both_kinds = pytest.mark.parametrize("kind", ["ram", "disk"])


def noise(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(size[0])
    return torch.randint(256, (3, *size), generator=generator).byte()


class Maker:
    """Makes an image, and counts how often."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.count = image, 0

    def __call__(self) -> Tensor:
        self.count += 1
        return self.image


# The cache


@both_kinds
def test_an_image_is_made_once(kind: str, tmp_path: Path) -> None:
    folder = tmp_path if kind == "disk" else None
    cache = ImageCache(SIZES, range(4), limit=138, folder=folder)
    assert (cache.num_rows, cache.num_kept, cache.num_bytes) == (4, 4, 138)
    makers = [Maker(noise(size)) for size in SIZES]
    for _ in range(2):
        for row, (size, make) in enumerate(zip(SIZES, makers, strict=True)):
            assert torch.equal(cache.image(row, size, make), make.image)
    assert [make.count for make in makers] == [1] * 4
    assert list(tmp_path.iterdir()) == []  # the file has no name: nothing stays behind


def test_it_lies_in_memory_as_it_did() -> None:
    """Decoded images have their channels last, drawn ones first; sums over them tell."""
    for order in (0, 1, 2), (1, 2, 0), (2, 1, 0):
        cache = ImageCache(SIZES, range(4), limit=138, folder=None)
        shape = torch.tensor([3, 5, 7])[list(order)].tolist()
        inner_to_outer = [order.index(dim) for dim in range(3)]
        image = noise((35, 1)).reshape(shape).permute(inner_to_outer)
        make = Maker(image)
        for _ in range(2):
            found = cache.image(1, (5, 7), make)
            assert torch.equal(found, image)
            assert found.stride() == image.stride()
        assert make.count == 1


def test_an_image_with_gaps_in_memory_is_not_kept() -> None:
    cache = ImageCache(SIZES, range(4), limit=138, folder=None)
    make = Maker(noise((5, 14))[..., ::2])
    for _ in range(2):
        assert torch.equal(cache.image(1, (5, 7), make), make.image)
    assert make.count == 2


def test_rows_beyond_the_limit_and_other_sizes_are_made_every_time() -> None:
    """Row 2 (12 bytes), then 0 (18): 30 bytes; row 1 has no room, and 3 was not asked for."""
    cache = ImageCache(SIZES, [2, 0, 1], limit=134, folder=None)
    assert (cache.num_rows, cache.num_kept, cache.num_bytes) == (3, 2, 30)
    makers = [Maker(noise(size)) for size in SIZES]
    other = Maker(noise((3, 2)))
    for _ in range(2):
        assert torch.equal(cache.image(0, (3, 2), other), other.image)
        for row, (size, make) in enumerate(zip(SIZES, makers, strict=True)):
            assert torch.equal(cache.image(row, size, make), make.image)
    assert [make.count for make in makers] == [1, 2, 1, 2]
    assert other.count == 2


def test_a_limit_below_every_image_keeps_none() -> None:
    cache = ImageCache(SIZES, range(4), limit=17, folder=None)
    assert (cache.num_kept, cache.num_bytes) == (0, 0)
    assert torch.equal(cache.image(0, (2, 3), lambda: noise((2, 3))), noise((2, 3)))


def test_no_room_is_one_line_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later, a write to the mapped file would be answered with SIGBUS."""

    def full(file: int, start: int, length: int) -> None:
        assert (start, length) == (0, 4 + 138)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError) as caught:
        ImageCache(SIZES, range(4), limit=138, folder=tmp_path)
    assert str(caught.value) == (
        f"data.cache=disk: expected 1.4e-07 GB in {tmp_path}, got: No space left on device; "
        "make room, or lower data.cache_gb"
    )
    with pytest.raises(ConfigError, match=r"^data\.cache=ram: expected 3e\+08 GB of memory, got: "):
        ImageCache([(10**8, 10**9)], [0], limit=10**18, folder=None)


# Batches


def config(cache: str | None = None, workers: int = 0, **data: Any) -> TrainConfig:
    return from_mapping(
        TrainConfig,
        {
            "dataset": {"shapes": {"size": [64, 96], "train_images": 7, "val_images": 3}},
            "data": {"cache": cache, **data},
            "image": {"short_side": 48, "max_side": 96},
            "augment": {"photometric": 0.5},
            "anchors": {"sizes": [[8], [16], [32], [64], [128]]},
            "schedule": {"batch_size": 2, "steps": 6},
            "eval": {"max_proposals": [10, 100], "batch_size": 2, "pictures": 0},
            "eval_every": 4,
            "workers": workers,
        },
    )


class Reader:
    """Draws an image, and counts; some cannot be read."""

    def __init__(self, cfg: TrainConfig, which: str, torn: tuple[int, ...] = ()) -> None:
        self.index, self._draw = open_split(cfg, which, "train")
        self.rows: list[int] = []
        self.torn = torn

    def __call__(self, row: int) -> Tensor:
        self.rows.append(row)
        if row in self.torn:
            raise DataError(f"{row}: torn")
        return self._draw(row)


def batches_of(
    cfg: TrainConfig, ranks: Ranks = ONE, folder: Path = Path(), torn: tuple[int, ...] = ()
) -> tuple[TrainBatches, EvalBatches, Reader, list[ImageCache]]:
    reader, val = Reader(cfg, "train", torn), Reader(cfg, "val")
    planner = build_planner(cfg, reader.index, 16)
    batches = build_train_batches(cfg, reader.index, reader, planner, ranks)
    eval_batches = build_eval_batches(cfg, val.index, val, 16, ranks)
    return batches, eval_batches, reader, add_caches(cfg, batches, eval_batches, folder, ranks)


def assert_same(a: Batch, b: Batch) -> None:
    for field in dataclasses.fields(Batch):
        first, second = getattr(a, field.name), getattr(b, field.name)
        same = torch.equal(first, second) if isinstance(first, Tensor) else first == second
        assert same, field.name


@pytest.mark.parametrize("torn", [(), (2,)])
@pytest.mark.parametrize("workers", [0, 2])
@both_kinds
def test_batches_are_those_without_a_cache(
    kind: str,
    workers: int,
    torn: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over three epochs, with flips and colours, and with an image that cannot be read.

    What loader processes have read is there for this one, which reads nothing else.
    """
    monkeypatch.setattr(batch_module, "RETRY_AFTER_S", ())
    plain, plain_eval, *_ = batches_of(config(), torn=torn)
    cached, cached_eval, reader, _ = batches_of(config(kind), folder=tmp_path, torn=torn)
    for a, b, keys in ((plain, cached, range(12)), (plain_eval, cached_eval, [0, 1, 0, 1])):
        with closing(load(b, keys, workers=workers, pin=False)) as found:
            for key, batch in zip(keys, found, strict=True):
                expected = a[key]
                assert isinstance(expected, Batch)
                assert_same(batch, expected)
    for key in range(4):
        assert_same(cached[key], plain[key])
    read_here = [row for row in reader.rows if row not in torn]
    assert sorted(read_here) == ([] if workers else [row for row in range(7) if row not in torn])
    assert reader.rows.count(2) >= len(torn)  # a torn one is tried again


def test_the_bound_is_for_all_processes_and_training_comes_first(tmp_path: Path) -> None:
    """An image is 3 x 48 x 72 = 10,368 bytes; 7 train, 3 are scored."""
    for gigabytes, world, kept in ((1.0, 1, [7, 3]), (9e-5, 1, [7, 1]), (9e-5, 2, [4, 0])):
        cfg = config("ram", cache_gb=gigabytes)
        together = 0
        for rank in range(world):
            ranks = Ranks(rank, world, torch.device("cpu"))
            _, eval_batches, _, caches = batches_of(cfg, ranks, tmp_path)
            assert [cache.num_kept for cache in caches] == kept
            assert caches[0].num_rows == 7
            assert caches[1].num_rows == sum(len(rows) for rows in eval_batches.batches)
            together += sum(cache.num_bytes for cache in caches)
        assert together == sum(kept) * world * 10_368 <= 1e9 * gigabytes


def test_images_of_many_sizes_are_not_kept() -> None:
    message = (
        r"^augment\.scale: expected \(1\.0, 1\.0\) with data\.cache=ram, .*, got \(0\.5, 1\.0\); "
    )
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, {"data": {"cache": "ram"}, "augment": {"scale": [0.5, 1]}})


# Runs


def outcome(folder: Path) -> tuple[str, dict[str, Tensor]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    saved = checkpoint.load(folder / "checkpoints" / "last.pt")
    assert saved["step"] == 6
    return json.dumps(sorted(lines)), saved["model"]


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("uncached")
    assert train(config(), folder, ONE) is None
    return outcome(folder)


@pytest.mark.parametrize(("kind", "workers"), [("ram", 0), ("disk", 2)])
def test_a_run_is_the_same_stopped_and_resumed_too(
    kind: str,
    workers: int,
    uncached: tuple[str, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = config(kind, workers)
    with stopped_at(5):
        assert train(cfg, tmp_path, ONE) == signal.SIGTERM
    assert train(cfg, tmp_path, ONE) is None
    lines, weights = outcome(tmp_path)
    assert lines == uncached[0]
    for key, value in uncached[1].items():
        assert torch.equal(weights[key], value), key
    told = "cached    10 of 10 images, 0.0001 GB\n"
    assert capsys.readouterr().out.count(told) == 2
