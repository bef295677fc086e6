"""Read pickles of numpy arrays without running what they name.

A pickle names functions and has them called. Here it can call none of numpy's or Python's: functions of this module replace the
few that build arrays; they take plain values and check them. Every other name is refused.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from fpn_ablate.utils.errors import UserError

# numpy's type codes of numbers; an array of objects ("O") would contain another pickle.
TYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
MAX_SHARING = 10  # times the size of a file: arrays may share its bytes, but not fill the memory


class _DType:
    """Replace numpy.dtype: a type code such as "f4", and a byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *flags: object) -> None:
        if not isinstance(code, str) or code not in TYPES:
            raise UserError(f"it holds an array of type {code!r}; only arrays of numbers are read")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"no byte order: {state[1]!r}")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Replace numpy.ndarray; `value` is set once the pickle has given shape, type and bytes."""

    __slots__ = ("claim", "value")

    def __init__(self, *_: object, claim: Callable[[int], None] = lambda _: None) -> None:
        self.value: np.ndarray | None = None
        self.claim = claim

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        # Python 2 wrote bytes as text.
        self.fill(raw.encode("latin1") if isinstance(raw, str) else raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> None:
        shape = tuple(int(side) for side in (shape if isinstance(shape, tuple) else (shape,)))
        if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _DType) or min(shape, default=0) < 0:
            raise ValueError("an array that does not consist of bytes, type and shape")
        stored_dtype = dtype.numpy()
        if len(raw) != math.prod(shape) * stored_dtype.itemsize:
            raise ValueError(f"an array of shape {shape} has {len(raw)} bytes")
        self.claim(len(raw))
        value = np.frombuffer(raw, stored_dtype).reshape(shape, order=order)
        self.value = np.ascontiguousarray(value, stored_dtype.newbyteorder("=")).reshape(shape).copy()


def _from_buffer(
    raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str, *_: object, claim: Callable[[int], None]
) -> _Array:
    """Build an array as numpy writes it with protocol 5."""
    array = _Array(claim=claim)
    array.fill(raw, dtype, shape, "F" if order == "F" else "C")
    return array


def _encode(text: str, encoding: str = "latin1", *, claim: Callable[[int], None]) -> bytes:
    """Decode bytes as Python 3 writes them into pickles for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"no encoding of bytes: {encoding!r}")
    claim(len(text))
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Return the bytes of an empty array, as protocol 2 writes them."""
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


# Python's reader, not C's, which allocates as much memory as a file claims to need before it reads on.
class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.unclaimed = MAX_SHARING * len(data)

    def claim(self, count: int) -> None:
        """Count bytes that an array or a text takes; the same bytes of the file may be named again and again."""
        self.unclaimed -= count
        if self.unclaimed < 0:
            raise UserError(f"its arrays claim more than {MAX_SHARING} times the bytes of the file")

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in ADMITTED:
            raise UserError(f"it asks for {module}.{name}, which is no part of an array; nothing in a file is run")
        # A new function each time: a pickle may set attributes of what it gets.
        function = ADMITTED[module, name]
        if function in (_Array, _from_buffer, _encode):
            return lambda *args: function(*args, claim=self.claim)
        return lambda *args: function(*args)


def read(data: bytes) -> Any:
    """Read the dictionaries, lists, numbers and numpy arrays of a pickle.

    Raises:
        UserError: it names something that is no part of an array.
        Exception: of any type, if it is damaged.
    """
    return _plain(_Reader(data).load(), {})


def _plain(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """Replace the stand-ins of arrays by the arrays. `seen` holds the result for each dictionary, by its id.

    A dictionary that occurs repeatedly is converted once: a few hundred bytes of a pickle can describe billions of occurrences.
    """
    if isinstance(value, dict):
        if depth > 4:
            raise ValueError("dictionaries nested too deeply")
        if id(value) not in seen:
            seen[id(value)] = {key: _plain(inner, seen, depth + 1) for key, inner in value.items()}
        return seen[id(value)]
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without values")
        return value.value
    return value
