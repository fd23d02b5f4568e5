"""The comparison with torchvision compares like with like."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rpn_train.build import build_planner
from rpn_train.data.batch import TrainBatches
from rpn_train.objective import batch_losses
from rpn_train.run_state import build_state
from rpn_train.splits import open_split

CPU = torch.device("cpu")
TINY = [
    "schedule=default",
    "dataset.shapes.size=[60,50]",  # stretched to 64 x 53: boxes have to find their way back
    "dataset.shapes.train_images=5",
    "dataset.shapes.val_images=3",
    "image.short_side=64",
    "image.max_side=64",
    "anchors.sizes=[[8],[16],[32],[64],[128]]",
    "schedule.batch_size=2",
    "schedule.steps=2",
    "log_every=1",
    "workers=0",
    "device=cpu",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "compare_torchvision.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_two_steps_side_by_side(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "compared.json"
    assert script.main([*TINY, "--seeds", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written.keys() == {"config", "environment", "results", "summary"}
    (result,) = written["results"]
    assert result["seed"] == 1

    rows = [line.split("|") for line in printed.splitlines() if line.count("|") == 3][1:]
    assert [int(row[0]) for row in rows] == [row["step"] for row in result["losses"]] == [1, 2]
    for row, logged in zip(rows, result["losses"], strict=True):
        for cells, side in zip(row[1:], script.SIDES, strict=False):
            loss, objectness, box = map(float, cells.split())
            assert {"objectness": objectness, "box": box} == pytest.approx(logged[side], abs=1e-4)
            assert loss == pytest.approx(objectness + box, abs=2e-4)
    first = result["losses"][0]
    assert first["ours"] == pytest.approx(first["torchvision"], rel=0.1)
    assert first["ours"]["box"] > 0

    ours, theirs = (result["figures"][side] for side in script.SIDES)
    assert ours.keys() == theirs.keys() == written["summary"].keys()
    assert {"ar_100", "ar_1000", "recall_2000_iou50", "mean_loss", "median_step_s"} <= ours.keys()
    # after two steps from the same weights the proposals are still much the same
    assert theirs["recall_2000_iou50"] > 0.5
    for key in ("ar_100", "ar_1000"):
        assert theirs[key] == pytest.approx(ours[key], abs=0.1)
    total = sum(sum(row["ours"].values()) for row in result["losses"])
    assert ours["mean_loss"] == pytest.approx(total / 2)
    gap = written["summary"]["ar_100"]["difference"]
    assert gap == pytest.approx(ours["ar_100"] - theirs["ar_100"])
    assert f"{gap:+.4f}" in printed


def test_with_our_sampler_the_losses_of_both_are_equal(script: ModuleType) -> None:
    cfg = script.compose(TINY)
    index, read = open_split(cfg, "train", "train")
    state = build_state(cfg, CPU)
    theirs = script.TorchvisionRPN(state.model, cfg).train()
    planner = build_planner(cfg, index, 64)
    batch: Any = TrainBatches(index, read, planner, rank=0, world=1, accumulate=1)[0]
    batch.gt_ignore[:, 0] = True  # a crowd is no object of either
    assert (batch.gt_valid & ~batch.gt_ignore).any()
    ours, picks = batch_losses(state.model.train(), state.model.grid, batch, cfg, 0.0)

    def our_sampler(labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        nothing = torch.zeros(len(labels), len(labels[0]), dtype=torch.bool)
        positive = nothing.scatter(1, picks.at, picks.positive)
        background = nothing.scatter(1, picks.at, picks.valid & ~picks.positive)
        return list(positive), list(background)

    theirs.rpn.fg_bg_sampler = our_sampler
    losses = theirs(batch, CPU)[1]
    assert picks.positive.any()
    assert_close(losses["loss_objectness"], ours.objectness, rtol=1e-5, atol=0)
    assert_close(losses["loss_rpn_box_reg"], ours.box, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.box_loss=l1"], "error: method.box_loss: expected smooth_l1 to compare, got l1"),
        (["--seeds", "-1"], "error: seed: expected at least 0"),
        (["--json", "no/such/folder/file.json"], "error: --json: expected a file in a folder"),
    ],
)
def test_faults_of_the_input_are_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert script.main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
