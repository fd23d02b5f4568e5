"""Bodies of backbones from the `timm` package, which is optional."""

import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from rpn_train.errors import CheckpointError, ConfigError
from rpn_train.norms import Norm


def timm_body(arch: str, *, weights: str | None, norm: Norm) -> tuple[nn.Module, list[int], bool]:
    """The last four features of one of timm's networks.

    Returns:
        The body, the channels of its maps, and whether they come as [B, H, W, C].

    Raises:
        ConfigError: timm is not installed, has no such network, or not with these strides.
        CheckpointError: the weights cannot be found or read.
    """
    try:
        import timm
    except ImportError:
        raise ConfigError(
            f"backbone.name: timm:{arch} needs pip install 'rpn-train[timm]'"
        ) from None
    norms: dict[Norm, Callable[[Any], Any]] = {
        "frozen_bn": timm.layers.freeze_batch_norm_2d,
        "bn": lambda body: body,
        "sync_bn": timm.layers.convert_sync_batchnorm,
    }
    if norm not in norms:
        expected = " | ".join(map(repr, norms))
        raise ConfigError(f"backbone.norm: expected {expected} for timm, got '{norm}'")
    try:
        body = timm.create_model(
            arch,
            features_only=True,
            out_indices=(-4, -3, -2, -1),
            pretrained=weights is not None,
            pretrained_cfg_overlay=None if weights in (None, "DEFAULT") else {"file": weights},
        )
    except Exception as error:  # timm's errors have no class in common
        kind = ConfigError if weights is None else CheckpointError
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
        raise kind(f"backbone: timm, '{arch}', weights '{weights}': {reason}") from error
    strides = body.feature_info.reduction()
    if strides != [4, 8, 16, 32]:
        raise ConfigError(f"backbone.name: expected strides [4, 8, 16, 32], {arch} has {strides}")
    for module in body.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0  # it would draw from the global generator
    nhwc = getattr(body, "output_fmt", "NCHW") == "NHWC"  # timm's EfficientNets do not say
    return norms[norm](body), body.feature_info.channels(), nhwc
