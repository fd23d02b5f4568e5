"""The commands as a person meets them: one line for each fault, and what was typed is what runs."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rpn_train import checkpoint, cli, cli_trained, shell
from rpn_train.build import build_model
from rpn_train.compose import groups, lay_over, parse, readable, sweep_values
from rpn_train.config import TrainConfig
from rpn_train.errors import ConfigError
from rpn_train.options import from_mapping, to_mapping, walk
from rpn_train.report import record_run
from rpn_train.run_log import write_yaml

TINY = {  # a network that is built in a moment, on images that are drawn in one
    "dataset.shapes.size": [64, 64],
    "dataset.shapes.train_images": 2,
    "dataset.shapes.val_images": 3,
    "image.short_side": 64,
    "image.max_side": 64,
    "eval.max_proposals": [10, 100],
    "workers": 0,
}
TYPED = [f"{key}={json.dumps(value).replace(' ', '')}" for key, value in TINY.items()]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of a command in this process: starting one costs seconds."""

    def call(
        command: Callable[[Sequence[str]], int], *arguments: str | Path
    ) -> tuple[int, str, str]:
        code = cli.guarded(command, [str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Path]]:
    """The runs that would have taken place."""
    taken: list[tuple[TrainConfig, Path]] = []
    monkeypatch.setattr(cli, "_run", lambda cfg, folder: taken.append((cfg, folder)) or 0)
    return taken


def write_coco(root: Path, images: list[dict[str, Any]]) -> None:
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        content = {"images": images, "annotations": [], "categories": []}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


# Faults of what was typed, before anything is done

ANCHORS = "'c4' | 'fpn' | 'fpn_half' | 'fpn_small' | 'paper'"
NEITHER = "expected KEY=VALUE or GROUP=CHOICE, got {!r}; rpn-train --help lists them"

FAULTS = {
    "lr=0.1": "lr: unknown key; did you mean 'schedule.lr'?",
    "schedule.lrr=0.1": "schedule.lrr: unknown key; did you mean 'schedule.lr'?",
    "hydra.run.dir=x": "hydra.run.dir: unknown key; rpn-train --help lists the keys",
    "anchors=foo": f"anchors: expected {ANCHORS}, got 'foo'",
    "anchors=fpn_smal": f"anchors: expected {ANCHORS}, got 'fpn_smal' (did you mean 'fpn_small'?)",
    "anchors=[32,64]": f"anchors: expected {ANCHORS}, got [32, 64]",
    "anchors=null": f"anchors: expected {ANCHORS}, got None",
    "seed": NEITHER.format("seed"),
    "--foo": NEITHER.format("--foo"),
    "+seed=1": NEITHER.format("+seed=1"),
    "~seed": NEITHER.format("~seed"),
    "dataset@x=coco": NEITHER.format("dataset@x=coco"),
    "dataset.categories=[a": NEITHER.format("dataset.categories=[a"),
    "seed=": "seed: expected integer, got ''",
    "seed=1.5": "seed: expected integer, got 1.5",
    "dataset.train=coco": "dataset.train: expected a group of keys, got 'coco'",
    "seed=0,1": (
        "seed: expected one value, got several: 'seed=0,1'; rpn-train -m makes a run of each, "
        "quotes within quotes make one value of them"
    ),
    "resume=auto": "resume=auto: expected output_dir=FOLDER of the run to go on with",
    "eval.max_proposals=[10]": (
        "eval.max_proposals: expected 100 among them (best.pt is that of the best AR@100), got 10"
    ),
}


@pytest.mark.parametrize(("typed", "message"), FAULTS.items())
def test_what_cannot_be_typed(run: Run, runs: list[Any], typed: str, message: str) -> None:
    assert run(cli._train, typed) == (2, "", f"error: {message}\n")
    assert runs == []


