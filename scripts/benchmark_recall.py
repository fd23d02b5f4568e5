"""Time and peak memory of `score_recall`, beside COCOeval and faster_coco_eval.

    python scripts/benchmark_recall.py --images 500 --objects 3600 --pycocotools

Each scorer reads the same drawn boxes in a process of its own. The time is that of scoring alone:
for the COCO classes `evaluate` and `accumulate`, without building their dictionaries. The memory is
the peak of the whole process, input and interpreter included. Recall must agree to 1e-9.
faster_coco_eval takes part where it is installed.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rpn_train.recall import Floats, ObjectArrays, ProposalArrays, score_recall

SIZES = ("images", "proposals", "objects")
MAX_PROPOSALS = (100, 300, 1000)
COCO_CLASSES = {  # scorer -> modules and names of its COCO and COCOeval
    "pycocotools": ("pycocotools.coco:COCO", "pycocotools.cocoeval:COCOeval"),
    "faster_coco_eval": ("faster_coco_eval:COCO", "faster_coco_eval:COCOeval_faster"),
}


def draw_objects(rng: np.random.Generator, images: int, objects: int) -> ObjectArrays:
    """Objects from 8 to 400 px; half of them overlap the one before, as in a crowd."""
    owner = np.sort(rng.integers(0, images, objects))
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (objects, 1)))
    boxes = np.concatenate([rng.uniform(0, 600, (objects, 2)), sides.repeat(2, axis=1)], axis=1)
    crowded = 1 + np.flatnonzero(rng.random(objects - 1) < 0.5)
    boxes[crowded] = boxes[crowded - 1]
    boxes[:, :2] += rng.normal(0, 0.15, (objects, 2)) * boxes[:, 2:]
    boxes[:, 2:] *= np.exp(rng.normal(0, 0.2, (objects, 2)))
    areas = boxes[:, 2:].prod(axis=1) * rng.uniform(0.4, 1, objects)  # a mask fills part of its box
    offsets = np.searchsorted(owner, np.arange(images + 1))
    return ObjectArrays(boxes, areas, rng.random(objects) < 0.01, offsets)


def draw_proposals(
    rng: np.random.Generator, images: int, proposals: int, objects: ObjectArrays
) -> ProposalArrays:
    """Six in ten near an object of the image, crowding some objects more than others."""
    first, counts = objects.offsets[:-1, None], np.diff(objects.offsets)[:, None]
    shape = (images, proposals)
    chosen = first + (rng.random(shape) ** 2 * counts).astype(np.int64)
    near = (rng.random(shape) < 0.6) & (counts > 0)
    chosen = np.where(near, chosen, rng.integers(0, len(objects.areas), shape))
    boxes = objects.boxes_xywh[chosen]  # [images, proposals, 4]
    blur = np.exp(rng.uniform(np.log(0.05), np.log(0.8), len(objects.areas)))[chosen]
    noise = rng.normal(size=(*shape, 4)) * blur[..., None]
    boxes[..., :2] += noise[..., :2] * boxes[..., 2:]
    boxes[..., 2:] *= np.exp(noise[..., 2:])
    scores = rng.normal(size=shape) + near
    order = np.argsort(-scores, axis=1)  # best first, as a network gives them
    boxes = np.take_along_axis(boxes, order[..., None], axis=1).reshape(-1, 4)
    scores = np.take_along_axis(scores, order, axis=1).ravel()
    return ProposalArrays(boxes, scores, np.arange(images + 1) * proposals)


def draw(folder: Path, images: int, proposals: int, objects: int) -> None:
    rng = np.random.default_rng(0)
    drawn = draw_objects(rng, images, objects)
    np.savez(folder / "objects.npz", **vars(drawn))
    np.savez(folder / "proposals.npz", **vars(draw_proposals(rng, images, proposals, drawn)))


def annotations(objects: ObjectArrays) -> list[dict[str, Any]]:
    """The objects in COCO's form; ids from 1, as COCOeval takes a match with id 0 for no match."""
    owner = np.repeat(np.arange(len(objects.offsets) - 1), np.diff(objects.offsets))
    crowd = objects.ignore.astype(int)
    columns = (owner, objects.boxes_xywh, objects.areas, crowd, range(1, len(owner) + 1))
    keys = ("image_id", "bbox", "area", "iscrowd", "id")
    rows = zip(*(np.asarray(column).tolist() for column in columns), strict=True)
    return [{"category_id": 1, **dict(zip(keys, row, strict=True))} for row in rows]


