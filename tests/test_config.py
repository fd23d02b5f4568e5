"""Options: the way there and back, one exact line for every fault, presets that only differ."""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from rpn_train import cli
from rpn_train.anchors import AnchorGrid
from rpn_train.backbones import BACKBONES, PYRAMIDS, build_backbone
from rpn_train.build import build_model
from rpn_train.config import AnchorsConfig, BackboneConfig, DatasetConfig, TopNConfig, TrainConfig
from rpn_train.data.batch import Batch
from rpn_train.errors import ConfigError, DataError, UserError
from rpn_train.heads import Outputs
from rpn_train.losses import box_errors
from rpn_train.method_config import MethodConfig
from rpn_train.model import autocast
from rpn_train.norms import Norm
from rpn_train.objective import batch_losses
from rpn_train.options import (
    describe_range,
    describe_type,
    differences,
    from_mapping,
    to_mapping,
    unknown_key,
    walk,
)
from rpn_train.read_proposals import read_proposals
from rpn_train.recall import ObjectArrays, ProposalArrays, score_recall
from rpn_train.schedule import build_optimizer, lr_at
from rpn_train.splits import open_split
from rpn_train.step import skips
from rpn_train.targets import assign_dense

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(CONFIGS.glob("*/*.yaml"))
OPTIONS = list(walk(TrainConfig))


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key "a.b"."""
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


def get(cfg: TrainConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)


def read(key: str, value: Any) -> Any:
    """What the option `key` is when `value` is given."""
    return get(from_mapping(TrainConfig, nested(key, value)), key)


def fault(values: Mapping[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, values)
    return str(caught.value)


# The way there and back


def test_nothing_given_is_all_defaults() -> None:
    assert from_mapping(TrainConfig, {}) == TrainConfig()


def test_every_option_has_a_meaning_and_a_default_that_it_accepts() -> None:
    for key, hint, default, metadata in OPTIONS:
        assert metadata["help"], key
        assert read(key, default) == default, key
        assert describe_type(hint), key


def test_a_part_of_a_section_keeps_the_rest_of_its_own_default() -> None:
    cfg = from_mapping(TrainConfig, {"proposals": {"train": {"pre_nms": 7}}})
    assert cfg.proposals.train == TopNConfig(7, 2000)  # and not the 1000 of TopNConfig()


def test_round_trip_through_yaml() -> None:
    values = {
        "seed": 7,
        "output_dir": "runs/a: b #1",
        "dataset": {"format": "voc", "root": "2007", "categories": ["no", "dining table"]},
        "anchors": {"sizes": [[8, 12.5], [16, 24]], "strides": [4, 8]},
        "augment": {"scale": [0.5, 1.5]},
        "schedule": {"lr": 1e-5, "clip_norm": 35, "milestones": [1 / 3]},
    }
    cfg = from_mapping(TrainConfig, values)
    plain = to_mapping(cfg)
    assert plain["anchors"]["sizes"] == [[8.0, 12.5], [16.0, 24.0]]  # no tuple is left
    assert from_mapping(TrainConfig, plain) == cfg
    assert from_mapping(TrainConfig, yaml.safe_load(yaml.safe_dump(plain))) == cfg


def values_of(hint: Any, limits: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Plain values of a type and range."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        size = (1, 3) if args[-1] is ... else (len(args), len(args))
        return st.lists(values_of(args[0], limits), min_size=size[0], max_size=size[1])
    if args:
        return st.one_of([values_of(a, limits) for a in args])
    low, high, above = limits["low"], limits["high"], limits["above"]
    open_below = {"min_value": above if low is None else low, "exclude_min": low is None}
    return {
        int: st.integers(low, high),
        float: st.floats(**open_below, max_value=high, allow_infinity=False, allow_nan=False)
        if low is not None or above is not None
        else st.nothing(),
        str: st.text(),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


@given(st.data())
def test_what_is_in_range_comes_back(data: st.DataObject) -> None:
    key, hint, _, limits = data.draw(st.sampled_from(OPTIONS))
    value = data.draw(values_of(hint, limits))
    message = ""
    try:
        cfg = from_mapping(TrainConfig, nested(key, value))
        assert from_mapping(TrainConfig, to_mapping(cfg)) == cfg
    except ConfigError as error:
        message = str(error)
    # at odds with another option perhaps, never with its own type or range
    assert not message or any(
        part in message for part in (" = ", "(lowest, highest)", "expected all with method.")
    )


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("schedule.lr", "1e-3", 0.001),  # text, for YAML 1.1
        ("schedule.lr", 1, 1.0),
        ("schedule.clip_norm", None, None),
        ("schedule.clip_norm", 35, 35.0),
        ("dataset.train.split", 2017, "2017"),
        ("dataset.categories", ["person", 3], ("person", "3")),
        ("anchors.sizes", [[32, "6.4e1"]], ((32.0, 64.0),)),
        ("anchors.strides", None, None),
        ("augment.scale", (0.8, 1), (0.8, 1.0)),
        ("eval.max_proposals", [1000], (1000,)),
    ],
)
def test_conversion(key: str, given: Any, expected: Any) -> None:
    found = read(key, given)
    assert found == expected
    assert str(found) == str(expected)  # 1.0 and not 1


# Faults

FAULTS = {
    # unknown keys
    "schedule.lrr: unknown key; did you mean 'schedule.lr'?": {"schedule": {"lrr": 1}},
    "lr: unknown key; did you mean 'schedule.lr'?": {"lr": 1},
    "dataset.trian: unknown key; did you mean 'dataset.train'?": {"dataset": {"trian": {}}},
    "zzz: unknown key; rpn-train --help lists the keys": {"zzz": 1},
    # types
    "seed: expected integer, got '7'": {"seed": "7"},
    "seed: expected integer, got 7.0": {"seed": 7.0},
    "seed: expected integer, got True": {"seed": True},
    "seed: expected integer, got None": {"seed": None},
    "schedule.lr: expected number, got 'fast'": {"schedule": {"lr": "fast"}},
    "schedule.lr: expected number, got False": {"schedule": {"lr": False}},
    "schedule.lr: expected number, got [0.1]": {"schedule": {"lr": [0.1]}},
    "compile: expected true | false, got 1": {"compile": 1},
    "compile: expected true | false, got 'yes'": {"compile": "yes"},
    "name: expected text, got 1.5": {"name": 1.5},
    "name: expected text, got None": {"name": None},
    "output_dir: expected text | null, got True": {"output_dir": True},
    "precision: expected 'fp32' | 'bf16' | 'fp16', got 'fp8'": {"precision": "fp8"},
    "resume: expected 'auto' | null, got True": {"resume": True},
    "image: expected a group of keys, got 800": {"image": 800},
    "dataset.train: expected a group of keys, got None": {"dataset": {"train": None}},
    "dataset.categories: expected non-empty list of text | null, got 'person'": {
        "dataset": {"categories": "person"}
    },
    "anchors.sizes: expected non-empty list of non-empty list of number, got [32, 64]": {
        "anchors": {"sizes": [32, 64]}
    },
    "anchors.sizes: expected non-empty list of non-empty list of number, got [[32], []]": {
        "anchors": {"sizes": [[32], []]}
    },
    "anchors.ratios: expected non-empty list of number, got []": {"anchors": {"ratios": []}},
    "augment.scale: expected 2 x number, got [1.0]": {"augment": {"scale": [1.0]}},
    "dataset.shapes.size: expected 2 x integer, got [64, 64.5]": {
        "dataset": {"shapes": {"size": [64, 64.5]}}
    },
    # ranges
    "seed: expected at least 0, at most 4294967295, got -1": {"seed": -1},
    "workers: expected at least 0, got -1": {"workers": -1},
    "augment.flip: expected at least 0, at most 1, got 1.5": {"augment": {"flip": 1.5}},
    "schedule.gamma: expected more than 0, at most 1, got 0.0": {"schedule": {"gamma": 0}},
    "schedule.lr: expected a finite number, got nan": {"schedule": {"lr": float("nan")}},
    "schedule.epochs: expected a finite number, got inf": {"schedule": {"epochs": "inf"}},
    "schedule.clip_norm: expected more than 0, got -1.0": {"schedule": {"clip_norm": -1}},
    "anchors.sizes: expected more than 0, got -64.0": {"anchors": {"sizes": [[32], [-64]]}},
    "dataset.shapes.size: expected at least 32, got 31": {
        "dataset": {"shapes": {"size": [64, 31]}}
    },
    # at odds with each other
    "image.max_side: expected at least image.short_side = 800, got 799": {
        "image": {"max_side": 799}
    },
    "method.bg_iou: expected at most method.fg_iou = 0.2, got 0.3": {"method": {"fg_iou": 0.2}},
    "augment.scale: expected (lowest, highest), got (2.0, 1.0)": {"augment": {"scale": [2, 1]}},
    "eval.max_proposals: expected at most proposals.test.post_nms = 2000, got 2001": {
        "eval": {"max_proposals": [100, 2001]}
    },
    "eval.max_proposals: expected at most proposals.train.post_nms = 2000, got 2001": {
        "eval": {"max_proposals": [2001], "split": "train"}
    },
    "schedule.batch_size: expected a multiple of schedule.accumulate = 2, got 7": {
        "schedule": {"batch_size": 7, "accumulate": 2}
    },
}


@pytest.mark.parametrize(("message", "values"), FAULTS.items())
def test_fault(message: str, values: dict[str, Any]) -> None:
    assert fault(values) == message


def test_at_the_limit_is_in_range() -> None:
    assert read("method.bg_iou", 0.7) == 0.7
    assert read("image.max_side", 800) == 800
    assert read("augment.scale", [1.25, 1.25]) == (1.25, 1.25)
    assert read("augment.flip", 1) == 1.0
    assert read("eval.split", "train") == "train"


def test_range_as_text() -> None:
    assert describe_range({"low": 0, "high": None, "above": None}) == "at least 0"
    assert describe_range({"low": None, "high": 0.5, "above": 0}) == "more than 0, at most 0.5"
    assert describe_range({"low": None, "high": None, "above": None}) == ""


def test_unknown_key_offers_groups_and_keys_of_other_groups() -> None:
    assert unknown_key("datset", TrainConfig) == "datset: unknown key; did you mean 'dataset'?"
    assert (
        unknown_key("model.flip", TrainConfig)
        == "model.flip: unknown key; did you mean 'augment.flip'?"
    )


def test_differences() -> None:
    old = {"a": 1, "b": {"c": [1], "d": 2}, "gone": 0}
    new = {"a": 1, "b": {"c": [2], "d": 2}, "came": {"x": 1}}
    assert differences(old, new) == {
        "b.c": "[1] -> [2]",
        "gone": "0 -> None",
        "came": "None -> {'x': 1}",
    }
    assert differences(old, old) == {}


# Presets


def flat(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The full keys of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield path + key


def preset(path: Path) -> dict[str, Any]:
    """What a preset sets, as a part of the whole configuration."""
    text = path.read_text()
    values = yaml.safe_load(text)
    values.pop("defaults", None)
    return values if text.startswith("# @package _global_") else {path.parent.name: values}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_preset(path: Path) -> None:
    values = preset(path)
    cfg, default = from_mapping(TrainConfig, values), TrainConfig()
    keys = {*flat(values)}
    assert "schedule.steps" not in keys, "a length in steps would hide the one in epochs"
    # a recipe states its numbers, whatever the defaults; other presets only what differs
    named = {"backbone.name", "dataset.format"}  # these say which preset it is
    if path.parent.name == "method":
        named.add("anchors.sizes")  # for its strides, whatever the data set brings
    if path.parent.name not in {"anchors", "schedule", "experiment"}:
        restated = sorted(key for key in keys - named if get(cfg, key) == get(default, key))
        assert restated == [], "a preset holds only what differs from the defaults"


def test_backbone_presets_are_the_backbones() -> None:
    presets = {path.stem: preset(path) for path in PRESETS if path.parent.name == "backbone"}
    assert presets.keys() == BACKBONES.keys()
    for name, values in presets.items():
        assert values == {"backbone": {"name": name}}
    assert BackboneConfig().name in BACKBONES


# Every choice of an option is something of its own to the code behind it


def of_format(value: Any) -> str:
    try:
        cfg = TrainConfig(dataset=DatasetConfig(format=value))
        return f"{len(open_split(cfg, 'val', 'score')[0])} drawn"
    except UserError as error:
        return str(error)


def of_norm(value: Any) -> type:
    backbone = build_backbone("resnet18_c4", weights=None, frozen_stages=0, norm=value)
    return type(backbone.body["bn1"])


def of_border(value: Any) -> list[int]:
    anchors = torch.tensor([[-1.0, 0, 9, 10]])
    boxes, yes = anchors[None], torch.tensor([[True]])
    assignment = assign_dense(
        anchors,
        boxes,
        yes,
        ~yes,
        torch.tensor([[20, 20]]),
        fg_iou=0.7,
        bg_iou=0.3,
        force_best=True,
        forced_min_iou=0.0,
        ignore_ioa=0.5,
        border=value,
    )
    return assignment.labels.tolist()


def of_box_loss(value: Any) -> float:
    anchor = torch.tensor([[[0.0, 0, 10, 10]]])
    yes = torch.tensor([[True]])
    deltas, options = torch.full((1, 1, 4), 0.5), {"beta": 1.0, "stds": (1.0,) * 4}
    return box_errors(deltas, anchor, anchor, yes, kind=value, **options).sum().item()


def of_protocol(value: Any) -> float:
    """The better proposal lies on both objects, the other on the one that it would take."""
    objects = np.array([[0.0, 0, 10, 10], [4.0, 0, 10, 10]])
    proposals = np.array([[2.2, 0, 10, 10], [4.5, 0, 10, 10]])
    two = np.array([0, 2])
    truth = ObjectArrays(objects, np.full(2, 100.0), np.zeros(2, bool), two)
    found = ProposalArrays(proposals, np.array([2.0, 1.0]), two)
    return float(score_recall(found, truth, max_proposals=(2,), protocol=value).recall[0, 0, 0])


def of_match(value: Any) -> str:
    index, _ = open_split(TrainConfig(), "val", "score")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.json"
        row = {"image_id": int(index.image_ids[0]), "bbox": [0, 0, 5, 5], "score": 1}
        file.write_text(json.dumps([row]))
        try:
            return f"{len(read_proposals(file, index, match=value).missing)} missing"
        except UserError as error:
            return str(error)


def of_device(value: Any) -> tuple[int, bool]:
    cfg = TrainConfig(device=value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        processes = cli.num_processes(cfg)
        try:
            cli.check_device(cfg)
        except ConfigError:
            return processes, False
        return processes, True


def of_data(key: str, value: Any) -> Any:
    """One that is black on the left or, EXIF applied, on the right; a sound box and a faulty."""
    with tempfile.TemporaryDirectory() as folder:
        root, exif = Path(folder), Image.Exif()
        exif[0x0112] = 3  # upside down
        Image.linear_gradient("L").rotate(90).save(root / "a.png", exif=exif)
        boxes = [[0, 0, 5, 5], [0, 0, 0, 5]]
        rows = [{"id": i, "image_id": 1, "category_id": 1, "bbox": b} for i, b in enumerate(boxes)]
        images = [{"id": 1, "file_name": "a.png", "height": 256, "width": 256}]
        (root / "a.json").write_text(json.dumps({"images": images, "annotations": rows}))
        split = {"images": folder, "annotations": f"{folder}/a.json"}
        data_set = {"format": "coco", "train": split}
        cfg = from_mapping(TrainConfig, {"dataset": data_set, "data": {key: value}})
        try:
            index, read_row = open_split(cfg, "train", "train")
        except DataError:
            return None
        return len(index.areas), read_row(0)[0, 0, 0].item()


def of_losses(name: str) -> Callable[[Any], list[float]]:
    """What a batch costs, at random outputs."""

    def losses(value: Any) -> list[float]:
        rng = torch.Generator().manual_seed(0)
        cfg = TrainConfig(method=MethodConfig(**{"sampling": "all", name: value}))
        grid = AnchorGrid(((32.0,),), (1.0,), (16,), True)
        logits, deltas = torch.randn(1, 16, generator=rng), torch.randn(1, 16, 4, generator=rng)

        def network(images: torch.Tensor, at: torch.Tensor | None) -> Outputs:
            taken = torch.arange(16)[None] if at is None else at
            return Outputs(logits.gather(1, taken), deltas[0, taken])

        yes = torch.ones(1, 1, dtype=torch.bool)
        batch = Batch(
            images=torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
            sizes=torch.tensor([[64, 64]]),
            gt_boxes=torch.tensor([[[2.0, 2, 46, 60]]]),
            gt_valid=yes,
            gt_ignore=~yes,
            seeds=torch.tensor([1]),
            rows=torch.tensor([0]),
        )
        found, picks = batch_losses(cast(nn.Module, network), grid, batch, cfg, 0.9)
        return [*map(float, found[:2]), float(picks.positive.sum())]

    return losses


def of_head(value: Any) -> type[nn.Module]:
    method = MethodConfig(head=value, sampling="random" if value == "cascade" else "all")
    one = AnchorsConfig(ratios=(1.0,))
    return type(build_model(TrainConfig(anchors=one, method=method)).rpn["head"])


CHOICES: dict[str, Callable[[Any], Any]] = {
    "data.on_error": functools.partial(of_data, "on_error"),
    "data.exif": functools.partial(of_data, "exif"),
    "dataset.format": of_format,
    "backbone.norm": of_norm,
    "method.border": of_border,
    "method.box_loss": of_box_loss,
    "schedule.optimizer": lambda value: type(
        build_optimizer(torch.nn.Linear(1, 1), name=value, momentum=0.5, weight_decay=0.0)
    ),
    "schedule.decay": lambda value: lr_at(
        9, total=10, peak=1.0, warmup=0.0, decay=value, milestones=[0.5], gamma=0.1
    ),
    "eval.protocol": of_protocol,
    "eval.match": of_match,
    "eval.split": lambda value: len(open_split(TrainConfig(), value, "score")[0]),
    "device": of_device,
    "backbone.pyramid": lambda value: PYRAMIDS[value],
    "method.head": of_head,
    "method.assignment": of_losses("assignment"),
    "method.sampling": of_losses("sampling"),
    "method.objectness_loss": of_losses("objectness_loss"),
    "method.objectness_target": of_losses("objectness_target"),
    "on_nonfinite": lambda value: skips(TrainConfig(on_nonfinite=value)),
    "precision": lambda value: str(vars(autocast(value, torch.device("cpu")))),
}


def test_every_choice_is_implemented_and_no_two_are_the_same() -> None:
    literals = {key: get_args(hint) for key, hint, *_ in OPTIONS if get_origin(hint) is Literal}
    assert literals.keys() == CHOICES.keys()
    for key, values in literals.items():
        outcomes = [CHOICES[key](value) for value in values]
        for i, outcome in enumerate(outcomes):
            assert outcome not in outcomes[:i], f"{key}: {values[i]!r} is like another"
    assert {*literals["backbone.norm"]} == {*get_args(Norm)}
