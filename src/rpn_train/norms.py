"""The normalisations that a backbone can be built with, and how fixed ones are made free."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F
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


def fold_norms(module: nn.Module) -> None:
    """Let every convolution that a batch norm directly follows do the work of that norm.

    Where the statistics of a batch norm stand still, it is y = s (w * x) + t, which is a
    convolution too: (s w) * x + t. In the weights that costs nothing, on the maps it is two more
    passes through memory. Values and gradients are those of before (`test_norms.py`), and so are
    the keys of the state dict: the product is made anew in each pass.

    Args:
        module: changed in place. A norm directly follows a convolution where it is the next child
            of the same parent, as in all of torchvision's networks.
    """
    for parent in module.modules():
        for conv, norm in pairwise(parent.children()):
            if type(conv) is nn.Conv2d and type(norm) in _FOLDED:
                conv.__class__ = FoldedConv2d
                cast(FoldedConv2d, conv).norm = (norm,)  # a tuple: it stays its parent's child
                norm.__class__ = _FOLDED[type(norm)]


class FoldedConv2d(nn.Conv2d):
    """A convolution that scales and shifts for the norm behind it, if that is fixed."""

    norm: "tuple[FrozenBatchNorm2d | nn.BatchNorm2d]"

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        (norm,) = self.norm
        if isinstance(norm, LearningBatchNorm2d) and norm.training:
            return super().forward(x)
        scale = norm.weight * (cast(Tensor, norm.running_var) + norm.eps).rsqrt()
        shift = norm.bias - cast(Tensor, norm.running_mean) * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """Done by the convolution before it."""

    def forward(self, x: Tensor) -> Tensor:
        """The same."""
        return x


class LearningBatchNorm2d(nn.BatchNorm2d):
    """Done by the convolution before it, except in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised by the batch in training, otherwise the same."""
        return super().forward(x) if self.training else x


_FOLDED = {FrozenBatchNorm2d: FoldedBatchNorm2d, nn.BatchNorm2d: LearningBatchNorm2d}
