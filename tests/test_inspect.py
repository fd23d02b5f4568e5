"""rpn-inspect: the figures of a set made by hand, and all that it writes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from untrained import untrained_run

from rpn_train.anchors import AnchorGrid
from rpn_train.cli_inspect import PICTURES, InspectArguments, _inspect
from rpn_train.compose import compose, own_arguments
from rpn_train.config import AnchorsConfig, DataConfig, ImageConfig, TrainConfig
from rpn_train.data.coco import read_coco
from rpn_train.inspect.figures import best_iou_figure, reach_figure
from rpn_train.inspect.inspection import inspect_split
from rpn_train.inspect.level_figures import levels_figure
from rpn_train.inspect.split_summary import Fault, file_faults
from rpn_train.inspect.views import Views
from rpn_train.options import from_mapping
from rpn_train.shell import guarded

Run = Callable[..., tuple[int, str, str]]

# One level of stride 16 (VGG16) with square anchors of 16, 32 and 260 px, on images of 96 x 64 px.
BY_HAND = {
    "a.png": [
        [8, 8, 16, 16],  # is an anchor: IoU 1
        [12, 8, 16, 16],  # shares 12 x 16 px with the same one: 192 / (512 - 192) = 0.6
        [30, 28, 4, 8],  # inside the anchor at (32, 32): 32 / 256
        [88, 56, 16, 16],  # cut to 8 x 8 px, inside the anchor of 32 px at (80, 48): 64 / 1024
    ],
    "b.png": [[72, 8, 16, 16], [72, 8, 16, 16]],  # the same object twice, an anchor too
    "c.png": [],
}
TYPED = [
    *["dataset=coco", "anchors.sizes=[[16,32,260]]", "anchors.ratios=[1]"],
    *["image.short_side=64", "image.max_side=96"],
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of the command in this process."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = guarded(_inspect, [str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return call


def write_coco(root: Path, boxes: dict[str, list[list[float]]], **sizes: tuple[int, int]) -> Path:
    """A train split of images of 64 x 96 px; the files as given by stem, (height, width)."""
    images, annotations = [], []
    for image_id, (name, of_image) in enumerate(boxes.items(), start=1):
        images.append({"id": image_id, "file_name": name, "height": 64, "width": 96})
        for box in of_image:
            annotation = {"image_id": image_id, "category_id": 1, "bbox": box, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **annotation})
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for name in boxes:
        height, width = sizes.get(Path(name).stem, (64, 96))
        Image.new("RGB", (width, height), (90, 120, 60)).save(root / "train2017" / name)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BY_HAND with a box without extent, a crowd, and one file of another size."""
    root = write_coco(tmp_path_factory.mktemp("by_hand"), BY_HAND, b=(96, 64))
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    flat = {"id": 98, "image_id": 2, "category_id": 1, "bbox": [5, 5, 0, 9], "iscrowd": 0}
    crowd = {"id": 99, "image_id": 3, "category_id": 1, "bbox": [0, 0, 64, 64], "iscrowd": 1}
    content["annotations"] += [flat, crowd]
    path.write_text(json.dumps(content))
    return root


