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

# The least denominator of complete IoU's weight, which is 0 / 0 for equal boxes.
_EPSILON = 1e-7


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


def area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def take_boxes(boxes: Tensor, at: Tensor) -> Tensor:
    """The rows of boxes [R, 4] or [B, R, 4] that `at`, int64 [B, S], names: [B, S, 4]."""
    return boxes.expand(len(at), -1, 4).gather(1, at[..., None].expand(-1, -1, 4))


def shared_area(boxes: Tensor, others: Tensor) -> Tensor:
    """Area of the intersections of boxes [..., 4], broadcast."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    left, top, right, bottom = others.unbind(-1)
    width = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp_(min=0)
    return width.mul_((torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp_(min=0))


def plain_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes [..., 4], broadcast: bit for bit that of torchvision's `box_iou`.

    NaN where both boxes are without extent, as in the two that follow.
    """
    shared = shared_area(boxes, others)
    return shared.div_((area(boxes) + area(others)).sub_(shared))


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU less the share of the hull that neither box fills: pairs [..., 4] -> [...] in (-1, 1].

    Rezatofighi et al. 2019. torchvision's loss indexes by masks and so waits for the GPU.
    """
    shared, hull = shared_area(boxes, others), area(_hull(boxes, others))
    union = area(boxes) + area(others) - shared
    return shared / union - (hull - union) / hull


def complete_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU less a distance of centres and a difference of ratios: pairs [..., 4] -> [...].

    Zheng et al. 2020 (Distance-IoU, section 3.3). The weight of the ratios has no gradient, as in
    torchvision, whose loss indexes by masks and so waits for the GPU.
    """
    iou = plain_iou(boxes, others)
    centers, sizes = centers_and_sizes(boxes)
    other_centers, other_sizes = centers_and_sizes(others)
    _, hull = centers_and_sizes(_hull(boxes, others))
    distance = (centers - other_centers).square().sum(-1) / hull.square().sum(-1)
    # the angle of a diagonal: atan(width / height) with a gradient where a height is 0
    angle = torch.atan2(sizes[..., 0], sizes[..., 1])
    other_angle = torch.atan2(other_sizes[..., 0], other_sizes[..., 1])
    ratios = (2 / math.pi * (angle - other_angle)).square()
    weight = (ratios / (1 - iou + ratios).clamp(min=_EPSILON)).detach()
    return iou - distance - weight * ratios


def _hull(boxes: Tensor, others: Tensor) -> Tensor:
    """The least box [..., 4] around both."""
    upper_left = torch.minimum(boxes[..., :2], others[..., :2])
    return torch.cat([upper_left, torch.maximum(boxes[..., 2:], others[..., 2:])], dim=-1)
