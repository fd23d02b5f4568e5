"""CPU time of one training sample: ours beside Pillow's, with and without floats.

    python scripts/benchmark_data.py --root DIR --split val2017 --images 500

A sample is an image read, resized, mirrored every other time and put on its padded canvas, and its
boxes: what a loader process does for each image. "ours" is TrainBatches with one image a batch, and
"cached" the same when a cache in memory holds all images (data.cache=ram, after the first epoch).
"float" is the plain way: Pillow decodes and resizes, torchvision makes floats and normalises them.
"uint8" is Pillow, too, but leaves the floats to the GPU, as ours and Detectron2 do.

All take turns on the same images in one process with one thread, and must agree within two grey
levels on average ("ours" and "cached" bit for bit). The time is that of the CPU, in ms per image,
median over images: waiting for the disk or for a core that others use is not in it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from rpn_train.data import batch as batch_module
from rpn_train.data.batch import Batch, TrainBatches
from rpn_train.data.coco import read_coco
from rpn_train.data.image_cache import ImageCache
from rpn_train.data.index import Index
from rpn_train.data.sampler import Item, Plan, Planner
from rpn_train.data.transforms import fit_size, read_image
from rpn_train.model import IMAGE_MEAN, IMAGE_STD, normalize_images

WARM_UP = 3
WAYS = ("ours", "cached", "float", "uint8")
PARTS = ("decode", "resize", "to float", "normalise", "flip", "pad", "other")


class Laps:
    """CPU time of the parts of a sample."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last end."""
        self._last = time.thread_time()

    def end(self, part: str) -> None:
        """The time since the last end went into `part`."""
        now = time.thread_time()
        self.times[part] = self.times.get(part, 0.0) + 1e3 * (now - self._last)
        self._last = now

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function as a part of its own; what came before it is "other"."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.end("other")
            result = function(*args, **kwargs)
            self.end(part)
            return result

        return timed


def filled_cache(index: Index, planner: Planner, steps: range) -> ImageCache:
    """A cache that holds the images of some steps."""
    short_side, max_side = planner.short_side, planner.max_side
    sizes = [fit_size((height, width), short_side, max_side) for height, width in planner.sizes]
    rows = {planner.plan(step).items[0].row for step in steps}
    cache = ImageCache(sizes, sorted(rows), limit=sys.maxsize, folder=None)
    for step in steps:
        our_sample(index, planner, step, Laps(), cache)
    return cache


def our_sample(
    index: Index, planner: Planner, step: int, laps: Laps, cache: ImageCache | None = None
) -> Tensor:
    read = laps.around(lambda row: read_image(index.path(row)), "decode")
    batches = TrainBatches(index, read, planner, rank=0, world=1, accumulate=1)
    batches.cache = cache
    with ExitStack() as stack:
        for name, part in (("resize_image", "resize"), ("flip", "flip")):
            timed = laps.around(getattr(batch_module, name), part)
            stack.enter_context(patch.object(batch_module, name, timed))
        laps.restart()  # the instruments do not count
        batch = batches[step - 1]
        laps.end("pad")
    assert isinstance(batch, Batch), batch
    return batch.images


def pillow_float(index: Index, plan: Plan, laps: Laps) -> Tensor:
    item = plan.items[0]
    image = F.pil_to_tensor(pillow_resized(index, item, laps))
    image = F.to_dtype(image, torch.float32, scale=True)
    laps.end("to float")
    image = F.normalize(image, list(IMAGE_MEAN), list(IMAGE_STD))
    laps.end("normalise")
    return flipped_and_padded(image, index, plan, laps)


def pillow_uint8(index: Index, plan: Plan, laps: Laps) -> Tensor:
    image = F.pil_to_tensor(pillow_resized(index, plan.items[0], laps))
    return flipped_and_padded(image, index, plan, laps)


def pillow_resized(index: Index, item: Item, laps: Laps) -> Image.Image:
    with Image.open(index.path(item.row)) as file:
        image = file.convert("RGB")
    laps.end("decode")
    height, width = item.size
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    laps.end("resize")
    return resized


