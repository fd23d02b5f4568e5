"""The benchmarks of the data side run, and their tables are what was measured."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import pytest

from rpn_train.data import index_cache


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.fixture
def index_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In this process alone, where the others would spend their time with imports."""
    script = load("benchmark_index")

    def run_here(*arguments: object) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            script.main([str(argument) for argument in arguments])
        return printed.getvalue()

    monkeypatch.setattr(script, "run_apart", run_here)
    monkeypatch.setattr(index_cache, "_MIN_BYTES", 1)
    return script


def test_reading_an_index(
    index_script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "index.json"
    index_script.main(["--images=3", "--boxes=7", "--points=5", "--repeats=2", f"--json={path}"])
    (result,) = json.loads(path.read_text())
    assert (result["images"], result["boxes"]) == (3, 7)
    assert result["readers"].keys() == set(index_script.READERS)
    assert result["cache_mb"] > 7 * 41 / 1e6  # bytes of a box
    printed = capsys.readouterr().out
    assert printed.startswith("3 images, 7 boxes: file 0.0 MB, cache 0.0 MB\n")
    assert f"second start{result['readers']['second start']['seconds']:12.4f}" in printed


def test_a_line_through_two_sizes(
    index_script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    index_script.main(["--boxes=120", "--points=0", "--repeats=1", "--extrapolate"])
    sizes = [line for line in capsys.readouterr().out.splitlines() if "file" in line]
    starts = ("2 images, 30 boxes", "8 images, 120 boxes", "1,700,000 images, 25,000,000 boxes")
    assert [line.split(":")[0] for line in sizes] == [*starts]
    assert sizes[-1].endswith(" (extrapolated)")
    small, large = (
        {"boxes": boxes, "file_mb": 1, "cache_mb": 0, "readers": {"r": {"seconds": seconds}}}
        for boxes, seconds in ((1_000_000, 3.0), (5_000_000, 5.0))  # 2.5 s and 0.5 s per million
    )
    line = index_script.extrapolate(small, large)
    assert line["readers"]["r"]["seconds"] == pytest.approx(2.5 + 0.5 * 25)


def test_making_samples(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    root = f"--root={data_root / 'coco_mini'}"
    sides = ["--short-side=97", "--max-side=131"]
    load("benchmark_data").main([root, "--images=4", *sides, f"--json={path}"])
    results = json.loads(path.read_text())["results"]
    ours, plain = results["ours"], results["float"]
    assert results["cached"]["decode"] == results["cached"]["resize"] == 0
    assert ours["to float"] == ours["normalise"] == 0 < plain["normalise"]
    assert min(ours["decode"], ours["resize"], ours["flip"], ours["pad"]) > 0
    printed = capsys.readouterr().out
    assert f"float / ours: {plain['median'] / ours['median']:.2f}\n" in printed
