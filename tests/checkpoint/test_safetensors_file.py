"""A safetensors file is believed only where header and data agree to the last byte."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swincupy.checkpoint.safetensors_file import read_safetensors
from swincupy.errors import CheckpointError
from tests.checkpoint.writers import save_safetensors


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    r = np.random.default_rng(0)
    arrays = {
        f"{dtype} {i}": r.integers(0, 2, size=shape).astype(dtype)
        for i, shape in enumerate([(), (0, 3), (3,), (2, 5), (1, 2, 3)])
        for dtype in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    }
    save_file(arrays, tmp_path / "x.safetensors", {"key": "välue"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"key": "välue"}
    assert set(tensors) == set(arrays)
    for name, x in arrays.items():
        found = tensors[name].read()
        assert found.dtype == x.dtype and not found.flags.writeable
        np.testing.assert_array_equal(found, x)


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    x = np.array([1.0, -2.5, 3e38, 1e-40, np.inf, np.nan], np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    path = save_safetensors(tmp_path / "x", {"a": entry([2, 3], 0, 12, "BF16")}, bits.tobytes())
    found = read_safetensors(path)[0]["a"]
    assert (found.dtype, found.shape) == ("bfloat16", (2, 3))
    expected = (bits.astype(np.uint32) << 16).view(np.float32).reshape(2, 3)
    np.testing.assert_array_equal(found.read(), expected)


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    path = save_safetensors(tmp_path / "x", header, b"\1\2\3" + np.float32([1, 2]).tobytes())
    np.testing.assert_array_equal(read_safetensors(path)[0]["b"].read(), [1, 2])


def test_nothing_is_read_until_asked(tmp_path: Path) -> None:
    size = 64 * 2**20
    path = save_safetensors(tmp_path / "x", json.dumps({"a": entry([size // 4], 0, size)}).ljust(128).encode())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    tracemalloc.start()
    tensors, _ = read_safetensors(path)
    tensors["a"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


D = b"\0" * 16


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry([4], 0, 16)}, D[:15], "truncated"),
        ({"a": entry([2], 0, 8)}, D, "longer than its header says"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, D[:12], "overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, D[:8], "overlaps"),
        ({"a": entry([1], 0, 4), "b": entry([2], 8, 16)}, D, "gap"),
        ({"a": entry([3], 0, 8)}, D[:8], "takes 12 bytes"),
        ({"a": entry([2], 8, 0)}, D[:8], "takes 8 bytes"),
        ({"a": entry([-2], 0, 8)}, D[:8], "shape must be"),
        ({"a": entry([2.0], 0, 8)}, D[:8], "shape must be"),
        ({"a": entry([True, 2], 0, 8)}, D[:8], "shape must be"),
        ({"a": entry("2", 0, 8)}, D[:8], "shape must be"),
        ({"a": entry([2**62, 2**62, 0], 0, 0)}, b"", "shape must be"),
        ({"a": entry([2] * 40, 0, 8)}, D[:8], "shape must be"),
        ({"a": entry([2], -8, 0)}, D[:8], "data_offsets must be"),
        ({"a": entry([2], 0, "8")}, D[:8], "data_offsets must be"),
        ({"a": entry([2], 0, 10**30)}, D[:8], "data_offsets must be"),
        ({"a": entry([8], 0, 8, "F8_E4M3")}, D[:8], "dtype must be one of .* got 'F8_E4M3'"),
        ({"a": entry([2], 0, 8, ["F32"])}, D[:8], "dtype must be one of"),
        ({"a": {"dtype": "F32"}}, b"", "exactly dtype, shape and data_offsets"),
        ({"a": [1]}, b"", "exactly dtype, shape and data_offsets"),
        ({"a": entry() | {"strides": [1]}}, D[:8], "exactly dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"__metadata__": "x"}, b"", "__metadata__"),
        ([1, 2], b"", "must be a JSON object"),
        (b'{"a": {}, "a": {}}', b"", "'a' occurs twice"),
        (b'{"a": NaN}', b"", "not valid JSON"),
        (b'{"a": ', b"", "not valid JSON"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, b"", "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
        (b"", b"", "not valid JSON"),
    ],
)
def test_lying_header(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_safetensors(save_safetensors(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_000, 9 * 2**20])
def test_huge_header_length(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="announces a header"):
        read_safetensors(save_safetensors(tmp_path / "x", {}, b"", length))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\0" * 7, "too few"),
        (struct.pack("<Q", 50) + b"{}", "truncated"),
        (b"<html>" * 9, "announces"),
    ],
)
def test_not_safetensors_at_all(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_safetensors(tmp_path / "x")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="regular file"):
        read_safetensors(tmp_path)
