"""What an anchor's objectness costs: functions of logits and targets in [0, 1], of any shape."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor, **_: float) -> Tensor:
    """Binary cross entropy of each logit."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Cross entropy that counts less for what is right already (Lin et al. 2017, equation 5).

    The probability of the target class weighs by (1 - p)^gamma, the class by alpha (positive) or
    1 - alpha. Targets between 0 and 1 mix both, as in torchvision.
    """
    # 1 - p of the target class, in one term where the targets are 0 or 1: no cancellation
    miss = targets * (-logits).sigmoid() + (1 - targets) * logits.sigmoid()
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return weight * miss.pow(gamma) * each


def quality_focal_loss(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Cross entropy with soft targets times |p - target|^gamma (Li et al. 2020, equation 3).

    gamma is the paper's beta; alpha is not used.
    """
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (logits.sigmoid() - targets).abs().pow(gamma) * each


def absolute_error(logits: Tensor, targets: Tensor, **_: float) -> Tensor:
    """|p - target| of each probability (Kim et al. 2022, section 3.2)."""
    return (logits.sigmoid() - targets).abs()


# By name, as of `method.objectness_loss`. Of every anchor: with the options of the focal ones.
OBJECTNESS_LOSSES: dict[str, Callable[..., Tensor]] = {
    "bce": cross_entropy,
    "l1": absolute_error,
    "focal": focal_loss,
    "quality_focal": quality_focal_loss,
}
