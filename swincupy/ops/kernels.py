"""Launchers of the kernels that are bound by memory: constants, grid and launch of each, on checked arrays.

Arrays are C-contiguous CuPy arrays in the storage of a precision; `swincupy.ops.fused` sees to that.
Attention has a module of its own, and so have matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.precision import Precision

Array = Any
Constants = dict[str, jit.Constant]

_BLOCK = 128  # threads, where several rows share a block
_SHARED = 64 * 1024  # what every GPU gives a block that asks
_CLUSTER = 8  # blocks that pool an image together
_PATCH_SHARED = 96 * 1024  # what all but the oldest give when asked


class RowLayout(NamedTuple):
    """How threads hold a row of elements, see cuda/rows.cuh."""

    vec: int  # elements an access
    group: int  # threads a row

    @property
    def rows(self) -> int:
        """Rows a block; a row of more than a warp has a block to itself."""
        return _BLOCK // self.group if self.group <= 32 else 1


@functools.cache
def row_layout(C: int, unit: int, itemsize: int, within_warp: int = 8) -> RowLayout:
    """Accesses of up to 16 bytes that do not straddle a multiple of ``unit``, and threads for up to 4 each.

    Up to ``within_warp`` where that keeps a row in one warp, whose sums need no shared memory.
    """
    vec = min(unit & -unit, 16 // itemsize)
    packs, group = C // vec, 1
    while group < 1024 and packs > 4 * group and not (group == 32 and packs <= within_warp * group):
        group *= 2
    return RowLayout(vec, group)


# ---------------------------------------------------------------- layer_norm


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float, precision: Precision) -> Array:
    """LayerNorm of the last axis."""
    import cupy

    C = weight.shape[0]
    constants, layout = row_constants(C, precision)
    out = cupy.empty(x.shape, precision.storage)
    rows = x.size // C
    if rows:
        kernel = jit.kernel("layer_norm", **constants)
        kernel(-(-rows // layout.rows), layout.rows * layout.group, x, weight, bias, out, rows, eps)
    return out


def layer_norm_residual(
    x: Array, y: Array, weight: Array, bias: Array, *, eps: float, precision: Precision, out: Array | None = None
) -> Array:
    """``x + LN(y)``; ``out`` may be x or y."""
    import cupy

    C = weight.shape[0]
    constants, layout = row_constants(C, precision)
    out = cupy.empty(x.shape, precision.storage) if out is None else out
    rows = x.size // C
    if rows:
        kernel = jit.kernel("layer_norm_residual", **constants)
        kernel(-(-rows // layout.rows), layout.rows * layout.group, x, y, weight, bias, out, rows, eps)
    return out


def row_constants(C: int, precision: Precision) -> tuple[Constants, RowLayout]:
    """Constants of both LayerNorm kernels."""
    layout = row_layout(C, C, precision.storage.itemsize)
    constants = {"scalar_t": precision.ctype, "C": C, "VEC": layout.vec, "GROUP": layout.group, "ROWS": layout.rows}
    return constants, layout  # type: ignore[return-value]


# ---------------------------------------------------------------- patch_merge


def patch_merge(
    x: Array, weight: Array | None, bias: Array | None, *, eps: float, precision: Precision, in_place: bool = False,
    overlap: bool = False,
) -> Array:  # fmt: skip
    """2 x 2 neighbours in one row, then LayerNorm where weight is given.

    [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 4 C]. With ``in_place``, row by row instead of column by column. With
    ``overlap``, no kernel under way writes weight or bias.
    """
    import cupy

    B, H, W, C = x.shape
    constants, layout = patch_merge_constants(C, weight is not None, precision, in_place)
    out = cupy.empty((B, (H + 1) // 2, (W + 1) // 2, 4 * C), precision.storage)
    rows = out.size // (4 * C)
    if rows:
        kernel = jit.kernel("patch_merge", **constants)
        blocks, threads = -(-rows // layout.rows), layout.rows * layout.group
        overlap = overlap or weight is None
        kernel(blocks, threads, x, weight, bias, out, rows, H, W, eps, overlap=overlap)
    return out


def patch_merge_constants(
    C: int, norm: bool, precision: Precision, in_place: bool = False
) -> tuple[Constants, RowLayout]:
    layout = row_layout(4 * C, C, precision.storage.itemsize, within_warp=4)
    return {
        "scalar_t": precision.ctype, "C": C, "NORM": norm, "IN_PLACE": in_place,
        "VEC": layout.vec, "GROUP": layout.group, "ROWS": layout.rows,
    }, layout  # fmt: skip


# ---------------------------------------------------------------- gelu


def gelu(x: Array, bias: Array | None = None, *, precision: Precision, out: Array | None = None) -> Array:
    """``gelu(x + bias)`` with the bias along the last axis; ``out`` may be x."""
    import cupy

    out = cupy.empty(x.shape, precision.storage) if out is None else out
    if x.size:
        unit = x.size if bias is None else bias.size
        constants = gelu_constants(unit, precision)
        blocks = -(-x.size // (256 * int(constants["VEC"])))
        jit.kernel("gelu", **constants)(blocks, 256, x, bias, out, x.size, unit if bias is not None else 1)
    return out


def gelu_constants(unit: int, precision: Precision) -> Constants:
    return {"scalar_t": precision.ctype, "VEC": min(unit & -unit, 16 // precision.storage.itemsize)}


# ---------------------------------------------------------------- global_pool


def global_pool(x: Array, weight: Array | None, bias: Array | None, *, eps: float, precision: Precision) -> Array:
    """Mean over the tokens of each image, of their LayerNorm where weight is given: [B, H, W, C] -> [B, C]."""
    import cupy

    B, C = x.shape[0], x.shape[-1]
    tokens = x.size // (B * C) if x.size else 0
    out = cupy.empty((B, C), precision.storage)
    if not out.size:
        return out
    constants, threads, shared = pool_constants(C, weight is not None, precision)
    groups = int(constants["GROUPS"])
    # enough blocks for one large image; not a matter of B, so that a result does not depend on its batch
    splits = 1 if tokens <= 16 * groups else -(-tokens // (8 * groups))
    if splits > 1:
        parts = cupy.empty((B, splits, C), np.float32)
        kernel = jit.kernel("global_pool", **constants | {"out_t": "float"})
        kernel((splits, B), threads, x, weight, bias, parts, tokens, 1.0, eps, shared=shared)
        constants, threads, shared = pool_constants(C, False, precisions.of("fp32"))
        constants["out_t"] = precision.ctype
        x, weight, bias = parts, None, None
    elif jit.multiprocessors(x.data.device_id) >= _CLUSTER * B and jit.compute_capability() >= 90:
        constants, threads, shared = pool_constants(C, weight is not None, precision, _CLUSTER)
    kernel, blocks = jit.kernel("global_pool", **constants), int(constants["CLUSTER"])
    kernel((blocks, B), threads, x, weight, bias, out, x.size // (B * C), 1 / tokens, eps, shared=shared)
    return out


def pool_constants(C: int, norm: bool, precision: Precision, cluster: int = 1) -> tuple[Constants, int, int]:
    """Constants, threads a block, and bytes of its shared memory. With a cluster, the sums are the same ones."""
    layout = row_layout(C, C, precision.storage.itemsize)
    groups = 1
    threads = 1024 // precision.storage.itemsize  # rows of float32 want more registers
    if layout.group <= 32:
        while 2 * groups * layout.group <= threads and 8 * groups * C <= _SHARED:
            groups *= 2
    cluster = cluster if groups % cluster == 0 and layout.group == 32 else 1
    return {
        "scalar_t": precision.ctype, "out_t": precision.ctype, "C": C, "NORM": norm, "VEC": layout.vec,
        "GROUP": layout.group, "GROUPS": groups // cluster, "CLUSTER": cluster, "ROWS": 8 // precision.storage.itemsize,
    }, groups // cluster * layout.group, groups // cluster * C * 4  # fmt: skip


# ---------------------------------------------------------------- patch_embed


def patch_embed(
    x: Array,
    weight: Array,
    bias: Array | None,
    norm_weight: Array | None,
    norm_bias: Array | None,
    position_embedding: Array | None,
    affine: Array | None,
    *,
    grid: tuple[int, int],
    eps: float,
    precision: Precision,
    out: Array | None = None,
) -> Array:
    """Embedded patches [B, H, W, C].

    x holds float pixels [B, Cin, height, width], or uint8 pixels [B, height, width, Cin], which
    ``affine`` [2, Cin] float32 takes to ``x * affine[0] + affine[1]``.
    """
    import cupy

    B, (H, W) = x.shape[0], grid
    height, width = x.shape[1:3] if affine is not None else x.shape[2:]
    C = weight.shape[0]
    out = cupy.empty((B, H, W, C), precision.storage) if out is None else out
    rows = B * H * W
    if not rows:
        return out
    reach, device = _alignment(x.data.ptr), x.data.device_id
    many = rows >= 16 * 8 * jit.multiprocessors(device)
    norm, position = norm_weight is not None, position_embedding is not None
    constants, shared = patch_embed_constants(
        tuple(weight.shape), x.dtype, width, norm, precision, reach, many, position
    )
    kernel = jit.kernel("patch_embed", **constants)
    warps, split, blocks = (int(constants[k]) for k in ("WARPS", "SPLIT", "BLOCKS"))
    blocks = jit.multiprocessors(device) * max(1, min(blocks, jit.shared_per_multiprocessor(device) // (shared + 1024)))
    kernel(
        min(-(-rows * split // (16 * warps)), blocks), 32 * warps,
        x, affine, weight, bias, norm_weight, norm_bias, position_embedding, out,
        rows, height, width, H, W, eps, shared=shared,
    )  # fmt: skip
    return out


def patch_embed_constants(
    shape: tuple[int, ...],
    pixel: np.dtype[Any],
    width: int,
    norm: bool,
    precision: Precision,
    reach: int = 16,
    many: bool = True,
    position: bool = False,
) -> tuple[Constants, int]:
    """Constants, and bytes of shared memory.

    ``reach``: bytes that the pixels' address is a multiple of. ``many``: there are patches for all warps.
    """
    C, CIN, PH, PW = shape
    if C > 2048:
        raise InputError(f"patch_embed: weight must have at most 2048 channels on a GPU, got {C}; use device='cpu'")
    size, pixels = precision.storage.itemsize, pixel == np.uint8
    run, line = (PW * CIN, width * CIN) if pixels else (PW, width)
    read = min(run & -run, line & -line, max(1, reach // pixel.itemsize), 4)
    if pixels and ((PH, PW) != (4, 4) or CIN > 4):
        read = 1
    split = next(n for n in (1, 2, 4, 8) if 192 * n >= C or n == 8)  # a lane has 16 sums of each 32 channels
    steps = -(-CIN * PH * PW // 16)
    columns = -(-C // 32) * 32
    weights = columns * (steps if steps < 4 else -(-steps // 4) * 4) * 16 * size
    resident = weights <= _PATCH_SHARED
    warps, blocks = _patch_blocks(C, split, precision, many) if resident else (8, 1)
    pixel_t = "unsigned char" if pixels else "float" if pixel == np.float32 else precision.ctype
    return {
        "scalar_t": precision.ctype, "pixel_t": pixel_t, "C": C, "CIN": CIN, "PH": PH, "PW": PW, "NORM": norm,
        "POSITION": position, "WARPS": warps, "BLOCKS": blocks, "SPLIT": split, "RESIDENT": resident,
        "READ": read, "VEC": min(C & -C, 16 // size),
    }, 12 * columns + weights * resident + 8 * CIN * pixels + warps * 64 * (split > 1)  # fmt: skip


def _patch_blocks(C: int, split: int, precision: Precision, many: bool) -> tuple[int, int]:
    """Warps a block, and blocks a multiprocessor, which bounds registers: most are sums, 16 for each 32 channels."""
    if split > 4:
        return 8, 1
    wide = C > 96 if precision.storage.itemsize == 4 else C > 128
    return (8, 2) if many and not wide else (4, 3)


def _alignment(pointer: int) -> int:
    return min(pointer & -pointer, 16)


# ---------------------------------------------------------------- for checks that they compile


def variants() -> Iterator[jit.Variant]:
    """The kernels of published models and of odd sizes, for checks that they compile."""
    for precision in (precisions.of(name) for name in ("fp32", "fp16", "bf16")):

        def variant(name: str, constants: Constants, p: Precision = precision) -> jit.Variant:
            return jit.Variant(name, constants, p.min_sm)

        for C in (96, 768, 45, 6144):
            yield variant("layer_norm", row_constants(C, precision)[0])
        for C in (96, 6144):
            yield variant("layer_norm_residual", row_constants(C, precision)[0])
        for C, norm in ((96, True), (768, True), (15, False)):
            yield variant("patch_merge", patch_merge_constants(C, norm, precision, in_place=C == 768)[0])
        for C, norm in ((768, True), (45, False), (6144, True)):
            yield variant("global_pool", pool_constants(C, norm, precision)[0])
        for unit in (8, 1):
            yield variant("gelu", gelu_constants(unit, precision))
        for shape, pixel in (
            ((96, 3, 4, 4), np.float32),
            ((96, 3, 4, 4), np.uint8),
            ((192, 3, 4, 4), np.float32),
            ((30, 1, 2, 3), np.uint8),
            ((128, 4, 16, 16), precision.storage),
            ((512, 3, 4, 4), np.float32),
        ):
            constants = patch_embed_constants(shape, np.dtype(pixel), 56 * shape[3], True, precision)[0]
            yield variant("patch_embed", constants)
    half = precisions.of("fp16")  # the first of two launches of a large image
    yield jit.Variant("global_pool", pool_constants(768, True, half)[0] | {"out_t": "float"})
    yield jit.Variant("global_pool", pool_constants(768, True, half, _CLUSTER)[0], 90)
