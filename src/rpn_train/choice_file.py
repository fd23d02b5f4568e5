"""A file of one's own in the place of a choice, written like those of configs/: `anchors=a.yaml`.

Hydra composes it like those. What it would refuse in its own words, or pass over, is refused here.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rpn_train.config import TrainConfig
from rpn_train.errors import ConfigError
from rpn_train.options import keys_and_sections, unknown_key

GLOBAL = "_global_"
_HEADER = re.compile(r"#\s*@package\s+(\S+)\s*")


def names_file(choice: Any) -> bool:
    """Whether what was typed for a choice is the name of a file."""
    return str(choice).endswith((".yaml", ".yml"))


def read_choice(
    group: str, path: Path, offered: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Any], str]:
    """The keys of a file, and the package that they are in: the group or `GLOBAL`.

    Args:
        offered: the choices of each group, on which the file may build.

    Raises:
        ConfigError: it cannot be read, or says what no configuration has.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        keys = OmegaConf.to_container(OmegaConf.create(text), resolve=True, throw_on_missing=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{group}: expected a choice or a YAML file, got {path}: {reason}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: expected values that do not hold themselves") from error
    if not isinstance(keys, dict) or not keys:
        raise ConfigError(f"{path}: expected keys and values, got none")
    package = _package(group, path, text)
    own = {str(key): value for key, value in keys.items() if key != "defaults"}
    _check_keys(path, own if package == GLOBAL else {group: own})
    if "defaults" in keys:
        _check_defaults(path, keys["defaults"], group, package, offered)
    return _expanded(keys), package


def _expanded(value: Any) -> Any:
    """The same with ~ of paths expanded, as it is in what is typed."""
    if isinstance(value, dict):
        return {key: _expanded(of) for key, of in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


def _package(group: str, path: Path, text: str) -> str:
    """Where the keys of a file belong, by the comments it begins with."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        header = _HEADER.fullmatch(line)
        if header and header[1] not in (GLOBAL, group):
            raise ConfigError(f"{path}: expected '# @package {GLOBAL}' or no package, got {line!r}")
        if header:
            return header[1]
    return GLOBAL if group == "experiment" else group


def _check_keys(path: Path, keys: Mapping[str, Any], section: str = "") -> None:
    known, sections = keys_and_sections(TrainConfig)
    for key, value in keys.items():
        full = f"{section}{key}"
        if "." in key:
            raise ConfigError(f"{path}: {full}: expected groups within each other, got a dot")
        if full in sections and isinstance(value, dict):
            _check_keys(path, value, f"{full}.")
        elif full in sections:
            raise ConfigError(f"{path}: {full}: expected a group of keys, got {value!r}")
        elif full not in known:
            raise ConfigError(f"{path}: {unknown_key(full, TrainConfig)}")


def _check_defaults(
    path: Path, defaults: Any, group: str, package: str, offered: Mapping[str, Sequence[str]]
) -> None:
    """A file builds on choices of its group; one for all sections changes those of other groups."""
    others = {f"override /{other}": of for other, of in offered.items() if other != group}
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if isinstance(entry, dict) and len(entry) == 1 and package == GLOBAL:
            ((key, choice),) = entry.items()
            if key in others and choice in others[key]:
                continue
        elif isinstance(entry, str) and isinstance(defaults, list) and entry in offered[group]:
            continue
        raise ConfigError(
            f"{path}: defaults: expected a list of choices of {group}"
            + ", or of 'override /GROUP: CHOICE'" * (package == GLOBAL)
            + f", got {entry!r}"
        )
