"""The methods side by side: what is counted, that they start alike, and the table of their runs."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torch.testing import assert_close

from rpn_train.build import build_model, build_planner
from rpn_train.cli import compose_run
from rpn_train.compose import groups
from rpn_train.errors import ConfigError
from rpn_train.options import to_mapping
from rpn_train.recall import NAMED_IOUS, SIZES
from rpn_train.splits import open_split

SETTINGS = ["schedule.steps=3", "schedule.batch_size=8", "eval.max_proposals=[100,10]"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("benchmark_methods")


def test_cost(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A k x k convolution takes k^2 C C' multiplications for each cell, and backward two as many.

    130 x 250 px are padded to multiples of 64 or of 128.
    """
    path, methods = tmp_path / "cost.json", ["faster_rcnn", "task_aligned", "atss"]
    arguments = ["--backbone", "resnet18_fpn", "--size", "130", "250", "--repeats", "1"]
    arguments += ["--methods", *methods, "--device", "cpu", "--markdown", "--json", str(path)]
    assert script.main(["cost", *arguments]) == 0
    costs = json.loads(path.read_text())["results"]
    fine, coarse = 12276 // 3, 1364  # cells on strides 4 to 64, 8 to 128
    sparse, aligned, atss = (costs[method] for method in methods)
    assert [(c["canvas"], c["anchors"]) for c in costs.values()] == [
        ([192, 256], 12276),
        ([256, 256], 1364),
        ([256, 256], 1364),
    ]

    branch, conv = 9 * 256 / 1e9, 9 * 256 * 256 / 1e9
    parts = [cost["inference_gmac"] for cost in (sparse, aligned, atss)]
    assert parts[0]["head"] == pytest.approx(fine * (conv + 15 * 256 / 1e9))
    assert parts[1]["head"] == pytest.approx(coarse * (8 * conv + 5 * branch))
    assert parts[2]["head"] == pytest.approx(coarse * (8 * conv + 6 * branch))
    laterals = (1024 * 128 + 256 * 256 + 64 * 512) * 256 / 1e9
    assert parts[1]["pyramid"] == pytest.approx(laterals + coarse * conv)
    for of in parts:
        assert of["whole"] == pytest.approx(of["body"] + of["pyramid"] + of["head"])
    assert atss["head_parameters"] - aligned["head_parameters"] == 9 * 256 + 1
    assert atss["parameters"] - aligned["parameters"] == 9 * 256 + 1
    steps = [cost["step_gmac"] for cost in (sparse, aligned, atss)]
    assert steps[0]["CPU"] < steps[0]["GPU"] < 3 * parts[0]["whole"]
    assert steps[1]["CPU"] == steps[1]["GPU"]
    assert steps[2]["GPU"] - steps[1]["GPU"] == pytest.approx(3 * coarse * branch)

    assert all(len(cost["rounds_ms"]) == 1 for cost in costs.values())
    shown = capsys.readouterr().out
    assert "\n| | faster_rcnn | task_aligned | atss |\n|---|---:|---:|---:|\n" in shown
    assert "\n| canvas, px | 192 x 256 | 256 x 256 | 256 x 256 |\n" in shown
    assert "\n| anchors | 12,276 | 1,364 | 1,364 |\n" in shown
    ms = [cost["ms"] for cost in costs.values()]
    assert all(of["whole"] > of["network"] > of["proposals"] > 0 for of in ms)
    assert f" | {ms[2]['whole']:.1f} |\n| network, ms | {ms[0]['network']:.1f} | " in shown


def test_what_is_typed_behind_a_method_is_for_it_alone(script: ModuleType, tmp_path: Path) -> None:
    args = argparse.Namespace(
        overrides=SETTINGS,
        methods=[
            "atss",
            "atss method.channels=8 method.num_convs=2",
            "thin one: atss method.channels=4",
        ],
        seeds=[3],
        output=tmp_path,
    )
    plain, narrow, labelled = script.plan(args)
    assert plain.cfg.method.channels is None
    assert (narrow.cfg.method.channels, narrow.cfg.method.num_convs) == (8, 2)
    assert narrow.cfg.method.assignment == "atss"
    assert plain.folder.name == "atss_3"
    assert narrow.folder.name == "atss_method.channels_8_method.num_convs_2_3"
    assert (labelled.method, labelled.folder.name) == ("thin one", "thin_one_3")
    assert labelled.cfg.method.channels == 4
    args.methods = ["atss", "atss: oln"]
    with pytest.raises(ConfigError, match="--methods: expected each once, got 'atss' again"):
        script.plan(args)
    for methods, message in (
        (["a+b: atss", "a-b: oln"], "'a-b' would share the folder .*a_b_3"),
        ([": atss"], "expected a method, or 'LABEL: METHOD KEY=VALUE ...', got ': atss'"),
        (["thin: "], "got 'thin: '"),
    ):
        args.methods = methods
        with pytest.raises(ConfigError, match=f"--methods: .*{message}"):
            script.plan(args)
    args.methods = ["atss seed=4"]
    with pytest.raises(ConfigError, match="seed: expected --seeds"):
        script.plan(args)


def test_methods_of_a_seed_start_alike_and_see_the_same(script: ModuleType) -> None:
    few = "dataset.shapes.train_images=50"
    assert sorted(script.METHODS) == groups()["method"]
    configs = [compose_run([f"method={method}", "seed=7", few]) for method in script.METHODS]
    models = [build_model(cfg) for cfg in configs]
    index, _ = open_split(configs[0], "train", "train")
    plans = []
    for cfg, model in zip(configs, models, strict=True):
        plans.append(build_planner(cfg, index, max(model.grid.strides)).plan(3).items)
        assert plans[-1] == plans[0]
        for section in ("dataset", "image", "augment", "schedule", "eval"):
            assert getattr(cfg, section) == getattr(configs[0], section)
        assert_close(
            model.backbone.body.state_dict(),
            models[0].backbone.body.state_dict(),
            rtol=0,
            atol=0,
        )