def test_an_unknown_backbone_either_way(run: Run, tmp_path: Path) -> None:
    code, _, fault = run(cli._train, "backbone=vgg19")
    assert code == 2
    assert fault.startswith("error: backbone: expected 'convnext_tiny_fpn' | ")
    assert fault.endswith("'vgg16' | 'timm:<name>', got 'vgg19' (did you mean 'vgg16'?)\n")
    code, _, fault = run(cli._train, *TYPED, "backbone.name=vgg19", f"output_dir={tmp_path}")
    assert code == 2
    assert fault.startswith("error: backbone.name: expected 'resnet18_fpn' | ")
    assert fault.endswith("'timm:<name>', got 'vgg19' (did you mean 'vgg16'?)\n")
    assert fault.count("\n") == 1


def test_processes_and_pieces_divide_the_batch(run: Run, runs: list[Any]) -> None:
    assert run(cli._train, "devices=3", "device=cpu", "schedule.batch_size=16") == (
        2,
        "",
        "error: schedule.batch_size: expected a multiple of 3 processes x schedule.accumulate = 1, "
        "got 16\n",
    )


def test_gpus_that_are_not_there(
    run: Run, runs: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "error: device: expected a GPU for 'cuda', found none; device=cpu needs none\n"
    assert run(cli._train, "device=cuda") == (2, "", expected)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expected = "error: devices: expected at most 2, the GPUs here, got 3\n"
    assert run(cli._train, "devices=3") == (2, "", expected)


# Faults that come to light when the run starts


def test_faults_of_the_data(run: Run, tmp_path: Path) -> None:
    """And none of them leaves a run behind: the command can be typed again."""
    root, folder = tmp_path / "coco", tmp_path / "run"

    def fault(*typed: str) -> str:
        code, out, err = run(cli._train, "dataset=coco", *typed, f"output_dir={folder}")
        assert code == 2
        assert out == f"run       {folder}\n"
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not folder.exists()
        return err.removeprefix("error: ").strip().replace(str(root), "ROOT")

    assert fault() == (
        "dataset.root: expected a folder in coco layout (or dataset.train.images and "
        "dataset.train.annotations), got null"
    )
    there = f"dataset.root={root}"
    assert fault(there) == "dataset.root: expected a folder, got nothing at ROOT"
    root.mkdir()
    assert fault(there) == "expected a folder of images, got nothing at ROOT/train2017"
    (root / "train2017").mkdir()
    annotations = "ROOT/annotations/instances_train2017.json"
    assert fault(there) == f"expected a COCO annotation file, got nothing at {annotations}"
    (root / "train2017").rmdir()
    write_coco(root, [])
    assert fault(there) == f"expected at least one image, got none: {annotations}"
    assert fault(there, "dataset.train.split=null") == (
        "dataset.train.split: expected the name of a split, got null"
    )


def test_a_voc_split_that_is_not_there(run: Run, tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "val.txt").touch()
    typed = ["dataset=voc", f"dataset.root={tmp_path}", f"output_dir={tmp_path / 'run'}"]
    code, _, fault = run(cli._train, *typed)
    assert code == 2
    assert fault == (
        f"error: expected a list of images, got nothing at {lists / 'train.txt'}; "
        "splits there: val\n"
    )


def test_anchors_of_another_number_of_levels(run: Run, tmp_path: Path) -> None:
    """As with backbone=vgg16, which takes longer to build."""
    folder = tmp_path / "run"
    code, _, fault = run(cli._train, *TYPED, "backbone=resnet18_c4", f"output_dir={folder}")
    assert code == 2
    assert fault == (
        "error: anchors.sizes: 5 level(s) given, backbone resnet18_c4 has 1 (strides 16); "
        "anchors=c4 or anchors=paper fits\n"
    )


def test_output_dir(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(cli, "train", lambda cfg, folder, ranks: None)
    assert run(cli._train, f"output_dir={folder}") == (0, f"run       {folder}\n", "")
    assert not folder.exists()  # nothing has been trained
    folder.mkdir()
    assert run(cli._train, f"output_dir={folder}")[0] == 0
    assert os.listdir(folder) == ["lock"]  # the folder was there
    monkeypatch.setattr(cli, "train", lambda cfg, *rest: record_run(folder, cfg, rest[-1]))
    folder = tmp_path / "other"
    for _ in range(2):  # the second time it holds no figure yet
        assert run(cli._train, f"output_dir={folder}") == (0, f"run       {folder}\n", "")
    assert sorted(os.listdir(folder)) == ["config.yaml", "environment.json", "lock"]
    assert json.loads((folder / "environment.json").read_text())["processes"] == 1
    (folder / "metrics.jsonl").touch()
    holds = (
        f"error: output_dir: {folder} holds a run already; give resume=auto to go on with it, or "
        "another folder\n"
    )
    assert run(cli._train, f"output_dir={folder}") == (2, "", holds)
    file = tmp_path / "file"
    file.touch()
    for path, reason in ((file, "File exists"), (file / "below", "Not a directory")):
        expected = f"error: output_dir: expected a folder to write to, got {path}: {reason}\n"
        assert run(cli._train, f"output_dir={path}") == (2, "", expected)


def test_nothing_to_resume(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    typed = ["resume=auto", f"output_dir={folder}"]
    expected = (
        f"error: resume=auto: expected a run in {folder}, got no config.yaml there; "
        "leave resume out to start one\n"
    )
    assert run(cli._train, *typed) == (2, "", expected)
    folder.mkdir()
    for content in ("", "just text", "a: [", "\x00"):
        (folder / "config.yaml").write_text(content)
        expected = f"error: {folder / 'config.yaml'}: expected the configuration of a run, got "
        assert run(cli._train, *typed) == (2, "", f"{expected}another file\n")


def test_a_refused_resume_leaves_the_run_as_it_was(run: Run, tmp_path: Path) -> None:
    save_run(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    typed = ["resume=auto", f"output_dir={tmp_path}", "backbone=resnet34_fpn"]
    code, _, fault = run(cli._train, *typed)
    assert code == 2
    assert fault.startswith("error: backbone.name: resnet18_fpn -> resnet34_fpn: ")
    assert (tmp_path / "config.yaml").read_text() == before


def test_exit_codes(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "train", lambda cfg, folder, ranks: 15)
    assert run(cli._train, f"output_dir={tmp_path}")[0] == 128 + 15

    def interrupted(arguments: Sequence[str]) -> int:
        raise KeyboardInterrupt

    def faulty(arguments: Sequence[str]) -> int:
        raise ZeroDivisionError

    assert run(interrupted) == (130, "", "interrupted\n")
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        run(faulty)


def test_the_installed_command(tmp_path: Path) -> None:
    """In a process of its own: exit code 2, one line, no traceback, nothing left behind."""
    command = Path(sysconfig.get_path("scripts")) / "rpn-train"
    done = subprocess.run(
        [sys.executable, command, "schedule.lr=fast"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: schedule.lr: expected number, got 'fast'\n"
    assert list(tmp_path.iterdir()) == []


# What was typed is what runs


def test_help_lists_every_key_and_choice(run: Run) -> None:
    code, page, fault = run(cli._train, "dataset=nonsense", "--help")
    assert (code, fault) == (0, "")
    for key, *_ in walk(TrainConfig):
        assert page.count(f"\n  {key}=") == 1, key
    for group, choices in groups().items():
        assert f"\n  {group}={', '.join(choices)}\n" in page
    assert "  augment.flip=0.5\n      probability of a horizontal flip (number, at least 0," in page
    assert "  anchors.sizes=[[32.0], [64.0], [128.0], [256.0], [512.0]]\n" in page
    code, page, fault = run(cli_trained._eval, "--help")
    assert (code, fault) == (0, "")
    assert page.startswith("usage: rpn-eval checkpoint=")


def test_config_prints_what_composes_back(run: Run, tmp_path: Path) -> None:
    typed = ["dataset=coco", f"dataset.root={tmp_path}", "schedule=1x", "schedule.weight_decay=0"]
    code, page, fault = run(cli._train, "--config", *typed)
    assert (code, fault) == (0, "")
    cfg = from_mapping(TrainConfig, yaml.safe_load(page))
    assert cfg == cli.compose_run(typed)
    assert cfg.dataset.root == str(tmp_path)
    assert cfg.schedule.weight_decay == 0.0


def test_typed_keys_and_groups_reach_the_configuration() -> None:
    cfg = cli.compose_run(
        [
            "dataset=coco",
            "dataset.root=/data/coco",
            "dataset.categories=[person,dining table]",
            "anchors.sizes=[[8,12.5],[16,24]]",
            "anchors.ratios=[1]",
            "schedule.lr=1e-3",
            "backbone.weights=null",
            "schedule=2x",
            "name=2007",
        ]
    )
    assert (cfg.dataset.format, cfg.dataset.root) == ("coco", "/data/coco")
    assert cfg.dataset.train.split == "train2017"
    assert cfg.dataset.categories == ("person", "dining table")
    assert cfg.anchors.sizes == ((8.0, 12.5), (16.0, 24.0))
    assert cfg.anchors.ratios == (1.0,)
    assert (cfg.schedule.lr, cfg.schedule.epochs) == (0.001, 24.0)
    assert cfg.backbone.weights is None
    assert cfg.name == "2007"


@pytest.mark.parametrize(
    ("typed", "root"),
    [
        ("/data/a b", "/data/a b"),
        ("/data/a=b", "/data/a=b"),
        ("/data/Bilder (für uns)", "/data/Bilder (für uns)"),
        ("it's", "it's"),
        ("'a,b'", "a,b"),
        ("~/coco", str(Path.home() / "coco")),
        ("2007", "2007"),
        ("null", None),
    ],
)
def test_paths_need_no_quotes(runs: list[Any], typed: str, root: str | None) -> None:
    """What is a path for the shell is one here, except for a comma."""
    assert cli._train([f"dataset.root={typed}"]) == 0
    assert runs[0][0].dataset.root == root


def test_shapes_bring_what_suits_them_and_a_typed_group_takes_its_place() -> None:
    plain, other = cli.compose_run([]), cli.compose_run(["anchors=fpn", "schedule=1x"])
    assert (plain.dataset.format, plain.image.short_side) == ("shapes", 128)
    assert plain.anchors.sizes[0] == (8.0,)
    assert other.anchors.sizes[0] == (32.0,)
    assert other.schedule.epochs == 12
    coco = cli.compose_run(["dataset=coco"])
    assert coco.image == TrainConfig().image
    assert coco.anchors == TrainConfig().anchors


@pytest.mark.parametrize("group", ["anchors", "dataset", "experiment", "method", "schedule"])
def test_every_choice_composes_to_something_of_its_own(group: str) -> None:
    """Backbones are networks by name: test_config has them."""
    configs = [cli.compose_run([f"{group}={choice}"]) for choice in groups()[group]]
    assert all(cfg not in configs[:i] for i, cfg in enumerate(configs))


def test_an_experiment_is_a_whole_configuration() -> None:
    cfg = cli.compose_run(["experiment=voc07_vgg16_paper", "dataset.root=VOC2007", "seed=3"])
    assert (cfg.dataset.format, cfg.dataset.val.split) == ("voc", "test")
    assert (cfg.backbone.name, cfg.backbone.frozen_stages) == ("vgg16", 2)
    assert cfg.anchors.sizes == ((128.0, 256.0, 512.0),)
    assert (cfg.image.short_side, cfg.schedule.batch_size, cfg.seed) == (600, 1, 3)
    assert cfg.dataset.root == "VOC2007"


def test_a_network_of_timm() -> None:
    assert cli.compose_run(["backbone=timm:efficientnet_b0"]).backbone.name == (
        "timm:efficientnet_b0"
    )


def test_default_folder(run: Run, runs: list[Any]) -> None:
    run(cli._train, "name=mine")
    assert runs[0][1].parent == Path("runs")
    assert runs[0][1].name.endswith("_mine")


def test_several_processes_are_started_with_what_was_typed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    ranks: list[tuple[str, ...]] = []

    class Started:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            commands.append(command)
            ranks.append((env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]))
            assert int(env["OMP_NUM_THREADS"]) >= 1
            assert env["RPN_TRAIN_MEETING"].startswith("file:///")

        def poll(self) -> int:
            return 3

        def wait(self, seconds: float | None) -> int:
            return 3

    monkeypatch.setattr(shell.subprocess, "Popen", Started)
    typed = ["devices=2", "device=cpu", "schedule.batch_size=4"]
    assert run(cli._train, *typed, "output_dir=a b=c")[0] == 3
    assert ranks == [("0", "0", "2"), ("1", "1", "2")]
    assert commands[0] == commands[1]
    assert commands[0][1:4] == ["-m", "rpn_train", "train"]
    passed_on = commands[0][4:]
    cfg = cli.compose_run(passed_on)
    assert cfg == cli.compose_run([*typed, "output_dir='a b=c'"])
    assert cfg.output_dir == "a b=c"


def test_a_group_from_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("sizes: [[10], [20.5], [40], [80], [160]]\nratios: [0.5, 2]\n")
    typed = ["anchors.ratios=[1]", f"anchors={file}"]  # what is typed by itself wins
    code, page, _ = run(cli._train, *typed, "--config")
    assert code == 0
    anchors = yaml.safe_load(page)["anchors"]
    assert anchors["sizes"] == [[10.0], [20.5], [40.0], [80.0], [160.0]]
    assert anchors["ratios"] == [1.0]
    file.write_text("size: 3\n")
    code, _, fault = run(cli._train, *typed, "--config")
    expected = f"error: {file}: anchors.size: unknown key; did you mean 'anchors.sizes'?\n"
    assert (code, fault) == (2, expected)
    assert run(cli._train, f"anchors={tmp_path}/no.yaml")[2].startswith(
        f"error: anchors: expected a choice or a YAML file, got {tmp_path}/no.yaml: "
    )


@pytest.fixture
def composed(run: Run) -> Callable[..., Any]:
    """What `rpn-train ... --config` prints."""

    def compose(*typed: str) -> Any:
        code, page, fault = run(cli._train, *typed, "--config")
        assert (code, fault) == (0, "")
        return yaml.safe_load(page)

    return compose


def test_a_method_and_an_experiment_from_files(
    composed: Callable[..., Any], tmp_path: Path
) -> None:
    """Files of one's own are choices like those of the package: the same order of who wins."""
    method, experiment = tmp_path / "it's mine.yaml", tmp_path / "my=run.yml"
    method.write_text(
        "# @package _global_\nanchors: {sizes: [[10]], ratios: [1]}\nmethod: {fg_iou: 0.6}\n"
    )
    experiment.write_text(
        "# A run.\ndefaults:\n  - override /method: atss\n"
        "method: {box_loss: ciou}\nschedule: {steps: 7}\noutput_dir: ~/runs\n"
    )
    of_method = composed(f"method={method}")
    assert of_method["anchors"]["sizes"] == [[10.0]]
    assert of_method["method"] == composed("method.fg_iou=0.6")["method"]
    half = composed("anchors=fpn_half")["anchors"]
    assert composed("anchors=fpn_half", f"method={method}")["anchors"] == half
    both = composed(f"experiment={experiment}")
    atss = composed("method=atss", "method.box_loss=ciou")
    assert (both["method"], both["anchors"]) == (atss["method"], atss["anchors"])
    assert both["schedule"]["steps"] == 7
    assert both["output_dir"] == str(Path.home() / "runs")
    typed = composed(f"experiment={experiment}", f"method={method}", "anchors=fpn_half")
    assert (typed["method"], typed["anchors"]) == (of_method["method"], half)


def test_what_is_typed_wins_over_an_experiment(
    composed: Callable[..., Any], tmp_path: Path
) -> None:
    """A file that is typed, too: all that it says."""
    files = {
        "anchors": "{sizes: [[10], [20], [40], [80], [160]], ratios: [1]}",
        "schedule": "{defaults: [2x], lr: 0.5}",
        "backbone": "{name: resnet34_fpn, norm: gn, weights: null}",
    }
    for group, content in files.items():
        (tmp_path / f"{group}.yaml").write_text(content)
    recipe = "experiment=coco_r50_fpn_1x_atss"
    found = composed(recipe, *(f"{group}={tmp_path / group}.yaml" for group in files))
    for group, keys in (("anchors", 2), ("backbone", 3)):
        written = yaml.safe_load(files[group])
        assert len(written) == keys
        assert {key: found[group][key] for key in written} == written
    assert (found["schedule"]["lr"], found["schedule"]["epochs"]) == (0.5, 24)
    assert (found["backbone"]["pyramid"], found["backbone"]["frozen_stages"]) == ("p3_p7", 2)
    named = composed("anchors=fpn_half")["anchors"]
    assert composed(recipe, "anchors=fpn_half")["anchors"] == named


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("method: {box_los: ciou}", "method.box_los: unknown key; did you mean 'method.box_loss'?"),
        ("method: 3", "method: expected a group of keys, got 3"),
        ("method.fg_iou: 0.6", "method.fg_iou: expected groups within each other, got a dot"),
        ("defaults: atss", "defaults: expected a list of choices of method, or of 'override"),
        ("defaults: [mine]", "defaults: expected a list of choices of method, or of 'override"),
        ("defaults: [override /method: oln]", "defaults: expected a list of choices of method"),
        ("defaults: [{a: 1, b: 2}]", "defaults: expected a list of choices of method"),
        ("[1]", "expected keys and values, got none"),
        ("", "expected keys and values, got none"),
        ("method: &m {fg_iou: *m}", "expected values that do not hold themselves"),
    ],
)
def test_faults_of_a_choice_file(run: Run, tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"# Mine.\n\n#@package _global_\n{content}\n")
    code, _, fault = run(cli._train, f"method={file}")
    assert (code, fault.count("\n")) == (2, 1)
    assert fault.startswith(f"error: {file}: {expected}")
    file.write_text("# @package _group_\nfg_iou: 0.6\n")
    assert "expected '# @package _global_' or no package" in run(cli._train, f"method={file}")[2]
    for unread in ("a: 1\na: 2\n", "a: [1", "a: ${b}\n", "a: ???\n"):
        file.write_text(unread)
        fault = run(cli._train, f"method={file}")[2]
        assert fault.startswith(f"error: method: expected a choice or a YAML file, got {file}: ")
        assert fault.count("\n") == 1


def test_files_in_a_sweep_are_read_one_by_one(tmp_path: Path) -> None:
    home = str(Path.home())
    assert readable(["anchors=~/a.yaml,fpn,it's.yaml"]) == [
        f"anchors={home}/a.yaml,fpn,'it\\'s.yaml'"
    ]
    files = [tmp_path / name for name in ("a.yaml", "b=c.yaml")]
    for number, file in enumerate(files, start=1):
        file.write_text(f"sizes: [[{number}]]\n")
    (typed,) = readable([f"anchors={files[0]},{files[1]},fpn"])
    (override,) = parse([typed], sweep=True)
    sizes = [cli.compose_run([one]).anchors.sizes for one in sweep_values(typed, override)]
    assert sizes[:2] == [((1.0,),), ((2.0,),)]
    assert len(sizes[2]) == 5


# Sweeps


def test_a_sweep_runs_every_combination(run: Run, runs: list[Any], tmp_path: Path) -> None:
    sizes = "anchors.sizes=[[8],[16]],[[32],[64]]"
    typed = ["-m", "seed=3,4", "schedule=demo", sizes, f"output_dir={tmp_path}/a=b"]
    code, out, fault = run(cli._train, *typed)
    assert (code, fault) == (0, "")
    assert [(cfg.seed, cfg.anchors.sizes[0][0], cfg.output_dir) for cfg, _ in runs] == [
        (3, 8.0, f"{tmp_path}/a=b/0_seed=3,anchors.sizes=[[8],[16]]"),
        (3, 32.0, f"{tmp_path}/a=b/1_seed=3,anchors.sizes=[[32],[64]]"),
        (4, 8.0, f"{tmp_path}/a=b/2_seed=4,anchors.sizes=[[8],[16]]"),
        (4, 32.0, f"{tmp_path}/a=b/3_seed=4,anchors.sizes=[[32],[64]]"),
    ]
    assert all(str(folder) == cfg.output_dir for cfg, folder in runs)
    assert all(cfg.schedule.decay == "cosine" for cfg, _ in runs)
    assert "\nrun 1 of 4: seed=3,anchors.sizes=[[8],[16]]\n" in out
    assert out.endswith(f"compare them: tensorboard --logdir {tmp_path}/a=b\n")


def test_a_sweep_over_paths_stays_in_its_folder(run: Run, runs: list[Any], tmp_path: Path) -> None:
    run(cli._train, "-m", f"output_dir={tmp_path}", "dataset.root=/data/a,/data/b")
    assert [cfg.dataset.root for cfg, _ in runs] == ["/data/a", "/data/b"]
    assert [folder.parent for _, folder in runs] == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["seed=0,x"], "seed: expected integer, got 'x'"),
        (["seed=0,1", "anchors=fpn,foo"], f"anchors: expected {ANCHORS}, got 'foo'"),
        (["schedule.batch_size=4,7", "schedule.accumulate=2"], "schedule.batch_size: expected a m"),
        (["eval.max_proposals=[100],[10]"], "eval.max_proposals: expected 100 among them"),
        (["backbone=glob(*)"], "expected KEY=VALUE,VALUE,..., got 'backbone=glob(*)'"),
        (["output_dir=a,b"], "output_dir: expected one value, got several: 'output_dir=a,b'"),
    ],
)
def test_faults_of_a_sweep_come_before_its_first_run(
    run: Run, runs: list[Any], typed: list[str], message: str
) -> None:
    code, out, fault = run(cli._train, "-m", *typed)
    assert (code, out) == (2, "")
    assert fault.startswith(f"error: {message}")
    assert fault.count("\n") == 1
    assert runs == []


