"""Convolutions evaluated at chosen cells of a feature map, and nowhere else.

The loss of an RPN reads some 256 of up to 270,000 anchors, so most of what a head computes over the
fine levels is thrown away in training. A stack of n 3x3 convolutions at one cell needs the
(2n + 1) x (2n + 1) cells around it: they are gathered, and the stack runs on these patches. Values
and gradients are those of the dense computation (`test_sparse.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Lateral:
    """A map of a feature pyramid not yet computed: fine through a 1x1 convolution, plus coarse.

    fine: [B, C, H, W]. inner: the convolution. coarse: [B, C', H / 2, W / 2].
    """

    fine: Tensor
    inner: nn.Module
    coarse: Tensor

    @property
    def shape(self) -> torch.Size:
        """[B, C', H, W]."""
        return torch.Size((*self.coarse.shape[:2], *self.fine.shape[2:]))

    def whole(self) -> Tensor:
        """The map, [B, C', H, W]."""
        coarse = F.interpolate(self.coarse, size=self.fine.shape[-2:])
        return cast(Tensor, self.inner(self.fine)) + coarse

    def at(self, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """The map at cells, like `_at`."""
        fine = cast(Tensor, self.inner(_at(self.fine, image, y, x)))
        return fine + _at(self.coarse, image, y // 2, x // 2)


def stack_at(
    feature: Tensor | Lateral,
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    stack: Sequence[tuple[nn.Conv2d, bool]],
) -> Tensor:
    """Output of a stack of 3x3 convolutions (stride 1, zero padding 1) at some cells.

    Args:
        feature: [B, C, H, W].
        image, rows, columns: int64 [N], of each cell; the same may come several times; N may be 0.
        stack: the convolutions in order, and whether a ReLU follows each.

    Returns:
        [N, channels of the last convolution, 1, 1].
    """
    height, width = feature.shape[2:]
    radius = len(stack)
    offsets = torch.arange(-radius, radius + 1, device=rows.device)
    y = rows.view(-1, 1, 1) + offsets[:, None]  # [N, K, 1], K = 2 * radius + 1
    x = columns.view(-1, 1, 1) + offsets  # [N, 1, K]
    inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]  # [N, 1, K, K]
    read = feature.at if isinstance(feature, Lateral) else partial(_at, feature)
    patches = read(image, y.clamp(0, height - 1), x.clamp(0, width - 1))  # [N, C, K, K]
    for conv, relu in stack:
        patches = patches * inside  # what lies outside is padding: zero for every convolution
        patches = F.conv2d(patches, conv.weight, conv.bias)
        patches = F.relu(patches) if relu else patches
        inside = inside[..., 1:-1, 1:-1]
    return patches


def _at(feature: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """A map [B, C, H, W] at rows y [N, K, 1] and columns x [N, 1, K]: [N, C, K, K]."""
    channels, height, width = feature.shape[1:]
    cell = (image.view(-1, 1, 1) * height + y) * width + x  # [N, K, K]
    cells = feature.permute(0, 2, 3, 1).reshape(-1, channels)  # [B * H * W, C]
    # an embedding, because its backward pass is fast and adds in a fixed order
    return F.embedding(cell, cells).permute(0, 3, 1, 2)
