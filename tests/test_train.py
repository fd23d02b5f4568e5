"""Whole runs on tiny drawn images: exactness, interruption, distribution and faults."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import stopped_at

from rpn_train import checkpoint
from rpn_train.config import TrainConfig
from rpn_train.distributed import Ranks
from rpn_train.errors import CheckpointError, DivergedError
from rpn_train.model import normalize_images
from rpn_train.options import from_mapping
from rpn_train.run_folder import run_folder
from rpn_train.train import train

TINY: dict[str, Any] = {
    "dataset.shapes.size": [64, 64],
    "dataset.shapes.train_images": 7,
    "dataset.shapes.val_images": 3,
    "image.short_side": 64,
    "image.max_side": 64,
    "anchors.sizes": [[8], [16], [32], [64], [128]],
    "schedule.batch_size": 2,
    "schedule.steps": 6,
    "schedule.lr": 0.04,
    "eval.max_proposals": [10, 100],
    "eval.pictures": 1,
    "log_every": 2,
    "eval_every": 3,
    "save_every": 2,
    "workers": 0,
}
ONE = Ranks(0, 1, torch.device("cpu"))
# Sums are ordered by the number of threads: equal bits need as many as conftest.py gives.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def config(**changes: Any) -> TrainConfig:
    """TINY with `changes` (dots as double underscores)."""
    nested: dict[str, Any] = {}
    for key, value in {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        *path, last = key.split(".")
        target = nested
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return from_mapping(TrainConfig, nested)


def arguments(**changes: Any) -> list[str]:
    """The same as typed on the command line."""
    values = {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}
    typed = [f"{key}={json.dumps(value).replace(' ', '')}" for key, value in values.items()]
    return ["schedule=default", *typed]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    assert state["step"] == 6
    return state["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit."""
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert (a / "recall.json").read_text() == (b / "recall.json").read_text()
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(config(), folder, ONE) is None
    return folder


