"""Fast R-CNN on proposals from files: its AP, what it looks at, and that it learns."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from rpn_train.compose import compose
from rpn_train.config import TrainConfig
from rpn_train.options import from_mapping
from rpn_train.proposal_files import NamedProposals, write_proposals
from rpn_train.shell import guarded

CPU = torch.device("cpu")
COLOURS = {"red": (230, 40, 30), "blue": (30, 50, 220)}
# Of each image the objects: class, x1, y1, x2, y2, difficult. The last one has none of its own.
TRAIN = [
    [("red", 4, 6, 24, 28, 0), ("blue", 40, 10, 66, 30, 0)],
    [("blue", 8, 20, 30, 44, 0)],
    [("red", 30, 4, 56, 30, 0), ("blue", 2, 8, 22, 36, 0)],
    [("red", 44, 18, 68, 42, 0)],
    [("red", 6, 14, 28, 40, 0), ("red", 36, 8, 62, 30, 0)],
    [("blue", 20, 12, 46, 38, 1)],
]
VAL = [
    [("blue", 10, 6, 34, 26, 0), ("red", 42, 16, 64, 40, 0)],
    [("red", 12, 10, 38, 36, 0), ("red", 44, 4, 62, 24, 1)],
]
SIZE = (47, 71)  # (height, width), resized to 40 x 60 and padded to 64 x 64


def write_voc(folder: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split, images in {"train": TRAIN, "val": VAL}.items():
        stems = [f"{split}{i}" for i in range(len(images))]
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems))
        for stem, objects in zip(stems, images, strict=True):
            pixels = np.full((*SIZE, 3), 128, np.uint8)
            lines = [f"<size><width>{SIZE[1]}</width><height>{SIZE[0]}</height></size>"]
            for name, x1, y1, x2, y2, difficult in objects:
                pixels[y1:y2, x1:x2] = COLOURS[name]
                corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
                box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners.items())
                more = f"<difficult>{difficult}</difficult><bndbox>{box}</bndbox>"
                lines.append(f"<object><name>{name}</name>{more}</object>")
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{stem}.png")
            text = f"<annotation>{''.join(lines)}</annotation>"
            (folder / "Annotations" / f"{stem}.xml").write_text(text)


def write_file(path: Path, images: list[list[Any]]) -> None:
    """The objects of each image, each moved by up to 3 px in four ways, and 30 boxes at random."""
    rng = np.random.default_rng(5)
    named = []
    for row, objects in enumerate(images):
        near = np.array([o[1:5] for o in objects for _ in range(4)], np.float32)
        near += rng.uniform(-3, 3, near.shape).astype(np.float32)
        corner = rng.uniform(0, 40, (30, 2))
        far = np.concatenate([corner, corner + rng.uniform(4, 30, (30, 2))], axis=1)
        boxes = np.concatenate([near, far.astype(np.float32)])
        logits = -np.arange(len(boxes), dtype=np.float32)
        named.append(NamedProposals(row + 1, f"{path.stem}{row}.png", boxes, logits))
    write_proposals(path, named)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "train_fast_rcnn.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC data set with proposals for it, train.npz and val.npz."""
    folder = tmp_path_factory.mktemp("colours")
    write_voc(folder)
    write_file(folder / "train.npz", TRAIN)
    write_file(folder / "val.npz", VAL)
    return folder


def overrides(folder: Path, steps: int) -> list[str]:
    return [
        "dataset=voc",
        f"dataset.root={folder}",
        "dataset.categories=[red,blue]",
        "image.short_side=40",
        "image.max_side=64",
        "schedule.batch_size=2",
        f"schedule.steps={steps}",
        "schedule.lr=0.05",
        "schedule.warmup=0.2",
        "log_every=5",
        "workers=0",
        "device=cpu",
    ]


def arguments(folder: Path, steps: int) -> list[str]:
    files = [f"--{split}-proposals={folder / split}.npz" for split in ("train", "val")]
    return [*overrides(folder, steps), *files]


def configured(folder: Path, steps: int) -> TrainConfig:
    return from_mapping(TrainConfig, compose(overrides(folder, steps)))


def test_classes_objects_and_proposals_of_a_split(script: ModuleType, folder: Path) -> None:
    split = script.open_classes(configured(folder, 1), "train", folder / "train.npz", 7)
    boxes, labels = split.objects(0)
    assert_close(boxes, torch.tensor([[4.0, 6, 24, 28], [40.0, 10, 66, 30]]))
    assert labels.tolist() == [1, 2]
    assert [len(split.objects(row)[1]) for row in range(6)] == [2, 1, 2, 1, 2, 0]  # difficult
    assert [len(of_image) for of_image in split.proposals] == [7] * 6
    with np.load(folder / "train.npz") as file:
        second = file["boxes"][file["offsets"][1] :][:7]
    assert_close(split.proposals[1], torch.from_numpy(second))

    moved = split.scattered(3)
    height, width = SIZE
    for before, after in zip(split.proposals, moved.proposals, strict=True):
        assert_close(after[:, 2:] - after[:, :2], before[:, 2:] - before[:, :2])
        assert (after - before).abs().amax(dim=1).min() > 0
        assert after.min() >= 0
        assert (after <= torch.tensor([width, height] * 2)).all()


