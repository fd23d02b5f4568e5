"""`rpn_train.load` and `propose`: from Python, what the commands give."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from untrained import untrained_run

import rpn_train
from rpn_train.cli import guarded
from rpn_train.cli_trained import _propose
from rpn_train.errors import CheckpointError, DataError

TYPED = ["workers=0", "image.short_side=64", "image.max_side=96", "device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("run"), TYPED)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of different shapes, one on its side."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for name, size in (("a", (60, 100)), ("b", (90, 41)), ("c", (64, 64))):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
        image.save(folder / f"{name}.png", exif=exif if name == "a" else Image.Exif())
    return folder


def test_proposals_are_those_of_the_command(run: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.npz"
    assert guarded(_propose, [f"checkpoint={run}", f"images={pictures}", f"output={output}"]) == 0
    model = rpn_train.load(run)
    found = model.propose(sorted(pictures.iterdir()))
    with np.load(output) as file:
        names = file["file_name_bytes"].tobytes().decode()
        for place, name in enumerate("abc"):
            row = names.index(name) // len("a.png")
            mine = slice(*file["offsets"][row : row + 2])
            np.testing.assert_array_equal(found[place].boxes, file["boxes"][mine])
            np.testing.assert_array_equal(found[place].logits, file["logits"][mine])
    assert found[0].boxes[:, 3].max() > 60.01  # upright: 100 px high
    torch.testing.assert_close(found[0].scores, found[0].logits.sigmoid())


def test_files_arrays_tensors_and_pil_images_are_the_same(run: Path, pictures: Path) -> None:
    model = rpn_train.load(run, top=20)
    path = pictures / "b.png"
    with Image.open(path) as image:
        array = np.asarray(image)
        forms = [path, str(path), array, torch.from_numpy(array.copy()).permute(2, 0, 1), image]
        found = model.propose(forms)
    for other in found[1:]:
        assert torch.equal(other.boxes, found[0].boxes)
    assert len(found[0].boxes) == 20
    assert model.propose([]) == []


def test_faults(run: Path) -> None:
    model = rpn_train.load(str(run))
    for image in (np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 3)), torch.zeros(3, 4, 4), 7):
        with pytest.raises(DataError, match="image 1: expected a file, an RGB uint8 tensor"):
            model.propose([np.zeros((4, 4, 3), np.uint8), image])
    with pytest.raises(CheckpointError, match="got nothing at no_such_run"):
        rpn_train.load("no_such_run")


def test_the_package_is_light_until_it_is_used() -> None:
    """Scoring files takes numpy alone; torch takes seconds and 500 MB."""
    code = "import rpn_train.recall, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'train_it'"):
        rpn_train.train_it  # noqa: B018
