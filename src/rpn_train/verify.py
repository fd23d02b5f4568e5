"""The same figures once more, by pycocotools itself: slow, and independent of `recall`."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rpn_train.recall import Floats, Ints, ObjectArrays, ProposalArrays, Recall

BLOCK_IMAGES = 250  # scored at once: about 2 MB for each image of 1,000 proposals


def largest_difference(proposals: ProposalArrays, objects: ObjectArrays, recall: Recall) -> float:
    """The largest absolute difference of `recall.recall` from what COCOeval finds.

    COCOeval scores with `useCats=0` and its own thresholds and sizes; expect 0.0 for a recall of
    the protocol "coco". Infinite if a figure is NaN where COCOeval has one, or the reverse. Takes
    minutes for 5,000 images of 1,000 proposals.

    Args:
        proposals, objects: those that `recall` is of.
    """
    num_images = len(objects.offsets) - 1
    hits, counts = np.zeros(recall.recall.shape), np.zeros(recall.recall.shape[1])
    for start in range(0, num_images, BLOCK_IMAGES):
        images = slice(start, min(start + BLOCK_IMAGES, num_images))
        found, among = _score(proposals, objects, images, recall.max_proposals)
        hits += found
        counts += among
    theirs = hits / np.where(counts > 0, counts, np.nan)[:, None]
    both_without = np.isnan(recall.recall) & np.isnan(theirs)
    difference = np.where(both_without, 0.0, np.abs(recall.recall - theirs))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def _score(
    proposals: ProposalArrays, objects: ObjectArrays, images: slice, limits: tuple[int, ...]
) -> tuple[Floats, Ints]:
    """Objects found [T, A, N] and objects [A] of a block of images."""
    crowd = {"iscrowd": objects.ignore.astype(int), "area": objects.areas}
    truth = _coco(objects.boxes_xywh, objects.offsets, images, crowd)
    # The area of a proposal decides whether it counts as false, which recall does not see.
    columns = {"score": proposals.scores, "area": np.ones(len(proposals.scores))}
    found = _coco(proposals.boxes_xywh, proposals.offsets, images, columns)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.params.useCats = 0
        evaluator.params.maxDets = sorted(limits)
        evaluator.evaluate()
        evaluator.accumulate()
    counts = np.zeros(len(evaluator.params.areaRng), np.int64)
    num_images = images.stop - images.start
    for i, image in enumerate(evaluator.evalImgs):  # sizes one after the other; None if empty
        if image is not None:
            counts[i // num_images] += np.count_nonzero(image["gtIgnore"] == 0)
    recall = evaluator.eval["recall"][:, 0][:, :, np.searchsorted(sorted(limits), limits)]
    return np.rint(recall * counts[:, None]), counts  # recall is -1 where counts is 0


def _coco(boxes: Floats, offsets: Ints, images: slice, columns: dict[str, np.ndarray]) -> COCO:
    """The boxes of some images as pycocotools wants them.

    Ids start at 1: COCOeval takes a match with id 0 for none.
    """
    rows = slice(offsets[images.start], offsets[images.stop])
    counts = np.diff(offsets)[images]
    owner = np.repeat(np.arange(images.start, images.stop), counts).tolist()
    values = zip(*(column[rows].tolist() for column in columns.values()), strict=True)
    made = COCO()
    made.dataset = {
        "images": [{"id": image} for image in range(images.start, images.stop)],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "bbox": box}
            | dict(zip(columns, row, strict=True))
            for i, (image, box, row) in enumerate(
                zip(owner, boxes[rows].tolist(), values, strict=True), start=1
            )
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        made.createIndex()
    return made