def test_boxes_go_to_the_network_and_back(script: ModuleType, folder: Path) -> None:
    """The second stage gets all boxes in pixels of the resized image; detections are in stored."""
    cfg = configured(folder, 1)
    split = script.open_classes(cfg, "train", folder / "train.npz", 7)
    seen = []

    class Echo(torch.nn.Module):
        def forward(self, features: Any, proposals: Any, padded: Any, targets: Any) -> Any:
            seen.append((proposals, targets))
            ones = [torch.arange(len(boxes)) for boxes in proposals]
            echo = zip(proposals, ones, strict=True)
            return [{"boxes": b, "labels": 1 + o, "scores": 0.9 - o / 10} for b, o in echo], {}

    model = script.FastRCNN(script.build_model(cfg).backbone, 2)
    model.roi_heads = Echo()
    detections = script.detect(model, split, cfg, script.Ranks(0, 1, CPU))
    height, width = SIZE
    factor = torch.tensor([60 / width, 40 / height] * 2)
    limits = torch.tensor([width, height] * 2)
    fitting = [boxes.clamp(min=0).minimum(limits) for boxes in split.proposals]
    assert_close(seen[0][0][1], fitting[1] * factor)
    assert seen[0][1] is None
    expected = torch.cat(fitting)
    assert_close(detections[:, 0], torch.arange(6.0).repeat_interleave(7))
    assert_close(detections[:, 1:3], expected[:, :2])
    assert_close(detections[:, 3:5], expected[:, 2:] - expected[:, :2])
    assert_close(detections[:7, 5], 0.9 - torch.arange(7) / 10)
    assert_close(detections[:7, 6], torch.arange(1.0, 8))

    planner = script.build_planner(cfg, split.index, 64)
    batch = script.TrainBatches(split.index, split.read, planner, rank=0, world=1, accumulate=1)[0]
    model.train()(batch, split, CPU)
    for row, target in zip(batch.rows.tolist(), seen[-1][1], strict=True):
        boxes, labels = split.objects(row)
        assert_close(target, {"boxes": boxes * factor, "labels": labels})


def test_regions_are_pooled_at_the_strides_of_the_maps(script: ModuleType, folder: Path) -> None:
    """40 x 60 is padded to 64 x 64: the maps are more than a quarter of the image."""
    cfg = configured(folder, 1)
    split = script.open_classes(cfg, "val", folder / "val.npz", 7)
    model = script.FastRCNN(script.build_model(cfg).backbone, 2)
    script.detect(model, split, cfg, script.Ranks(0, 1, CPU))
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


PERFECT = [  # image, x, y, width, height, score, label
    [0, 10, 6, 24, 20, 0.8, 2],
    [0, 42, 16, 22, 24, 0.7, 1],
    [1, 12, 10, 26, 26, 0.6, 1],
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 1, 1]),
        # first of all, but of a difficult object: not counted
        ({3: [1, 44, 4, 18, 20, 0.9, 1]}, [1, 1, 1]),
        # 62 % of the blue one: right at IoU .5, .55 and .6
        ({0: [0, 10, 6, 24, 12.4, 0.8, 2]}, [(0.3 + 1) / 2, 1, 0.5]),
        # one of two red ones taken for blue, before the blue one
        ({2: [1, 12, 10, 26, 26, 0.9, 2]}, [(51 / 101 + 0.5) / 2] * 3),
    ],
)
def test_average_precision_by_hand(
    script: ModuleType, folder: Path, changes: dict[int, list[float]], expected: list[float]
) -> None:
    split = script.open_classes(configured(folder, 1), "val", folder / "val.npz", 7)
    rows = dict(enumerate(PERFECT)) | changes
    assert script.average_precision(split, torch.tensor([*rows.values()])) == pytest.approx(
        expected
    )
    assert script.average_precision(split, torch.zeros(0, 7)) == [0, 0, 0]


def test_it_learns_and_the_proposals_matter(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(script.main, [*arguments(folder, 10), "--control"]) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.rpartition("loss")[2]) for line in lines if "loss" in line]
    assert len(losses) == 4  # of two runs the mean of the first five steps and of the last
    assert losses[1] < 0.8 * losses[0]
    assert lines[-3].split() == ["boxes", "AP", "untrained", "AP", "AP50", "AP75"]
    (name, *figures), (control, *controls) = (line.split() for line in lines[-2:])
    assert (name, control) == ("proposals", "scattered")
    untrained, ap, ap50, _ = map(float, figures)
    assert ap > untrained + 0.2
    assert ap50 > 0.8
    assert ap > float(controls[1]) + 0.2


def test_proposals_of_the_other_split_are_one_line(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [*arguments(folder, 1), f"--train-proposals={folder / 'val.npz'}"]
    assert guarded(script.main, wrong) == 2
    error = capsys.readouterr().err
    assert error.endswith("val.npz: expected all train images, 4 are not in it\n")
    assert error.count("\n") == 1