def test_a_set_made_by_hand(run: Run, by_hand: Path, tmp_path: Path) -> None:
    (tmp_path / "inspect.json").write_text("of a run before")
    code, page, fault = run(
        *TYPED, "backbone=vgg16", f"dataset.root={by_hand}", f"output_dir={tmp_path}"
    )
    assert (code, fault) == (0, "")
    told = json.loads((tmp_path / "inspect.json").read_text())

    data = told["data"]
    assert (data["images"], data["empty_images"]) == (3, 1)
    assert (data["objects"], data["ignored"], data["repeated"], data["over_border"]) == (6, 1, 1, 1)
    flat = {"count": 1, "first": "annotation 98 of image 'b.png'"}
    assert data["left_out"] == {"box without extent": flat}
    assert data["files_checked"] == 3
    assert data["files"] == {"of another size than annotated": {"count": 1, "first": "b.png"}}
    assert (data["objects_per_image"]["median"], data["objects_per_image"]["largest"]) == (2, 4)
    assert (data["side_px"]["median"], data["side_px"]["largest"]) == (16, 16)
    assert told["small"] == pytest.approx({"64": 2 / 6, "80": 2 / 6, "96": 2 / 6, "128": 1 / 6})

    everything = told["reach"]["area"]["all"]
    assert everything["mean_iou"] == pytest.approx((1 + 0.6 + 1 / 8 + 1 / 16 + 1 + 1) / 6)
    shares = [everything[k] for k in ("recall_iou50", "recall_iou70", "reached", "forced")]
    assert shares == pytest.approx([4 / 6, 3 / 6, 3 / 6, 3 / 6])
    assert told["reach"]["side"]["under 8 px"]["num_objects"] == 1
    assert told["reach"]["ratio"]["3:2 - 3:1"]["num_objects"] == 1

    # the second object loses its anchor to the first, in both images
    positives = told["positives"]
    assert (positives["images"], positives["per_image"]["median"]) == (2, (3 + 1) / 2)
    assert positives["per_image"]["largest"] == 3
    assert positives["objects_without"] == pytest.approx(2 / 6)

    (level,) = told["levels"]
    assert (level["stride"], level["best_for"], level["unused"]) == (16, 6, [[260, 1]])
    assert level["field_px"] == [228, 228]  # Ren et al. 2015, section 3.1
    assert level["out_of_sight"] == [[260, 260]]

    assert told["findings"] == [
        "left out: 1 x box without extent, first annotation 98 of image 'b.png'",
        "of 3 image files looked at: 1 x of another size than annotated, first b.png",
        "1 box (16.7 %) cut at the border of the image, over which they reach by more than 1 px; "
        "are they x, y, width, height?",
        "1 object with the very box of another of the same image",
        "50.0 % of the objects reach IoU 0.7 with an anchor, 50.0 % train only through their best "
        "one, 0.0 % not at all",
        "side under 8 px: of 1 object 0.0 % have an anchor of IoU 0.5 (of all 66.7 %)",
        "side 8 px - 16 px: of 1 object 0.0 % have an anchor of IoU 0.5 (of all 66.7 %)",
        "height : width 3:2 - 3:1: of 1 object 0.0 % have an anchor of IoU 0.5 (of all 66.7 %)",
        "33.3 % of the objects are under 16 px after resizing to a short side of 64 px; "
        "33.3 % at 80 px, 33.3 % at 96 px, 16.7 % at 128 px",
        "1 anchor of a cell best for no object: 260 px 1:1 on 16",
        "stride 16: 1 anchor larger than the 228 x 228 px that a cell sees, up to 260 x 260 px "
        "(height x width)",
    ]
    lines = page.splitlines()
    assert lines[1:12] == [f"  * {finding}" for finding in told["findings"]]
    assert max(map(len, lines[12:-1])) <= 100
    words = [" ".join(line.split()) for line in lines]
    assert "all 6 100.0 % 0.631 66.7 % 50.0 % 50.0 % 0.0 %" in words
    assert "16 16 32 260 260 x 260 6 6 - 16 1 of 3 228 x 228 ! -" in words
    check_files(tmp_path, {"data", "best_iou", "reach_by_size", "levels", "montage"})


def check_files(folder: Path, names: set[str]) -> None:
    """Every picture is there, legible, and shown in inspect.md."""
    assert {p.stem for p in folder.glob("*.png")} == names
    markdown = (folder / "inspect.md").read_text()
    for name in names:
        assert f"![{PICTURES[name]}]({name}.png)" in markdown
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
            assert len(np.unique(picture.convert("L"))) > 4


