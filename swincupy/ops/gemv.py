"""Matrix products of few rows, such as a classifier's for one image: ``cuda/gemv.cu``.

What cuBLASLt lacks: its weights are on their way before the kernel ahead is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from swincupy import jit
from swincupy import precision as precisions
from swincupy.precision import Precision

Array = Any

_ROWS = 4  # more are better off on tensor cores
_DEPTH = 4096  # a lane holds this / 32 weights


class Tile(NamedTuple):
    """How ``cuda/gemv.cu`` cuts the result: columns a block, a warp for each."""

    warps: int

    @property
    def kernel(self) -> str:
        """The kernel that has such tiles."""
        return "gemv"


TILES = (Tile(4),)


def takes(M: int, K: int, *, gelu: bool, residual: bool) -> bool:
    """Whether the kernel computes products of so many rows, this deep, with these epilogues."""
    return M <= _ROWS and K <= _DEPTH and not gelu and not residual


class Product:
    """``out = a @ w.T + bias`` for one shape, on CuPy's current device.

    Parameters
    ----------
    M, N, K : int
        a [M, K], w [N, K], out [M, N], C-contiguous, at addresses that are multiples of 16; see `takes`.
    precision : Precision
        float32's products are exact in any case.
    tile : Tile

    Raises
    ------
    DeviceError
        The kernel does not compile for this GPU.
    """

    def __init__(self, M: int, N: int, K: int, precision: Precision, *, tile: Tile) -> None:
        self._kernel = jit.kernel(tile.kernel, **constants(M, K, precision, tile))
        self._blocks, self._threads, self._N = -(-N // tile.warps), tile.warps * 32, N

    def __call__(
        self,
        a: Array,
        w: Array,
        bias: Array | None,
        residual: None,
        out: Array,
        norm: None = None,
        moments: None = None,
        overlap: bool = False,
    ) -> None:
        """Enqueue the product on CuPy's current stream; takes neither a residual nor norms.

        With ``overlap``, no kernel that is under way may write ``w`` or ``bias``.
        """
        self._kernel(self._blocks, self._threads, a, w, bias, out, self._N, overlap=overlap)


def constants(M: int, K: int, precision: Precision, tile: Tile) -> dict[str, jit.Constant]:
    """The kernel's compile-time constants."""
    vec = min(K & -K, 16 // precision.storage.itemsize)
    return {"scalar_t": precision.ctype, "M": M, "K": K, "VEC": vec, "WARPS": tile.warps}


def variants() -> Iterator[jit.Variant]:
    """The kernels of a classifier, and of odd sizes, for checks that they compile."""
    for p in (precisions.of(name) for name in ("fp32", "fp16", "bf16")):
        for M, K in ((1, 768), (4, 1536), (3, 45)):
            yield jit.Variant("gemv", constants(M, K, p, TILES[0]), p.min_sm)
