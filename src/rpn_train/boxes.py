"""Box arithmetic. Boxes are [N, 4] float32 (x1, y1, x2, y2) in pixels, x2 and y2 exclusive edges.

Letters of shapes, here and everywhere: B images, L levels, A anchors per cell, R anchors of an
image over all levels, S sampled anchors of an image, G ground-truth boxes of an image, K proposals.
"""

import math

import torch
from torch import Tensor

# exp() of a delta is limited so that a box cannot outgrow its anchor more than this; the value is
# that of Detectron and torchvision, without which weights cannot be exchanged.
MAX_LOG_SCALE = math.log(1000 / 16)


def centers_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [..., 2] and widths and heights [..., 2] of boxes [..., 4]."""
    sizes = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sizes, sizes


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas [..., 4] (dx, dy, dw, dh) that turn `anchors` into `boxes` (Ren et al. 2015, eq. 2).

    Boxes without extent give -inf: callers replace them first.
    """
    box_centers, box_sizes = centers_and_sizes(boxes)
    anchor_centers, anchor_sizes = centers_and_sizes(anchors)
    shift = (box_centers - anchor_centers) / anchor_sizes
    return torch.cat([shift, torch.log(box_sizes / anchor_sizes)], dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes [..., 4] that `deltas` make of `anchors`; the inverse of `encode`.

    Growth is limited by MAX_LOG_SCALE. float32 whatever autocast says: bf16 boxes are pixels off.
    """
    deltas, anchors = deltas.float(), anchors.float()
    centers, sizes = centers_and_sizes(anchors)
    centers = deltas[..., :2] * sizes + centers
    half = 0.5 * (torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE)) * sizes)
    return torch.cat([centers - half, centers + half], dim=-1)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes [..., 4] cut to an image of `size` (height, width) [..., 2], broadcast."""
    limits = size.flip(-1).to(boxes.dtype)  # (width, height)
    corners = boxes.unflatten(-1, (2, 2))  # [..., 2 corners, 2]
    return torch.minimum(corners.clamp(min=0), limits[..., None, :]).flatten(-2)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU less the share of the hull that neither box fills: pairs [..., 4] -> [...] in (-1, 1].

    Rezatofighi et al. 2019. torchvision's loss indexes by masks and so waits for the GPU. NaN where
    both boxes are without extent.
    """
    inter = _area(
        torch.maximum(boxes[..., :2], others[..., :2]),
        torch.minimum(boxes[..., 2:], others[..., 2:]),
    )
    hull = _area(
        torch.minimum(boxes[..., :2], others[..., :2]),
        torch.maximum(boxes[..., 2:], others[..., 2:]),
    )
    areas = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:])
    union = areas - inter
    return inter / union - (hull - union) / hull


def _area(upper_left: Tensor, lower_right: Tensor) -> Tensor:
    """Area between two corners [..., 2] -> [...]; 0 where they have changed places."""
    width, height = (lower_right - upper_left).clamp(min=0).unbind(-1)
    return width * height  # prod() would wait for the GPU in its backward pass