def test_drawn_shapes_with_anchors_fitted_and_fields_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["dataset.shapes.train_images=40", "dataset.shapes.size=[64,96]"]
    typed += ["image.short_side=64", "image.max_side=96"]
    code, page, fault = run(*typed, "fit=true", "effective=true", "pictures=4")
    assert (code, fault) == (0, "")
    folder = tmp_path / "shapes_train_inspect"
    check_files(folder, {*PICTURES})
    told = json.loads((folder / "inspect.json").read_text())
    assert told["data"]["files_checked"] == 0  # they are drawn
    before, after = told["fit"]["before"]["all"], told["fit"]["after"]["all"]
    assert before == told["reach"]["area"]["all"]
    assert after["mean_iou"] > before["mean_iou"] + 0.05
    for level in told["levels"]:
        assert 0 < level["effective_px"] < level["field_px"][0]

    written = yaml.safe_load((folder / "anchors_fitted.yaml").read_text())
    anchors = from_mapping(AnchorsConfig, written)
    assert [list(sizes) for sizes in anchors.sizes] == told["fit"]["sizes"]
    # what is printed is what may be typed
    (overrides,) = [x.split() for x in page.splitlines() if x.startswith("  anchors.sizes=")]
    composed = from_mapping(TrainConfig, compose([x.replace("'", "") for x in overrides]))
    assert replace(anchors, strides=None) == composed.anchors


def test_a_split_without_objects_and_without_files(run: Run, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "empty", {"a.png": [], "b.png": []})
    shutil.rmtree(root / "train2017")
    typed = [*TYPED, "backbone=resnet18_c4", f"dataset.root={root}", f"output_dir={tmp_path}"]
    code, page, _ = run(*typed)
    assert code == 0
    missing = root / "train2017" / "a.png"
    assert page.splitlines()[1:4] == [
        "  * of 2 image files looked at: 2 x missing, first a.png",
        "  * there is no object",
        "  * 3 anchors of a cell best for no object: 16 px 1:1 on 16, 32 px 1:1 on 16, 260 px 1:1 "
        "on 16",
    ]
    assert f"  * montage.png is not drawn: {missing}: expected an image, got: No such file" in page
    assert {p.name for p in tmp_path.glob("*.png")} == {"levels.png"}
    assert "nan" not in page + (tmp_path / "inspect.md").read_text()
    told = json.loads((tmp_path / "inspect.json").read_text(), parse_constant=pytest.fail)
    assert told["data"]["side_px"]["median"] is None
    fault = "inspect.fit: expected at least one object with an extent, got none"
    assert run(*typed, "fit=true")[::2] == (2, f"error: {fault}\n")


def test_of_a_checkpoint_the_configuration_is_inspected(run: Run, tmp_path: Path) -> None:
    typed = ["dataset.shapes.size=[64,64]", "dataset.shapes.val_images=3", "image.short_side=64"]
    typed += ["image.max_side=96", "anchors.ratios=[1,3]", "device=cpu"]
    folder = untrained_run(tmp_path / "run", typed)
    code, page, _ = run(f"checkpoint={folder}", "split=val", "pictures=0", "method.fg_iou=0.6")
    assert code == 0
    told = json.loads((folder / "inspect" / "inspect.json").read_text())
    assert (told["split"], told["data"]["images"], told["ratios"]) == ("val", 3, [1, 3])
    assert told["fg_iou"] == 0.6
    assert "IoU .7  IoU 0.6" in page
    assert not (folder / "inspect" / "montage.png").exists()


def test_figures_show_what_was_counted(tmp_path: Path) -> None:
    boxes = [[8, 8, 16, 16]] * 5 + [[12, 8, 16, 16], [30, 30, 4, 4]]
    root = write_coco(tmp_path, {"a.png": boxes})
    path = root / "annotations" / "instances_train2017.json"
    index = read_coco(path, root, categories=None, keep_empty=True)
    cfg = TrainConfig(image=ImageConfig(64, 96))
    grid = AnchorGrid(((16.0,), (32.0,)), (1.0,), (8, 16), True)
    inspection = inspect_split(
        index, grid, Views(None, None), cfg, split="train", fit=False, files_checked=0, files={}
    )
    # the anchor of 16 px has the first five, and shares 12 x 16 px with the next; that of 32 px
    # holds 16 x 16 px of each; what is in a bin with fewer than five objects is not drawn
    means, shares, _, _ = reach_figure(inspection).axes
    others = {"stride 8": (5 + 0.6) / 6, "stride 16": 0.25}
    for axes, expected in (
        (means, {"all levels": (5 + 0.6) / 6, **others}),
        (shares, {"all levels": 5 / 6, "stride 8": 5 / 6, "stride 16": 0.0}),
    ):
        drawn = {x.get_label(): x.get_xydata() for x in axes.lines if len(x.get_xydata()) == 1}
        assert {name: y for name, ((_, y),) in drawn.items()} == pytest.approx(expected)
        assert drawn["stride 8"][0, 0] == pytest.approx(16 * 2**0.25)  # middle of 16 and 22.6 px
    (axes,) = best_iou_figure(inspection).axes
    bars = {round(bar.get_x(), 3): bar.get_height() for bar in axes.patches if bar.get_height()}
    assert bars == pytest.approx({0.05: 100 / 7, 0.6: 100 / 7, 0.975: 500 / 7})
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "forced: the best anchors alone train: 28.6 %",
        "positive: IoU 0.7 or more: 71.4 %",
    ]
    assert levels_figure(inspection).axes[0].get_legend_handles_labels()[1].count("anchors") == 2