def test_a_sweep_ends_with_the_first_run_that_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(cli, "_run", lambda cfg, folder: seeds.append(cfg.seed) or 143)
    assert run(cli._train, "-m", "seed=1,2", f"output_dir={tmp_path}")[0] == 143
    assert seeds == [1]


# A stored configuration under what is typed


def stored() -> dict[str, Any]:
    """Of a run that differs from the defaults in every section below."""
    values = {
        "seed": 9,
        "dataset": {"keep_empty": False, "shapes": {"max_objects": 3}},
        "image": {"short_side": 64, "max_side": 64},
        "schedule": {"lr": 0.5, "epochs": 2},
    }
    return to_mapping(from_mapping(TrainConfig, values))


def laid_over(*typed: str) -> TrainConfig:
    return lay_over(stored(), parse(typed), typed)


def test_nothing_typed_is_what_was_stored() -> None:
    assert to_mapping(laid_over()) == stored()


def test_a_typed_key_replaces_only_itself() -> None:
    cfg = laid_over("schedule.lr=0.25", "dataset.shapes.clutter=true")
    expected = stored()
    expected["schedule"]["lr"] = 0.25
    expected["dataset"]["shapes"]["clutter"] = True
    assert to_mapping(cfg) == expected


def test_a_typed_group_replaces_its_whole_section_and_no_other() -> None:
    for typed in (["schedule.lr=0.3", "schedule=2x"], ["schedule=2x", "schedule.lr=0.3"]):
        cfg = laid_over(*typed)
        fresh = cli.compose_run(["schedule=2x", "schedule.lr=0.3"])
        assert to_mapping(cfg) == {**stored(), "schedule": to_mapping(fresh.schedule)}
    cfg = laid_over("dataset=coco", "dataset.root=/data/coco")
    fresh = cli.compose_run(["dataset=coco", "dataset.root=/data/coco"])
    assert cfg.dataset == fresh.dataset
    assert cfg.dataset.shapes.max_objects == 8
    assert cfg.dataset.keep_empty
    assert {**to_mapping(cfg), "dataset": None} == {**stored(), "dataset": None}


