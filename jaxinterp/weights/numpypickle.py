"""Pickled numpy arrays, read without an unpickler: a dict of arrays, or of lists of arrays, such as Keras's weights.

The pickle is run by the machine of `pickles`. It may name `numpy.ndarray`, `numpy.dtype`, the function that makes an
empty array before its state is set, and `_codecs.encode`, with which Python 3 writes bytes as latin-1 text into old
protocols. Arrays are made afterwards, each from bytes of exactly its size; structured types, objects and text are
refused.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinterp.weights.pickles import Machine, PickleError, function

_LIMIT = 256 << 20
_WHAT = "a dict of numpy arrays"


@dataclass(eq=False)
class _Type:
    """numpy.dtype(code), until its state says the byte order."""

    code: str
    order: str | None = None

    def dtype(self) -> np.dtype:
        return np.dtype((">" if self.order == ">" else "<") + self.code)


@dataclass(eq=False)
class _Array:
    """An array, until its state says everything about it."""

    state: tuple | None = None


@dataclass(frozen=True, eq=False)
class _Latin1:
    """Bytes written as text; encoded when an array is made of them, since a pickle may name one text many times."""

    text: str


_NDARRAY = object()
_CODES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _NDARRAY or shape != (0,) or not isinstance(code, bytes | str | _Latin1):
        raise PickleError("an array begins as something that is not an empty ndarray")
    return _Array()


def _type(code: object, *flags: object) -> _Type:
    if not isinstance(code, str) or code not in _CODES:
        shown = code[:40] if isinstance(code, str) else type(code).__name__
        raise PickleError(f"arrays of type {shown!r} are not read")
    return _Type(code)


def _encode(text: object, encoding: object = "utf-8") -> _Latin1:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError("text is encoded in something other than latin-1")
    return _Latin1(text)


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): function(_type, 1, 3),
    ("numpy.core.multiarray", "_reconstruct"): function(_reconstruct, 3),
    ("numpy._core.multiarray", "_reconstruct"): function(_reconstruct, 3),
    ("_codecs", "encode"): function(_encode, 2),
}


def _build(target: object, state: object) -> bool:
    if isinstance(target, _Array):
        if target.state is not None or not isinstance(state, tuple) or len(state) != 5:
            raise PickleError("an array is given a malformed state, or two")
        target.state = state
        return True
    if isinstance(target, _Type):
        # version, byte order, sub-type, names, fields, item size, alignment, flags
        if target.order is not None or not isinstance(state, tuple) or len(state) not in (8, 9):
            raise PickleError("a type is given a malformed state, or two")
        if state[1] not in ("<", ">", "|") or any(part is not None for part in (*state[2:5], *state[8:])):
            raise PickleError("a structured type is not read")
        target.order = state[1]
        return True
    return False


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a pickled dict of numpy arrays.

    Args:
        path: the file, at most 256 MiB.

    Returns:
        The arrays by name, in file order, as C-contiguous arrays that own their memory. The item `i` of a list
        under the key "conv1" is called "conv1.i".

    Raises:
        PickleError: the file is damaged, names something else, or holds something that is not an array.
        OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > _LIMIT:
                raise PickleError(f"a pickle of {size} bytes, more than {_LIMIT}")
            if not size:
                raise PickleError("the file is empty")
            found = Machine(io.BytesIO(file.read(_LIMIT)), names=_NAMES, build=_build, what=_WHAT).run()
            return _arrays(found, size)
        except PickleError as error:
            raise PickleError(f"{path}: {error}") from None


def _arrays(found: object, size: int) -> dict[str, np.ndarray]:
    if not isinstance(found, dict):
        raise PickleError(f"holds an object of type {type(found).__name__}, not {_WHAT}")
    arrays: dict[str, np.ndarray] = {}
    budget = size  # every array has bytes of its own in the file, so together they are smaller
    for key, value in found.items():
        if not isinstance(key, str):
            raise PickleError(f"entry {key!r}: the name is no text")
        listed = isinstance(value, list | tuple)
        for name, item in ((f"{key}.{i}", item) for i, item in enumerate(value)) if listed else [(key, value)]:
            if not isinstance(item, _Array) or name in arrays:
                what = "occurs twice" if name in arrays else f"is of type {type(item).__name__}, not an array"
                raise PickleError(f"entry {name!r} {what}")
            try:
                arrays[name] = _array(item, budget)
            except PickleError as error:
                raise PickleError(f"tensor {name!r}: {error}") from None
            budget -= arrays[name].nbytes
    return arrays


def _array(item: _Array, budget: int) -> np.ndarray:
    if item.state is None:
        raise PickleError("it has no content")
    _, shape, kind, by_columns, content = item.state
    if not isinstance(shape, tuple) or len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape):
        raise PickleError("its shape is malformed")
    if not isinstance(kind, _Type) or type(by_columns) not in (bool, int):
        raise PickleError("its type is malformed")
    dtype = kind.dtype()
    expected = math.prod(shape) * dtype.itemsize
    # An empty axis counts as 1: numpy refuses an empty array whose other axes are huge.
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > budget:
        raise PickleError(f"the shape {shape} needs more bytes than the file has")
    if isinstance(content, _Latin1 | str):
        text = content.text if isinstance(content, _Latin1) else content
        try:
            content = text.encode("latin-1") if len(text) == expected else b""
        except UnicodeEncodeError:
            raise PickleError("its bytes are not latin-1 text") from None
    if not isinstance(content, bytes) or len(content) != expected:
        raise PickleError(f"its shape {shape} does not fit its bytes")
    array = np.frombuffer(content, dtype)
    if dtype == np.bool_:  # a byte other than 0 and 1 would be a bool that equals neither
        array = array.view(np.uint8) != 0
    array = array.reshape(shape, order="F" if by_columns else "C")
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")
