"""cuda/wgmma_gemm.cu compiled by g++ and run on the CPU: its ring, its turns, its permuted columns, its edges."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swincupy import precision as precisions
from swincupy.ops import reference, tensor_maps, wgmma
from tests.host import emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU")

MAP = np.dtype([("base", "u8"), ("sizes", "i8", 5), ("strides", "i8", 5), ("box", "i4", 5), ("rank", "i4"),
                ("itemsize", "i4")], align=True)  # fmt: skip


def tensor_map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], precision: str
) -> np.ndarray:
    """What tests/host/hopper.cuh reads, in place of a CUtensorMap."""
    itemsize, made = precisions.of(precision).storage.itemsize, np.zeros(1, MAP)
    made["base"], made["rank"], made["itemsize"] = address, len(sizes), itemsize
    made["sizes"][0, : len(sizes)], made["strides"][0, : len(sizes)] = sizes, (itemsize, *strides)
    made["box"][0, : len(sizes)] = (tensor_maps.SLAB // itemsize, *box)
    return made


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tensor_maps, "_tensor_map", tensor_map)
    with emulator.installed():  # which has two multiprocessors, so that tiles come in turns
        yield


# both numbers of groups; rows and columns that fill no tile; K of less than a slab, of part of one, beyond the ring
CASES = [
    (wgmma.Tile(64, 96, 2, 2, 1), (700, 160, 200), "fp16", ("bias", "gelu")),
    (wgmma.Tile(128, 96, 2, 3, 1), (333, 96, 456), "fp16", ("bias", "residual")),
    (wgmma.Tile(128, 192, 2, 4, 1), (130, 416, 64), "fp16", ()),
    (wgmma.Tile(64, 64, 1, 6, 1), (70, 96, 520), "fp16", ("residual",)),
    (wgmma.Tile(64, 64, 1, 3, 4), (70, 96, 520), "fp16", ("bias", "residual")),
    (wgmma.Tile(64, 64, 1, 6, 2), (65, 64, 200), "fp16", ("bias", "gelu")),
    (wgmma.Tile(64, 32, 1, 8, 1), (1, 32, 8), "fp16", ("bias",)),
    (wgmma.Tile(64, 96, 2, 3, 1), (200, 96, 132), "tf32", ("bias", "gelu")),
    (wgmma.Tile(64, 96, 2, 3, 1), (333, 160, 192), "fp16", ("norm", "bias", "gelu")),
    (wgmma.Tile(64, 64, 1, 6, 1), (70, 96, 448), "fp16", ("norm",)),
    (wgmma.Tile(64, 64, 1, 3, 4), (70, 64, 512), "fp16", ("norm", "bias", "moments")),
    (wgmma.Tile(64, 96, 2, 2, 1), (300, 192, 64), "fp16", ("bias", "residual", "moments")),
    (wgmma.Tile(64, 64, 1, 3, 4), (70, 128, 520), "fp16", ("residual", "moments")),
    (wgmma.Tile(128, 192, 2, 2, 1), (700, 416, 192), "fp16", ("norm", "bias", "gelu")),
    (wgmma.Tile(128, 192, 2, 2, 1), (300, 384, 64), "fp16", ("bias", "residual", "moments")),
    (wgmma.Tile(64, 96, 2, 2, 1), (200, 192, 384), "fp16", ("norm", "bias", "gelu", "moments")),
    (wgmma.Tile(128, 128, 2, 2, 1), (300, 160, 384), "fp16", ("norm", "bias", "gelu")),
    (wgmma.Tile(128, 96, 2, 2, 1), (300, 160, 96), "tf32", ("norm", "bias")),
    (wgmma.Tile(128, 96, 2, 2, 1), (300, 96, 96), "tf32", ("bias", "residual", "moments")),
    (wgmma.Tile(128, 128, 2, 2, 1), (300, 96, 128), "fp16", ("norm", "bias", "gelu")),
]


def moments_of(x: np.ndarray, width: int) -> np.ndarray:
    """Mean and sum of squared deviations of so many neighbours in a row: [M, C / width, 2]."""
    parts = x.reshape(len(x), -1, width)
    return np.stack([parts.mean(axis=2), parts.var(axis=2) * width], axis=2)


@pytest.mark.parametrize(("tile", "size", "name", "parts"), CASES, ids=str)
def test_wgmma_gemm(
    monkeypatch: pytest.MonkeyPatch, tile: wgmma.Tile, size: tuple[int, int, int], name: str, parts: tuple[str, ...]
) -> None:
    if tile.groups == 2:
        monkeypatch.setattr(wgmma, "_FEW", 0)  # rows count as many
    (M, N, K), precision, rng = size, precisions.of(name), np.random.default_rng()
    shapes = {"a": (M, K), "w": (N, K), "bias": (N,), "residual": (M, N)}
    x: dict[str, Any] = {
        k: emulator.asarray(rng.standard_normal(shapes[k]).astype(precision.storage))
        for k in ("a", "w", *parts) if k in shapes
    }  # fmt: skip
    out = emulator.asarray(np.full((M + 1, N), np.nan, precision.storage))
    moments = emulator.asarray(np.full((M + 1, N // (wgmma.neighbours(M, N) or N), 2), np.nan, np.float32))
    exact = {k: np.asarray(v, np.float64) for k, v in x.items()}
    norm = None
    if "norm" in parts:
        x["a"][...] = 3 + x["a"] * rng.uniform(0.5, 2, (M, 1))  # rows have a mean, and deviations of their own
        exact["a"] = np.asarray(x["a"], np.float64)
        sums = emulator.asarray(exact["w"].sum(axis=1).astype(np.float32))
        norm = wgmma.Norm(
            emulator.asarray(moments_of(exact["a"], wgmma.neighbours(M, K)).astype(np.float32)), sums, 1e-5
        )
        exact["a"] = reference.layer_norm(exact["a"], np.ones(K), np.zeros(K))
    product = wgmma.Product(
        M, N, K, precision, gelu="gelu" in parts, norm="norm" in parts, moments="moments" in parts, tile=tile
    )
    product(x["a"], x["w"], x.get("bias"), x.get("residual"), out[:M], norm, moments[:M])
    want = reference.linear(exact["a"], exact["w"], exact.get("bias"))
    want = reference.gelu(want) if "gelu" in parts else want + exact.get("residual", 0.0)
    assert np.linalg.norm(np.asarray(out[:M], np.float64) - want) <= precision.tolerance * np.linalg.norm(want)
    assert np.isnan(out[M]).all(), "wrote past the last row"
    if "moments" in parts:
        of_rows = moments_of(want, wgmma.neighbours(M, N))
        np.testing.assert_allclose(moments[:M], of_rows, rtol=1e-2, atol=1e-2)
        assert np.isnan(moments[M]).all(), "wrote past the last row"


def test_a_row_has_one_group_or_an_even_number() -> None:
    """They are read two at a time."""
    for N in range(32, 6144 + 1, 32):
        for M in (1, 49, 196, 1568, 6272, 25088, 100352, 401408):
            width = wgmma.neighbours(M, N)
            assert width in (0, N) or N % (2 * width) == 0, (M, N)


# maps of more and of fewer rows than a tile takes, K beyond the ring, both numbers of groups, K shared
MAPS = [
    (wgmma.Tile(64, 96, 2, 2, 1), (2, 6, 14, 64), 160, "fp16", ("norm", "bias")),
    (wgmma.Tile(128, 192, 2, 3, 1), (3, 10, 56, 96), 192, "fp16", ("norm", "bias", "moments")),
    (wgmma.Tile(64, 32, 1, 8, 1), (1, 14, 14, 96), 96, "fp16", ("norm",)),
    (wgmma.Tile(64, 64, 1, 2, 4), (1, 4, 10, 128), 64, "fp16", ("norm",)),
    (wgmma.Tile(64, 64, 1, 2, 2), (1, 4, 10, 64), 64, "fp16", ()),
    (wgmma.Tile(64, 64, 1, 3, 1), (1, 2, 128, 32), 64, "tf32", ("norm", "bias")),
    (wgmma.Tile(128, 96, 2, 2, 1), (1, 8, 28, 96), 192, "tf32", ("norm", "bias", "moments")),
]


def drawn(rng: np.random.Generator, precision: precisions.Precision, *shape: int) -> np.ndarray:
    return emulator.asarray(rng.standard_normal(shape).astype(precision.storage))


@pytest.mark.parametrize(("tile", "shape", "N", "name", "parts"), MAPS, ids=str)
def test_neighbours_in_a_map(
    monkeypatch: pytest.MonkeyPatch, tile: wgmma.Tile, shape: tuple[int, ...], N: int, name: str, parts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(wgmma, "_FEW", 0)
    (B, H, W, C), precision, rng = shape, precisions.of(name), np.random.default_rng()
    M, K, gather = B * H * W // 4, 4 * C, W // 2
    assert wgmma.takes_gather(gather, K, precision)
    x, w, bias = drawn(rng, precision, *shape), drawn(rng, precision, N, K), drawn(rng, precision, N)
    x[...] = 3 + x * rng.uniform(0.5, 2, (B, H, W, 1))
    exact, weight = np.asarray(x, np.float64), np.asarray(w, np.float64)
    of_rows = exact.reshape(B, H // 2, 2, W // 2, 2 * C).swapaxes(2, 3).reshape(M, K)
    want = reference.layer_norm(of_rows, np.ones(K), np.zeros(K)) if "norm" in parts else of_rows
    want = reference.linear(want, weight, np.asarray(bias, np.float64) if "bias" in parts else None)
    out = emulator.asarray(np.full((M + 1, N), np.nan, precision.storage))
    moments = emulator.asarray(np.full((M + 1, N // (wgmma.neighbours(M, N) or N), 2), np.nan, np.float32))
    width = wgmma.neighbours(4 * M, C) or 32  # tokens of 96 or 128 channels have one group
    of_tokens = emulator.asarray(moments_of(exact.reshape(4 * M, C), width).astype(np.float32))
    sums = emulator.asarray(weight.sum(axis=1).astype(np.float32))
    norm = wgmma.Norm(of_tokens, sums, 1e-5) if "norm" in parts else None
    product = wgmma.Product(
        M, N, K, precision, gelu=False, norm="norm" in parts, moments="moments" in parts, gather=gather, tile=tile
    )
    product(x.reshape(M, K), w, bias if "bias" in parts else None, None, out[:M], norm, moments[:M])
    assert np.linalg.norm(np.asarray(out[:M], np.float64) - want) <= precision.tolerance * np.linalg.norm(want)
    assert np.isnan(out[M]).all(), "wrote past the last row"
    if "moments" in parts:
        np.testing.assert_allclose(moments[:M], moments_of(want, wgmma.neighbours(M, N)), rtol=1e-2, atol=1e-2)
