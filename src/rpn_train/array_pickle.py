"""Pickles of arrays, read without running anything they contain.

A pickle is a program that may call whatever it names. Here it may name what rebuilds an array of
numbers, and each of these names stands for a function below; numpy's own trust their arguments.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpn_train.errors import DataError


def load_arrays(path: Path) -> Any:
    """Lists, tuples, dicts, strings, bytes, numbers and numeric arrays in any nesting.

    Those that Python 2 wrote, too.

    Raises:
        DataError: the file is broken or holds anything else; names it.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except _RefusedError as error:
        raise DataError(
            f"{path}: expected a pickle of arrays in plain containers, got {error}"
        ) from error
    except Exception as error:  # a torn or foreign file can break the reader in any way
        raise DataError(
            f"{path}: expected a pickle of arrays, got a broken or another file "
            f"({type(error).__name__})"
        ) from error


class _RefusedError(Exception):
    """What was found in place of arrays."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full not in _ADMITTED:
            raise _RefusedError(full)
        return _ADMITTED[full]


class _Dtype:
    """Stands for `numpy.dtype`, which also makes objects and records."""

    def __init__(self, name: str, *_copy: object) -> None:
        if not re.fullmatch("[biuf][1248]", name):
            raise _RefusedError(f"an array of dtype {name!r}")
        self.numeric = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numeric = self.numeric.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """Stands for `numpy.ndarray`, whose state could say that bytes are pointers."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, content = state
        super().__setstate__((1, shape, dtype.numeric, fortran, _as_bytes(content)))


def _reconstruct(*_: object) -> _Array:
    return _Array((0,), np.uint8)


def _frombuffer(
    content: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any
) -> NDArray[np.generic]:
    return np.frombuffer(content, dtype.numeric).reshape(shape, order=order)


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    return np.frombuffer(_as_bytes(content), dtype.numeric)[0].item()


def _as_bytes(text: bytes | str, encoding: str = "latin1") -> bytes:
    """Python 2 had one type for both, and its protocols write bytes as text of this encoding."""
    if encoding != "latin1":
        raise _RefusedError(f"text of encoding {encoding!r}")
    return text.encode("latin1") if isinstance(text, str) else text


_ADMITTED: dict[str, object] = {
    "__builtin__.bytes": bytes,  # what b"" is written as, in the protocols of Python 2
    "_codecs.encode": _as_bytes,
    "collections.OrderedDict": dict,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": "numpy.ndarray",  # only named, to _reconstruct, which knows
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy._core.multiarray._reconstruct": _reconstruct,  # since numpy 2
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _frombuffer,
}
