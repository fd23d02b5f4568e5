"""Optimizer and learning rate. The rate of a step follows from its number alone."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer


def lr_at(
    step: int,
    *,
    total: int,
    peak: float,
    warmup: float,
    decay: str,
    milestones: Sequence[float],
    gamma: float,
) -> float:
    """Learning rate of `step` (1..total).

    Linear warm-up over the first `warmup` share of the run, times the decay: "multistep" (by gamma
    at each milestone, a share of the run), "cosine" (to 0) or "constant".
    """
    done = (step - 1) / total
    ramp = min(1.0, step / (warmup * total)) if warmup > 0 else 1.0
    if decay == "multistep":
        return peak * ramp * gamma ** sum(done >= m for m in milestones)
    if decay == "cosine":
        return peak * ramp * 0.5 * (1 + math.cos(math.pi * done))
    assert decay == "constant"
    return peak * ramp


def build_optimizer(
    model: nn.Module, *, name: str, momentum: float, weight_decay: float
) -> Optimizer:
    """SGD or AdamW over the parameters that train; norms and biases without weight decay.

    The learning rate is set before every step, by `lr_at`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    assert name == "adamw"
    return torch.optim.AdamW(groups, lr=0.0, betas=(momentum, 0.999))