def flipped_and_padded(image: Tensor, index: Index, plan: Plan, laps: Laps) -> Tensor:
    item = plan.items[0]
    scale = np.array(item.size[::-1] * 2) / index.sizes[item.row, [1, 0, 1, 0]]
    boxes = torch.from_numpy(index.boxes_xyxy(item.row) * scale)
    if item.flip:
        laps.end("other")
        image = image.flip(-1)
        boxes[:, [0, 2]] = item.size[1] - boxes[:, [2, 0]]
        laps.end("flip")
    canvas = torch.zeros(1, 3, *plan.canvas, dtype=image.dtype)
    canvas[0, :, : item.size[0], : item.size[1]] = image
    laps.end("pad")
    return canvas


def samples(
    index: Index, planner: Planner, cache: ImageCache, step: int
) -> Iterator[tuple[str, Tensor, Laps]]:
    """The sample of a step in each way. The order moves on, so that none has the better place."""
    plan = planner.plan(step)
    ways: list[tuple[str, Callable[[Laps], Tensor]]] = [
        ("ours", lambda laps: our_sample(index, planner, step, laps)),
        ("cached", lambda laps: our_sample(index, planner, step, laps, cache)),
        ("float", lambda laps: pillow_float(index, plan, laps)),
        ("uint8", lambda laps: pillow_uint8(index, plan, laps)),
    ]
    for i in range(len(ways)):
        name, sample = ways[(step + i) % len(ways)]
        laps = Laps()
        yield name, sample(laps), laps


def check(images: dict[str, Tensor], size: tuple[int, int]) -> None:
    """The ways agree, padding included."""
    assert torch.equal(images["cached"], images["ours"])
    sizes = torch.tensor([size])
    ours = normalize_images(images["ours"], sizes)
    for theirs in (images["float"], normalize_images(images["uint8"], sizes)):
        levels = 255 * min(IMAGE_STD) * float((ours - theirs).abs().mean())
        assert levels < 2, f"{levels:.1f} grey levels apart"


def measure(index: Index, planner: Planner, count: int) -> dict[str, list[dict[str, float]]]:
    """Times of the parts of each image in each way."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    steps = range(1, WARM_UP + count + 1)
    cache = filled_cache(index, planner, steps)
    for step in steps:
        images = {}
        for name, image, laps in samples(index, planner, cache, step):
            images[name] = image
            if step > WARM_UP:
                times[name].append(laps.times)
        check(images, planner.plan(step).items[0].size)
    return times


def summarize(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of the parts, which add up to the mean; median of the whole."""
    parts = {part: sum(row.get(part, 0.0) for row in rows) / len(rows) for part in PARTS}
    whole = median(sum(row.values()) for row in rows)
    return {**parts, "mean": sum(parts.values()), "median": whole, "images/s": 1e3 / whole}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the making of samples.")
    parser.add_argument("--root", type=Path, required=True, help="folder in COCO's layout")
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--short-side", type=int, default=800)
    parser.add_argument("--max-side", type=int, default=1333)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    args = parser.parse_args(arguments)
    annotations = args.root / "annotations" / f"instances_{args.split}.json"
    index = read_coco(annotations, args.root / args.split, categories=None, keep_empty=True)
    planner = Planner(
        sizes=index.sizes,
        seed=0,
        batch_size=1,
        short_side=args.short_side,
        max_side=args.max_side,
        divisor=64,
        flip=0.5,
        scale=(1.0, 1.0),
        photometric=0.0,
    )
    torch.set_num_threads(1)
    times = measure(index, planner, args.images)
    results = {name: summarize(rows) for name, rows in times.items()}
    print(f"{args.images} images, {args.short_side} / {args.max_side} px, ms of one core")
    print(f"{'':10}" + "".join(f"{name:>9}" for name in WAYS))
    for key in results["ours"]:
        cells = "".join(f"{result[key]:9.2f}" for result in results.values())
        print(f"{key:10}{cells}")
    for name in ("float", "uint8"):
        ratio = results[name]["median"] / results["ours"]["median"]
        print(f"{name} / ours: {ratio:.2f}")
    print(f"ours / cached: {results['ours']['median'] / results['cached']['median']:.2f}")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
