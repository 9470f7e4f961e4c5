"""Matrix products on the asynchronous tensor cores of SM 9.0: ``cuda/wgmma_gemm.cu``.

What cuBLASLt lacks: the exact GELU, a residual that costs no second pass, a start before the kernel ahead
is done, and LayerNorm of the rows of ``a`` for the price of their moments, which the product before it gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import tensor_maps
from swincupy.precision import Precision

Array = Any


class Tile(NamedTuple):
    """How ``cuda/wgmma_gemm.cu`` cuts the result: a tile, who computes it, slabs of K in shared memory, clusters."""

    bm: int
    bn: int
    groups: int
    stages: int
    split: int  # blocks that share K

    @property
    def kernel(self) -> str:
        """The kernel that has such tiles."""
        return "wgmma_gemm"

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: the ring, others' parts of sums, barriers, what norms need of two tiles."""
        ring = self.stages * ((self.bm + self.bn) * tensor_maps.SLAB + 16)
        return ring + self.bm * self.bn * 4 * (self.split - 1) // self.split + 5 * 8 + 2 * (self.bm + self.bn) * 8

    def rows(self, gather: int = 0) -> int:
        """Rows of a tile, of neighbours in a map of twice so many columns."""
        return self.bm // gather * gather if gather else self.bm

    def threads(self, norm: bool) -> int:
        return 384 if self.groups == 2 else 224 if norm else 160


#: For many rows: two warpgroups take turns.
LARGE = (
    Tile(128, 192, 2, 4, 1), Tile(128, 128, 2, 6, 1), Tile(128, 96, 2, 6, 1), Tile(64, 192, 2, 6, 1),
    Tile(64, 96, 2, 6, 1),
)  # fmt: skip
#: For few rows, the last two with K shared in a cluster. With 12 stages all weights are there before the rows come.
SMALL = (
    Tile(64, 64, 1, 6, 1), Tile(64, 64, 1, 12, 1), Tile(64, 32, 1, 8, 1), Tile(64, 64, 1, 6, 4),
    Tile(64, 64, 1, 12, 4),
)  # fmt: skip
TILES = LARGE + SMALL


class Norm(NamedTuple):
    """What makes a product ``a @ w.T`` one of ``LN(a) @ w.T``, the norm without an affine part.

    Where a is a map, see `Product`, moments are those of its tokens: [4 M, K / 4 / neighbours, 2].
    """

    moments: Array  # [M, K / neighbours, 2] float32: mean, and sum of squared deviations from it, of neighbours in a
    sums: Array  # [N] float32: of the rows of w
    eps: float


def neighbours(M: int, N: int) -> int:
    """How many numbers side by side in a row have moments in common in a result [M, N]; 0: there are none.

    A row has one such group or an even number of them. Measured: where it is 0, what a norm costs is less than what other tiles,
    or cuBLASLt's products, are faster by.
    """
    if M * N <= _FEW:
        return 32 if N % 64 == 0 else 0  # tiles are small
    if (N == 96 or N % 192 == 0) and (N <= 384 or M * N <= 4 * _FEW):
        return 96
    return _WIDE if (N == _WIDE or N % (2 * _WIDE) == 0) and M * N >= 12 * _FEW else 0


_FEW, _WIDE = 1 << 18, 128


def better_with_moments(M: int, N: int, K: int) -> bool:
    """Whether a product should come with the moments of its rows.

    Not a deep one with wide rows: cuBLASLt's is faster by more than the norm costs.
    """
    width = neighbours(M, N)
    return width > 0 and (width < _WIDE or N == _WIDE or K <= N)


def takes_norm(K: int, tile: Tile | None = None) -> bool:
    """Whether rows of so many channels may come with their moments in place of a norm (for this tile)."""
    return (K == 96 or K % 64 == 0) and (tile is None or tile.groups == 2 or tile.bn <= 96)


def gives_moments(M: int, N: int, tile: Tile) -> bool:
    """Whether this tile comes with the moments of a result [M, N]."""
    return (width := neighbours(M, N)) > 0 and tile.bn % width == 0