def test_a_run_folder_holds_what_it_should(whole: Path) -> None:
    assert [line["step"] for line in metrics(whole)] == [0, 2, 3, 4, 6, 6]
    evaluation = metrics(whole)[0]
    assert {"val/ar_10", "val/ar_100", "val/recall_100_iou50_small"} <= evaluation.keys()
    step = metrics(whole)[1]
    assert step["train/loss"] == pytest.approx(
        step["train/loss_objectness"] + step["train/loss_box"]
    )
    timing = [json.loads(line) for line in (whole / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == [2, 4, 6]
    assert all(line["train/images_per_s"] > 0 for line in timing)
    recall = json.loads((whole / "recall.json").read_text())
    assert (recall["num_images"], recall["step"]) == (3, 6)
    assert list((whole / "tensorboard").iterdir())
    stored = yaml.safe_load((whole / "config.yaml").read_text())
    assert from_mapping(TrainConfig, stored) == config()
    best = checkpoint.load(whole / "checkpoints" / "best.pt")
    assert best["best_ar_100"] == max(line.get("val/ar_100", -1) for line in metrics(whole))


def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends as if nothing had been."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    last = folder / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    assert train(config(resume="auto"), folder, ONE) is None
    assert_same_run(whole, folder)
    expected = f"changed: last.pt: {last}: expected a checkpoint of rpn-train, got a broken or"
    told = capsys.readouterr().out
    assert expected in told
    assert "-> last.1.pt" in told


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with run_folder(tmp_path, goes_on=False):
        second = [sys.executable, "-m", "rpn_train", *arguments(), f"output_dir={tmp_path}"]
        refused = subprocess.run(second, capture_output=True, text=True, env=ONE_THREAD)
    assert refused.returncode == 2
    expected = f"error: output_dir: {tmp_path} is in use by the run of process {os.getpid()}; "
    assert refused.stderr == expected + "wait for it, or give another folder\n"
    with run_folder(tmp_path, goes_on=False):
        pass  # free again


def test_a_loader_process_that_is_killed_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    typed = [*arguments(workers=2, schedule__steps=100000, eval_every=100000, log_every=1)]
    command = [sys.executable, "-m", "rpn_train", *typed, f"output_dir={tmp_path / 'run'}"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step 3/"):
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    try:
        _, fault = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 2
    assert fault.startswith("error: a loader process ended: DataLoader worker ")
    assert fault.count("\n") == 1


def test_killed_in_the_middle_of_an_epoch_and_resumed_is_the_same_run(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "rpn_train", *arguments(), f"output_dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ONE_THREAD) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            log = folder / "metrics.jsonl"
            if log.exists() and '"step": 3' in log.read_text():
                process.kill()  # SIGKILL: after the evaluation of step 3, in the second epoch
            time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["step"] < 6
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "tor')  # a line torn by the kill
    assert train(config(resume="auto"), folder, ONE) is None
    assert_same_run(whole, folder)


@pytest.mark.parametrize("at", [1, 3])  # 3 owes an evaluation when it stops
def test_stopped_by_a_signal_and_resumed_is_the_same_run(
    whole: Path, tmp_path: Path, at: int
) -> None:
    with stopped_at(at):
        assert train(config(), tmp_path, ONE) == signal.SIGTERM
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"] == at
    assert train(config(), tmp_path, ONE) is None
    assert_same_run(whole, tmp_path)


def test_workers_do_not_change_a_run(whole: Path, tmp_path: Path) -> None:
    train(config(workers=2), tmp_path, ONE)
    assert_same_run(whole, tmp_path)


def test_resuming_with_averaged_weights_is_exact(tmp_path: Path) -> None:
    cfg = config(
        schedule__ema=0.5, schedule__optimizer="adamw", schedule__lr=1e-3, eval_at_start=False
    )
    train(cfg, tmp_path / "whole", ONE)
    with stopped_at(4):
        train(cfg, tmp_path / "parts", ONE)
    train(cfg, tmp_path / "parts", ONE)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    first = checkpoint.load(tmp_path / "whole" / "checkpoints" / "last.pt")
    second = checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.pt")
    for key, average in first["ema"].items():
        assert torch.equal(average, second["ema"][key]), key
    key = "backbone.body.conv1.weight"
    assert not torch.equal(first["ema"][key], first["model"][key])


def test_pieces_of_a_batch_add_up_to_it(tmp_path: Path) -> None:
    """Up to rounding. With group norm: batch norm sees the pieces, here as everywhere."""
    lines = []
    for pieces in (1, 2):
        folder = tmp_path / str(pieces)
        cfg = config(schedule__accumulate=pieces, backbone__norm="gn", log_every=1)
        train(cfg, folder, ONE)
        lines.append([line["train/loss"] for line in metrics(folder) if "train/loss" in line])
    np.testing.assert_allclose(lines[0], lines[1], rtol=1e-4)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same losses and weights but for the order of float32 sums."""
    changes = {"backbone__norm": "gn", "log_every": 1}
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "rpn_train", *arguments(**changes)]
    done = subprocess.run(
        [*command, "devices=2", "device=cpu", f"output_dir={folder}"],
        capture_output=True,
        text=True,
        env=ONE_THREAD,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    train(config(**changes), tmp_path / "one", ONE)
    one, two = metrics(tmp_path / "one"), metrics(folder)
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two, strict=True):
        if "train/loss" in a:
            np.testing.assert_allclose(b["train/loss"], a["train/loss"], rtol=1e-4)
    first, second = weights(tmp_path / "one"), weights(folder)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(tmp_path: Path) -> None:
    cfg = config(schedule__lr=1e30, schedule__warmup=0.0, eval_at_start=False, save_every=1)
    with pytest.raises(DivergedError, match=r"step \d: expected a finite loss.*images \[\d"):
        train(cfg, tmp_path, ONE)
    last = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert last["step"] == 1  # the step before: its own loss was still finite
    assert not (tmp_path / "checkpoints" / "best.pt").exists()


def overflowing(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are not finite in these steps."""
    count = iter(range(1, 1000))
    monkeypatch.setattr(
        "rpn_train.objective.normalize_images",
        lambda *batch: normalize_images(*batch) * (math.nan if next(count) in steps else 1),
    )


@pytest.mark.parametrize(
    ("ema", "policy", "precision"),
    [(None, "skip", "fp32"), (0.5, "skip", "fp32"), (None, "stop", "fp16")],
)
def test_a_step_that_overflows_is_left_out_without_a_trace(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ema: float | None,
    policy: str,
    precision: str,
) -> None:
    """Batch norm has seen the infinities: its statistics go back too."""
    overflowing({3}, monkeypatch)
    cfg = config(
        on_nonfinite=policy,
        precision=precision,
        save_every=1,
        keep_checkpoints=9,
        eval_every=9,
        schedule__ema=ema,
    )
    train(cfg, tmp_path, ONE)
    kept = tmp_path / "checkpoints"
    last, *_ = states = [checkpoint.load(path) for path in checkpoint.kept(kept / "last.pt")]
    before, after, later = (next(s for s in states if s["step"] == n) for n in (2, 3, 4))
    for part in ("model", "ema") if ema else ("model",):
        for key in before[part]:
            assert torch.equal(before[part][key], after[part][key]), key
        assert any(not torch.equal(after[part][key], later[part][key]) for key in later[part])
        assert all(value.isfinite().all() for value in last[part].values())
    of_steps = [line for line in metrics(tmp_path) if "train/loss" in line]
    assert [line.get("train/skipped") for line in of_steps] == [None, 1, None]
    assert all(np.isfinite(line["train/loss"]) for line in of_steps)


def test_too_many_steps_that_overflow_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflowing({2, 3, 4, 5, 6}, monkeypatch)
    cfg = config(on_nonfinite="skip", max_skipped=2, eval_at_start=False)
    with pytest.raises(DivergedError, match=r"step 4: expected at most max_skipped = 2 .* got 3"):
        train(cfg, tmp_path, ONE)
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"] == 3


def test_a_checkpoint_of_another_network_is_not_resumed(whole: Path) -> None:
    cfg = config(resume="auto", backbone__name="resnet34_fpn")
    with pytest.raises(CheckpointError, match=r"backbone.name: resnet18_fpn -> resnet34_fpn"):
        train(cfg, whole, ONE)


def test_a_few_steps_on_two_images_raise_recall(tmp_path: Path) -> None:
    cfg = config(
        dataset__shapes__train_images=2,
        eval__split="train",
        proposals__nms_iou=0.8,
        schedule__steps=60,
        schedule__lr=0.08,
        eval_every=60,
        save_every=60,
        augment__flip=0.0,
    )
    train(cfg, tmp_path, ONE)
    evaluations = [line["val/recall_10_iou50"] for line in metrics(tmp_path) if "val/ar_10" in line]
    before, after = evaluations[0], evaluations[-1]
    assert after > before + 0.3
    assert after > 0.7
