"""What a step costs, counted in operations and not by a clock: the same on every machine.

On the meta device shapes are computed and nothing else. It stands for a GPU here: what needs a
value, and so would wait for the GPU, is an error.
"""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from rpn_train import objective
from rpn_train.build import build_model
from rpn_train.cli import compose_run
from rpn_train.config import BackboneConfig, ScheduleConfig, TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.distributed import Ranks
from rpn_train.evaluate import propose_batch
from rpn_train.heads import Outputs
from rpn_train.model import RPN
from rpn_train.objective import batch_losses
from rpn_train.run_state import build_state
from rpn_train.step import Clock, training_step

META = torch.device("meta")
METHODS = ("faster_rcnn", "retina", "atss", "task_aligned", "cascade", "oln")
BATCH = 2


def config(backbone: str) -> TrainConfig:
    return TrainConfig(
        backbone=BackboneConfig(backbone, frozen_stages=2, norm="frozen_bn"),
        schedule=ScheduleConfig(batch_size=BATCH),
    )


def draw_batch(canvas: tuple[int, int], objects: int, count: int = BATCH) -> Batch:
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(2, count, objects, 2, generator=generator)
    sides = 8 * 30 ** draw[0]  # 8 to 240 px
    corners = draw[1] * (torch.tensor(canvas[::-1]) - sides)
    valid = torch.ones(count, objects, dtype=torch.bool)
    return Batch(
        images=torch.randint(256, (count, 3, *canvas), dtype=torch.uint8, generator=generator),
        sizes=torch.tensor([canvas] * count),
        gt_boxes=torch.cat([corners, corners + sides], dim=-1),
        gt_valid=valid,
        gt_ignore=~valid,
        seeds=torch.arange(count),
        rows=torch.arange(count),
    )


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for the meta device; float32 does not need it."""
    monkeypatch.setattr(objective, "autocast", lambda precision, device: nullcontext())


class Everywhere(nn.Module):
    """A network that is evaluated at every anchor and then read at some."""

    def __init__(self, model: RPN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, at: Tensor) -> Outputs:
        logits, deltas, *_ = self.model(images)
        return Outputs(logits.gather(1, at), torch.take_along_dim(deltas, at[..., None], 1))


class Nothing(nn.Module):
    """A network that costs nothing, so that what comes before and after it remains."""

    def forward(self, images: Tensor, at: Tensor) -> Outputs:
        return Outputs(*(torch.zeros(*at.shape, *more, device=at.device) for more in ((), (4,))))


class Operations(TorchDispatchMode):
    """Counts operators by name, and the elements that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket._qualified_op_name] += 1
        if not func.is_view:
            self.elements += sum(r.numel() for r in tree_leaves(result) if isinstance(r, Tensor))
        return result


def step_flops(network: nn.Module, model: RPN, batch: Batch, cfg: TrainConfig) -> int:
    with FlopCounterMode(display=False) as counter:
        losses, _ = batch_losses(network, model.grid, batch, cfg, 0.0)
        (losses.objectness + losses.box).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("backbone", "canvas", "most", "everywhere"),
    [
        ("resnet18_fpn", (512, 512), 0.42, 0.75),
        ("resnet50_fpn", (512, 512), 0.27, 0.58),
        ("resnet50_fpn", (832, 1344), 0.16, 0.58),
    ],
)
def test_a_step_is_mostly_the_body(
    backbone: str, canvas: tuple[int, int], most: float, everywhere: float
) -> None:
    """Share of the arithmetic that is not the backbone's body; measured 0.405, 0.254, 0.143."""
    cfg = config(backbone)
    model, batch = build_model(cfg).to(META), draw_batch(canvas, 8).to(META)
    with FlopCounterMode(display=False) as counter:
        maps = model.backbone.body(torch.empty(batch.images.shape, device=META))
        torch.stack([m.sum() for m in maps.values()]).sum().backward()
    body = counter.get_total_flops()
    assert 1 - body / step_flops(model, model, batch, cfg) < most
    assert 1 - body / step_flops(Everywhere(model), model, batch, cfg) > everywhere


def test_a_step_on_a_cpu_computes_no_more_than_on_a_gpu() -> None:
    cfg = config("resnet18_fpn")
    model, batch = build_model(cfg), draw_batch((192, 256), 5)
    on_cpu = step_flops(model, model, batch, cfg)
    model = model.to(META)
    everywhere = step_flops(Everywhere(model), model, batch.to(META), cfg)
    assert 0 < on_cpu <= step_flops(model, model, batch.to(META), cfg) < 0.7 * everywhere


