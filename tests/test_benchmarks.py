"""The benchmarks compare like with like, notice when they do not, and write what they print."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rpn_train.config import AnchorsConfig
from rpn_train.distributed import Ranks

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = ["--backbone", "resnet18_fpn", "--size", "64", "128", "--boxes", "3", "--device", "cpu"]
RANKS = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def script(name: str) -> Any:
    return importlib.import_module(name)


def run(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """What the benchmark wrote."""
    path = folder / "written.json"
    script(name).main([*arguments, "--json", str(path)])
    written: dict[str, Any] = json.loads(path.read_text())
    assert written.keys() == {"arguments", "environment", "results"}
    assert {"device", "torch", "torchvision", "commit"} <= written["environment"].keys()
    return written


def tiny_bench() -> Any:
    arguments = script("benchmarking").parser("", size=64, repeats=1).parse_args(TINY)
    return script("benchmarking").build(arguments, RANKS)


PARTS = ("input", "network", "targets", "losses, backward", "update", "whole")


@pytest.mark.parametrize(
    ("name", "parts", "theirs_alone"),
    [
        ("benchmark_step", PARTS, {"proposals"}),
        ("benchmark_inference", ("input", "network", "proposals", "whole"), set()),
    ],
)
def test_both_sides(
    name: str,
    parts: tuple[str, ...],
    theirs_alone: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = run(name, [*TINY, "--repeats", "2"], tmp_path)
    assert written["arguments"]["size"] == [64, 128]
    results = written["results"]
    assert results["ours"].keys() == {*parts}
    assert results["torchvision"].keys() == {*parts} | theirs_alone
    assert min(*results["ours"].values(), *results["torchvision"].values()) > 0
    assert len(results["ratios"]) == 2
    assert results["ratio"] == pytest.approx(sum(results["ratios"]) / 2)
    printed = capsys.readouterr().out
    assert f"torchvision / ours: {results['ratio']:.2f}" in printed
    for part in results["torchvision"]:
        assert f"\n{part}" in printed


def test_rates_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--repeats", "1", "--channels-last"]
    results = run("benchmark_step", arguments, tmp_path)["results"]
    assert results["rates"] == {
        side: {"images/s": pytest.approx(2 / (results[side]["whole"] / 1e3))}
        for side in ("ours", "torchvision")
    }
    assert "\nimages/s" in capsys.readouterr().out


def test_operations_of_a_step() -> None:
    """As an earlier count of the two had it: 527 and 1,134 GFLOP for an image."""
    tools = script("benchmarking")
    arguments = ["--size", "800", "1344", "--batch", "1", "--device", "cpu"]
    bench = tools.build(tools.parser("", size=64, repeats=1).parse_args(arguments), RANKS)
    expected = {"ours": 527, "torchvision": 1134}
    assert script("benchmark_step").step_gflop(bench) == pytest.approx(expected, rel=0.01)


def test_other_weights_are_noticed() -> None:
    bench, tools = tiny_bench(), script("benchmarking")
    theirs = tools.TorchvisionRPN(bench)
    tools.check_outputs(bench, theirs)
    script("benchmark_step").check_losses(bench, theirs)
    script("benchmark_inference").check_proposals(bench, theirs)
    with torch.no_grad():
        theirs.rpn.head.bbox_pred.bias += 0.1
    for check in (
        tools.check_outputs,
        script("benchmark_step").check_losses,
        script("benchmark_inference").check_proposals,
    ):
        with pytest.raises(AssertionError):
            check(bench, theirs)


def test_a_step_is_taken_but_moves_nothing() -> None:
    bench = tiny_bench()
    before = {key: value.clone() for key, value in bench.state.model.state_dict().items()}
    bench.watch.start()
    script("benchmarking").our_step(bench)()
    assert bench.state.step == 1
    momenta = [state["momentum_buffer"] for state in bench.state.optimizer.state.values()]
    assert any(momentum.abs().max() > 0 for momentum in momenta)
    for key, value in bench.state.model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_torchvision_gets_its_own_canvas() -> None:
    batch = script("benchmarking").draw_batch((70, 130), 2, 3, 64)
    assert batch.canvas == (128, 192)
    assert not batch.images[:, :, 70:].any()
    cut = script("benchmarking").their_canvas(batch)
    assert cut.canvas == (96, 160)
    assert torch.equal(cut.images, batch.images[:, :, :96, :160])
    assert ((batch.gt_boxes >= 0) & (batch.gt_boxes <= torch.tensor([130, 70] * 2))).all()


def test_turns() -> None:
    """The order turns around from round to round, the first round does not count."""
    tools, order = script("benchmarking"), []
    watch = tools.Stopwatch(RANKS.device)

    def side(name: str) -> Any:
        def take() -> None:
            order.append(name)
            watch.lap("a")
            watch.lap("b")
            watch.lap("a")

        return take

    times = tools.in_turns({name: side(name) for name in "xy"}, watch, 3)
    assert "".join(order) == "yxxyyxxy"
    assert [len(rows) for rows in times.values()] == [3, 3]
    assert [*times["x"][0]] == ["a", "b", "whole"]
    assert times["x"][0]["whole"] == pytest.approx(times["x"][0]["a"] + times["x"][0]["b"])
    rows = [{"a": 1.0}, {"a": 9.0}, {"a": 2.0}]
    assert tools.medians(rows) == {"a": 2.0}


def test_scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = script("benchmark_scaling")
    arguments = argparse.Namespace(size=[256, 512])
    swept = dict(program.sweeps(arguments))
    assert [value for value, *_ in swept["pixels"]] == [
        128 * 256,
        192 * 384,
        256 * 512,
        384 * 768,
        512 * 1024,
    ]
    assert [value for value, *_ in swept["anchors per cell"]] == [3, 6, 9, 18]
    changes = [(1, {"boxes": 1}, AnchorsConfig()), (10, {"boxes": 10}, AnchorsConfig())]
    monkeypatch.setattr(program, "sweeps", lambda args: [("objects", changes)])
    results = run("benchmark_scaling", [*TINY, "--repeats", "1"], tmp_path)["results"]
    assert [row["objects"] for row in results["objects"]["rows"]] == [1, 10]
    assert results["objects"]["exponents"].keys() == {"targets", "step", "proposals"}
    rows = [{"n": n, "ms": 5 * n**1.5} for n in (1, 3, 10)]
    assert program.exponent(rows, "n", "ms") == pytest.approx(1.5)


def test_model(tmp_path: Path) -> None:
    """k x k convolutions take 2 k^2 C C' operations for each cell, and backward twice as many."""
    arguments = ["--backbone", "resnet18_fpn", "--size", "256", "320", "--batch", "1"]
    results = run("benchmark_model", arguments, tmp_path)["results"]
    head = 256 * 256 * 9 + 256 + 3 * 257 + 12 * 257
    assert results["parameters"]["head"] == {"all": head, "trained": head}
    (step,) = results["steps"]
    cells = [(256 >> n) * (320 >> n) for n in range(2, 7)]
    per_cell = 3 * 2 * 9 * 256 * 256 / 1e9
    branches = 3 * 2 * 15 * 256 / 1e9
    laterals = sum(
        3 * 2 * 256 * c * n / 1e9 for c, n in zip((64, 128, 256, 512), cells[:4], strict=True)
    )
    everywhere = (sum(cells[:4]) + sum(cells)) * per_cell + sum(cells) * branches + laterals
    # nothing is learned in the first stage, so no gradient goes into its lateral
    everywhere -= 2 * 256 * 64 * cells[0] / 1e9
    assert step["everywhere"]["pyramid and head"] == pytest.approx(everywhere, rel=1e-6)
    assert step["CPU"]["whole"] < step["GPU"]["whole"] < 0.7 * step["everywhere"]["whole"]