@pytest.mark.parametrize(
    ("typed", "message"),
    {
        "fit=perhaps": "fit: expected true | false, got 'perhaps'",
        "split=test": "split: expected 'train' | 'val', got 'test'",
        "pictures=-1": "pictures: expected at least 0, got -1",
        "dataset=coco": (
            "dataset.root: expected a folder in coco layout (or dataset.train.images and "
            "dataset.train.annotations), got null"
        ),
        "checkpoint=torchvision:fasterrcnn_resnet5_fpn": "torchvision:",
        "fits=true": "fits: unknown key; rpn-train --help lists the keys",
    }.items(),
)
def test_faults_are_one_line(run: Run, typed: str, message: str) -> None:
    code, page, fault = run(typed)
    assert (code, page) == (2, "")
    assert fault.startswith(f"error: {message}")
    assert fault.count("\n") == 1


def test_arguments_of_its_own_come_once() -> None:
    own, others = own_arguments(InspectArguments, ["fit=true", "files=5", "checkpoint=1", "seed=3"])
    assert own == InspectArguments(fit=True, files=5, checkpoint="1")
    assert others == ["seed=3"]


def test_headers_tell_what_training_could_not_read(tmp_path: Path) -> None:
    names = ["good.jpg", "gone.png", "text.png", "deep.png", "turned.png", "other.bmp", "gif.gif"]
    root = write_coco(tmp_path, {name: [] for name in names}, turned=(96, 64))
    folder = root / "train2017"
    (folder / "gone.png").unlink()
    (folder / "text.png").write_text("no image")
    Image.fromarray(np.zeros((64, 96), np.uint16)).save(folder / "deep.png")
    index = read_coco(
        root / "annotations" / "instances_train2017.json",
        folder,
        categories=None,
        keep_empty=True,
    )
    data = DataConfig(max_pixels=64 * 96)
    assert file_faults(index, range(len(index)), data) == {
        "not readable": Fault(2, "text.png"),
        "missing": Fault(1, "gone.png"),
        "of another size than annotated": Fault(1, "turned.png"),
    }
    assert file_faults(index, [], data) == {}
    larger = file_faults(index, range(len(index)), DataConfig(max_pixels=64 * 96 - 1))
    assert larger["of too many pixels"] == Fault(4, "good.jpg")


@pytest.mark.parametrize(
    ("method", "note"),
    [("cascade", "no first stage has moved"), ("atss", "atss chooses otherwise"), ("retina", "")],
)
def test_shares_are_of_methods_that_assign_these_anchors_by_iou(
    run: Run, method: str, note: str, tmp_path: Path
) -> None:
    code, out, fault = run(
        *["dataset=shapes", "dataset.shapes.train_images=20", "anchors.sizes=[[16]]"],
        *["anchors.ratios=[1]", f"method={method}", f"output_dir={tmp_path}"],
    )
    assert (code, fault) == (0, "")
    assert note in out
    by_iou = method == "retina"
    assert ("train only through their best one" in out) == by_iou
    assert ("positive anchors per image" in out) == by_iou
    assert "than are sampled" not in out
