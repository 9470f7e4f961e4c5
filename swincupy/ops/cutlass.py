"""Matrix products through CUTLASS, where its headers are installed: ``cuda/cutlass_gemm.cu``, for SM 9.0.

The tensor copy engine brings both operands to shared memory by tensor maps that are made here, and the
sums get bias, exact GELU or residual before they leave the registers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import DeviceError
from swincupy.precision import Precision

Array = Any

_ARCH = "sm_90a"
_SLAB = 128  # bytes of K that a stage holds of each row


class Tile(NamedTuple):
    """How ``cuda/cutlass_gemm.cu`` cuts the result: a block's tile, and slabs of K in shared memory."""

    bm: int
    bn: int
    stages: int


TILES = (Tile(128, 128, 3), Tile(64, 96, 4), Tile(128, 192, 4), Tile(128, 96, 4), Tile(64, 128, 4))


def takes(N: int, precision: Precision) -> bool:
    """Whether the kernel computes products of this width here, given what `gemm.choices` asks of any kernel."""
    if N % 32 or precision.name == "fp32" or jit.compute_capability() != 90:
        return False
    try:
        jit.cutlass()
    except DeviceError:
        return False
    return True


class Product:
    """``out = act(a @ w.T + bias) + residual`` for one shape, on CuPy's current device.

    Parameters
    ----------
    M, N, K : int
        a [M, K], w [N, K], out and residual [M, N], C-contiguous; N a multiple of 32, K of 16 bytes.
    precision : Precision
        Not fp32.
    gelu : bool
    tile : Tile

    Raises
    ------
    DeviceError
        No CUTLASS, or the kernel does not compile for this GPU.
    """

    def __init__(self, M: int, N: int, K: int, precision: Precision, *, gelu: bool, tile: Tile) -> None:
        self._kernel = jit.kernel("cutlass_gemm", arch=_ARCH, **constants(tile, precision))
        self._blocks = -(-M // tile.bm) * -(-N // tile.bn)
        self._threads = tile.bm * 2 + 32
        self._shared = tile.stages * ((tile.bm + tile.bn) * _SLAB + 16)
        self._sizes, self._gelu, self._precision, self._tile = (M, N, K), gelu, precision.name, tile

    def __call__(self, a: Array, w: Array, bias: Array | None, residual: Array | None, out: Array) -> None:
        """Enqueue the product on CuPy's current stream; ``residual`` may be ``out``."""
        M, N, K = self._sizes
        of_a = rows(a.data.ptr, M, K, self._precision, self._tile.bm)
        of_w = permuted_rows(w.data.ptr, N, K, self._precision, self._tile.bn)
        self._kernel(
            self._blocks, self._threads, of_a, of_w, bias, residual, out, M, N, K, self._gelu, shared=self._shared
        )


def constants(tile: Tile, precision: Precision) -> dict[str, jit.Constant]:
    """The kernel's compile-time constants."""
    return {"scalar_t": precision.ctype, "BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages}


def rows(address: int, M: int, K: int, precision: str, box: int) -> np.ndarray:
    """Tensor map of [M, K], a box of it ``box`` rows of 128 bytes."""
    pitch = K * precisions.of(precision).storage.itemsize
    return _tensor_map(address, (K, M), (pitch,), (box,), precision)


def permuted_rows(address: int, N: int, K: int, precision: str, box: int) -> np.ndarray:
    """Tensor map of [N, K] as ``[N / 32, j, i, e, K]``: of each 32 rows, 8 i + 2 j + e comes at 8 j + 2 i + e."""
    pitch = K * precisions.of(precision).storage.itemsize
    strides = (pitch, 8 * pitch, 2 * pitch, 32 * pitch)
    return _tensor_map(address, (K, 2, 4, 4, N // 32), strides, (2, 4, 4, box // 32), precision)


@functools.lru_cache(1024)
def _tensor_map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], precision: str
) -> np.ndarray:
    """``CUtensorMap`` of an array, its innermost dimension first; zeros where a box leaves it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            f"gemm: cuda-bindings must be installed, got {error}; "
            'pip install "swincupy[cuda12]" or "swincupy[cuda13]", whichever the driver supports'
        ) from error
    types = driver.CUtensorMapDataType
    itemsize = precisions.of(precision).storage.itemsize
    status, made = driver.cuTensorMapEncodeTiled(
        # float32 is rounded to tf32 on its way, 16 bits are left as they are
        types.CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 if itemsize == 4 else types.CU_TENSOR_MAP_DATA_TYPE_UINT16,
        driver.cuuint32_t(len(sizes)), address,
        [driver.cuuint64_t(n) for n in sizes], [driver.cuuint64_t(n) for n in strides],
        [driver.cuuint32_t(n) for n in (_SLAB // itemsize, *box)], [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"gemm: an array must have a tensor map, got {status!r} for sizes {sizes}, strides {strides}")
    # one element of 128 bytes: CuPy passes arrays of one element by value
    return np.array([int(word) for word in made.opaque], np.uint64).view("V128")


def variants() -> Iterator[jit.Variant]:
    """A tile for each size of an element, for checks that they compile: all take half a minute."""
    for tile, name in zip(TILES, ("fp16", "tf32"), strict=False):
        yield jit.Variant("cutlass_gemm", constants(tile, precisions.of(name)), 90, _ARCH)
