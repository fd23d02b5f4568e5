"""One image followed through a network: the numbers drawn are those of training and proposing."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image
from torch.testing import assert_close
from torchvision.ops import nms
from untrained import untrained_run

import rpn_train
from rpn_train.anchors import grid_anchors
from rpn_train.build import assignment_rule, build_eval_batches, build_model
from rpn_train.cli import compose_run
from rpn_train.cli_inspect import _inspect
from rpn_train.config import TrainConfig
from rpn_train.curves import figure_to_image
from rpn_train.data.batch import make_batch
from rpn_train.data.files import index_images
from rpn_train.data.index import Index
from rpn_train.data.sampler import Item
from rpn_train.distributed import Ranks
from rpn_train.inspect import diagram, learning_figures, network_figures, proposal_figures
from rpn_train.inspect.panels import FORCED_ANCHOR, IGNORED_ANCHOR, OBJECT, POSITIVE_ANCHOR
from rpn_train.inspect.receptive_field import receptive_fields
from rpn_train.inspect.story import place, plates, story_page
from rpn_train.inspect.walk import Walk, walk
from rpn_train.method_targets import dense_targets
from rpn_train.model import RPN, normalize_images
from rpn_train.report import log_walk
from rpn_train.run_log import RunLog
from rpn_train.run_state import build_state
from rpn_train.shell import guarded
from rpn_train.splits import open_split
from rpn_train.targets import (
    BACKGROUND,
    IGNORED,
    POSITIVE,
    assign,
    assign_dense,
    random_keys,
    sample,
)

ROOT = Path(__file__).parents[1]
# 50 x 70 px are padded to 64 x 128: padding on both sides.
TYPED = [
    *["device=cpu", "workers=0", "dataset.shapes.size=[50,70]", "dataset.shapes.val_images=9"],
    *["image.short_side=50", "image.max_side=70", "proposals.test.pre_nms=60", "seed=3"],
    *["proposals.test.post_nms=2000", "method.num_samples=32"],
]
OF_TRUTH = {"assignment", "read"}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cfg() -> TrainConfig:
    return compose_run(TYPED)


@pytest.fixture(scope="module")
def model(cfg: TrainConfig) -> RPN:
    model = build_model(cfg)
    with torch.no_grad():  # spread, as after training
        model.rpn["head"].cls_logits.weight *= 30
        model.rpn["head"].bbox_pred.weight *= 10
    return model.eval()


@pytest.fixture(scope="module")
def index(cfg: TrainConfig) -> Index:
    return open_split(cfg, "val", "score")[0]


@pytest.fixture(scope="module")
def seen(model: RPN, cfg: TrainConfig) -> Walk:
    index, read = open_split(cfg, "val", "score")
    row = int(np.diff(index.box_offsets).argmax())
    return walk(model, index, read, row, cfg, truth=True, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("run"), TYPED)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = guarded(_inspect, arguments)
        return (code, *capsys.readouterr())

    return call


def drawn(figure: Figure, panel: int) -> dict[str, torch.Tensor]:
    """Boxes [n, 4] of a panel by their label."""
    found = {}
    for outlines in figure.axes[panel].collections:
        assert isinstance(outlines, PolyCollection)
        corners = np.stack([path.vertices[:4] for path in outlines.get_paths()])  # [n, 4, 2]
        boxes = np.concatenate([corners[:, 0], corners[:, 2]], axis=1)
        found[str(outlines.get_label())] = torch.from_numpy(boxes).float()
    return found


def test_the_walk_is_what_the_network_computes(seen: Walk, model: RPN) -> None:
    canvas = torch.zeros(1, 3, 64, 128, dtype=torch.uint8)
    canvas[0, :, :50, :70] = seen.image
    with torch.no_grad():
        outputs = model(normalize_images(canvas, torch.tensor([[50, 70]])))
    assert (seen.canvas, seen.size) == ((64, 128), (50, 70))
    close: dict[str, Any] = {
        "rtol": 1e-3,
        "atol": 1e-4,
    }  # another layout in memory rounds otherwise
    assert_close(seen.logits, outputs.logits[0], **close)
    assert torch.equal(seen.anchors, grid_anchors(model.grid, (64, 128), torch.device("cpu")))
    start = 0
    for i, (level, stride) in enumerate(zip(seen.levels, (4, 8, 16, 32, 64), strict=True)):
        rows, columns = 64 // stride, 128 // stride
        of_cells = outputs.logits[0, start : start + 3 * rows * columns].view(rows, columns, 3)
        assert_close(level.objectness, of_cells.amax(-1).sigmoid(), **close)
        last = start + 3 * rows * columns - 1
        assert seen.cell_of(last) == (i, rows - 1, columns - 1)
        x1, y1, x2, y2 = seen.anchors_at(i, rows - 1, columns - 1).unbind(1)
        assert_close((x1 + x2) / 2, torch.full((3,), (columns - 1.0) * stride))
        assert_close((y1 + y2) / 2, torch.full((3,), (rows - 1.0) * stride))
        start = last + 1
    body = [(64, 16, 32), (128, 8, 16), (256, 4, 8), (512, 2, 4)]
    assert (seen.shapes["body"], seen.shapes["hidden"][4]) == (body, (256, 1, 2))
    assert (seen.shapes["logits"][0], seen.shapes["deltas"][4]) == ((3, 16, 32), (12, 1, 2))


def test_the_model_stays_as_it_was(model: RPN, cfg: TrainConfig) -> None:
    index, read = open_split(cfg, "val", "score")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    try:
        first, second = (walk(model, index, read, 0, cfg, truth=True) for _ in range(2))
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(first.logits, second.logits)


def test_targets_are_those_of_training(seen: Walk, cfg: TrainConfig) -> None:
    truth = seen.truth
    assert truth is not None
    boxes, sizes = truth.boxes[None], torch.tensor([[50, 70]])
    valid = torch.ones(1, len(truth.boxes), dtype=torch.bool)
    rule = assignment_rule(cfg.method)
    labels, _ = assign(seen.grid, (64, 128), boxes, valid, ~valid, sizes, **rule)
    keys = random_keys(torch.tensor([5]), len(seen.anchors))
    picks = sample(labels, keys, num_samples=32, fg_fraction=0.5)
    assert torch.equal(truth.targets.labels, labels[0])
    positive, background = truth.targets.read_of
    assert torch.equal(positive, picks.at[picks.positive])
    assert len(positive) > 0
    assert len(background) == 32 - len(positive)

    left, right = (drawn(learning_figures.assignment_plate(seen).figure, i) for i in (0, 1))
    shown = torch.cat(
        [left[look.label] for look in (FORCED_ANCHOR, POSITIVE_ANCHOR) if look.label in left]
    )
    expected = seen.anchors[labels[0] == 1]
    assert_close(shown.sort(0).values, expected.sort(0).values)
    assert_close(right[IGNORED_ANCHOR.label], seen.anchors[labels[0] == -1])
    assert_close(left[OBJECT.label], truth.boxes)


def test_heat_reaches_over_the_whole_image(seen: Walk) -> None:
    """Each pixel has the colour of the cell whose anchors are centred nearest."""
    axes = learning_figures.objectness_plate(seen).figure.axes[5]  # stride 64, 1 x 2 cells
    (heat,) = axes.images
    assert [*heat.get_extent()] == [-32, 160, 96, -32]
    values = np.asarray(heat.get_array())
    np.testing.assert_allclose(values[:1, :2], seen.levels[4].objectness)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 70), (50, 0))


def test_proposals_are_those_of_the_proposer(folder: Path) -> None:
    proposer = rpn_train.load(folder)
    index, read = open_split(proposer.cfg, "val", "score")
    seen = walk(proposer.network, index, read, 2, proposer.cfg, truth=True)
    (expected,) = proposer.propose([read(2)])
    assert_close(seen.proposals.boxes, expected.boxes)
    assert torch.equal(seen.proposals.logits, expected.logits)
    rows = seen.behind(9)
    assert_close(seen.boxes[rows], expected.boxes[:9])
    assert torch.equal(seen.logits[rows], expected.logits[:9])


def test_nms_of_each_level(seen: Walk) -> None:
    kept = []
    for level in seen.levels:
        boxes, logits = level.candidates
        assert len(logits) <= min(60, level.logits.numel())
        keep = nms(boxes, logits, 0.7)
        assert torch.equal(level.kept.boxes, boxes[keep])
        kept.append(logits[keep])
    assert torch.equal(torch.cat(kept).sort(descending=True).values, seen.proposals.logits)
    assert sum(map(len, kept)) < sum(len(level.candidates.logits) for level in seen.levels)
    plate = proposal_figures.nms_plate(seen)
    before, after = (drawn(plate.figure, panel) for panel in (0, 1))
    assert sum(map(len, before.values())) == proposal_figures.CANDIDATES
    assert len(after["stays"]) == len(before["stays"])
    assert f"{len(seen.proposals.logits):,} of" in plate.text


def test_the_receptive_field_is_drawn_where_it_is(seen: Walk) -> None:
    fields = receptive_fields(build_model(seen.cfg))
    level, row, column = network_figures._focus(seen)
    field = fields[level]
    figure = network_figures.window_plate(seen, fields).figure
    ((x1, y1, x2, y2),) = drawn(figure, 2)[network_figures.FIELD.label].tolist()
    assert (y2 - y1, x2 - x1) == field.size
    y, x = row * field.stride + field.centre[0], column * field.stride + field.centre[1]
    assert ((y1 + y2) / 2, (x1 + x2) / 2) == (y, x)
    assert len(network_figures.window_plate(seen, None).figure.axes) == 2


@pytest.mark.parametrize(
    "typed", [[], ["backbone=resnet18_c4", "anchors=c4", "method.num_convs=2"]]
)
def test_the_diagram_has_no_two_boxes_in_one_place(typed: list[str]) -> None:
    cfg = compose_run([*TYPED, *typed])
    index, read = open_split(cfg, "val", "score")
    seen = walk(build_model(cfg), index, read, 0, cfg, truth=False)
    blocks = [*diagram._blocks(seen).values()]
    for i, one in enumerate(blocks):
        for other in blocks[:i]:
            apart_x = abs(one.x - other.x) >= (one.width + other.width) / 2
            assert apart_x or abs(one.y - other.y) >= (one.height + other.height) / 2
    figure = diagram.modules_plate(seen).figure
    renderer, page = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    for text in figure.axes[0].texts:
        box = text.get_window_extent(renderer)
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
    assert len(blocks) == (12 if len(seen.levels) > 1 else 11)


def test_an_image_of_the_split(run: Run, folder: Path, index: Index, tmp_path: Path) -> None:
    name = index.file_name(4)
    code, out, fault = run(f"checkpoint={folder}", f"image={name}", "split=val")
    assert (code, fault) == (0, "")
    written = folder / "inspect" / name
    page = (written / "image.md").read_text()
    pictures = {file.name for file in written.glob("*.png")}
    assert set(re.findall(r"\((\w+\.png)\)", page)) == pictures
    assert {f"{plate}.png" for plate in OF_TRUTH} < pictures
    assert str(written) in out
    assert "image.md" in out
    with Image.open(written / "objectness.png") as picture:
        assert picture.width == 1000


def test_a_file_has_no_truth(run: Run, folder: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = tmp_path / "a [1].png"
    Image.new("RGB", (90, 41), (90, 120, 60)).save(file, exif=exif)
    code, out, fault = run(f"checkpoint={folder}", f"image={file}", f"output_dir={tmp_path}")
    assert (code, fault) == (0, "")
    page = (tmp_path / "image.md").read_text()
    assert not {f"{name}.png" for name in OF_TRUTH} & {p.name for p in tmp_path.glob("*.png")}
    assert "its objects are not known" in page
    assert "its objects are not known" in out
    assert "90 x 41 px" in page  # upright


def test_a_path_into_the_split_is_of_the_split(run: Run, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (70, 50), (9, 120, 60)).save(tmp_path / "images" / "a.png")
    (tmp_path / "a.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "height": 50, "width": 70}], "categories": '
        '[{"id": 1, "name": "x"}], "annotations": [{"id": 1, "image_id": 1, "category_id": 1, '
        '"bbox": [5, 5, 30, 20], "iscrowd": 0}]}'
    )
    split = [f"dataset.val.images={tmp_path}/images", f"dataset.val.annotations={tmp_path}/a.json"]
    folder = untrained_run(tmp_path / "run", [*TYPED, "dataset=coco", "anchors=fpn_small", *split])
    code, out, _ = run(
        f"checkpoint={folder}", f"image={tmp_path}/images/../images/a.png", "split=val"
    )
    assert code == 0
    assert "not known" not in out
    (tmp_path / "a.json").unlink()  # the data is gone, the file is not
    code, out, _ = run(f"checkpoint={folder}", f"image={tmp_path}/images/a.png", "split=val")
    assert code == 0
    assert "not known" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["image=a.jpg"], "image: expected checkpoint=WHERE"),
        (["checkpoint={folder}", "image=gone.jpg"], "expected a file, or an image of the data"),
        (["checkpoint={folder}", "image={folder}"], "expected a file, or an image of the data"),
        (["checkpoint={folder}", "image={folder}/checkpoints/last.pt"], "readable"),
        (["checkpoint={folder}", "image=shapes_1000000", "split=val", "fit=true"], "neither fit"),
        (["checkpoint={folder}/gone", "image=a.jpg"], "checkpoint"),
    ],
)
def test_faults_are_one_line(run: Run, folder: Path, arguments: list[str], expected: str) -> None:
    code, _, fault = run(*(argument.format(folder=folder) for argument in arguments))
    assert code == 2
    assert fault.count("\n") == 1
    assert expected in fault


def test_an_image_without_objects_and_without_proposals(model: RPN, cfg: TrainConfig) -> None:
    read = open_split(cfg, "val", "score")[1]
    bare = index_images([(50, 70)])
    none = replace(cfg, proposals=replace(cfg.proposals, min_size=1e6))
    seen = walk(model, bare, lambda _: read(0), 0, none, truth=True)
    assert len(seen.proposals.logits) == len(seen.behind(3)) == 0
    names = [plate.name for plate in plates(seen, None)]
    assert set(names) > OF_TRUTH


@pytest.mark.parametrize("method", ["retina", "atss", "task_aligned"])
def test_targets_of_methods_that_read_every_anchor(method: str) -> None:
    cfg = compose_run([*TYPED, f"method={method}"])
    index, read = open_split(cfg, "val", "score")
    model = build_model(cfg).eval()
    seen = walk(model, index, read, 4, cfg, truth=True)
    assert seen.truth is not None
    targets = seen.truth.targets
    item = Item(4, (50, 70), flip=False, seed=0, photometric=False)
    batch = make_batch(index, read, [item], seen.canvas)
    with torch.no_grad():
        outputs = model(normalize_images(batch.images, batch.sizes))
    expected = dense_targets(model.grid, batch, outputs, cfg.method).labels[0]
    assert (expected == POSITIVE).any()
    assert torch.equal(targets.labels, expected)
    assert torch.equal(targets.read, (expected != IGNORED).nonzero()[:, 0])
    shown = {plate.name: plate for plate in plates(seen, None)}
    positive, background = targets.read_of
    assert len(background) == int((expected == BACKGROUND).sum())
    assert FORCED_ANCHOR.label not in drawn(shown["assignment"].figure, 0) or method == "retina"
    assert f"{len(positive):,} are positive" in shown["assignment"].text
    outlined = drawn(shown["read"].figure, 1)
    drawn_of = [boxes for label, boxes in outlined.items() if label != OBJECT.label]
    assert sum(map(len, drawn_of)) == min(len(background), learning_figures.DRAWN_READ)


def test_background_that_is_not_learned_is_not_read() -> None:
    cfg = compose_run([*TYPED, "method=oln", "method.learn_background=false"])
    index, read = open_split(cfg, "val", "score")
    seen = walk(build_model(cfg).eval(), index, read, 4, cfg, truth=True)
    assert seen.truth is not None
    positive, background = seen.truth.targets.read_of
    assert 0 < len(positive) <= 32
    assert len(background) == len(seen.truth.targets.rows(BACKGROUND)) == 0
    texts = {plate.name: plate.text for plate in plates(seen, None)}
    assert "is not learned as background" in texts["assignment"]
    assert "positive anchors alone, at most 32 random ones" in texts["read"]
    assert "to how central it is in its object; the deltas" in texts["read"]


def test_targets_of_a_cascade_are_those_of_the_moved_anchors() -> None:
    cfg = compose_run([*TYPED, "method=cascade"])
    index, read = open_split(cfg, "val", "score")
    model = build_model(cfg).eval()
    with torch.no_grad():
        model.rpn["head"].first_bbox_pred.weight *= 30
    seen = walk(model, index, read, 4, cfg, truth=True)
    assert seen.truth is not None
    assert torch.equal(seen.placed, grid_anchors(model.grid, seen.canvas, torch.device("cpu")))
    assert (seen.anchors - seen.placed).abs().amax() > 1
    boxes, valid = seen.truth.boxes[None], torch.ones(1, len(seen.truth.boxes), dtype=torch.bool)
    rule = assignment_rule(cfg.method)
    sizes = torch.tensor([seen.size])
    labels, _ = assign_dense(seen.anchors, boxes, valid, ~valid, sizes, **rule)
    assert torch.equal(seen.truth.targets.labels, labels[0])
    texts = {plate.name: plate.text for plate in plates(seen, None)}
    for name in ("window", "anchors", "assignment", "regression"):
        assert "first stage" in texts[name]
    assert "picked first" not in texts["modules"]


def test_the_walk_is_logged_of_the_first_image(cfg: TrainConfig) -> None:
    """The same pictures each time, from the averaged weights if there are some; nothing changes."""
    index, read = open_split(cfg, "val", "score")
    state = build_state(cfg, torch.device("cpu"))
    state.model.train()
    batches = build_eval_batches(cfg, index, read, 64, Ranks(0, 1, torch.device("cpu")))
    random_state = torch.get_rng_state()
    logged: list[tuple[str, int, torch.Tensor]] = []

    class Log:
        def image(self, tag: str, step: int, image: torch.Tensor) -> None:
            logged.append((tag, step, image))

    for _ in range(2):
        log_walk(cast(RunLog, Log()), state, batches, cfg, 1.0)
    name = index.file_name(0)
    assert [tag for tag, *_ in logged] == [f"objectness/{name}", f"read/{name}"] * 2
    assert torch.equal(logged[0][2], logged[2][2])
    assert torch.equal(logged[1][2], logged[3][2])
    assert logged[0][2].dtype == torch.uint8
    assert logged[0][2].shape[2] == 1000
    assert state.model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_targets_logged_are_those_of_that_part_of_the_run() -> None:
    cfg = compose_run([*TYPED, "method=task_aligned"])
    index, read = open_split(cfg, "val", "score")
    state = build_state(cfg, torch.device("cpu"))
    batches = build_eval_batches(cfg, index, read, 128, Ranks(0, 1, torch.device("cpu")))
    logged: list[torch.Tensor] = []
    log = cast(RunLog, SimpleNamespace(image=lambda tag, step, image: logged.append(image)))
    as_atss = replace(cfg.method, assignment="atss", objectness_target="label")
    for progress, as_method in ((0.3, as_atss), (0.4, cfg.method)):
        log_walk(log, state, batches, cfg, progress)
        then = replace(cfg, method=as_method)
        seen = walk(state.model, index, read, 0, then, truth=True, seed=cfg.seed)
        assert torch.equal(logged[-1], figure_to_image(learning_figures.read_plate(seen).figure))
    assert not torch.equal(logged[1], logged[3])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_how_it_works", ROOT / "scripts" / "make_how_it_works.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_in_the_repository_is_up_to_date(script: ModuleType) -> None:
    """If it is not: python scripts/make_how_it_works.py --links."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    links = re.findall(r"\[`([\w.]+)`\]\(\.\.(/src/[\w/]+\.py)#L(\d+)\)", page)
    assert len(links) > 10
    for name, file, line in links:
        start = (ROOT / file[1:]).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name.rpartition('.')[2]}\b", start), f"{file}#L{line}"
    assert script.with_new_links(page) == page
    assert script.with_new_links(page.replace("#L", "#L9")) == page
    pictures = re.findall(r"\((images/\w+\.png)\)", page)
    stored = [*(ROOT / "docs" / "images").iterdir()]
    assert sorted(pictures) == sorted(f"images/{file.name}" for file in stored)
    assert sum(file.stat().st_size for file in stored) < 1.5e6


def test_photos_make_no_page(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = untrained_run(tmp_path, [*TYPED, "dataset=voc", "dataset.root=gone"])
    assert script.main([str(folder)]) == 2
    assert "expected shapes" in capsys.readouterr().err
    assert script.main([]) == 2


def test_the_place_of_a_decorated_function() -> None:
    name, file, line = place(grid_anchors)
    assert (name, file) == ("anchors.grid_anchors", "anchors.py")
    source = (ROOT / "src" / "rpn_train" / file).read_text().splitlines()
    assert source[line - 1].startswith("def grid_anchors")
    page = story_page("T", ["lead"], [], str, str)
    assert page == "# T\n\nlead\n"
