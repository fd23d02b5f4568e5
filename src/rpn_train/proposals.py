"""From outputs at every anchor to proposals (Ren et al. 2015, section 3.3 and its code)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from rpn_train.boxes import clip, decode, take_boxes

_Level = tuple[Tensor, Tensor]  # candidates of one level of one image: boxes [k, 4], logits [k]


class Proposals(NamedTuple):
    """Proposals of one image, best first: boxes [K, 4] xyxy px, logits [K] (objectness)."""

    boxes: Tensor
    logits: Tensor

    @property
    def scores(self) -> Tensor:
        """Probabilities [K], which saturate where logits still order."""
        return self.logits.sigmoid()


def make_proposals(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    level_lengths: Sequence[int],
    sizes: Tensor,
    *,
    pre_nms: int,
    post_nms: int,
    nms_iou: float,
    min_size: float,
) -> list[Proposals]:
    """Per level top-k, decode the survivors, clip, NMS; then the best over all levels per image.

    Ranked by logit: its sigmoid saturates at 1 in float32 and then no longer orders.

    Args:
        logits, deltas: [B, R] and [B, R, 4], levels one after the other.
        anchors: [R, 4] or [B, R, 4] xyxy px, to which deltas refer.
        level_lengths: anchors of each level, summing to R.
        sizes: [B, 2] height and width of each image without padding, px.
        pre_nms, post_nms: kept per level before, and per image after, NMS.
        min_size: proposals with a side shorter than this are dropped, px.

    Returns:
        One `Proposals` per image, of at most post_nms rows; fewer, or none, where NMS leaves fewer.
    """
    logits = logits.float()
    candidates = []  # per level: boxes [B, k, 4], logits [B, k]
    start = 0
    for length in level_lengths:
        of_level = logits[:, start : start + length]
        top, index = of_level.topk(min(pre_nms, length), dim=1)
        index = index + start
        boxes = decode(take_boxes(deltas, index), take_boxes(anchors, index))
        boxes = clip(boxes, sizes[:, None])
        candidates.append((boxes, top))
        start += length
    levels = [(boxes[i], top[i]) for i in range(len(logits)) for boxes, top in candidates]
    kept = _map(partial(_suppress, post_nms=post_nms, nms_iou=nms_iou, min_size=min_size), levels)
    per_image = len(candidates)
    return [_best(kept[i * per_image : (i + 1) * per_image], post_nms) for i in range(len(logits))]


def _map(function: Callable[[_Level], _Level], levels: list[_Level]) -> list[_Level]:
    """The results in order. On the CPU side by side: NMS uses one core and lets Python go on."""
    threads = torch.get_num_threads()
    if threads == 1 or levels[0][0].is_cuda:
        return [function(level) for level in levels]
    with ThreadPoolExecutor(threads) as pool:
        return [*pool.map(function, levels)]


def _suppress(level: _Level, *, post_nms: int, nms_iou: float, min_size: float) -> _Level:
    """NMS in one level of one image."""
    boxes, logits = level
    large = (boxes[:, 2:] - boxes[:, :2] >= min_size).all(1)
    boxes, logits = boxes[large], logits[large]
    keep = nms(boxes, logits, nms_iou)[:post_nms]
    return boxes[keep], logits[keep]


def _best(levels: list[_Level], post_nms: int) -> Proposals:
    """The best of all levels of one image."""
    boxes, logits = (torch.cat(parts) for parts in zip(*levels, strict=True))
    order = logits.argsort(descending=True, stable=True)[:post_nms]
    return Proposals(boxes[order], logits[order])
