"""Recall of class-agnostic proposals: the figures of COCOeval with `useCats=0`, vectorised.

For every image, size class and IoU threshold, COCOeval goes through the proposals in the order of
their scores and gives each the free object it overlaps most, if their IoU reaches the threshold.
Three facts make this fast without changing a figure.

*Few pairs matter.* A pair below the lowest threshold never matches, so only those of IoU >= 0.5 are
kept: a few in a hundred. Crowds and objects outside the size class are offered only to proposals
that found no object inside it; this spares a proposal from counting as false but takes no object
from another, so recall does not see it. And a proposal has no say over those ranked before it, so
that one matching at the largest number of proposals holds the matching at every smaller one.

*The walk is a stable matching.* Say that a proposal prefers the object it overlaps more, and an
object the proposal of higher score. The first proposal and the object it overlaps most prefer each
other to all others, so every stable matching joins them; with the two set aside, the same is true
of the next proposal, and so on. Hence there is exactly one stable matching, the one COCOeval walks
to, and any other way to it gives the same. `_match` takes that of Gale and Shapley (1962), for many
images and all thresholds side by side: every object asks the first proposal on its list, every
proposal keeps the one it prefers of those who asked, and the others ask the next on theirs.

*The greedy protocol is the same with another taste.* Detectron2 joins the pair of highest IoU that
is left, again and again, afresh for each number of proposals. That is the stable matching in which
objects, too, prefer the higher IoU; and as pairs below a threshold come after all those above, it
may be found per threshold. Images with objects but no proposals count here; Detectron2 skips them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rpn_train.errors import ConfigError, DataError

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
NAMED_IOUS = {"iou50": 0, "iou70": 4, "iou75": 5}  # name -> index in IOU_THRESHOLDS
SIZES = {  # bounds of the annotation's area, px^2, both inclusive
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
BLOCK_SIZE = 100_000  # pairs and proposals matched at once: bounds memory, hides the cost of a call

Protocol = Literal["coco", "greedy"]


@dataclass(frozen=True, eq=False)
class ProposalArrays:
    """The proposals of N images; those of image i are rows `offsets[i]:offsets[i + 1]`, any order.

    Args:
        boxes_xywh: [P, 4] float64, corner and size in the pixels of the annotations.
        scores: [P] float64, higher is better; logits or probabilities. Equal scores rank by row.
        offsets: [N + 1] int64, from 0 to P.
    """

    boxes_xywh: Floats
    scores: Floats
    offsets: Ints

    def __post_init__(self) -> None:
        _check_boxes("proposals", self.boxes_xywh, self.offsets)
        if self.scores.shape != (len(self.boxes_xywh),) or not np.isfinite(self.scores).all():
            raise DataError("proposals: expected one score for each box, none NaN or infinite")


@dataclass(frozen=True, eq=False)
class ObjectArrays:
    """The annotated objects of N images; those of image i are rows `offsets[i]:offsets[i + 1]`.

    Their order within an image decides between equal IoUs. COCOeval's is by category id, then as
    in the file.

    Args:
        boxes_xywh: [M, 4] float64, corner and size in pixels.
        areas: [M] float64, px^2, the annotation's own (in COCO the area of the mask, not w x h).
        ignore: [M] bool, crowds and the like: neither to be found nor counted.
        offsets: [N + 1] int64, from 0 to M.
    """

    boxes_xywh: Floats
    areas: Floats
    ignore: Bools
    offsets: Ints

    def __post_init__(self) -> None:
        _check_boxes("objects", self.boxes_xywh, self.offsets)
        shape = (len(self.boxes_xywh),)
        if self.areas.shape != shape or not np.isfinite(self.areas).all():
            raise DataError("objects: expected one area for each box, none NaN or infinite")
        if self.ignore.shape != shape or self.ignore.dtype != np.bool_:
            raise DataError(f"objects: expected bool ignore {shape}, got {self.ignore.dtype}")

    def in_size(self) -> Bools:
        """Which objects count in which size: [A, M]."""
        low, high = np.array(list(SIZES.values())).T[:, :, None]
        return (self.areas >= low) & (self.areas <= high) & ~self.ignore


@dataclass(frozen=True, eq=False)
class Recall:
    """What `score_recall` found.

    Args:
        max_proposals: the N of recall@N.
        recall: [T, A, N] float64, IoU threshold x size x max_proposals. NaN where there is no
            object of the size (COCOeval says -1).
        num_images: all images, those without objects or proposals included.
        num_objects: of each size, ignored ones left out; an area on a border counts in both.
        matched_rank: [T, A, M] int32, rank (from 0) within its image of the proposal that found
            each object among those of the size, at the largest N; -1 if none did. The share of
            `0 <= matched_rank < N` is recall@N for every N, under "greedy" for the largest only.
    """

    max_proposals: tuple[int, ...]
    recall: Floats
    num_images: int
    num_objects: dict[str, int]
    matched_rank: npt.NDArray[np.int32]

    def figures(self) -> dict[str, float]:
        """Named figures: `ar_100`, `recall_100_iou50`, `num_objects`, each also with `_small`, ...

        AR@N is the mean of recall@N over the ten IoU thresholds (Hosang et al. 2016).
        """
        named: dict[str, float] = {"num_images": self.num_images}
        for a, size in enumerate(SIZES):
            suffix = "" if size == "all" else f"_{size}"
            named[f"num_objects{suffix}"] = self.num_objects[size]
            for n, limit in enumerate(self.max_proposals):
                named[f"ar_{limit}{suffix}"] = float(self.recall[:, a, n].mean())
                for iou, t in NAMED_IOUS.items():
                    named[f"recall_{limit}_{iou}{suffix}"] = float(self.recall[t, a, n])
        return named


def boxes_to_xywh(boxes: npt.NDArray[np.float32]) -> Floats:
    """Boxes [K, 4] float32 xyxy as [K, 4] float64 xywh; converted first, so nothing is rounded."""
    corners = boxes.astype(np.float64).reshape(-1, 4)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def score_recall(
    proposals: ProposalArrays,
    objects: ObjectArrays,
    *,
    max_proposals: Sequence[int] = (100, 300, 1000),
    protocol: Protocol = "coco",
) -> Recall:
    """Recall of the objects by the N best proposals of their image.

    Args:
        proposals, objects: those of the same images in the same order.
        max_proposals: each N >= 1; may exceed the number of proposals.
        protocol: "coco" matches as COCOeval (Lin et al. 2014), "greedy" as Detectron2; see above.

    Raises:
        ConfigError: no `max_proposals`, one below 1, or an unknown protocol.
        DataError: proposals and objects differ in their number of images.
    """
    if not max_proposals or min(max_proposals) < 1:
        raise ConfigError(f"max_proposals: expected numbers >= 1, got {tuple(max_proposals)}")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol: expected {' | '.join(PROTOCOLS)}, got {protocol!r}")
    num_images, given = len(objects.offsets) - 1, len(proposals.offsets) - 1
    if num_images != given:
        raise DataError(f"proposals: expected those of {num_images} images, got {given}")
    in_size = objects.in_size()
    hits = np.zeros((len(IOU_THRESHOLDS), len(SIZES), len(max_proposals)))
    matched_rank = np.full((len(IOU_THRESHOLDS), *in_size.shape), -1, np.int32)
    for block, pairs in _candidate_pairs(proposals, objects, max(max_proposals)):
        for a, members in enumerate(in_size[:, block]):
            inside = pairs.where(members[pairs.objects])
            ranks = PROTOCOLS[protocol](inside, len(members), max_proposals)  # [N, T, G]
            hits[:, a] += (ranks >= 0).sum(axis=-1).T
            matched_rank[:, a, block] = ranks[np.argmax(max_proposals)]
    counts = in_size.sum(axis=1)
    recall = hits / np.where(counts > 0, counts, np.nan)[:, None]
    num_objects = dict(zip(SIZES, counts.tolist(), strict=True))
    return Recall(tuple(max_proposals), recall, num_images, num_objects, matched_rank)


def _check_boxes(name: str, boxes: Floats, offsets: Ints) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype != np.float64:
        raise DataError(f"{name}: expected float64 boxes [K, 4], got {boxes.dtype} {boxes.shape}")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < 0).any():
        raise DataError(f"{name}: expected finite boxes with sides >= 0 px")
    whole = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(boxes)
    if not whole or (np.diff(offsets) < 0).any():
        raise DataError(f"{name}: expected offsets that rise from 0 to {len(boxes)}")


class _Pairs(NamedTuple):
    """Pairs of IoU >= 0.5 in a block of images, the pairs of an object in the order it prefers."""

    objects: Ints  # [E] counted from the first object of the block
    proposals: Ints  # [E] a number of its own for each proposal of the block
    ranks: Ints  # [E] rank of the proposal in its image
    ious: Floats  # [E]

    def where(self, picks: Bools | Ints) -> "_Pairs":
        return _Pairs._make(column[picks] for column in self)


def _candidate_pairs(
    proposals: ProposalArrays, objects: ObjectArrays, limit: int
) -> Iterator[tuple[slice, _Pairs]]:
    """The objects of each block of images and their pairs, sorted by object, then rank."""
    num_images = len(objects.offsets) - 1
    start, found, num_pairs, num_proposals = 0, [], 0, 0
    for image in range(num_images):
        ours = slice(*objects.offsets[image : image + 2])
        rows = slice(*proposals.offsets[image : image + 2])
        best = np.argsort(-proposals.scores[rows], kind="stable")[:limit]
        boxes = proposals.boxes_xywh[rows][best]
        indices, ranks, ious = _overlaps(objects.boxes_xywh[ours], boxes)
        found.append((indices + (ours.start - start), ranks + num_proposals, ranks, ious))
        num_pairs += len(ious)
        num_proposals += len(best)
        if num_pairs + num_proposals >= BLOCK_SIZE or image == num_images - 1:
            columns = map(np.concatenate, zip(*found, strict=True))
            yield slice(start, ours.stop), _Pairs._make(columns)
            start, found, num_pairs, num_proposals = ours.stop, [], 0, 0


def _overlaps(objects: Floats, proposals: Floats) -> tuple[Ints, Ints, Floats]:
    """Object, proposal and IoU, each [E], of the pairs of IoU >= 0.5 of boxes [G, 4] and [P, 4].

    The arithmetic is that of pycocotools, operation by operation: its IoUs to the last bit.
    """
    gx, gy, gw, gh = objects.T[:, :, None]
    x, y, w, h = np.ascontiguousarray(proposals.T)
    overlap_w = np.minimum(x + w, gx + gw) - np.maximum(x, gx)  # [G, P]
    overlap_h = np.minimum(y + h, gy + gh) - np.maximum(y, gy)
    overlap = np.maximum(overlap_w, 0.0) * overlap_h
    areas = w * h + gw * gh
    # IoU >= 1/2 is 3 overlap >= areas. The larger factor leaves the border to the exact IoU below;
    # `>` leaves out what does not overlap, boxes without extent too.
    near = np.flatnonzero(3.01 * overlap > areas)
    overlap = overlap.ravel()[near]
    ious = overlap / (areas.ravel()[near] - overlap)
    reached = ious >= IOU_THRESHOLDS[0]
    indices, ranks = np.divmod(near[reached], max(len(proposals), 1))
    return indices, ranks, ious[reached]


def _match(pairs: _Pairs, num_objects: int, *, later_wins: bool) -> Ints:
    """The stable matching at each threshold: rank [T, G] of the proposal of each object, or -1.

    `later_wins`: a proposal that overlaps two objects equally prefers the later one.
    """
    eligible = pairs.ious >= IOU_THRESHOLDS[:, None]  # [T, E]
    level = np.repeat(np.arange(len(eligible)), np.count_nonzero(eligible, axis=1))  # [F]
    pair = np.flatnonzero(eligible) - level * len(
        pairs.ious
    )  # [F] questions, in the order of asking
    asker = pairs.objects[pair] + level * num_objects
    asked = pairs.proposals[pair] + level * (pairs.proposals.max(initial=0) + 1)
    is_last = np.diff(asker, append=-1) != 0
    asking = np.flatnonzero(np.diff(asker, prepend=-1))
    said_yes = np.full(asked.max(initial=0) + 1, -1)  # the question each proposal has accepted
    while len(asking):
        rivals = np.union1d(asking, said_yes[asked[asking]])
        rivals = rivals[rivals >= 0]
        objects, ious = pairs.objects[pair[rivals]], pairs.ious[pair[rivals]]
        rivals = rivals[np.lexsort((objects if later_wins else -objects, ious, asked[rivals]))]
        preferred = np.diff(asked[rivals], append=-1) != 0  # the last of each proposal
        said_yes[asked[rivals[preferred]]] = rivals[preferred]
        refused = rivals[~preferred]
        asking = refused[~is_last[refused]] + 1
    accepted = said_yes[said_yes >= 0]
    ranks = np.full((len(eligible), num_objects), -1)
    ranks[level[accepted], pairs.objects[pair[accepted]]] = pairs.ranks[pair[accepted]]
    return ranks


def _match_by_score(pairs: _Pairs, num_objects: int, max_proposals: Sequence[int]) -> Ints:
    """COCOeval's matching: rank [N, T, G] of the proposal of each object, or -1."""
    ranks = _match(pairs, num_objects, later_wins=True)
    return np.stack([np.where(ranks < limit, ranks, -1) for limit in max_proposals])


def _match_by_iou(pairs: _Pairs, num_objects: int, max_proposals: Sequence[int]) -> Ints:
    """Detectron2's matching: rank [N, T, G] of the proposal of each object, or -1."""
    pairs = pairs.where(np.lexsort((pairs.ranks, -pairs.ious, pairs.objects)))
    among = [pairs.where(pairs.ranks < limit) for limit in max_proposals]
    return np.stack([_match(best, num_objects, later_wins=False) for best in among])


PROTOCOLS: dict[Protocol, Callable[[_Pairs, int, Sequence[int]], Ints]] = {
    "coco": _match_by_score,
    "greedy": _match_by_iou,
}