def detections(proposals: ProposalArrays) -> list[dict[str, Any]]:
    """The proposals in the form of COCO results."""
    owner = np.repeat(np.arange(len(proposals.offsets) - 1), np.diff(proposals.offsets))
    columns = (owner.tolist(), proposals.boxes_xywh.tolist(), proposals.scores.tolist())
    return [
        {"image_id": image, "category_id": 1, "bbox": box, "score": score}
        for image, box, score in zip(*columns, strict=True)
    ]


def score_by_coco(scorer: str, proposals: ProposalArrays, objects: ObjectArrays) -> dict[str, Any]:
    """Time and recall [T, A, N] of a scorer with the interface of pycocotools."""
    coco_class, eval_class = (
        getattr(importlib.import_module(path.split(":")[0]), path.split(":")[1])
        for path in COCO_CLASSES[scorer]
    )
    truth = coco_class()
    truth.dataset = {
        "images": [
            {"id": i, "width": 1000, "height": 1000} for i in range(len(objects.offsets) - 1)
        ],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": annotations(objects),
    }
    truth.createIndex()
    found = truth.loadRes(detections(proposals))
    evaluator = eval_class(truth, found, "bbox")
    evaluator.params.useCats = 0
    evaluator.params.maxDets = list(MAX_PROPOSALS)
    start = time.perf_counter()
    evaluator.evaluate()
    evaluator.accumulate()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "recall": evaluator.eval["recall"][:, 0].tolist()}


def work(scorer: str, folder: Path) -> dict[str, Any]:
    """Score the boxes in the folder; runs in a process of its own."""
    with np.load(folder / "objects.npz") as file:
        objects = ObjectArrays(**file)
    with np.load(folder / "proposals.npz") as file:
        proposals = ProposalArrays(**file)
    if scorer in COCO_CLASSES:
        with contextlib.redirect_stdout(sys.stderr):
            result = score_by_coco(scorer, proposals, objects)
    else:
        start = time.perf_counter()
        recall = score_recall(
            proposals,
            objects,
            max_proposals=MAX_PROPOSALS,
            protocol="greedy" if scorer == "rpn_train greedy" else "coco",
        ).recall
        result = {"seconds": time.perf_counter() - start, "recall": recall.tolist()}
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"scorer": scorer, **result, "peak_mib": peak_kib / 1024}


def run_apart(*arguments: str | Path | int) -> str:
    """This program in a new process. The one that starts it has to stay small: on Linux, the peak
    of a process counts from that of its parent at the start."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def print_table(results: list[dict[str, Any]]) -> None:
    ours = results[0]
    print(f"{'scorer':18} {'seconds':>9} {'ratio':>7} {'peak MiB':>9} {'ratio':>7}   AR@1000")
    for result in results:
        time_ratio = result["seconds"] / ours["seconds"]
        peak_ratio = result["peak_mib"] / ours["peak_mib"]
        recall: Floats = np.array(result["recall"])
        print(
            f"{result['scorer']:18} {result['seconds']:9.2f} {time_ratio:7.1f} "
            f"{result['peak_mib']:9.0f} {peak_ratio:7.2f}   {recall[:, 0, -1].mean():.10f}"
        )
        if result["scorer"] in COCO_CLASSES:
            np.testing.assert_allclose(np.nan_to_num(ours["recall"], nan=-1.0), recall, atol=1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the recall of proposals.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--proposals", type=int, default=1000, help="of each image")
    parser.add_argument("--objects", type=int, default=36000, help="of all images")
    parser.add_argument("--pycocotools", action="store_true", help="minutes at 5,000 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # see run_apart
    args = parser.parse_args()
    if args.work:
        task, folder = args.work[0], Path(args.work[1])
        if task == "draw":
            draw(folder, args.images, args.proposals, args.objects)
        else:
            print(json.dumps(work(task, folder)))
        return
    size = [f"--{key}={vars(args)[key]}" for key in SIZES]
    scorers = ["rpn_train", "rpn_train greedy"]
    scorers += ["pycocotools"] * args.pycocotools
    scorers += ["faster_coco_eval"] * (importlib.util.find_spec("faster_coco_eval") is not None)
    with tempfile.TemporaryDirectory() as boxes:
        run_apart(*size, "--work", "draw", boxes)
        results = [json.loads(run_apart("--work", scorer, boxes)) for scorer in scorers]
    print(f"{args.images:,} images x {args.proposals:,} proposals, {args.objects:,} objects")
    print_table(results)
    if args.json:
        sizes = {key: vars(args)[key] for key in SIZES}
        args.json.write_text(json.dumps({**sizes, "results": results}, indent=1))


if __name__ == "__main__":
    main()
