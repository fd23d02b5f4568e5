"""Heads: what turns the feature maps into objectness and boxes, shared by all levels."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rpn_train.sparse import Lateral, stack_at

PRIOR = 0.01  # objectness of every anchor before training (Lin et al. 2017b, section 4.1)


class RPNHead(nn.Module):
    """3x3 convolution(s), then two sibling 1x1 convolutions (Ren et al. 2015, section 3.1).

    delta_stds: what the second puts out is multiplied by these (dx, dy, dw, dh): it then learns
    numbers of about the same size.
    """

    def __init__(
        self,
        in_channels: int,
        per_cell: int,
        *,
        num_convs: int,
        channels: int | None,
        delta_stds: Sequence[float] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        channels = channels or in_channels
        self.delta_stds = tuple(delta_stds)
        convs = [
            nn.Sequential(nn.Conv2d(c, channels, 3, padding=1), nn.ReLU(inplace=True))
            for c in [in_channels] + [channels] * (num_convs - 1)
        ]
        self.conv = nn.Sequential(*convs)
        self.cls_logits = nn.Conv2d(channels, per_cell, 1)
        self.bbox_pred = nn.Conv2d(channels, per_cell * 4, 1)
        _initialize(self)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> logits [B, H * W * A] and deltas [B, H * W * A, 4]."""
        return self._branches(self.conv(feature))

    def at(
        self,
        feature: Tensor | Lateral,
        image: Tensor,
        rows: Tensor,
        columns: Tensor,
        before: Sequence[tuple[nn.Conv2d, bool]],
    ) -> tuple[Tensor, Tensor]:
        """The same at some cells: logits [N, A] and deltas [N, A, 4].

        Args:
            feature: [B, C, H, W], what goes into the convolutions `before` (see `stack_at`).
            image, rows, columns: int64 [N].
        """
        convs = (cast(nn.Sequential, block)[0] for block in self.conv)
        stack = [*before, *((cast(nn.Conv2d, conv), True) for conv in convs)]
        return self._branches(stack_at(feature, image, rows, columns, stack))

    def _branches(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _rows(self.cls_logits(hidden)), _deltas(self.bbox_pred(hidden), self.delta_stds)


class TowerHead(nn.Module):
    """A stack of 3x3 convolutions with group norm for each of two branches (RetinaNet, FCOS).

    The first ends in objectness, the second in boxes and, with `quality`, in a third number: how
    well the box fits (Tian et al. 2019, section 3.3). For losses that read every anchor: objectness
    starts at `PRIOR`, so that the many background anchors do not drown the rest.
    """

    def __init__(
        self,
        in_channels: int,
        per_cell: int,
        *,
        num_convs: int,
        channels: int | None,
        delta_stds: Sequence[float],
        quality: bool,
    ) -> None:
        super().__init__()
        channels = channels or in_channels
        self.delta_stds = tuple(delta_stds)
        self.cls_tower = _tower(in_channels, channels, num_convs)
        self.bbox_tower = _tower(in_channels, channels, num_convs)
        self.cls_logits = nn.Conv2d(channels, per_cell, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, per_cell * 4, 3, padding=1)
        self.quality = nn.Conv2d(channels, per_cell, 3, padding=1) if quality else None
        _initialize(self)
        nn.init.constant_(cast(Tensor, self.cls_logits.bias), -math.log((1 - PRIOR) / PRIOR))

    def forward(self, feature: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> logits [B, H * W * A], deltas [B, H * W * A, 4] and maybe quality."""
        boxes = self.bbox_tower(feature)
        logits = _rows(self.cls_logits(self.cls_tower(feature)))
        deltas = _deltas(self.bbox_pred(boxes), self.delta_stds)
        if self.quality is None:
            return logits, deltas
        return logits, deltas, _rows(self.quality(boxes))


def _tower(in_channels: int, channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    groups = math.gcd(32, channels)
    if groups == channels > 1:
        groups //= 2  # a group of one channel has no variance in a map of one cell
    for c in [in_channels] + [channels] * (num_convs - 1):
        layers += [nn.Conv2d(c, channels, 3, padding=1, bias=False)]
        layers += [nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _initialize(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _rows(maps: Tensor) -> Tensor:
    """[B, A * K, H, W] -> [B, H * W * A * K], in the order of the anchors."""
    return maps.permute(0, 2, 3, 1).flatten(1)


def _deltas(maps: Tensor, stds: tuple[float, ...]) -> Tensor:
    """[B, A * 4, H, W] -> [B, H * W * A, 4]."""
    deltas = _rows(maps).unflatten(1, (-1, 4))
    if stds == (1, 1, 1, 1):
        return deltas
    return deltas * torch.tensor(stds).to(deltas.device, non_blocking=True)
