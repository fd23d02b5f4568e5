"""The cache of an index: the same index at once, and nothing worse than none when it fails."""

import errno
import hashlib
import json
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rpn_train.config import DataConfig, DatasetConfig, SplitConfig, TrainConfig
from rpn_train.data import index_cache
from rpn_train.data.coco import read_coco
from rpn_train.data.faults import LeftOut
from rpn_train.data.index import Index
from rpn_train.data.index_cache import cache_folder, cached_index
from rpn_train.errors import DataError
from rpn_train.splits import open_split

DAY_S = 24 * 3600
CONTENT: dict[str, Any] = {
    "images": [
        {"id": 9, "file_name": "neun.jpg", "height": 30, "width": 41},
        {"id": 2, "file_name": "größe.jpg", "height": 20, "width": 21},
        {"id": 5, "file_name": "five.jpg", "height": 10, "width": 11},
    ],
    "annotations": [
        {"id": 8, "image_id": 5, "category_id": 3, "bbox": [1.25, 2, 3, 4.5], "area": 7.5},
        {"id": 1, "image_id": 9, "category_id": 2, "bbox": [-3, 0, 20, 10], "iscrowd": 1},
        {"id": 4, "image_id": 5, "category_id": 2, "bbox": [0.1, 0.2, 5, 5.5]},
        {"id": 6, "image_id": 2, "category_id": 2, "bbox": [1, 1, 0, 5.5]},
        {"id": 7, "image_id": 2, "category_id": 2, "bbox": [21, 1, 5, 5.5]},
    ],
    "categories": [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
}
OPTIONS: dict[str, Any] = {"categories": None, "keep_empty": True}


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "_MIN_BYTES", 1)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    images = tmp_path / "images"
    images.mkdir()
    for image in CONTENT["images"]:
        size = image["width"], image["height"]
        Image.new("RGB", size).save(images / image["file_name"])
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(CONTENT))
    return annotations, images


