"""Time and memory of reading a COCO annotation file: read_coco, its cache, and pycocotools.

    python scripts/benchmark_index.py                          # the size of train2017
    python scripts/benchmark_index.py --extrapolate --points 0 --json index.json

The file is drawn: images, boxes and polygons in the numbers and lengths of COCO's. Each start is a
process of its own, in turns. The time is that of the call, imports done and the file in the
system's memory, the best of the repeats. What is mapped has not been read yet: "in full" is the
time with a pass over all arrays. The growth is the peak of the process less what it had after its
imports (ours import torch); pages of mapped files count. --extrapolate measures a quarter of the
size as well and lays a line through both, up to the size of Objects365. Linux only.
"""

import argparse
import contextlib
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

READERS = ("read_coco", "first start", "second start", "pycocotools")
FIGURES = ("seconds", "in_full_s", "growth_mib", "peak_mib")
OBJECTS365 = (1_700_000, 25_000_000)  # images and boxes, rounded
CATEGORIES = 80
OPTIONS: dict[str, Any] = {"categories": None, "keep_empty": True}


def draw(folder: Path, images: int, boxes: int, points: int) -> None:
    """An annotation file and an empty folder for the images."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    with (folder / "instances.json").open("w") as file:
        file.write('{"info": {"year": 2017}, "images": [')
        file.writelines(separated(image_records(images)))
        file.write('], "annotations": [')
        file.writelines(separated(annotation_records(rng, images, boxes, points)))
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def image_name(i: int) -> str:
    return f"{i:012d}.jpg"


def separated(records: Iterator[str]) -> Iterator[str]:
    yield next(records, "")
    for record in records:
        yield ", "
        yield record


def image_records(images: int) -> Iterator[str]:
    for i in range(images):
        name = image_name(i)
        yield (
            f'{{"license": 3, "file_name": "{name}", '
            f'"coco_url": "http://images.cocodataset.org/train2017/{name}", '
            '"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", '
            f'"flickr_url": "http://farm9.staticflickr.com/8186/{i:010d}_z.jpg", "id": {i}}}'
        )


def annotation_records(
    rng: np.random.Generator, images: int, boxes: int, points: int
) -> Iterator[str]:
    """In no order of images, as COCO's. Polygons come from a pool: nobody looks into them."""
    corners = rng.uniform(0, 400, (boxes, 2)).round(2).tolist()
    sides = rng.uniform(1, 80, (boxes, 2)).round(2).tolist()
    owners, categories = rng.integers(0, images, boxes), rng.integers(1, CATEGORIES + 1, boxes)
    lengths = rng.geometric(1 / points, 4096) if points else [0]
    pool = [json.dumps([rng.uniform(0, 480, 2 * n).round(2).tolist()]) for n in lengths]
    for i in range(boxes):
        yield (
            f'{{"segmentation": {pool[i % len(pool)]}, "area": {sides[i][0] * sides[i][1]:.4f}, '
            f'"iscrowd": 0, "image_id": {owners[i]}, "bbox": {corners[i] + sides[i]}, '
            f'"category_id": {categories[i]}, "id": {i + 1}}}'
        )


def read(reader: str, folder: Path) -> dict[str, Any]:
    """Read the file in the folder; runs in a process of its own."""
    call = prepare(reader, folder)
    before = resident_mib()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints
        found = call()
    seconds = time.perf_counter() - start
    if reader == "pycocotools":
        counts = [len(found.imgs), len(found.anns)]
        return {"seconds": seconds, "counts": counts, **memory(before)}
    arrays = [array for array in vars(found).values() if isinstance(array, np.ndarray)]
    for array in arrays:
        array.max()
    in_full = time.perf_counter() - start
    return {
        "seconds": seconds,
        "in_full_s": in_full,
        **memory(before),
        "counts": [len(found), len(found.areas)],
        "digest": hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest(),
    }


def prepare(reader: str, folder: Path) -> Callable[[], Any]:
    """The call that is timed. Imports are here, so that no process has more than its reader's."""
    file, images = folder / "instances.json", folder / "images"
    if reader == "pycocotools":
        from pycocotools.coco import COCO

        return partial(COCO, file)
    from rpn_train.data.coco import read_coco
    from rpn_train.data.index_cache import cached_index

    make = partial(read_coco, file, images, **OPTIONS)
    if reader == "read_coco":
        return make
    caches = folder / "caches"
    return partial(cached_index, file, images, options=OPTIONS, folder=caches, make=make)


