"""rpn-eval and rpn-propose: what is written and scored is what is scored directly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from untrained import untrained_run

from rpn_train.cli import guarded
from rpn_train.cli_trained import _eval, _propose
from rpn_train.data.coco import read_coco
from rpn_train.data.files import index_files
from rpn_train.errors import DataError
from rpn_train.propose import logit

TYPED = [
    *["workers=0", "dataset.shapes.size=[64,96]", "image.short_side=64", "image.max_side=96"],
    *["dataset.shapes.val_images=5", "dataset.shapes.train_images=2", "device=cpu"],
]
DATA = [t for t in TYPED if t.startswith("dataset")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an untrained network."""
    return untrained_run(tmp_path_factory.mktemp("run"), TYPED)


@pytest.mark.parametrize("suffix", ["json", "npz", "pkl"])
def test_a_file_written_and_scored_has_the_figures_of_the_checkpoint(
    run: Path, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"p.{suffix}"
    limits = "eval.max_proposals=[10,100]"
    assert guarded(_eval, [f"checkpoint={run}", limits, f"output_dir={tmp_path}/direct"]) == 0
    assert guarded(_propose, [f"checkpoint={run}", f"output={file}"]) == 0
    typed = [*DATA, limits, f"output_dir={tmp_path}/file"]
    assert guarded(_eval, [f"proposals={file}", *typed]) == 0
    direct = json.loads((tmp_path / "direct" / "recall.json").read_text())
    assert direct.pop("step") == 0
    assert json.loads((tmp_path / "file" / "recall.json").read_text()) == direct
    assert direct["num_images"] == 5
    assert 0 < direct["ar_100"] < 1
    written = {p.name for p in (tmp_path / "file").iterdir()}
    assert written == {p.name for p in (tmp_path / "direct").iterdir()} - {"timing.json"}
    for name in ("recall_by_number.png", "recall_by_iou.png", "worst.png"):
        with Image.open(tmp_path / "file" / name) as picture:
            assert picture.size[0] > 600
    timing = json.loads((tmp_path / "direct" / "timing.json").read_text())
    assert min(timing["network_ms"], timing["proposals_ms"]) > 0
    for name in ("recall.md", "images.csv"):
        assert (tmp_path / "file" / name).read_text() == (tmp_path / "direct" / name).read_text()
    assert len((tmp_path / "file" / "images.csv").read_text().splitlines()) == 1 + 5


def test_files_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, top in (("few", 3), ("many", 50)):
        typed = [f"checkpoint={run}", f"output={tmp_path}/{name}.npz", f"top={top}"]
        assert guarded(_propose, typed) == 0
    both = f"proposals={{few: {tmp_path}/few.npz, many: {tmp_path}/many.npz}}"
    assert guarded(_eval, [both, *DATA, f"output_dir={tmp_path}"]) == 0
    figures = json.loads((tmp_path / "recall.json").read_text())
    assert figures["few"]["ar_1000"] < figures["many"]["ar_1000"]
    lines = (tmp_path / "recall.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines]
    assert names == ["proposals", "---", *["few"] * 5, *["many"] * 5]
    assert (tmp_path / "recall_by_number.png").is_file()
    assert (tmp_path / "images_few.csv").is_file()
    assert (tmp_path / "worst_many.png").is_file()
    printed = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/few.npz: 15 proposals, 5 images" in printed
    assert {"few", "many"} <= {*printed}


def test_images_of_a_folder_upright_with_pictures(run: Path, tmp_path: Path) -> None:
    """An image on its side, as EXIF says, gives boxes in the pixels of the upright one."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save(folder / "below" / "side.jpg", exif=exif)
    Image.fromarray(pixels).save(folder / "a.png")
    index = index_files(str(folder))
    assert [index.file_name(i) for i in range(2)] == ["a.png", "below/side.jpg"]
    assert index.sizes.tolist() == [[60, 100], [100, 60]]
    file, draw = tmp_path / "p.npz", tmp_path / "pictures"
    typed = [f"images={folder}", f"output={file}", f"draw={draw}", "top=20"]
    assert guarded(_propose, [f"checkpoint={run}", *typed]) == 0
    with np.load(file) as found:
        names = found["file_name_bytes"].tobytes().decode()
        side = found["boxes"][found["offsets"][1] : found["offsets"][2]]
        if names.startswith("below"):
            side = found["boxes"][: found["offsets"][1]]
    assert side[:, 2].max() <= 60.01
    assert side[:, 3].max() > 61
    with Image.open(draw / "below" / "side.jpg.png") as picture:
        assert picture.size[1] > picture.size[0]
    assert index_files(str(folder / "*.png")).file_name(0) == "a.png"
    with pytest.raises(DataError, match="expected a file, a folder or a glob"):
        index_files(str(folder / "*.bmp"))


def command(name: str, *typed: object) -> list[str]:
    """A command as a person starts it, of this environment."""
    return [sys.executable, "-m", "rpn_train", name, *map(str, typed)]


def test_two_processes_write_the_file_of_one(run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    typed = [f"checkpoint={run}", "dataset.shapes.val_images=7", "eval.batch_size=2"]
    assert guarded(_propose, [*typed, f"output={one}"]) == 0
    same_threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = command("propose", *typed, f"output={two}", "devices=2")
    subprocess.run(words, check=True, env=same_threads)
    assert two.read_bytes() == one.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one.npz", "two.npz"}


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_half_way_leaves_no_half_file(
    run: Path, tmp_path: Path, signal_number: signal.Signals
) -> None:
    output = tmp_path / "out" / "p.json"
    typed = [f"checkpoint={run}", "dataset.shapes.val_images=5000", "eval.batch_size=1"]
    started = subprocess.Popen(
        command("propose", *typed, f"output={output}"), stderr=subprocess.PIPE, text=True
    )
    while started.poll() is None and not any(
        path.stat().st_size for path in tmp_path.rglob("*.tmp")
    ):
        time.sleep(0.05)
    assert started.poll() is None  # it was at work
    started.send_signal(signal_number)
    try:
        _, said = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 128 + signal_number
    assert "Traceback" not in said
    assert list(output.parent.iterdir()) == []


def test_scoring_files_needs_no_images(
    run: Path, tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Annotations alone are enough; the pictures that cannot be drawn are named."""
    annotations = data_root / "coco_mini" / "annotations" / "instances_val2017.json"
    index = read_coco(annotations, tmp_path, categories=None, keep_empty=True)
    rows = [
        {"image_id": int(i), "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}
        for i in index.image_ids
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "nothing").mkdir()
    typed = ["dataset=coco", f"dataset.val.annotations={annotations}"]
    typed += [f"dataset.val.images={tmp_path / 'nothing'}", f"output_dir={tmp_path / 'out'}"]
    assert guarded(_eval, [f"proposals={tmp_path / 'p.json'}", *typed]) == 0
    assert "expected an image, got: No such file" in capsys.readouterr().out
    assert (tmp_path / "out" / "images.csv").is_file()
    assert not (tmp_path / "out" / "worst.png").exists()


def test_min_score(run: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.npz", tmp_path / "part.npz"
    guarded(_propose, [f"checkpoint={run}", f"output={whole}"])
    with np.load(whole) as found:
        median = float(np.median(found["logits"]))
        probability = float(torch.tensor(median, dtype=torch.float64).sigmoid())
        expected = int((found["logits"] >= logit(probability)).sum())
    guarded(_propose, [f"checkpoint={run}", f"output={part}", f"min_score={probability!r}"])
    with np.load(part) as found:
        assert abs(len(found["logits"]) - expected) <= 1  # the median itself may round either way


@pytest.mark.parametrize(
    ("command", "typed", "message"),
    [
        (_propose, ["output=a.npz"], "expected checkpoint=WHERE and output=FILE"),
        (
            _propose,
            ["checkpoint={run}", "output={tmp}/a.txt"],
            "expected a file of proposals in .json",
        ),
        (_propose, ["checkpoint={run}", "output={tmp}/a.npz", "top=0"], "top: expected at least 1"),
        (
            _propose,
            ["checkpoint={run}", "output={tmp}/a.npz", "nms=2"],
            "nms: expected at least 0, at most 1",
        ),
        (_propose, ["checkpoint={run}", "output={tmp}/a.npz", "images={tmp}/no"], "images: expec"),
        (_eval, [], "expected checkpoint=WHERE or proposals=FILE"),
        (_eval, ["proposals={tmp}/no.json"], "nothing at {tmp}/no.json"),
        (_eval, ["proposals={{../a: b.npz}}"], "proposals: expected names of letters, digits"),
        (_eval, ["proposals={{a"], "proposals: expected FILE or '{{name: FILE, ...}}'"),
    ],
)
def test_faults_are_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: object,
    typed: list[str],
    message: str,
) -> None:
    filled = [t.format(run=run, tmp=tmp_path) for t in typed]
    assert guarded(command, filled) == 2  # type: ignore[arg-type]
    fault = capsys.readouterr().err
    assert fault.startswith("error: ")
    assert fault.count("\n") == 1
    assert message.format(tmp=tmp_path) in fault
    assert not list(tmp_path.glob("a.*"))