def test_a_step_makes_no_proposals() -> None:
    cfg = config("resnet18_fpn")
    state, batch = build_state(cfg, torch.device("cpu")), draw_batch((64, 128), 3)
    ranks = Ranks(0, 1, torch.device("cpu"))
    with Operations() as training:
        training_step(state, state.model, iter([batch]), cfg, 0.01, 0.0, Clock(), ranks)
    with Operations() as evaluation:
        propose_batch(state.model, batch, cfg)
    assert training.calls["aten::convolution_backward"] > 20
    assert training.calls["torchvision::nms"] == 0
    assert evaluation.calls["torchvision::nms"] == BATCH * 5  # once for each image and level


class BlockingCopies(TorchDispatchMode):
    """Counts copies from the CPU to another device that would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1 if func.overloadpacket is torch.ops.aten.copy_ else 0]
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            self.count += waits and source.device.type == "cpu" and result.device == META
        return result


@pytest.mark.parametrize("done", [0.0, 0.9])
@pytest.mark.parametrize(
    "chosen",
    [
        *[f"method={method}" for method in METHODS],
        "schedule.optimizer=adamw schedule.clip_norm=1 schedule.ema=0.9 schedule.accumulate=2",
    ],
)
def test_a_step_waits_for_nothing(chosen: str, done: float) -> None:
    """All of it, with the update: no number is read, and no copy is waited for."""
    cfg = compose_run([*chosen.split(), "backbone.name=resnet18_fpn", "schedule.batch_size=2"])
    state = build_state(cfg, META)
    batches = iter([draw_batch((256, 384), 3)] * cfg.schedule.accumulate)
    batch_losses(state.model, state.model.grid, draw_batch((256, 384), 1).to(META), cfg, 0.0)
    with BlockingCopies() as copies:
        training_step(state, state.model, batches, cfg, 0.01, done, Clock(), Ranks(0, 1, META))
    assert copies.count == 0
    (numbers,) = state.pending
    assert (numbers.shape, numbers.device) == ((4,), META)


def test_waits_are_noticed() -> None:
    """Guards the test above."""
    value = torch.zeros(3)
    with BlockingCopies() as copies:
        value.to(META, non_blocking=True)
        assert copies.count == 0
        value.to(META)
        torch.zeros(3, device=META).copy_(value)
    assert copies.count == 2
    for read in (Tensor.tolist, Tensor.nonzero, lambda tensor: bool(tensor.any())):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read(value.to(META))


def count_targets(objects: int, device: torch.device) -> Operations:
    """Operations of a step but for the network, at 512 x 640."""
    cfg = config("resnet18_fpn")
    grid = build_model(cfg).grid
    batch = draw_batch((512, 640), objects).to(device)
    batch_losses(Nothing(), grid, batch, cfg, 0.0)  # makes the anchors, which stay
    with Operations() as counted:
        batch_losses(Nothing(), grid, batch, cfg, 0.0)
    return counted


def test_targets_on_a_gpu_are_as_many_operators_for_any_number_of_objects() -> None:
    one, many = count_targets(1, META), count_targets(60, META)
    assert one.calls == many.calls
    assert one.calls.total() < 400


def test_targets_on_a_cpu_hardly_grow_with_the_objects() -> None:
    """60 objects instead of one: measured 1.2 times as many operators, 1.1 times the elements."""
    cpu = torch.device("cpu")
    one, many = count_targets(1, cpu), count_targets(60, cpu)
    assert many.calls.total() < 1.5 * one.calls.total()
    assert many.elements < 1.5 * one.elements


def test_a_fixed_norm_makes_no_pass_over_its_map() -> None:
    """Elements written: torchvision's frozen norms write each map twice more. Measured 0.59."""
    cfg = config("resnet50_fpn")
    ours = build_model(cfg).backbone.body.to(META)
    theirs = resnet_fpn_backbone(backbone_name="resnet50", weights=None).body.to(META)
    images = torch.empty(2, 3, 512, 512, device=META)
    written = []
    for body in (ours, theirs):
        with torch.no_grad(), Operations() as counted:
            body(images)
        written.append(counted.elements)
    assert written[0] < 0.65 * written[1]
