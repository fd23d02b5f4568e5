"""Whole runs of every method: what the loop promises does not depend on how a network learns."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stopped_at
from torch import nn
from torch.testing import assert_close

from rpn_train import checkpoint
from rpn_train.cli import compose_run
from rpn_train.distributed import Ranks
from rpn_train.train import train

METHODS = ["faster_rcnn", "retina", "atss", "task_aligned", "cascade", "oln"]
ONE = Ranks(0, 1, torch.device("cpu"))
# task_aligned changes its mind in the middle: the first two steps of four are those of ATSS
TINY = [
    *[
        "dataset.shapes.size=[64,64]",
        "dataset.shapes.train_images=7",
        "dataset.shapes.val_images=3",
    ],
    *["image.short_side=64", "image.max_side=64", "workers=0", "device=cpu", "eval.pictures=0"],
    *["anchors.sizes=[[16],[32],[64],[128],[256]]", "anchors.ratios=[1]", "method.num_convs=1"],
    *["method.channels=32", "method.aligned_from=0.5", "schedule=default", "schedule.steps=4"],
    *["schedule.batch_size=2", "schedule.optimizer=adamw", "schedule.lr=0.004", "log_every=1"],
    *["eval_every=2", "eval_at_start=false"],
]


def run(method: str, folder: Path, *typed: str) -> int | None:
    return train(compose_run([*TINY, f"method={method}", *typed]), folder, ONE)


def saved(folder: Path, step: int = 4) -> dict[str, Any]:
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    assert state["step"] == step
    return state


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    """Bit for bit, with averaged weights and in half precision."""
    typed = ["schedule.ema=0.5", "precision=bf16"]
    run(method, tmp_path / "whole", *typed)
    with stopped_at(2):
        assert run(method, tmp_path / "parts", *typed) == signal.SIGTERM
    saved(tmp_path / "parts", step=2)
    run(method, tmp_path / "parts", *typed)
    for name in ("metrics.jsonl", "recall.json"):
        whole, parts = (tmp_path / folder / name for folder in ("whole", "parts"))
        assert whole.read_text() == parts.read_text()
    first, second = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    for part in ("model", "ema"):
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key


@pytest.mark.parametrize("method", ["task_aligned", "cascade", "oln"])
def test_two_processes_are_one(method: str, tmp_path: Path) -> None:
    """But for the order of sums."""
    typed = ["backbone.norm=gn", "schedule.optimizer=sgd", "schedule.momentum=0.9"]
    command = [sys.executable, "-m", "rpn_train", *TINY, *typed, f"method={method}", "devices=2"]
    done = subprocess.run(
        [*command, f"output_dir={tmp_path}/two"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    run(method, tmp_path / "one", *typed)
    one, two = saved(tmp_path / "one")["model"], saved(tmp_path / "two")["model"]
    for key, value in one.items():
        assert_close(two[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["faster_rcnn", "atss", "cascade"])  # one of each head
def test_a_compiled_network_learns_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as for a GPU, but run by plain operators: to generate code takes minutes."""
    run(method, tmp_path / "plain")
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    torch._dynamo.reset()
    run(method, tmp_path / "compiled", "compile=true")
    before, *_, after = (
        json.loads(line)["train/compilations"]
        for line in (tmp_path / "compiled" / "timing.jsonl").read_text().splitlines()
    )
    assert after == before >= 1  # nothing was compiled again after the first step
    plain, compiled = saved(tmp_path / "plain")["model"], saved(tmp_path / "compiled")["model"]
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)