def memory(before: float) -> dict[str, float]:
    return {"growth_mib": peak_mib() - before, "peak_mib": peak_mib()}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_apart(*arguments: str | Path | int) -> str:
    """This program in a new process. The one that starts it has to stay small: on Linux, the peak
    of a process counts from that of its parent at the start."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(images: int, boxes: int, points: int, repeats: int) -> dict[str, Any]:
    """The best of each reader over the repeats, at one size."""
    runs: dict[str, list[dict[str, Any]]] = {reader: [] for reader in READERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_apart(f"--images={images}", f"--boxes={boxes}", f"--points={points}", "--draw", name)
        file_bytes = (folder / "instances.json").stat().st_size
        for _ in range(repeats):
            for reader in READERS:
                if reader == "first start":
                    forget(folder / "caches")
                runs[reader].append(json.loads(run_apart("--read", reader, name)))
        cache_bytes = sum(f.stat().st_size for f in folder.glob("caches/*/*"))
    everything = [run for of_reader in runs.values() for run in of_reader]
    assert all(run["counts"] == [images, boxes] for run in everything)
    assert len({run["digest"] for run in everything if "digest" in run}) == 1, "another index"
    best = {
        reader: {key: min(run[key] for run in rows) for key in FIGURES if key in rows[0]}
        for reader, rows in runs.items()
    }
    return {
        "images": images,
        "boxes": boxes,
        "file_mb": file_bytes / 1e6,
        "cache_mb": cache_bytes / 1e6,
        "readers": best,
    }


def forget(caches: Path) -> None:
    for file in caches.glob("*/*"):
        file.unlink()
    for cache in caches.glob("*"):
        cache.rmdir()


def extrapolate(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """The line through two sizes, by boxes, at the number of boxes of Objects365."""
    images, boxes = OBJECTS365
    share = (boxes - small["boxes"]) / (large["boxes"] - small["boxes"])

    def at(first: float, second: float) -> float:
        return first + share * (second - first)

    readers = {
        reader: {key: at(value, large["readers"][reader][key]) for key, value in figures.items()}
        for reader, figures in small["readers"].items()
    }
    sizes = {key: at(small[key], large[key]) for key in ("file_mb", "cache_mb")}
    return {"images": images, "boxes": boxes, **sizes, "readers": readers}


def print_table(result: dict[str, Any], note: str = "") -> None:
    print(
        f"{result['images']:,} images, {result['boxes']:,} boxes: file {result['file_mb']:,.1f} MB,"
        f" cache {result['cache_mb']:,.1f} MB{note}"
    )
    theirs = result["readers"]["pycocotools"]
    print(f"{'':14}{'seconds':>10}{'faster':>9}{'in full':>10}{'growth MiB':>12}{'peak MiB':>10}")
    for reader, figures in result["readers"].items():
        in_full = f"{figures['in_full_s']:10.4f}" if "in_full_s" in figures else " " * 10
        print(
            f"{reader:14}{figures['seconds']:10.4f}{theirs['seconds'] / figures['seconds']:8.1f}x"
            f"{in_full}{figures['growth_mib']:12,.0f}{figures['peak_mib']:10,.0f}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Benchmark of reading a COCO annotation file.")
    parser.add_argument("--images", type=int, default=118_287, help="train2017's by default")
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--points", type=int, default=22, help="mean of a polygon; 0: no polygons")
    parser.add_argument("--repeats", type=int, default=3, help="starts, of which the best")
    parser.add_argument(
        "--extrapolate", action="store_true", help="with as many images per box as Objects365"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)  # see run_apart
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.draw:
        draw(args.draw, args.images, args.boxes, args.points)
    elif args.read:
        print(json.dumps(read(args.read[0], Path(args.read[1]))))
    else:
        results = []
        for part in (4, 1) if args.extrapolate else (1,):
            boxes = args.boxes // part
            images = boxes * OBJECTS365[0] // OBJECTS365[1] if args.extrapolate else args.images
            results.append(measure(images, boxes, args.points, args.repeats))
            print_table(results[-1])
        if args.extrapolate:
            results.append(extrapolate(*results))
            print_table(results[-1], " (extrapolated)")
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