def test_a_typed_experiment_replaces_everything() -> None:
    typed = ["experiment=coco_r50_fpn_1x", "seed=1"]
    assert laid_over(*typed) == cli.compose_run(typed)


def test_resume_goes_on_with_the_stored_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored()))
    typed = ["resume=auto", f"output_dir={tmp_path}", "schedule.epochs=24"]
    expected = stored()
    expected.update(resume="auto", output_dir=str(tmp_path))
    expected["schedule"]["epochs"] = 24.0
    assert to_mapping(cli.compose_run(typed)) == expected


def test_what_was_stored_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\nspeed: 2\n")
    with pytest.raises(ConfigError, match="speed: unknown key"):
        cli.compose_run(["resume=auto", f"output_dir={tmp_path}"])


# rpn-eval


def save_run(folder: Path) -> TrainConfig:
    """A run folder with an untrained network."""
    cfg = cli.compose_run([*TYPED, "seed=5", f"output_dir={folder}"])
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "config.yaml", to_mapping(cfg))
    model = build_model(cfg)
    saved = {
        "step": 0,
        "evaluated": -1,
        "best_ar_100": -1.0,
        "history": [],
        "config": to_mapping(cfg),
        "model": model.state_dict(),
        "ema": None,
        "optimizer": {},
        "scaler": {},
    }
    checkpoint.save(saved, folder / "checkpoints" / "last.pt")
    return cfg


