"""Options: the way there and back, one exact line for every fault, presets that only differ."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rpn_train import backbones, config
from rpn_train.backbones import BACKBONES
from rpn_train.config import (
    EvalConfig,
    TrainConfig,
    describe_range,
    describe_type,
    differences,
    from_mapping,
    to_mapping,
    unknown_key,
    walk,
)
from rpn_train.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = ("anchors", "backbone", "dataset", "experiment", "method", "schedule")


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key "a.b"."""
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


def read(key: str, value: Any) -> Any:
    """What the option `key` is when `value` is given."""
    found: Any = from_mapping(TrainConfig, nested(key, value))
    for part in key.split("."):
        found = getattr(found, part)
    return found


# The way there and back


def test_nothing_given_is_all_defaults() -> None:
    assert from_mapping(TrainConfig, {}) == TrainConfig()


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
    assert plain["anchors"]["sizes"] == [[8.0, 12.5], [16.0, 24.0]]  # lists, no tuple left
    assert from_mapping(TrainConfig, plain) == cfg
    assert from_mapping(TrainConfig, yaml.safe_load(yaml.safe_dump(plain))) == cfg


def options_of(hint: Any, limits: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Plain values that an option of this type may have."""
    origin, args = get_origin(hint), get_args(hint)
    low = limits["low"] if limits["above"] is None else limits["above"]
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        of = options_of(args[0], limits)
        return st.lists(of, min_size=1, max_size=3) if args[-1] is ... else st.tuples(of, of)
    if args:
        return st.one_of([options_of(a, limits) for a in args])
    return {
        int: st.integers(low, limits["high"]),
        float: st.floats(
            low, limits["high"], allow_infinity=False, exclude_min=limits["above"] is not None
        ),
        str: st.text(),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


@given(st.data())
def test_whatever_is_accepted_comes_back(data: st.DataObject) -> None:
    key, hint, _, limits = data.draw(st.sampled_from([*walk(EvalConfig), *walk(TrainConfig)[:0]]
        if False else list(walk(EvalConfig))))
    value = data.draw(options_of(hint, limits))
    cfg = from_mapping(EvalConfig, {key: value})
    assert from_mapping(EvalConfig, to_mapping(cfg)) == cfg
