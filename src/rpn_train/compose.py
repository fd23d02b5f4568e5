"""What a person typed, composed by Hydra with the files of `configs/`, made one configuration.

No Hydra or OmegaConf object goes further than this module and `choice_file`.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rpn_train.choice_file import names_file, read_choice
from rpn_train.config import TrainConfig
from rpn_train.errors import ConfigError
from rpn_train.options import from_mapping, keys_and_sections, to_mapping, unknown_key, walk

CONFIGS = Path(__file__).parent / "configs"  # in an installed package
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parents[2] / "configs"  # in the source tree


def readable(arguments: Sequence[str]) -> list[str]:
    """What was typed, as Hydra's grammar reads it."""
    return [_readable(argument) for argument in arguments]


def _readable(argument: str) -> str:
    """Paths with ~ expanded, in quotes where Hydra's grammar asks for them: a=b, (1), ü."""
    key, _, value = argument.partition("=")
    texts = {name for name, hint, *_ in walk(TrainConfig) if hint in (str, str | None)}
    if key in texts:
        return f"{key}={_readable_path(key, value)}"
    choices = value.split(",")  # several in a sweep
    if key in groups() and any(map(names_file, choices)):
        return f"{key}={','.join(_readable_path(key, choice) for choice in choices)}"
    return argument


def _readable_path(key: str, value: str) -> str:
    value = os.path.expanduser(value)
    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        value = quoted(value)
    return value


def own_arguments(kind: type[Any], arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """The arguments that only this command understands, checked, and the others."""
    hints = get_type_hints(kind)
    own: dict[str, Any] = {}
    typed = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not (equals and key in hints):
            typed.append(_readable(argument))
        elif key in own:
            raise ConfigError(f"{key}: expected once, got it several times")
        else:
            number = hints[key] not in (str, str | None) and re.fullmatch(r"[\w.+-]+", value)
            own[key] = yaml.safe_load(value) if number else value
    return from_mapping(kind, own), typed


def quoted(text: str) -> str:
    """A value that Hydra's grammar reads as this very text."""
    return "'" + text.replace("'", "\\'") + "'"


def parse(typed: Sequence[str], *, sweep: bool = False) -> list[Override]:
    """The typed overrides; what is no KEY=VALUE of a known key or group is refused here."""
    known, sections = keys_and_sections(TrainConfig)
    overrides = []
    for text in typed:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            override = None
        # all keys exist, so there is nothing to add (+KEY), to delete (~KEY) or to move (@)
        if not override or override.type is not OverrideType.CHANGE or override.package:
            raise ConfigError(
                f"expected KEY=VALUE or GROUP=CHOICE, got {text!r}; rpn-train --help lists them"
            )
        if override.key_or_group not in known | sections | {"experiment"}:
            raise ConfigError(unknown_key(override.key_or_group, TrainConfig))
        if not override.is_sweep_override():
            _check_choice(override.key_or_group, override.value())
        elif not sweep or override.key_or_group == "output_dir":
            raise ConfigError(
                f"{override.key_or_group}: expected one value, got several: {text!r}; "
                "rpn-train -m makes a run of each, quotes within quotes make one value of them"
            )
        overrides.append(override)
    return overrides


def _check_choice(key: str, choice: Any) -> None:
    """Refuse what is no choice of a group."""
    offered = groups().get(key)
    if offered is None or choice in offered or names_file(choice):
        return
    if key == "backbone":
        if str(choice).startswith("timm:"):
            return
        offered = [*offered, "timm:<name>"]
    close = difflib.get_close_matches(str(choice), offered, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(f"{key}: expected {' | '.join(map(repr, offered))}, got {choice!r}{hint}")


def groups() -> dict[str, list[str]]:
    """The groups and their choices: the folders of configs/ and the files in them."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    return {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in folders}


def compose(typed: Sequence[str]) -> dict[str, Any]:
    """Plain nested data: defaults, then files, then what was typed."""
    ConfigStore.instance().store(name="schema", node=to_mapping(TrainConfig()))
    of_files: list[str] = []
    typed = [_choice(argument, of_files) for argument in typed]
    try:
        with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            composed = _composed([*of_files, *typed])
            # a method brings anchors, an experiment parts of a method: what is typed wins
            for group, others in (("anchors", ("method", "experiment")), ("method", "experiment")):
                rest = [a for a in typed if a.partition("=")[0] not in others]
                if len(rest) < len(typed) and any(a.startswith(f"{group}=") for a in typed):
                    composed[group] = _composed([*of_files, *rest])[group]
        return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _choice(argument: str, of_files: list[str]) -> str:
    """What was typed, as Hydra finds it.

    A file of one's own becomes a choice of its group, so that it may build on others. It was typed,
    so what it says of its group goes to `of_files`, as if it had been typed key by key.
    """
    group, _, choice = argument.partition("=")
    if argument.startswith("backbone=timm:"):  # networks of timm have no file
        return f"backbone.name={choice}"
    if group not in groups():
        return argument
    value = OverridesParser.create().parse_override(argument).value()
    if not names_file(value):
        return argument
    path, name = Path(str(value)), f"{group}_of_file"
    keys, package = read_choice(group, path, groups())
    if package == group:
        of_files += [
            f"{group}.{key}={json.dumps(value, ensure_ascii=False)}"
            for key, value in keys.items()
            if key != "defaults"
        ]
    ConfigStore.instance().store(name=name, node=keys, group=group, package=package)
    return f"{group}={name}"


def _composed(typed: Sequence[str]) -> dict[str, Any]:
    composed = hydra_compose("train", overrides=[*typed])
    return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))


def lay_over(
    base: dict[str, Any], overrides: Sequence[Override], typed: Sequence[str]
) -> TrainConfig:
    """A stored configuration with exactly the typed keys and groups replaced.

    A typed group (dataset=voc) replaces its whole section, a typed key only itself; an experiment
    replaces everything.
    """
    composed = compose(typed)
    if any(o.key_or_group == "experiment" for o in overrides):
        return from_mapping(TrainConfig, composed)
    for override in overrides:
        *path, last = override.key_or_group.split(".")
        target, source = base, composed
        for part in path:
            target, source = target.setdefault(part, {}), source[part]
        target[last] = source[last]
    return from_mapping(TrainConfig, base)


def sweep_values(text: str, override: Override) -> list[str]:
    """KEY=VALUE for each value of KEY=VALUE,VALUE,..."""
    try:
        values = list(cast(Any, override).sweep_string_iterator())
    except HydraException as error:  # glob(*)
        raise ConfigError(f"expected KEY=VALUE,VALUE,..., got {text!r}") from error
    return [f"{override.key_or_group}={value}" for value in values]
