"""From outputs at every anchor to proposals (Ren et al. 2015, section 3.3 and its code)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from rpn_train.boxes import clip, decode


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
        anchors: [R, 4] xyxy px.
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
        picked = deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = clip(decode(picked, anchors[index]), sizes[:, None])
        candidates.append((boxes, top))
        start += length
    return [
        _suppress([(boxes[i], top[i]) for boxes, top in candidates], post_nms, nms_iou, min_size)
        for i in range(len(logits))
    ]


def _suppress(
    levels: list[tuple[Tensor, Tensor]], post_nms: int, nms_iou: float, min_size: float
) -> Proposals:
    """NMS in each level of one image, then the best `post_nms` of all."""
    kept_boxes, kept_logits = [], []
    for boxes, logits in levels:
        sides = boxes[:, 2:] - boxes[:, :2]
        large = (sides >= min_size).all(1)
        boxes, logits = boxes[large], logits[large]
        keep = nms(boxes, logits, nms_iou)[:post_nms]
        kept_boxes.append(boxes[keep])
        kept_logits.append(logits[keep])
    boxes, logits = torch.cat(kept_boxes), torch.cat(kept_logits)
    order = logits.argsort(descending=True, stable=True)[:post_nms]
    return Proposals(boxes[order], logits[order])
