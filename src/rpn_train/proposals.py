"""From outputs at every anchor to proposals (Ren et al. 2015, section 3.3 and its code)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from rpn_train.boxes import clip, decode, take_boxes
from rpn_train.nms import suppress

_Level = tuple[Tensor, Tensor]  # candidates of one level of one image: boxes [k, 4], logits [k]
_Candidates = list[tuple[Tensor, Tensor]]  # of each level: boxes [B, k, 4], logits [B, k]


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
    candidates = []
    start = 0
    for length in level_lengths:
        of_level = logits[:, start : start + length]
        top, index = of_level.topk(min(pre_nms, length), dim=1)
        index = index + start
        boxes = decode(take_boxes(deltas, index), take_boxes(anchors, index))
        boxes = clip(boxes, sizes[:, None])
        candidates.append((boxes, top))
        start += length
    best = best_one_by_one if logits.device.type == "cpu" else best_at_once
    return best(candidates, post_nms=post_nms, nms_iou=nms_iou, min_size=min_size)


def best_one_by_one(
    candidates: _Candidates, *, post_nms: int, nms_iou: float, min_size: float
) -> list[Proposals]:
    """NMS in each level of each image, side by side: it uses one core and lets Python go on."""
    images, levels = range(len(candidates[0][0])), len(candidates)
    lists = [(boxes[i], logits[i]) for i in images for boxes, logits in candidates]
    suppress_one = partial(_suppress, post_nms=post_nms, nms_iou=nms_iou, min_size=min_size)
    threads = torch.get_num_threads()
    if threads == 1:
        kept = [*map(suppress_one, lists)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            kept = [*pool.map(suppress_one, lists)]
    return [_best(kept[i * levels : (i + 1) * levels], post_nms) for i in images]


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


def best_at_once(
    candidates: _Candidates, *, post_nms: int, nms_iou: float, min_size: float
) -> list[Proposals]:
    """The same for all images and levels together, in fixed shapes until the end: for a GPU.

    It is waited for where `suppress` looks whether it is done, and once to count what is left.
    """
    most = max(logits.shape[1] for _, logits in candidates)
    missing = [most - logits.shape[1] for _, logits in candidates]
    levels = [*zip(candidates, missing, strict=True)]
    # boxes of no number are not large, and overlap nothing
    boxes = torch.stack([F.pad(b, (0, 0, 0, n), value=torch.nan) for (b, _), n in levels], 1)
    logits = torch.stack([F.pad(logits, (0, n)) for (_, logits), n in levels], 1)  # [B, L, k]
    large = (boxes[..., 2:] - boxes[..., :2] >= min_size).all(-1)
    kept = suppress(boxes.flatten(0, 1), large.flatten(0, 1), nms_iou).view_as(large).flatten(1)
    boxes, logits = boxes.flatten(1, 2), logits.flatten(1)
    least = torch.finfo(logits.dtype).min  # so that what is kept comes before what is not
    ranks = torch.where(kept, logits.clamp(min=least), -torch.inf)
    order = ranks.argsort(dim=1, descending=True, stable=True)[:, :post_nms]
    counts = kept.sum(1).tolist()
    best = zip(take_boxes(boxes, order), logits.gather(1, order), counts, strict=True)
    return [Proposals(boxes[:count], logits[:count]) for boxes, logits, count in best]