class Start:
    """A start of the program; `reads` counts those that had to read the annotations."""

    def __init__(self, files: tuple[Path, Path], folder: Path) -> None:
        self.files, self.folder, self.reads = files, folder, 0

    def __call__(self, options: dict[str, Any] = OPTIONS, before: Any = None) -> Index:
        def make() -> Index:
            self.reads += 1
            index = read_coco(*self.files, **options)
            if before is not None:
                before()
            return index

        return cached_index(*self.files, options=options, folder=self.folder, make=make)

    @property
    def caches(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def start(files: tuple[Path, Path], tmp_path: Path) -> Start:
    return Start(files, tmp_path / "made" / "caches")


def assert_same(index: Index, expected: Index) -> None:
    for field in fields(Index):
        given, wanted = getattr(index, field.name), getattr(expected, field.name)
        if isinstance(wanted, np.ndarray):
            assert given.dtype == wanted.dtype, field.name
            np.testing.assert_array_equal(given, wanted, err_msg=field.name)
        else:
            assert given == wanted, field.name


def is_mapped(index: Index) -> bool:
    """All arrays are views of a mapped file."""
    for array in (a for a in vars(index).values() if isinstance(a, np.ndarray)):
        base = array
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        if not isinstance(base, mmap.mmap) or array.flags.writeable:
            return False
    return True


def test_the_second_start_maps_what_the_first_one_read(start: Start) -> None:
    expected = read_coco(*start.files, **OPTIONS)
    assert len(expected.left_out) == 2
    for _ in range(3):
        index = start()
        assert_same(index, expected)
        assert is_mapped(index)  # already the first, so that processes share it
    assert start.reads == 1
    assert index.file_name(1) == "größe.jpg"
    assert type(index.sizes) is np.ndarray


def test_a_split_without_boxes(start: Start) -> None:
    start.files[0].write_text(json.dumps(CONTENT | {"annotations": []}))
    assert start().boxes_xyxy(2).shape == start().boxes_xyxy(2).shape == (0, 4)
    assert start.reads == 1


def set_time(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


@pytest.mark.parametrize(
    "change",
    [
        lambda start: set_time(start.files[0], 12345.5),
        lambda start: start.files[0].write_text(json.dumps(CONTENT, indent=1)),
        lambda start: set_time(start.files[1], 12345.5),
        lambda start: start.files[0].rename(start.files[0].with_name("b.json")),
        lambda start: start.files[1].rename(start.files[1].with_name("b")),
    ],
)
def test_changed_files_are_read_again(start: Start, change: Callable[[Start], Any]) -> None:
    start()
    moved = change(start)
    if isinstance(moved, Path):
        start.files = tuple(f if f.exists() else moved for f in start.files)  # type: ignore[assignment]
    assert_same(start(), read_coco(*start.files, **OPTIONS))
    start()
    assert start.reads == 2


def test_a_size_that_differs_is_enough(start: Start) -> None:
    start()
    time_ns = start.files[0].stat().st_mtime_ns
    start.files[0].write_text(json.dumps(CONTENT) + " ")
    os.utime(start.files[0], ns=(time_ns, time_ns))
    start()
    assert start.reads == 2


def test_options_have_caches_of_their_own(start: Start) -> None:
    chosen = [OPTIONS, OPTIONS | {"keep_empty": False}, OPTIONS | {"categories": ["cat"]}]
    for options in chosen * 2:
        assert_same(start(options), read_coco(*start.files, **options))
    assert start.reads == len(start.caches) == 3


def test_a_relative_path_is_that_of_the_present_folder(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    start.files = Path("instances.json"), Path("images")
    monkeypatch.chdir(tmp_path)
    index = start()
    assert (index.root, start.reads) == (Path("images"), 1)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(DataError, match=r"^expected a COCO annotation file, got nothing at inst"):
        start()


def change_array(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def break_(cache: Path) -> None:
        array = np.load(cache / f"{name}.npy")
        np.save(cache / f"{name}.npy", change(array), allow_pickle=True)

    return break_


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def break_(cache: Path) -> None:
        (cache / name).write_bytes(change((cache / name).read_bytes()))

    return break_


@pytest.mark.parametrize(
    "break_",
    [
        *(rewrite(f"{name}.npy", lambda b: b[:-1]) for name in index_cache._ARRAYS),
        rewrite("areas.npy", lambda b: b[:60]),
        rewrite("areas.npy", lambda b: b""),
        rewrite("areas.npy", lambda b: b"PK\x03\x04" + b),
        rewrite("left_out.json", lambda b: b[:-1]),
        rewrite("left_out.json", lambda b: b"7"),
        lambda cache: (cache / "sizes.npy").unlink(),
        *(change_array(name, lambda a: a[:-1]) for name in index_cache._ARRAYS),
        change_array("name_bytes", lambda a: np.append(a, a)),
        change_array("image_ids", lambda a: a[0]),
        change_array("image_ids", lambda a: a.astype(object)),
        change_array("sizes", lambda a: a.astype(np.int64)),
        change_array("sizes", lambda a: a.T),
        change_array("box_offsets", lambda a: a.astype(">i8")),
        change_array("box_offsets", lambda a: np.array([0, 5, 1, a[-1]])),  # not in order
        change_array("box_offsets", lambda a: np.array([-1, 0, 1, a[-1]])),
        change_array("name_offsets", lambda a: np.zeros_like(a)),  # as a crash of the disk leaves
    ],
)
def test_a_broken_cache_is_made_again(start: Start, break_: Callable[[Path], None]) -> None:
    expected = read_coco(*start.files, **OPTIONS)
    start()
    (cache,) = start.caches
    break_(cache)
    for _ in range(2):
        assert_same(start(), expected)
        assert start.reads == 2


def test_a_cache_of_no_image_is_broken(start: Start) -> None:
    start()
    (cache,) = start.caches
    for name in index_cache._ARRAYS:
        change_array(name, lambda a: a[:0])(cache)
    for name in ("name_offsets", "box_offsets"):
        np.save(cache / f"{name}.npy", np.zeros(1, np.int64))
    assert len(start()) == 3


def test_where_nothing_can_be_written_the_annotations_are_read(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = read_coco(*start.files, **OPTIONS)
    start.folder.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert_same(start(), expected)
    assert start.caches == []
    start.folder = tmp_path / "a file"
    start.folder.touch()
    assert_same(start(), expected)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user that the system does not know
    start.folder = cache_folder("~/caches")
    assert_same(start(), expected)
    assert start.reads == 3


def test_a_kill_leaves_no_cache(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        patched.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            start()
    (left,) = start.caches
    assert (left / "ignore.npy").is_file()
    assert is_mapped(start())
    assert start.reads == 2
    assert left in start.caches


def test_of_two_that_race_the_first_one_stays(start: Start) -> None:
    other = Start(start.files, start.folder)

    assert_same(start(before=other), read_coco(*start.files, **OPTIONS))
    assert (start.reads, other.reads, len(start.caches)) == (1, 1, 1)
    assert start.caches[0].stat().st_ino == other.caches[0].stat().st_ino


def test_a_file_that_changes_while_it_is_read_leaves_no_cache(start: Start) -> None:
    start(before=partial(set_time, start.files[0], 12345.5))
    assert not start.folder.exists()


def test_what_nobody_uses_for_a_week_is_deleted(start: Start) -> None:
    old, used = OPTIONS | {"categories": ["cat"]}, OPTIONS | {"categories": ["dog"]}
    mapped = start(old)
    (cache,) = start.caches
    start(used)
    (start.folder / f"{cache.name}.7.tmp").mkdir()
    strangers = [start.folder / "index.json", start.folder / "thesis"]
    strangers[0].touch()
    strangers[1].mkdir()
    for path in start.caches:
        set_time(path, time.time() - 7 * DAY_S - 60)
    start(used)
    assert start.reads == 2
    assert len(start.caches) == 5
    start()
    assert len(start.caches) == 4
    assert cache not in start.caches
    assert all(stranger.exists() for stranger in strangers)
    assert mapped.image_ids.tolist() == [9, 2, 5]  # a run that has it goes on with it
    start(used)
    assert start.reads == 3


def test_small_files_are_not_cached(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "_MIN_BYTES", start.files[0].stat().st_size + 1)
    assert not is_mapped(start())
    assert not start.folder.exists()


def test_a_missing_file_is_what_the_reader_says(start: Start) -> None:
    start.files[0].unlink()
    with pytest.raises(DataError, match=r"^expected a COCO annotation file, got nothing at "):
        start()


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder("a/b") == Path("a/b")
    assert cache_folder(None) == Path("/x/rpn-train")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder(None) == Path("~/.cache/rpn-train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path("~/.cache/rpn-train")


@pytest.fixture
def cfg(files: tuple[Path, Path], tmp_path: Path) -> TrainConfig:
    split = SplitConfig(annotations=str(files[0]), images=str(files[1]))
    dataset = DatasetConfig(format="coco", val=split, cache=str(tmp_path / "caches"))
    return TrainConfig(dataset=dataset, data=DataConfig(max_bad_fraction=1.0))


def test_a_split_is_opened_from_its_cache(
    cfg: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = open_split(cfg, "val", "score")
    with monkeypatch.context() as patched:
        patched.setattr("rpn_train.splits.read_coco", list)  # which takes no options
        patched.setattr("rpn_train.splits.header_faults", list)
        index, _ = open_split(cfg, "val", "score")
    assert_same(index, first)
    assert len(list((tmp_path / "caches").iterdir())) == 1


def test_what_was_found_in_the_headers_of_images_is_kept_for_its_use(
    cfg: TrainConfig, files: tuple[Path, Path]
) -> None:
    """What an image is depends on the folder, on what it is for, and on two options."""
    files[0].write_text(json.dumps(CONTENT | {"annotations": CONTENT["annotations"][:3]}))
    assert len(open_split(cfg, "val", "train")[0]) == 3
    (files[1] / "five.jpg").unlink()
    gone = LeftOut("five.jpg", None, "missing")
    for _ in range(2):
        counts = {}
        for use in ("train", "score", "annotations"):
            index, _ = open_split(cfg, "val", use)
            counts[use] = len(index), len(index.areas), gone in index.left_out
        assert counts == {
            "train": (2, 1, True),
            "score": (3, 3, True),
            "annotations": (3, 3, False),
        }
    small = replace(cfg, data=replace(cfg.data, max_pixels=20 * 21))
    (index, _), (all_, _) = (open_split(c, "val", "train") for c in (small, cfg))
    assert (index.file_names(), all_.file_names()) == (["größe.jpg"], ["neun.jpg", "größe.jpg"])


def digest(index: Index) -> str:
    parts = [getattr(index, name).tobytes() for name in index_cache._ARRAYS]
    text = json.dumps(index.left_out).encode()
    return hashlib.sha256(b"".join([*parts, text])).hexdigest()[:16]


def test_another_result_of_the_reader_needs_another_format(files: tuple[Path, Path]) -> None:
    """Otherwise the caches of today would be taken for it. A new line here, and a new FORMAT."""
    known = {1: "d207e1c73d87a6c2", 2: "1fbab8f080e8bfe5"}
    assert digest(read_coco(*files, **OPTIONS)) == known[index_cache.FORMAT]
