"""Norms folded into convolutions: the values, gradients and keys of before."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from rpn_train.backbones import BACKBONES, build_backbone
from rpn_train.norms import FoldedConv2d, fold_norms


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for m in module.modules():
        if isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d):
            lows = {"running_var": 0.5, "weight": 0.5, "bias": -1, "running_mean": -1}
            for name, low in lows.items():
                value = getattr(m, name).detach()
                value.copy_(torch.rand(value.shape, generator=generator) + low)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v3_large"])
def test_values_and_gradients_are_those_of_before(
    arch: str, training: bool, norm: type[nn.Module]
) -> None:
    """In float64, so that a fault of any size shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = get_model(arch, norm_layer=norm)
        images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    trunk = plain.features if arch.startswith("mobile") else plain
    last = [*trunk._modules][-1] if trunk is not plain else "layer4"
    plain = IntermediateLayerGetter(trunk, {last: "0"}).double()
    randomise(plain)
    folded = copy.deepcopy(plain)
    fold_norms(folded)
    assert list(folded.state_dict()) == list(plain.state_dict())
    num_norms = sum(isinstance(m, norm) for m in plain.modules())
    assert sum(isinstance(m, FoldedConv2d) for m in folded.modules()) == num_norms
    outputs = []
    for network in (plain, folded):
        network.train(training)
        output = network(images)["0"]
        output.square().mean().backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    for (key, ours), theirs in zip(folded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=key)
    for key, value in folded.state_dict().items():  # statistics moved alike
        torch.testing.assert_close(value, plain.state_dict()[key], msg=key)


def test_a_copy_has_norms_of_its_own() -> None:
    """An average of weights is a copy: its convolutions must read its norms, not the model's."""
    first = build_backbone("resnet18_fpn", weights=None, frozen_stages=0, norm="frozen_bn").eval()
    second = copy.deepcopy(first)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = second(images)[0]
    randomise(first)
    assert torch.equal(second(images)[0], before)
    assert not torch.allclose(first(images)[0], before)


def test_weights_that_are_loaded_or_changed_count_at_once() -> None:
    backbone = build_backbone("resnet18_fpn", weights=None, frozen_stages=0, norm="bn").eval()
    other = build_backbone("resnet18_fpn", weights=None, frozen_stages=0, norm="bn").eval()
    randomise(other)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone(images)
    backbone.load_state_dict(other.state_dict())
    assert torch.equal(backbone(images)[0], other(images)[0])


@pytest.mark.parametrize("name", ["resnet50_fpn", "mobilenet_v3_large_fpn", "resnet18_c4"])
def test_no_norm_is_left_over(name: str) -> None:
    assert name in BACKBONES
    with torch.device("meta"):
        backbone = build_backbone(name, weights=None, frozen_stages=0, norm="frozen_bn")
    kinds = {type(m).__name__ for m in backbone.modules()}
    assert "FoldedBatchNorm2d" in kinds
    assert "FrozenBatchNorm2d" not in kinds
