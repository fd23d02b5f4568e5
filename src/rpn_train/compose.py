"""What a person typed, composed by Hydra with the files of `configs/`, made one configuration.

No Hydra or OmegaConf object goes further than this module.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
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

from rpn_train.config import TrainConfig
from rpn_train.errors import ConfigError
from rpn_train.options import from_mapping, to_mapping, unknown_key, walk

CONFIGS = Path(__file__).parent / "configs"  # in an installed package
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parents[2] / "configs"  # in the source tree


def readable(arguments: Sequence[str]) -> list[str]:
    """What was typed, as Hydra's grammar reads it."""
    return [_readable(argument) for argument in arguments]


def _readable(argument: str) -> str:
    """A path with ~ expanded, in quotes where Hydra's grammar asks for them: a=b, (1), ü."""
    key, _, value = argument.partition("=")
    texts = {name for name, hint, *_ in walk(TrainConfig) if hint in (str, str | None)}
    if key not in texts and not (key in groups() and is_file(value)):
        return argument
    value = os.path.expanduser(value)
    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        value = quoted(value)
    return f"{key}={value}"


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
    known, sections = _known()
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


def is_file(choice: Any) -> bool:
    """Whether a choice of a group is a file of one's own, like those in `configs/`."""
    return str(choice).endswith((".yaml", ".yml"))


def _check_choice(key: str, choice: Any) -> None:
    """Refuse what is no choice of a group."""
    offered = groups().get(key)
    if offered is None or choice in offered or is_file(choice):
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
    typed = [_stored_choice(argument) for argument in typed]
    try:
        with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            composed = _composed(typed)
            # a method brings anchors, an experiment parts of a method: what is typed wins
            for group, other in (("anchors", "method"), ("method", "experiment")):
                rest = [a for a in typed if not a.startswith(f"{other}=")]
                if len(rest) < len(typed) and any(a.startswith(f"{group}=") for a in typed):
                    composed[group] = _composed(rest)[group]
        return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _stored_choice(argument: str) -> str:
    """A choice that is not among the files of `configs/`, as one that Hydra finds."""
    group, _, choice = argument.partition("=")
    if argument.startswith("backbone=timm:"):  # networks of timm have no file
        return f"backbone.name={choice}"
    if group not in groups() or not is_file(choice.strip("'")):
        return argument
    path = Path(cast(str, OverridesParser.create().parse_override(argument).value()))
    try:
        text = path.read_text(encoding="utf-8")
        keys = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{group}: expected a choice or a YAML file, got {path}: {reason}"
        ) from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{group}: expected keys and values in {path}, got another file")
    package = "_global_" if "# @package _global_" in text.splitlines() else group
    known, sections = _known()
    for key in _keys_of(keys if package == "_global_" else {group: keys}):
        if key in sections:
            raise ConfigError(f"{path}: {key}: expected a group of keys")
        if key not in {*known, "defaults"}:
            raise ConfigError(f"{path}: {unknown_key(key, TrainConfig)}")
    name = f"{group}_of_file"
    ConfigStore.instance().store(name=name, node=keys, group=group, package=package)
    return f"{group}={name}"


def _keys_of(keys: dict[str, Any], section: str = "") -> Iterator[str]:
    """The full keys of nested ones."""
    for key, value in keys.items():
        full = f"{section}{key}"
        if isinstance(value, dict) and full in _known()[1]:
            yield from _keys_of(value, f"{full}.")
        else:
            yield full


def _known() -> tuple[set[str], set[str]]:
    """All keys, and the sections that they are in."""
    keys = {name for name, *_ in walk(TrainConfig)}
    return keys, {name.rsplit(".", i)[0] for name in keys for i in range(1, name.count(".") + 1)}


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
