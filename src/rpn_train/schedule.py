"""Optimizer, learning rate, averaged weights. The rate of a step follows from its number alone."""

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


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Let the exponential moving average of all weights and buffers follow those of the model.

    Not by torch's AveragedModel, which waits for a GPU in every step.
    """
    averages, values = ([*m.parameters(), *m.buffers()] for m in (average, model))
    floats = [i for i, value in enumerate(values) if value.is_floating_point()]
    torch._foreach_lerp_([averages[i] for i in floats], [values[i] for i in floats], 1 - decay)
    for number, value in zip(averages, values, strict=True):
        if not value.is_floating_point():  # how many batches a norm has seen
            number.copy_(value)
