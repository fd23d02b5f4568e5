"""The normalisations that a backbone can be built with."""

from collections.abc import Callable
from typing import Literal

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]


def _group_norm(channels: int, *, eps: float) -> nn.GroupNorm:
    """32 groups (Wu and He 2018), or the most below 32 that divide the channels."""
    return nn.GroupNorm(max(g for g in range(1, 33) if channels % g == 0), channels, eps=eps)


NORMS: dict[Norm, Callable[..., nn.Module]] = {
    "frozen_bn": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "sync_bn": nn.SyncBatchNorm,
    "gn": _group_norm,
}
