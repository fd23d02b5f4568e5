"""The images and boxes of a split: found, looked at, and left out where they are faulty."""

from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from rpn_train.config import DataConfig, DatasetConfig, SplitConfig, TrainConfig
from rpn_train.data.batch import ReadImage
from rpn_train.data.coco import read_coco
from rpn_train.data.faults import counted
from rpn_train.data.files import index_files
from rpn_train.data.headers import header_faults
from rpn_train.data.index import Index, list_folder, without_images
from rpn_train.data.index_cache import cache_folder, cached_index
from rpn_train.data.shapes import FIRST_VAL, Style, draw_row, shapes_index
from rpn_train.data.transforms import read_image
from rpn_train.data.voc import read_voc
from rpn_train.errors import ConfigError, DataError

Use = Literal["train", "score", "annotations"]


def open_split(cfg: TrainConfig, which: str, use: Use) -> tuple[Index, ReadImage]:
    """The annotations of the "train" or "val" split, and how to read its images.

    Args:
        use: what for. "train": images whose headers have faults are left out. "score": their
            objects stay, to count as missed. "annotations": images are not looked at and may be
            missing, and no number of faults is too much.

    Raises:
        ConfigError: a path is needed and not given.
        DataError: files are missing or broken, or there are too many faults.
    """
    dataset, data = cfg.dataset, cfg.data
    if dataset.format == "shapes":
        return _open_shapes(dataset, which, cfg.seed)
    keep_empty = dataset.keep_empty or which == "val"
    index = (_open_coco if dataset.format == "coco" else _open_voc)(
        dataset, data, which, use, keep_empty
    )
    if use != "annotations":
        _check_limit(index, data)
    upright, max_pixels = data.exif == "apply", data.max_pixels
    return index, lambda row: read_image(index.path(row), upright=upright, max_pixels=max_pixels)


def open_files(pattern: str, data: DataConfig) -> tuple[Index, ReadImage]:
    """Images without annotations (see `index_files`), upright, and how to read them."""
    index = index_files(pattern, max_pixels=data.max_pixels)
    _check_limit(index, data)

    def read(row: int) -> Tensor:
        # not index.path: that refuses links out of the folder, which are the user's own here
        path = index.root / index.file_name(row)
        return read_image(path, upright=True, max_pixels=data.max_pixels)

    return index, read


def _open_coco(
    dataset: DatasetConfig, data: DataConfig, which: str, use: Use, keep_empty: bool
) -> Index:
    split = dataset.train if which == "train" else dataset.val
    images = _path(dataset, which, split, split.images, split.split)
    annotations = _path(
        dataset, which, split, split.annotations, f"annotations/instances_{split.split}.json"
    )
    if use != "annotations":
        list_folder(images, "images")

    def make() -> Index:
        index = read_coco(annotations, images, categories=dataset.categories, keep_empty=keep_empty)
        return _look_at_images(index, data, use)

    return cached_index(
        annotations,
        images,
        options={
            "categories": dataset.categories,
            "keep_empty": keep_empty,
            "use": use,
            "exif": data.exif,
            "max_pixels": data.max_pixels,
        },
        folder=cache_folder(dataset.cache),
        make=make,
    )


def _open_voc(
    dataset: DatasetConfig, data: DataConfig, which: str, use: Use, keep_empty: bool
) -> Index:
    split = dataset.train if which == "train" else dataset.val
    index = read_voc(
        _path(dataset, which, split, split.annotations, "Annotations"),
        _path(dataset, which, split, split.images, "JPEGImages"),
        _path(dataset, which, split, None, f"ImageSets/Main/{split.split}.txt"),
        categories=dataset.categories,
        keep_empty=keep_empty,
    )
    return _look_at_images(index, data, use)


def _open_shapes(dataset: DatasetConfig, which: str, seed: int) -> tuple[Index, ReadImage]:
    shapes = dataset.shapes
    first, count = (0, shapes.train_images) if which == "train" else (FIRST_VAL, shapes.val_images)
    style = Style(shapes.size, shapes.max_objects, shapes.extents, shapes.clutter)
    index = shapes_index(seed, count, style, first=first, kinds=dataset.categories)
    return index, partial(draw_row, index, seed=seed, style=style)


def _look_at_images(index: Index, data: DataConfig, use: Use) -> Index:
    if use == "annotations":
        return index
    faults = header_faults(
        index, range(len(index)), upright=data.exif == "apply", max_pixels=data.max_pixels
    )
    return without_images(index, faults, keep_objects=use == "score")


def _check_limit(index: Index, data: DataConfig) -> None:
    """Refuse a split with too many faults; the first is named."""
    faults = [one for one in index.left_out if one.is_fault]
    if faults and data.on_error == "raise":
        raise DataError(f"{faults[0]}; with data.on_error=skip it would be left out")
    images = [one for one in faults if one.annotation is None]
    num_images = len({one.image for one in images}.union(index.file_names())) if images else 0
    if len(images) > data.max_bad_fraction * num_images:
        raise DataError(
            f"expected at most {data.max_bad_fraction:.2%} of {num_images} images to be faulty "
            f"(data.max_bad_fraction), got {counted(images)}; first {images[0]}"
        )
    if len(faults) - len(images) > len(index.boxes_xywh):
        boxes = [one for one in faults if one.annotation is not None]
        raise DataError(
            f"expected boxes without faults, got more with: {counted(boxes)}, and "
            f"{len(index.boxes_xywh)} without; first {boxes[0]}"
        )


def _path(
    dataset: DatasetConfig,
    which: str,
    split: SplitConfig,
    given: str | None,
    below_root: str | None,
) -> Path:
    """A path given outright, or its place below the root of the standard layout."""
    if given is not None:
        return Path(given).expanduser()
    if dataset.root is None:
        raise ConfigError(
            f"dataset.root: expected a folder in {dataset.format} layout (or "
            f"dataset.{which}.images and dataset.{which}.annotations), got null"
        )
    root = Path(dataset.root).expanduser()
    if not root.is_dir():
        raise ConfigError(f"dataset.root: expected a folder, got nothing at {root}")
    if split.split is None or below_root is None:
        raise ConfigError(f"dataset.{which}.split: expected the name of a split, got null")
    return root / below_root
