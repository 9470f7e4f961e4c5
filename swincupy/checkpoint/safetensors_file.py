"""Reading safetensors: the header is checked to the last byte, the data is mapped.

A file is 8 bytes (little endian) with the length n of the header, n bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``, and the
data, in which the tensors lie without gaps. See https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from swincupy.checkpoint.tensors import Array, StoredTensor, check_shape, decode, itemsize, map_file
from swincupy.errors import CheckpointError

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

# The largest published header is under 100 kB; parsed JSON takes some 50 times its text in memory.
_MAX_HEADER = 8 * 2**20


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises
    ------
    CheckpointError
        The file is truncated, its header is not valid, or the header and the data disagree.
    """
    data = map_file(path)
    header, start = _header(data, path.name)
    metadata = _metadata(header.pop("__metadata__", {}), path.name)
    body = data[start:]
    tensors: dict[str, StoredTensor] = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry, path.name)
        spans.append((begin, end, name))
        tensors[name] = StoredTensor(name, dtype, shape, _reader(body, dtype, shape, begin, end))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CheckpointError(f"{path.name}: tensor {_short(name)} {fault} (it begins at byte {begin} of the data)")
        position = end
    if position != body.size:
        fault = "truncated; download it again" if position > body.size else "longer than its header says"
        raise CheckpointError(
            f"{path.name}: the file is {fault} (the header describes {position} bytes of data, there are {body.size})"
        )
    return tensors, metadata


def _reader(body: Array, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> Any:
    return lambda: decode(body[begin:end], dtype).reshape(shape)


def _header(data: Array, file: str) -> tuple[dict[str, Any], int]:
    if data.size < 8:
        raise CheckpointError(f"{file}: not a safetensors file: {data.size} bytes are too few; download it again")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{file}: not a safetensors file: it announces a header of {length} bytes, at most {_MAX_HEADER} are read"
        )
    if length > data.size - 8:
        raise CheckpointError(
            f"{file}: the file is truncated: its header should take {length} bytes, {data.size - 8} are there; "
            "download it again"
        )
    try:
        header = json.loads(
            data[8 : 8 + length].tobytes().decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the safetensors header is not valid JSON ({str(error)[:200]})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header must be a JSON object, got {type(header).__name__}")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {_short(again)} occurs twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def _metadata(found: Any, file: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{file}: __metadata__ of the safetensors header must map strings to strings")
    return found


def _entry(name: str, entry: Any, file: str) -> tuple[str, tuple[int, ...], int, int]:
    what = f"{file}: tensor {_short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: its header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{what}: dtype must be one of {', '.join(DTYPES)}, got {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(_is_size(d) for d in shape):
        raise CheckpointError(f"{what}: shape must be a list of integers >= 0, got {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(d) for d in offsets):
        raise CheckpointError(f"{what}: data_offsets must be two integers >= 0, got {str(offsets)[:80]}")
    check_shape(tuple(shape), what)
    begin, end = offsets
    need = math.prod(shape) * itemsize(DTYPES[dtype])
    if end - begin != need:
        raise CheckpointError(
            f"{what}: {dtype} {str(shape)[:80]} takes {need} bytes, data_offsets {str(offsets)[:80]} give "
            f"{str(end - begin)[:40]}"
        )
    return DTYPES[dtype], tuple(shape), begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")
