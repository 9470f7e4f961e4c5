"""Matrix products through CUTLASS, where its headers are installed: ``cuda/cutlass_gemm.cu``, for SM 9.0.

The tensor copy engine brings both operands to shared memory by tensor maps that are made here, and the
sums get bias, exact GELU or residual before they leave the registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import DeviceError
from swincupy.ops import tensor_maps
from swincupy.precision import Precision

Array = Any


class Tile(NamedTuple):
    """How ``cuda/cutlass_gemm.cu`` cuts the result: a block's tile, and slabs of K in shared memory."""

    bm: int
    bn: int
    stages: int

    @property
    def kernel(self) -> str:
        """The kernel that has such tiles."""
        return "cutlass_gemm"


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
        self._kernel = jit.kernel(tile.kernel, arch=jit.HOPPER, **constants(tile, precision))
        self._blocks = -(-M // tile.bm) * -(-N // tile.bn)
        self._threads = tile.bm * 2 + 32
        self._shared = tile.stages * ((tile.bm + tile.bn) * tensor_maps.SLAB + 16)
        self._sizes, self._gelu, self._precision, self._tile = (M, N, K), gelu, precision.name, tile

    def __call__(self, a: Array, w: Array, bias: Array | None, residual: Array | None, out: Array) -> None:
        """Enqueue the product on CuPy's current stream; ``residual`` may be ``out``."""
        M, N, K = self._sizes
        of_a = tensor_maps.rows(a.data.ptr, M, K, self._precision, self._tile.bm)
        of_w = tensor_maps.permuted_rows(w.data.ptr, N, K, self._precision, self._tile.bn)
        self._kernel(
            self._blocks, self._threads, of_a, of_w, bias, residual, out, M, N, K, self._gelu, shared=self._shared
        )


def constants(tile: Tile, precision: Precision) -> dict[str, jit.Constant]:
    """The kernel's compile-time constants."""
    return {"scalar_t": precision.ctype, "BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages}


def variants() -> Iterator[jit.Variant]:
    """A tile for each size of an element, for checks that they compile: all take half a minute."""
    for tile, name in zip(TILES, ("fp16", "tf32"), strict=False):
        yield jit.Variant(tile.kernel, constants(tile, precisions.of(name)), 90, jit.HOPPER)
