"""Assignments for methods whose loss reads every anchor: centre region, ATSS and task-aligned.

ATSS counts its candidates for one anchor per cell, as the presets have. Everything works with fixed
shapes and masks: nothing waits for a GPU. Ties are broken by position (the first anchor, the first
object), so that every device gives the same labels. Images are done one after another; the peak is
some 20 bytes for each pair of a box and an anchor of one image, 45 MB for 100 boxes and 22,000
anchors (P3-P7 of 800 x 1344 px).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rpn_train.boxes import area, centers_and_sizes, plain_iou, shared_area
from rpn_train.targets import Assignment

# A centre is inside a box if it is further than this from all sides, px; that of both references.
INSIDE_PX = 0.01
_MASK32 = 0xFFFFFFFF


class DenseTargets(NamedTuple):
    """labels int8 [B, R], matches int64 [B, R] as of `Assignment`; quality float32 [B, R].

    quality: what the objectness of a positive aims at, in [0, 1], anything elsewhere; None: 1.
    """

    labels: Tensor
    matches: Tensor
    quality: Tensor | None


def center_region_assign(
    anchors: Tensor,
    level_lengths: Sequence[int],
    strides: Sequence[int],
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_ignore: Tensor,
    *,
    share: float,
    ignore_ioa: float,
) -> Assignment:
    """Positive: the anchors in the middle of an object, on the level of its size.

    As the first stage of Cascade RPN (Vu et al. 2019, section 3.3) after Wang et al. 2019 (guided
    anchoring, section 3.4). The level is that whose anchors' area is nearest to the object's, as a
    ratio. There, anchors are positive whose cells touch the object's middle `share`, both ways, and
    the one nearest to its centre in any case.

    Ignored and background anchors, boxes and flags, one anchor and several objects: as of
    `atss_assign`, which says what the arguments are. Anchors of a level have equal areas.

    Args:
        strides: px, the side of a cell of each level, around the centre of its anchors.
    """
    centers, _ = centers_and_sizes(anchors)
    parts = anchors.split(list(level_lengths))
    areas = torch.stack([area(part[0]) for part in parts])  # [L]
    levels = [torch.full_like(part[:, 0], i, dtype=torch.int64) for i, part in enumerate(parts)]
    level_of = torch.cat(levels)  # [R]
    sides = [torch.full_like(part[:, :1], s) for part, s in zip(parts, strides, strict=True)]
    cells = torch.cat(sides)  # [R, 1] px
    image_labels, image_matches = [], []
    every = torch.arange(len(anchors), device=anchors.device).expand(gt_boxes.shape[1], -1)
    for boxes, valid, ignore in zip(gt_boxes, gt_valid, gt_ignore, strict=True):
        middles, sizes = centers_and_sizes(boxes)
        least = torch.finfo(areas.dtype).tiny  # of padding, whose area may be 0
        level = (area(boxes)[:, None].clamp(min=least) / areas).log().abs().argmin(1)  # [G]
        reach = (share * sizes[:, None] + cells) / 2
        near = (centers - middles[:, None]).abs() <= reach  # [G, R, 2]
        nearest = _nearest(middles, centers, level_lengths, 1).gather(1, level[:, None])
        positive = near.all(-1) & (level_of == level[:, None])
        positive = positive.scatter(1, nearest, True) & (valid & ~ignore)[:, None]
        iou = plain_iou(boxes[:, None], anchors)
        is_positive, matches = _resolve(every, iou, positive & (iou > 0), len(anchors))
        crowded = _in_crowd(anchors, boxes, valid & ignore, ignore_ioa)
        image_labels.append(_labels(is_positive, crowded))
        image_matches.append(matches)
    return Assignment(torch.stack(image_labels), torch.stack(image_matches))


def atss_assign(
    anchors: Tensor,
    level_lengths: Sequence[int],
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_ignore: Tensor,
    *,
    candidates: int,
    ignore_ioa: float,
) -> Assignment:
    """Adaptive training sample selection (Zhang et al. 2020, section 3.2, algorithm 1).

    An object's candidates are the anchors of each level whose centres are nearest to its own.
    Positive: those whose IoU is at least the mean plus the (sample) standard deviation of the
    candidates' IoU, and whose centre lies inside the object. An anchor that is positive for several
    objects goes to the one of highest IoU. Ignored: other anchors of which `ignore_ioa` of the area
    lies in an ignore box. Background: the rest; without objects nothing is positive.

    Args:
        anchors: [R, 4] xyxy px, each with an extent. level_lengths: anchors of each level, sum R.
        gt_boxes: [B, G, 4] xyxy px, G >= 1; anything in padding. gt_valid, gt_ignore: bool [B, G].
        candidates: of each level and object (9 in the paper); all of a level that has fewer.
    """
    centers, _ = centers_and_sizes(anchors)
    image_labels, image_matches = [], []
    for boxes, valid, ignore in zip(gt_boxes, gt_valid, gt_ignore, strict=True):
        at = _nearest(centers_and_sizes(boxes)[0], centers, level_lengths, candidates)  # [G, K]
        iou = plain_iou(boxes[:, None], anchors[at])
        # in float64, where the mean of equal numbers is that number on every device
        exact = iou.double()
        mean = exact.mean(1, keepdim=True)
        variance = (exact - mean).square().sum(1, keepdim=True) / max(iou.shape[1] - 1, 1)
        positive = (exact >= mean + variance.sqrt()) & _inside(centers[at], boxes[:, None])
        positive &= (valid & ~ignore)[:, None]
        is_positive, matches = _resolve(at, iou, positive, len(anchors))
        crowded = _in_crowd(anchors, boxes, valid & ignore, ignore_ioa)
        image_labels.append(_labels(is_positive, crowded))
        image_matches.append(matches)
    return Assignment(torch.stack(image_labels), torch.stack(image_matches))


def task_aligned_assign(
    scores: Tensor,
    boxes: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_ignore: Tensor,
    *,
    candidates: int,
    alpha: float,
    beta: float,
    ignore_ioa: float,
) -> DenseTargets:
    """Task-aligned assignment (Feng et al. 2021, section 3.3, equations 4 to 6).

    The alignment of an anchor with an object is t = score^alpha * IoU^beta, the IoU that of the
    predicted box. Positive: of the anchors whose centre lies inside an object those of the highest
    t, if it is above 0; of equal ones the first, so an object of t = 0 everywhere has no positive.
    (The authors' code takes the highest of all anchors first and drops those outside then.) An
    anchor that is positive for several objects goes to the one of highest IoU. The quality of a
    positive is t over the highest t of the object's positives, times their highest IoU.

    Ignored and background anchors, boxes and flags: as of `atss_assign`.

    Args:
        scores: [B, R] objectness in [0, 1]. boxes: [B, R, 4] xyxy px, the predictions. No gradient
            is wanted through either.
        candidates: positives of an object at most (13 in the paper). alpha, beta: 1 and 6 there.
    """
    centers, _ = centers_and_sizes(anchors)
    scores, boxes = scores.float().pow(alpha), boxes.float()
    images = zip(scores, boxes, gt_boxes, gt_valid, gt_ignore, strict=True)
    targets = []
    for score, pred, gt, valid, ignore in images:
        iou = plain_iou(gt[:, None], pred)  # [G, R]
        aligned = iou.pow(beta).mul_(score)
        counts = _inside(centers, gt[:, None]).logical_and_((valid & ~ignore)[:, None])
        aligned.masked_fill_(~(counts & (aligned > 0)), 0.0)  # NaN is not above 0 either
        at = _highest(aligned, candidates)  # [G, K]
        aligned, iou = aligned.gather(1, at), iou.gather(1, at)
        is_positive, matches = _resolve(at, iou, aligned > 0, len(anchors))
        rows = torch.arange(len(gt), device=gt.device)[:, None]
        won = (aligned > 0) & (matches[at] == rows)
        aligned, iou = torch.where(won, aligned, 0.0), torch.where(won, iou, 0.0)
        # no positive: 0 / 1 instead of 0 / 0
        highest = torch.where(won.any(1), aligned.amax(1), 1.0)[:, None]
        each = aligned / highest * iou.amax(1, keepdim=True)
        # an anchor has at most one winner: all others offer it 0
        quality = torch.zeros_like(score).scatter_reduce_(0, at.flatten(), each.flatten(), "amax")
        crowded = _in_crowd(anchors, gt, valid & ignore, ignore_ioa)
        targets.append((_labels(is_positive, crowded), matches, quality))
    return DenseTargets(*map(torch.stack, zip(*targets, strict=True)))


def centerness_targets(anchors: Tensor, gt_boxes: Tensor) -> Tensor:
    """How central the centres of anchors [..., 4] are in boxes [..., 4], broadcast: 0 to 1.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of the distances to the sides (Tian et al.
    2019, equation 3); 1 in the middle, 0 on a side and outside.
    """
    centers, _ = centers_and_sizes(anchors)
    near, far = centers - gt_boxes[..., :2], gt_boxes[..., 2:] - centers  # (l, t), (r, b)
    least, most = torch.minimum(near, far).clamp(min=0), torch.maximum(near, far)
    x, y = (least / most.clamp(min=torch.finfo(most.dtype).tiny)).unbind(-1)
    return (x * y).sqrt()


def _nearest(
    points: Tensor, centers: Tensor, level_lengths: Sequence[int], candidates: int
) -> Tensor:
    """Indices [G, K] of the centers [R, 2] of each level nearest to points [G, 2].

    The first of equally near ones.
    """
    dx, dy = (points[:, None] - centers).unbind(-1)  # [G, R]
    index = torch.arange(len(centers), device=centers.device)
    levels = _packed(dx * dx + dy * dy, index).split(list(level_lengths), dim=1)
    least = [keys.topk(min(candidates, keys.shape[1]), largest=False).values for keys in levels]
    return torch.cat(least, dim=1).bitwise_and_(_MASK32)


def _highest(values: Tensor, candidates: int) -> Tensor:
    """Indices [G, K] of the highest values >= 0 [G, R], the first of equal ones."""
    backwards = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return _packed(values, backwards).topk(min(candidates, values.shape[1])).indices


def _resolve(at: Tensor, iou: Tensor, positive: Tensor, num_anchors: int) -> tuple[Tensor, Tensor]:
    """Which anchors are positive for some object, bool [R], and the one of highest IoU, int64 [R].

    The first object of equal ones; some row where there is none.

    Args:
        at, iou, positive: [G, K] the candidates of each object, positive only with an IoU above 0.
    """
    last = len(at) - 1
    rows = torch.arange(last, -1, -1, device=at.device)[:, None]
    ranks = torch.where(positive, _packed(iou, rows), 0)
    best = ranks.new_zeros(num_anchors).scatter_reduce_(0, at.flatten(), ranks.flatten(), "amax")
    return best > 0, last - best.bitwise_and(_MASK32)


def _packed(values: Tensor, order: Tensor) -> Tensor:
    """int64 numbers in the order of float32 values >= 0, and of equal ones in the given order.

    The bits of such values are in the same order. The lower half holds `order`.
    """
    return values.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(order)


def _inside(centers: Tensor, boxes: Tensor) -> Tensor:
    """Bool: points [..., 2] in boxes [..., 4], broadcast."""
    x, y = centers.unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    inside = (x - x1 > INSIDE_PX).logical_and_(x2 - x > INSIDE_PX)
    return inside.logical_and_(y - y1 > INSIDE_PX).logical_and_(y2 - y > INSIDE_PX)


def _in_crowd(anchors: Tensor, boxes: Tensor, is_crowd: Tensor, ignore_ioa: float) -> Tensor:
    """Bool [R]: anchors of which a share of ignore_ioa or more lies in a crowd box."""
    share = shared_area(boxes[:, None], anchors).div_(area(anchors))  # [G, R]
    return ((share >= ignore_ioa) & is_crowd[:, None]).any(dim=0)


def _labels(positive: Tensor, in_crowd: Tensor) -> Tensor:
    """Labels int8 of bools of the same shape."""
    return positive.view(torch.int8) - (in_crowd & ~positive).view(torch.int8)
