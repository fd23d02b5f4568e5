"""What only a GPU can show: nothing waits for it that need not, and it computes what a CPU does."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from test_cost import METHODS, draw_batch
from torch import nn
from torch.testing import assert_close

from rpn_train.cli import compose_run
from rpn_train.config import TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.distributed import Ranks
from rpn_train.evaluate import propose_batch
from rpn_train.nms import suppress
from rpn_train.run_state import RunState, build_state
from rpn_train.step import Clock, prepare_network, training_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU, CPU = torch.device("cuda"), torch.device("cpu")
CANVAS = (256, 384)


def config(*overrides: str) -> TrainConfig:
    fixed = ["backbone.name=resnet18_fpn", "schedule.batch_size=2", "method.channels=64"]
    return compose_run([*fixed, *overrides])


@contextmanager
def without_waiting() -> Iterator[None]:
    """Whatever waits for the GPU is an error."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take_steps(
    state: RunState, network: nn.Module, batches: Sequence[Batch], cfg: TrainConfig, ranks: Ranks
) -> None:
    loader, steps = iter(batches), len(batches) // cfg.schedule.accumulate
    for i in range(steps):
        training_step(state, network, loader, cfg, 0.01, i / steps, Clock(), ranks)


@pytest.mark.parametrize(
    "chosen",
    [
        *[(f"method={method}", f"precision={p}") for method in METHODS for p in ("fp32", "bf16")],
        ("compile=true", "precision=bf16"),
        ("schedule.accumulate=2", "schedule.ema=0.9"),
        ("schedule.optimizer=adamw", "schedule.clip_norm=1"),
    ],
    ids=" ".join,
)
def test_steps_wait_for_nothing(chosen: tuple[str, ...]) -> None:
    cfg = config(*chosen)
    state, ranks = build_state(cfg, GPU), Ranks(0, 1, GPU)
    network = prepare_network(state.model, cfg, ranks)
    batches = [draw_batch(CANVAS, 3).pin_memory() for _ in range(3 * cfg.schedule.accumulate)]
    take_steps(state, network, batches, cfg, ranks)  # kernels are loaded or made, and anchors
    with without_waiting():
        take_steps(state, network, batches, cfg, ranks)


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_a_cpu(method: str) -> None:
    """Losses, positives and gradient norms of three steps; the anchors that are read are equal."""
    cfg = config(f"method={method}")
    batches = [draw_batch(CANVAS, objects) for objects in (3, 5, 2)]
    rows = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in (CPU, GPU):
            state = build_state(cfg, device)
            take_steps(state, state.model.train(), batches, cfg, Ranks(0, 1, device))
            rows.append(torch.stack(state.pending).cpu())
    assert_close(rows[1], rows[0], rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["faster_rcnn", "atss", "cascade"])
def test_proposals_are_those_of_a_cpu(method: str) -> None:
    """But for near-ties, which rounding decides."""
    cfg = config(f"method={method}")
    batch = draw_batch(CANVAS, 1)
    found = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in (CPU, GPU):
            model = build_state(cfg, device).model.eval()
            found.append(propose_batch(model, batch.to(device), cfg))
    for ours, expected in zip(found[1], found[0], strict=True):
        apart = torch.cdist(ours.boxes.cpu(), expected.boxes, p=torch.inf).amin(1)
        assert (apart < 0.1).float().mean() > 0.98
        assert abs(len(ours.boxes) - len(expected.boxes)) <= 0.02 * len(expected.boxes)


def test_what_is_suppressed_is_the_same() -> None:
    corners, sides = 300 * torch.rand(20, 700, 2), 10 + 90 * torch.rand(20, 700, 2)
    boxes, valid = torch.cat([corners, corners + sides], dim=-1), torch.rand(20, 700) < 0.9
    expected = suppress(boxes, valid, 0.5)
    assert torch.equal(suppress(boxes.to(GPU), valid.to(GPU), 0.5).cpu(), expected)


def count_waits(images: int) -> int:
    """How often the GPU is waited for from a batch on it to proposals on the CPU."""
    cfg = config()
    model, batch = build_state(cfg, GPU).model.eval(), draw_batch(CANVAS, 1, images).to(GPU)
    propose_batch(model, batch, cfg)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            found = propose_batch(model, batch, cfg)
            torch.cat([of_image.boxes for of_image in found]).cpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def test_proposals_of_many_images_wait_no_oftener() -> None:
    """Some lists may need a round more, after which it is looked at again."""
    waits = count_waits(1), count_waits(8)
    assert 2 <= min(waits) <= max(waits) <= min(waits) + 2


def test_a_batch_arrives_whole_beside_a_busy_gpu() -> None:
    """The memory of a batch is not another's while the GPU still has to read it."""
    batches = [draw_batch((512, 512), 4).pin_memory() for _ in range(8)]
    for i, batch in enumerate(batches):
        batch.images.fill_(i + 1)
    busy = torch.randn(4096, 4096, device=GPU)
    means = []
    for batch in batches * 4:
        moved = batch.to(GPU)
        for _ in range(5):
            busy = busy @ busy / 64
        means.append(moved.images.float().mean())
        del moved
    assert torch.stack(means).tolist() == [*range(1, 9)] * 4