def test_eval(run: Run, tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    code, out, fault = run(cli_trained._eval, f"checkpoint={tmp_path / 'run'}")
    assert (code, fault) == (0, "")
    assert out.startswith(f"{tmp_path}/run/checkpoints/last.pt, step 0, 3 images of val\n")
    figures = json.loads((tmp_path / "run" / "eval" / "recall.json").read_text())
    assert figures["num_images"] == 3
    assert "ar_10" in figures
    # typed keys take the place of stored ones; a file is as good as a folder
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    typed = ["eval.split=train", "eval.max_proposals=[7]", f"output_dir={tmp_path / 'out'}"]
    code, out, fault = run(cli_trained._eval, f"checkpoint={last}", *typed)
    assert (code, fault) == (0, "")
    figures = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert figures["num_images"] == 2
    assert "ar_7" in figures


def test_faults_of_eval(run: Run, tmp_path: Path) -> None:
    def fault(*typed: str) -> str:
        code, out, err = run(cli_trained._eval, *typed)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").strip().replace(str(tmp_path), "TMP")

    either = "expected checkpoint=WHERE or proposals=FILE, one of the two; "
    assert fault() == f"{either}rpn-eval --help says more"
    assert fault("checkpoint=a", "checkpoint=b") == (
        "checkpoint: expected once, got it several times"
    )
    given = f"checkpoint={tmp_path / 'run'}"
    nothing = "expected a run folder or a checkpoint, got nothing at TMP/run"
    assert fault(given) == nothing
    (tmp_path / "run").mkdir()
    assert fault(given) == "TMP/run: expected a run folder, got no checkpoints/last.pt in it"
    save_run(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert fault(given, "schedule.lrr=1") == (
        "schedule.lrr: unknown key; did you mean 'schedule.lr'?"
    )
    assert fault(given, "seed=1,2").startswith("seed: expected one value, got several: 'seed=1,2'")
    assert fault(given, "backbone=resnet34_fpn").startswith("TMP/run/checkpoints/last.pt: ")
    assert fault(given, "dataset=coco").startswith("dataset.root: expected a folder in coco layout")
    assert fault(given, f"output_dir={last}") == (
        "output_dir: expected a folder to write to, got TMP/run/checkpoints/last.pt: File exists"
    )
    last.write_bytes(last.read_bytes()[:1000])
    expected = "TMP/run/checkpoints/last.pt: expected a checkpoint of rpn-train, got "
    assert fault(given) == f"{expected}a broken or another file (BadZipFile)"
    torch.save({"model": {}}, last)
    assert fault(given) == f"{expected}another file"
