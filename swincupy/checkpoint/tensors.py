"""A tensor in a checkpoint, before its numbers are read."""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from swincupy.errors import CheckpointError

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

#: NumPy's type for the bytes of each dtype; bfloat16 is carried as its 16 bits.
STORAGE = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2",
    "int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1",
    "uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1", "bool": "?",
}  # fmt: skip
FLOATS = ("float16", "bfloat16", "float32", "float64")

_MAX_DIMS = 16
_MAX_BYTES = 2**62  # beyond any file; keeps sizes inside NumPy's integers


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Name (in the file), dtype and shape of a tensor, and the function that reads it.

    ``read()`` returns an array of ``shape``: a read-only view of the mapped file where it can,
    bfloat16 widened to float32.
    """

    name: str
    dtype: str
    shape: Shape
    read: Callable[[], Array]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)

    def then(self, shape: Shape, change: Callable[[Array], Array]) -> StoredTensor:
        """The same tensor with ``change`` applied after reading, which gives it ``shape``."""
        return dataclasses.replace(self, shape=shape, read=lambda: change(self.read()))


def itemsize(dtype: str) -> int:
    """Bytes of one element; 0 for a dtype that NumPy does not have (it is only ever named, not read)."""
    return np.dtype(STORAGE[dtype]).itemsize if dtype in STORAGE else 0


def check_shape(shape: Shape, what: str) -> None:
    """Refuse what no array can have: negative or absurd dimensions."""
    if len(shape) > _MAX_DIMS or any(d < 0 for d in shape) or math.prod(d for d in shape if d) > _MAX_BYTES // 8:
        shown = str(list(shape[:8])) + (" ..." if len(shape) > 8 else "")
        raise CheckpointError(f"{what}: shape must be at most {_MAX_DIMS} sizes >= 0 of an array, got {shown[:200]}")


def decode(raw: Array, dtype: str, byteorder: Literal["<", ">"] = "<") -> Array:
    """Bytes [n] (uint8) as a flat array of ``dtype``: a view if the machine can read it in place."""
    storage = np.dtype(STORAGE[dtype]).newbyteorder(byteorder)
    if raw.ctypes.data % storage.alignment:
        raw = raw.copy()  # unaligned views are legal but slow everywhere afterwards
    values = raw.view(storage)
    if not storage.isnative:
        values = values.astype(storage.newbyteorder("="))
    return widen(values) if dtype == "bfloat16" else values


def widen(bits: Array) -> Array:
    """bfloat16 bits (uint16) as float32, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def map_file(path: Path) -> Array:
    """The bytes of a file [n] (uint8), mapped, not read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: a checkpoint must be a regular file or a directory")
        if status.st_size == 0:
            raise CheckpointError(f"{path}: the file is empty; download it again")
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file or directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def read_small(path: Path, limit: int) -> bytes:
    """A whole small file, such as a config.json; more than ``limit`` bytes are refused."""
    data = map_file(path)
    if data.size > limit:
        raise CheckpointError(f"{path}: must be at most {limit} bytes, got {data.size}")
    return data.tobytes()