def takes(N: int, K: int, precision: Precision, tile: Tile | None = None) -> bool:
    """Whether the kernel computes products of this width and depth here (with this tile, where one is given)."""
    if N % 32 or K % 8 or precision.name == "fp32" or jit.compute_capability() != 90:
        return False
    return tile is None or tile.split == 1 or tile.split * (tensor_maps.SLAB // precision.storage.itemsize) <= K


def takes_gather(gather: int, K: int, precision: Precision) -> bool:
    """Whether rows may be 2 x 2 neighbours in a map of ``2 gather`` columns: a tile has at least one row of them."""
    return 0 < gather <= 64 and K // 2 * precision.storage.itemsize % tensor_maps.SLAB == 0


def likely(M: int, N: int, K: int, multiprocessors: int) -> tuple[Tile, ...]:
    """The tiles that are worth a try: large ones where there is one for each multiprocessor, else small ones."""
    tiles = LARGE if multiprocessors <= -(-M // 128) * -(-N // 96) else (LARGE[-1], *SMALL)
    return tuple(t for t in tiles if t.split == 1 or t.split * 64 <= K)


class Product:
    """``out = act(a @ w.T + bias) + residual`` for one shape, on CuPy's current device.

    Parameters
    ----------
    M, N, K : int
        a [M, K], w [N, K], out and residual [M, N], C-contiguous; N a multiple of 32, K of 8.
    precision : Precision
        Not fp32.
    gelu, norm, moments : bool
        What it is called with, too.
    gather : int
        Not 0: a is a map of ``2 gather`` columns and K / 4 channels, its rows are 2 x 2 neighbours: all channels of the
        upper two, then of the lower two.
    tile : Tile

    Raises
    ------
    DeviceError
        The kernel does not compile for this GPU.
    """

    def __init__(
        self, M: int, N: int, K: int, precision: Precision, *, gelu: bool, norm: bool = False, moments: bool = False,
        gather: int = 0, tile: Tile,
    ) -> None:  # fmt: skip
        import cupy

        width = neighbours(M, N) if moments else 0
        fixed = constants(tile, precision, gelu=gelu, norm=norm, moments=width, gather=gather > 0)
        self._kernel = jit.kernel(tile.kernel, arch=jit.HOPPER, **fixed)
        tiles = -(-M // tile.rows(gather)) * -(-N // tile.bn)
        most = jit.multiprocessors(cupy.cuda.device.get_device_id()) * (1 if tile.groups == 2 else 3)
        self._blocks = tiles * tile.split if tile.split > 1 else min(tiles, most)
        self._threads = tile.threads(norm)
        self._sizes, self._precision, self._tile = (M, N, K, gather), precision.name, tile

    def __call__(
        self,
        a: Array,
        w: Array,
        bias: Array | None,
        residual: Array | None,
        out: Array,
        norm: Norm | None = None,
        moments: Array | None = None,
        overlap: bool = False,
    ) -> None:
        """Enqueue the product on CuPy's current stream; ``residual`` may be ``out``.

        ``moments`` [M, N / neighbours(M, N), 2] float32 is written: those of out, as a `Norm` has them. With
        ``overlap``, no kernel that is under way may write ``w``.
        """
        M, N, K, gather = self._sizes
        if gather:
            of_a = tensor_maps.pairs_of_rows(a.data.ptr, M, gather, K, self._precision, self._tile.bm // gather)
        else:
            of_a = tensor_maps.rows(a.data.ptr, M, K, self._precision, self._tile.bm)
        of_w = tensor_maps.permuted_rows(w.data.ptr, N, K, self._precision, self._tile.bn)
        self._kernel(
            self._blocks, self._threads, of_a, of_w, bias, residual, out,
            *(norm[:2] if norm else (None, None)), moments, M, N, K, gather,
            norm.moments.shape[1] * (4 if gather else 1) if norm else 0, norm.eps if norm else 0.0,
            shared=self._tile.shared, overlap=overlap,
        )  # fmt: skip


def constants(
    tile: Tile, precision: Precision, *, gelu: bool, norm: bool, moments: int, gather: bool = False
) -> dict[str, jit.Constant]:
    """The kernel's compile-time constants."""
    return {
        "scalar_t": precision.ctype, "BM": tile.bm, "BN": tile.bn, "GROUPS": tile.groups, "STAGES": tile.stages,
        "SPLIT": tile.split, "GELU": gelu, "NORM": norm, "MOMENTS": moments, "GATHER": gather,
    }  # fmt: skip


def variants() -> Iterator[jit.Variant]:
    """The kernels that a search may try, for checks that they compile."""
    for tile in TILES:
        for name in ("fp16", "bf16", "tf32") if tile == Tile(128, 96, 2, 6, 1) else ("fp16",):
            for norm in (False, True) if takes_norm(256, tile) else (False,):
                width = 0 if norm else next(w for w in (96, _WIDE, 32) if tile.bn % w == 0)
                c = constants(tile, precisions.of(name), gelu=tile.bm == 128, norm=norm, moments=width)
                yield jit.Variant(tile.kernel, c, 90, jit.HOPPER)
        if takes_norm(256, tile):
            c = constants(tile, precisions.of("fp16"), gelu=False, norm=True, moments=0, gather=True)
            yield jit.Variant(tile.kernel, c, 90, jit.HOPPER)
