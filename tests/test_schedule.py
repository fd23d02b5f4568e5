"""Learning rates by hand, which parameters decay, and averages."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rpn_train.schedule import build_optimizer, lr_at, update_average


def rates(total, decay, *, warmup=0.0, milestones=(2 / 3, 11 / 12)):
    options = {"peak": 2.0, "milestones": milestones, "gamma": 0.1}
    return [
        lr_at(step, total=total, warmup=warmup, decay=decay, **options)
        for step in range(1, total + 1)
    ]


def test_multistep_by_hand():
    """Twelve steps, as twelve epochs: eight at the peak, three at a tenth, the last at .01."""
    assert rates(12, "multistep") == pytest.approx([2.0] * 8 + [0.2] * 3 + [0.02])
    detectron = rates(90, "multistep", milestones=(2 / 3, 8 / 9))
    assert detectron == pytest.approx([2.0] * 60 + [0.2] * 20 + [0.02] * 10)


def test_cosine_by_hand():
    half_root = 2**-0.5
    assert rates(4, "cosine") == pytest.approx([2, 1 + half_root, 1, 1 - half_root])
    long = rates(1000, "cosine")
    assert long[0] == 2
    assert 0 < long[-1] < 1e-5


def test_warmup_by_hand():
    """The first tenth rises to the peak, from step 1 on."""
    assert rates(20, "constant", warmup=0.25) == pytest.approx([0.4, 0.8, 1.2, 1.6] + [2] * 16)
    assert rates(20, "multistep", warmup=0.1)[:3] == pytest.approx([1, 2, 2])
    assert rates(20, "cosine", warmup=0.1)[0] == pytest.approx(1)
    both = rates(4, "multistep", warmup=1.0, milestones=(0.5,))
    assert both == pytest.approx([0.5, 1, 0.15, 0.2])


@pytest.mark.parametrize("decay", ["multistep", "cosine", "constant"])
def test_a_run_of_one_step(decay):
    """Also where the warm-up is shorter than a step."""
    assert rates(1, decay) == rates(1, decay, warmup=0.01) == [2]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay(name):
    """One step without gradients leaves what does not decay as it was."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Linear(4, 2),
        nn.Conv2d(3, 4, 1),
    )
    model[4].requires_grad_(False)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model, name=name, momentum=0.8, weight_decay=0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    decayed = {name for name, value in model.named_parameters() if not (value == 1).all()}
    assert decayed == {"0.weight", "3.weight"}
    assert model[0].weight.flatten()[0].item() == pytest.approx(1 - 0.1 * 0.5)
    assert len(optimizer.state_dict()["state"]) == 8  # all but the frozen two


def test_momentum_goes_where_it_belongs():
    options = {"momentum": 0.8, "weight_decay": 0.0}
    model = nn.Linear(2, 1)
    assert build_optimizer(model, name="sgd", **options).defaults["momentum"] == 0.8
    assert build_optimizer(model, name="adamw", **options).defaults["betas"] == (0.8, 0.999)


def test_averaged_weights():
    """What is left of the initial ones, and a share of all values since; counts are the last."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average, initial = copy.deepcopy(model), copy.deepcopy(model).state_dict()
    expected = {key: value.double() for key, value in initial.items()}
    for _ in range(3):
        model(torch.rand(4, 2))  # moves the statistics
        with torch.no_grad():
            model[0].weight += torch.rand(3, 2)
        update_average(average, model, 0.75)
        for key, value in model.state_dict().items():
            expected[key] = 0.75 * expected[key] + 0.25 * value
    found = average.state_dict()
    assert found.pop("1.num_batches_tracked") == 3
    for key, value in found.items():
        assert_close(value, expected[key].float())
    assert not torch.equal(found["1.running_mean"], model.state_dict()["1.running_mean"])
    assert torch.equal(found["1.weight"], initial["1.weight"])
