"""What the CUTLASS kernel is given, on a stand-in for the driver that notes the tensor maps it is asked for."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import types
from typing import Any

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import DeviceError
from swincupy.ops import cutlass, tensor_maps


class Driver(types.ModuleType):
    """The part of ``cuda.bindings.driver`` in use."""

    cuuint32_t = cuuint64_t = int
    CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.asked: list[tuple[Any, ...]] = []
        self.status = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("CUtensorMap"):
            raise AttributeError(name)
        return type(name, (), {"__getattr__": lambda self, constant: constant})()

    def cuTensorMapEncodeTiled(self, *args: Any) -> tuple[int, Any]:
        self.asked.append(args)
        return self.status, types.SimpleNamespace(opaque=list(range(16)))

    def fetch(self, array: np.ndarray, *corner: int) -> np.ndarray:
        """The rows of 128 bytes that the copy engine brings from ``array`` for the map that was asked for last."""
        _, rank, address, sizes, strides, box, steps, _, swizzle, _, _ = self.asked[-1]
        assert rank == len(sizes) == len(box) == len(strides) + 1 and set(steps) == {1} and max(box) <= 256
        assert swizzle.endswith("SWIZZLE_128B") and box[0] * array.itemsize == 128
        assert address % 16 == 0 and all(s % 16 == 0 for s in strides)
        rows = []
        for at in itertools.product(*map(range, reversed(box[1:]))):  # the first dimension runs fastest
            index = [c + i for c, i in zip(corner, (0, *reversed(at)), strict=True)]
            row = np.zeros(box[0], array.dtype)
            if all(i < n for i, n in zip(index[1:], sizes[1:], strict=True)):
                start = sum(i * s for i, s in zip(index[1:], strides, strict=True)) // array.itemsize + index[0]
                count = max(min(box[0], sizes[0] - index[0]), 0)
                assert start + count <= array.size, "reads beyond the array"
                row[:count] = array.reshape(-1)[start : start + count]
            rows.append(row)
        return np.array(rows)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    for name, module in {"cuda.bindings": bindings, "cuda.bindings.driver": driver}.items():
        monkeypatch.setitem(sys.modules, name, module)
    tensor_maps._tensor_map.cache_clear()
    yield driver
    tensor_maps._tensor_map.cache_clear()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.uint16), ("tf32", np.float32)])
def test_rows(driver: Driver, name: str, dtype: Any) -> None:
    a = np.arange(1, 1 + 100 * 104).reshape(100, 104).astype(dtype)
    width = 128 // a.itemsize
    made = tensor_maps.rows(4096, 100, 104, name, 64)
    assert made.size == 1 and made.nbytes == 128
    padded = np.zeros((128, 256), dtype)
    padded[:100, :104] = a
    assert (driver.fetch(a, width, 64) == padded[64:128, width : 2 * width]).all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", np.uint16), ("tf32", np.float32)])
def test_permuted_rows(driver: Driver, name: str, dtype: Any) -> None:
    """What thread i has of each 32 or 16 rows, 8 j + 2 i + e for e < 2, are neighbours, 16 bytes of a result's row."""
    w = np.arange(1, 1 + 160 * 72).reshape(160, 72).astype(dtype)
    tensor_maps.permuted_rows(4096, 160, 72, name, 96)
    n = 16 // w.itemsize
    got = driver.fetch(w, 0, 0, 0, 0, 96 // (4 * n))
    padded = np.zeros((192, 128 // w.itemsize), dtype)
    padded[:160, : min(72, padded.shape[1])] = w[:, : padded.shape[1]]
    for first, i, j, e in itertools.product(range(0, 96, 4 * n), range(4), range(n // 2), range(2)):
        assert (got[first + 8 * j + 2 * i + e] == padded[96 + first + n * i + 2 * j + e]).all()


def test_maps_are_made_once(driver: Driver) -> None:
    assert tensor_maps.rows(4096, 8, 64, "fp16", 64) is tensor_maps.rows(4096, 8, 64, "fp16", 64)
    assert len(driver.asked) == 1


def test_a_map_that_the_driver_refuses(driver: Driver) -> None:
    driver.status = 1
    with pytest.raises(DeviceError, match="tensor map"):
        tensor_maps.rows(4096, 8, 64, "fp16", 64)


def test_a_launch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(jit, "kernel", lambda name, **c: lambda *args, shared: launches.append((name, c, args, shared)))
    tile = cutlass.Tile(128, 96, 4)
    product = cutlass.Product(300, 288, 96, precisions.of("fp16"), gelu=True, tile=tile)
    arrays = [types.SimpleNamespace(data=types.SimpleNamespace(ptr=p)) for p in (4096, 8192, 16384)]
    product(*arrays, None, "out")
    name, constants, args, shared = launches[0]
    assert (name, constants["arch"], constants["scalar_t"]) == ("cutlass_gemm", "sm_90a", "__half")
    assert args[:2] == (3 * 3, 256 + 32) and shared == 4 * ((128 + 96) * 128 + 16)
    assert args[4:] == (arrays[2], None, "out", 300, 288, 96, True)
    assert len(args) - 2 == len(jit.parameters("cutlass_gemm", {}))


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    fp16, here = precisions.of("fp16"), [90]
    monkeypatch.setattr(jit, "compute_capability", lambda: here[0])
    monkeypatch.setattr(jit, "cutlass", lambda: None)
    assert cutlass.takes(96, fp16) and not cutlass.takes(1000, fp16) and not cutlass.takes(96, precisions.of("fp32"))
    here[0] = 100
    assert not cutlass.takes(96, fp16)
    here[0] = 90
    monkeypatch.setattr(jit, "cutlass", lambda: (_ for _ in ()).throw(DeviceError("none")))
    assert not cutlass.takes(96, fp16)


def test_without_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    jit.cutlass.cache_clear()
    with pytest.raises(DeviceError, match=r"swincupy\[cutlass\]"):
        jit.source("cutlass_gemm", {})
    assert "cutlass" not in jit.source("gemm", {}).lower()
