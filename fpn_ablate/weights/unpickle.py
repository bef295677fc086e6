"""Pickles of numpy arrays, read without running what they name.

A pickle names functions and has them called. Here it gets none of numpy's or of Python's: for the few names that arrays are
made of, functions of this file stand in, which take plain values and check them. Every other name is refused.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from fpn_ablate.utils.errors import UserError

# Of numpy's type codes; an array of objects ("O") would be another pickle.
TYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class _DType:
    """Stands in for numpy.dtype: a code as "f4", and the order of its bytes."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *flags: object) -> None:
        if not isinstance(code, str) or code not in TYPES:
            raise UserError(f"it holds an array of type {code!r}; numbers alone are read")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"no order of bytes: {state[1]!r}")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands in for numpy.ndarray; `value` is there once the pickle has given shape, type and bytes."""

    __slots__ = ("value",)

    def __init__(self, *_: object) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        # Python 2 wrote bytes as text.
        self.fill(raw.encode("latin1") if isinstance(raw, str) else raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> None:
        shape = tuple(int(side) for side in (shape if isinstance(shape, tuple) else (shape,)))
        if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _DType) or min(shape, default=0) < 0:
            raise ValueError("an array is not made of bytes, type and shape")
        kind = dtype.numpy()
        if len(raw) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"an array of shape {shape} has {len(raw)} bytes")
        value = np.frombuffer(raw, kind).reshape(shape, order=order)
        self.value = np.ascontiguousarray(value, kind.newbyteorder("=")).reshape(shape).copy()


def _from_buffer(raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str, *_: object) -> _Array:
    """numpy's way of writing with protocol 5."""
    array = _Array()
    array.fill(raw, dtype, shape, "F" if order == "F" else "C")
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into pickles that Python 2 can read."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"no encoding of bytes: {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocol 2 writes the bytes of an empty array."""
    return b""


ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}


# Python's own reader, not C's: that one makes room for whatever a file claims to hold before it looks.
class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in ADMITTED:
            raise UserError(f"it asks for {module}.{name}, which is no part of an array; nothing in a file is run")
        # A new function each time: a pickle may set attributes of what it is given.
        return lambda *args: ADMITTED[module, name](*args)


def read(data: bytes) -> Any:
    """The dictionaries, lists and numbers of a pickle, its arrays as numpy arrays.

    Raises:
        UserError: it names something that is no part of an array.
        Exception: of any kind, where it is damaged.
    """
    return _plain(_Reader(io.BytesIO(data), encoding="latin1").load(), {})


def _plain(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """`seen`: what became of each dictionary. One that stands in many places is done once: a few hundred bytes could stand for
    billions of them."""
    if isinstance(value, dict):
        if depth > 4:
            raise ValueError("dictionaries in dictionaries")
        if id(value) not in seen:
            seen[id(value)] = {key: _plain(inner, seen, depth + 1) for key, inner in value.items()}
        return seen[id(value)]
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without values")
        return value.value
    return value