def write_run(folder: Path, ar: float, *, finished: bool = True) -> None:
    """What `rpn-train` leaves after 3 steps: AR@10 `ar`, AR@100 twice that, no large objects."""
    method, seed = folder.name.rsplit("_", 1)
    cfg = compose_run([*SETTINGS, f"method={method}", f"seed={seed}", f"output_dir={folder}"])
    figures: dict[str, Any] = {"step": 3}
    for size in SIZES:
        suffix = f"_{size}".replace("_all", "")
        for n, value in ((10, ar), (100, 2 * ar)):
            known = None if size == "large" else value
            figures[f"ar_{n}{suffix}"] = known
            figures |= {f"recall_{n}_{iou}{suffix}": known for iou in NAMED_IOUS}
    timing = [
        {"step": step, "train/images_per_s": s, "train/data_wait": 0.1, "train/memory_mb": 5 + step}
        for step, s in ((1, 0.5), (2, 4.0), (3, 5.0))
    ]
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_mapping(cfg)))
    (folder / "recall.json").write_text(json.dumps(figures))
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    (folder / "environment.json").write_text('{"device": "abacus", "commit": "f00"}')
    if finished:
        (folder / "finished").touch()


def test_table_of_runs(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four runs two are finished, one goes on and is, one begins and fails."""
    write_run(tmp_path / "retina_0", 0.2)
    write_run(tmp_path / "retina_1", 0.3, finished=False)
    write_run(tmp_path / "atss_0", 0.25)
    typed: list[list[str]] = []

    def command(of_run: list[str]) -> list[str]:
        typed.append(of_run)
        fails = "resume=auto" not in of_run
        return [sys.executable, "-c", "raise SystemExit('line\\nerror: no luck')" if fails else ""]

    monkeypatch.setattr(script, "command", command)
    arguments = [*SETTINGS, "--methods", "retina", "atss", "--seeds", "0", "1"]
    arguments += ["--output", str(tmp_path)]
    assert script.main(["train", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err == "atss_1: failed with exit code 1: error: no luck\n"
    assert [run[-1] for run in typed] == ["resume=auto", f"output_dir='{tmp_path / 'atss_1'}'"]
    assert typed[1][:-1] == [*SETTINGS, "method=atss", "seed=1"]
    assert (tmp_path / "retina_1" / "finished").exists()
    assert not (tmp_path / "atss_1" / "finished").exists()

    lines = (tmp_path / "methods.md").read_text().splitlines()
    table = dict(line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| "))
    assert lines[0] == "| | retina | atss |"
    assert table["seeds"] == "0, 1 | 0"
    assert table["AR@10"] == "0.2500 (0.2000 .. 0.3000) | 0.2500"
    assert table["recall@100, IoU .75"] == "0.5000 (0.4000 .. 0.6000) | 0.5000"
    assert table["AR@100, small"] == table["recall@100, IoU .75"]
    assert table["AR@100, large"] == "- | -"
    assert table["step, s"] == "2.000 | 2.000"  # 8 images at 4 in a second
    assert table["image, ms"] == "250.0 | 250.0"
    assert "3 steps of 8 images, resnet18_fpn, abacus, commit f00:" in "\n".join(lines)
    printed = shown.out.splitlines()
    assert [line.split()[0] for line in printed if line.startswith("AR@1")][:2] == [
        "AR@10",
        "AR@100",
    ]

    written = json.loads((tmp_path / "methods.json").read_text())
    assert [(run["method"], run["seed"]) for run in written["runs"]] == [
        ("retina", 0),
        ("atss", 0),
        ("retina", 1),
    ]
    expected = {"mean": 0.5, "lowest": 0.4, "highest": 0.6}
    assert written["methods"]["retina"]["ar_100"] == pytest.approx(expected)
    assert written["methods"]["atss"]["ar_100_large"]["mean"] is None
    assert written["runs"][0]["figures"]["memory_mb"] == 8
    assert np.ptp(np.array(Image.open(tmp_path / "methods.png"))) > 0


def test_figure_has_means_and_bands(script: ModuleType) -> None:
    values = {"mean": 0.5, "lowest": 0.4, "highest": 0.7}
    of = {f"ar_{n}{size}": values for n in (10, 99) for size in ("", "_small", "_medium")}
    nothing = dict.fromkeys(values, float("nan"))
    of |= {f"ar_{n}_large": nothing for n in (10, 99)}
    figure = script.curves({"atss": of, "retina": of}, (10, 99))
    panel, large = figure.axes[0], figure.axes[3]
    assert [line.get_label() for line in panel.lines] == ["atss", "retina"]
    assert panel.lines[0].get_xydata().tolist() == [[10, 0.5], [99, 0.5]]
    corners = panel.collections[0].get_paths()[0].vertices
    assert {(x, round(y, 6)) for x, y in corners.tolist()} == {
        *((10, 0.4), (99, 0.4), (10, 0.7), (99, 0.7))
    }
    assert [text.get_text() for text in large.texts] == ["no objects"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.steps=4"], r"atss_0 holds a run of other options \(schedule.steps: 3 -> 4\)"),
        (["seed=4"], "seed: expected --seeds to set it, got it among KEY=VALUE"),
    ],
)
def test_what_would_mix_runs_is_refused(
    script: ModuleType, tmp_path: Path, overrides: list[str], message: str
) -> None:
    write_run(tmp_path / "atss_0", 0.2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        script.main(["train", *SETTINGS, *overrides, "--output", str(tmp_path)])
    assert sorted(tmp_path.rglob("*")) == before
