"""How an option is declared, checked, converted from plain data and described to a person.

`from_mapping` makes frozen dataclasses of nested plain data, strictly: an unknown key, a wrong type
or a value out of range is a `ConfigError` that names the key.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from rpn_train.errors import ConfigError

T = TypeVar("T")


def option(
    default: T,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> T:
    """A field with its meaning and legal range: low <= value <= high, value > above.

    The range holds for every number of a nested tuple.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above}
    value: T = field(default=default, metadata=metadata)
    return value


def from_mapping(
    kind: type[T],
    values: Mapping[str, Any],
    path: str = "",
    root: type | None = None,
    default: T | None = None,
) -> T:
    """Frozen dataclass `kind` from nested plain data; keys left out keep their defaults.

    `path`, `root` and `default` are its place, the outermost dataclass, and the default there,
    where it is nested in others.

    Raises:
        ConfigError: unknown key, wrong type, value out of range; the message names the full key.
    """
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(cast(Any, kind))}
    arguments = {}
    for key, value in values.items():
        full = f"{path}{key}"
        if key not in known:
            raise ConfigError(unknown_key(full, root or kind))
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{full}: expected a group of keys, got {value!r}")
            section = cast(type[Any], hints[key])
            arguments[key] = from_mapping(
                section, value, f"{full}.", root or kind, known[key].default
            )
        else:
            arguments[key] = _convert(full, hints[key], value)
            _check_range(full, known[key].metadata, arguments[key])
    return kind(**arguments) if default is None else replace(cast(Any, default), **arguments)


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain data (dicts, lists, numbers, strings) of a config; `from_mapping`'s inverse."""
    return cast(dict[str, Any], plain(dataclasses.asdict(config)))


def plain(value: Any) -> Any:
    """A nested value with lists for tuples, as YAML and checkpoints have it."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def walk(
    kind: type, path: str = "", defaults: Any = None
) -> Iterator[tuple[str, Any, Any, Mapping[str, Any]]]:
    """(key, type, default, metadata) of every option below a dataclass, in order."""
    hints, defaults = get_type_hints(kind), kind() if defaults is None else defaults
    for f in fields(kind):
        value = getattr(defaults, f.name)
        if is_dataclass(hints[f.name]):
            yield from walk(cast(type, hints[f.name]), f"{path}{f.name}.", value)
        else:
            yield f"{path}{f.name}", hints[f.name], value, f.metadata


def keys_and_sections(kind: type) -> tuple[set[str], set[str]]:
    """The full keys of all options below a dataclass, and of the groups that they are in."""
    keys = {name for name, *_ in walk(kind)}
    return keys, {name.rsplit(".", i)[0] for name in keys for i in range(1, name.count(".") + 1)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """What differs between two nested mappings: full key -> 'old -> new'."""
    found = {}
    for key in dict.fromkeys((*old, *new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.update(differences(a, b, f"{path}{key}."))
        elif a != b:
            found[f"{path}{key}"] = f"{a} -> {b}"
    return found


def unknown_key(key: str, root: type) -> str:
    """One line about a key that does not exist, with the nearest below `root` that does."""
    known = [name for name, *_ in walk(root)]
    groups = sorted({name.rsplit(".", 1)[0] for name in known if "." in name})
    close = difflib.get_close_matches(key, known + groups, n=1, cutoff=0.6)
    if not close:  # the right last part in another group: lr -> schedule.lr
        close = [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f"did you mean {close[0]!r}?" if close else "rpn-train --help lists the keys"
    return f"{key}: unknown key; {hint}"


def describe_type(hint: Any) -> str:
    """A type as a person writes it: 'a' | 'b', integer, list of numbers, ... | null."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " | ".join(describe_type(a) for a in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"non-empty list of {describe_type(args[0])}"
        return f"{len(args)} x {describe_type(args[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true | false"}
    return "null" if hint is types.NoneType else names[hint]


def _convert(key: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, or a ConfigError that names what was expected."""
    converted, fits = _try_convert(hint, value)
    if not fits:
        raise ConfigError(f"{key}: expected {describe_type(hint)}, got {value!r}")
    return converted


def _try_convert(hint: Any, value: Any) -> tuple[Any, bool]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value, value in args
    if origin in (Union, types.UnionType):
        tried = (_try_convert(a, value) for a in args)
        return next(((v, True) for v, fits in tried if fits), (None, False))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return None, False
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value) or not value:
            return None, False
        parts = [_try_convert(k, v) for k, v in zip(kinds, value, strict=True)]
        return tuple(v for v, _ in parts), all(fits for _, fits in parts)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # text too: YAML 1.1 reads 1e-3 as text
            return float(value), True
        except (ValueError, OverflowError):
            return None, False
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value), True  # a folder or a split named 2007
    return value, type(value) is hint


def _check_range(key: str, limits: Mapping[str, Any], value: Any) -> None:
    if isinstance(value, tuple):
        for v in value:
            _check_range(key, limits, v)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        low, high, above = limits["low"], limits["high"], limits["above"]
        if not abs(value) < math.inf:
            raise ConfigError(f"{key}: expected a finite number, got {value!r}")
        inside = (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
        )
        if not inside:
            raise ConfigError(f"{key}: expected {describe_range(limits)}, got {value!r}")


def describe_range(limits: Mapping[str, Any]) -> str:
    """'at least 0, at most 1'; empty where there is no limit."""
    words = {"above": "more than", "low": "at least", "high": "at most"}
    return ", ".join(f"{words[k]} {limits[k]:.12g}" for k in words if limits[k] is not None)
