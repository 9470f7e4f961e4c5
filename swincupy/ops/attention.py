"""Attention within windows on the GPU: the constants, the grid and the launch of ``cuda/window_attention.cu``."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.ops.reference import PadMode, Pair
from swincupy.precision import Precision

Array = Any

_LOG2_E = math.log2(math.e)  # the kernel's exponentials are powers of two
_SHARED = 48 * 1024  # what every GPU gives a block without being asked
_GRID_Z = 65535  # images a launch
_BLOCKS = 16  # blocks that any multiprocessor holds


class Tiling(NamedTuple):
    """How a block cuts a window: 16 queries a warp, keys in blocks, of which `stages` are in shared memory."""

    warps: int
    key_block: int
    stages: int
    min_blocks: int  # blocks that a multiprocessor is to hold: caps the registers


def window_attention(
    qkv: Array,
    qkv_bias: Array | None,
    position_bias: Array,
    *,
    batch: int,
    grid: Pair,
    window: Pair,
    shift: Pair = (0, 0),
    pad_mode: PadMode = "pad_roll",
    num_heads: int,
    scale: float | None = None,
    logit_scale: Array | None = None,
    precision: Precision,
    out: Array | None = None,
) -> Array:
    """``softmax(Q K^T scale + B + mask) V`` within shifted windows, from and to rows in image order.

    Windows, shift, padding and mask are index arithmetic of the kernel: nothing is partitioned,
    rolled or read from memory. The products run on tensor cores, the softmax in float32.

    Parameters
    ----------
    qkv : [B * H * W, 3 C], C-contiguous, the precision's storage
        Rows of q, k, v, each [nH, d]; as a matrix product over the rows of an image leaves them.
    qkv_bias : [3 C], same dtype, optional
        q, k and v of padding: zeros went into the product. None where it has no bias.
    position_bias : [nH, N, N] of any float dtype, or what `prepare_position_bias` made of it
        The latter saves its preparation in each call.
    batch : int
        B.
    grid : (H, W)
    window : (Mh, Mw)
    shift : (int, int)
        Of the cyclic shift up and left, less than the window. The mask goes with it.
    pad_mode : see `swincupy.ops.reference.shifted_windows`
    num_heads : int
        nH, a divisor of C; d = C / nH is at most 128.
    scale : float, optional
        Of the scores; 1 / sqrt(d) where None.
    logit_scale : [nH] float32, optional
        Cosine attention: q and k are divided by their norms, in float32, and this is the scale.
    precision : Precision
    out : [B * H * W, C], optional
        Where the result is written. It must not overlap ``qkv``.

    Returns
    -------
    [B * H * W, C]

    Raises
    ------
    InputError
        Shapes that do not fit together, or a head too long for the kernel.

    Notes
    -----
    Source: Swin Transformer, eq. 4, and Swin Transformer V2, eq. 2; before the projection.
    """
    import cupy

    H, W = grid
    if qkv.ndim != 2 or qkv.shape[0] != batch * H * W or qkv.shape[1] % (3 * num_heads) or not qkv.shape[1]:
        raise InputError(
            f"window_attention: qkv must be [{batch * H * W}, 3 * C] with C a multiple of {num_heads} heads, "
            f"got shape {tuple(qkv.shape)}"
        )
    C = qkv.shape[1] // 3
    if any(not 0 <= s < m for s, m in zip(shift, window, strict=True)):
        raise InputError(f"window_attention: shift must be from 0 to less than the window {window}, got {shift}")
    if logit_scale is not None and logit_scale.shape != (num_heads,):
        raise InputError(f"window_attention: logit_scale must be [{num_heads}], got shape {tuple(logit_scale.shape)}")
    if qkv_bias is not None and qkv_bias.shape != (3 * C,):
        raise InputError(f"window_attention: qkv_bias must be [{3 * C}], got shape {tuple(qkv_bias.shape)}")
    N = window[0] * window[1]
    if position_bias.shape == (num_heads, N, N):
        position_bias = prepare_position_bias(position_bias, precision)
    groups = -(-N // 16)
    if position_bias.shape != (num_heads, groups, groups, 32, 8):
        raise InputError(
            f"window_attention: position_bias must be of {num_heads} heads and {N} tokens, "
            f"got shape {tuple(position_bias.shape)}"
        )
    if out is None:
        out = cupy.empty((qkv.shape[0], C), precision.storage)
    elif out.shape != (qkv.shape[0], C):
        raise InputError(f"window_attention: out must be [{qkv.shape[0]}, {C}], got shape {tuple(out.shape)}")
    if not out.size:
        return out

    d = C // num_heads
    fixed, tiling = constants(d, window, precision, cosine=logit_scale is not None, pad_mode=pad_mode)
    kernel = jit.kernel("window_attention", **fixed)
    blocks = -(-W // window[1]) * num_heads * -(-groups // tiling.warps), -(-H // window[0])
    for b in range(0, batch, _GRID_Z):
        rows = slice(b * H * W, min(b + _GRID_Z, batch) * H * W)
        kernel(
            (*blocks, min(_GRID_Z, batch - b)), 32 * tiling.warps,
            qkv[rows], qkv_bias, position_bias, logit_scale, out[rows],
            H, W, *shift, num_heads, d**-0.5 if scale is None else scale,
        )  # fmt: skip
    return out


def prepare_position_bias(position_bias: Array, precision: Precision) -> Array:
    """B times log2(e) in the order in which a warp reads it: 16 bytes a lane.

    16-bit precisions get it in float16, bfloat16 too: its values are few and small, and logits
    deserve the three more bits.

    Parameters
    ----------
    position_bias : [nH, N, N], float, of NumPy or CuPy
    precision : Precision

    Returns
    -------
    [nH, ceil(N / 16), ceil(N / 16), 32, 8] float16 or float32, in the namespace of ``position_bias``
        Lane 4 g + t of the pair of 8 x 8 halves of a 16 x 16 piece holds, tile by tile, rows g and
        g + 8 of columns 2 t and 2 t + 1. -inf in the columns from N on.
    """
    if position_bias.ndim != 3 or position_bias.shape[1] != position_bias.shape[2]:
        raise InputError(f"prepare_position_bias: position_bias must be [nH, N, N], got {tuple(position_bias.shape)}")
    xp = array_namespace(position_bias)
    nH, N, _ = position_bias.shape
    n = -(-N // 16)
    dtype = np.dtype(_bias_dtype(precision))
    limit = np.float32(np.finfo(dtype).max)  # a large bias must not become the padding's infinity
    padded = xp.full((nH, 16 * n, 16 * n), -np.inf, dtype=np.float32)
    padded[:, :, :N] = 0
    padded[:, :N, :N] = xp.clip(position_bias.astype(np.float32) * np.float32(_LOG2_E), -limit, limit)
    split = padded.reshape(nH, n, 2, 8, n, 2, 4, 2)  # head, strip, r, g, pair, tile, t, e
    return xp.ascontiguousarray(split.transpose(0, 1, 4, 3, 6, 5, 2, 7)).reshape(nH, n, n, 32, 8).astype(dtype)


def constants(
    d: int, window: Pair, precision: Precision, *, cosine: bool, pad_mode: PadMode
) -> tuple[dict[str, jit.Constant], Tiling]:
    """The kernel's compile-time constants, and the tiling among them."""
    t = tiling(window[0] * window[1], d, precision)
    bias_type = "float" if _bias_dtype(precision) is np.float32 else "__half"
    return {
        "scalar_t": precision.ctype, "bias_t": bias_type, "EXACT": precision.name == "fp32",
        "COSINE": cosine, "ROLL_PAD": pad_mode == "roll_pad", "D": d, "MH": window[0], "MW": window[1],
        "WARPS": t.warps, "KEY_BLOCK": t.key_block, "STAGES": t.stages, "MIN_BLOCKS": t.min_blocks,
    }, t  # fmt: skip


@functools.cache
def tiling(N: int, d: int, precision: Precision) -> Tiling:
    """The tiling for windows of N tokens and heads of length d: as many queries and keys as fit.

    Nothing spills to local memory, or next to nothing, with the warps that a multiprocessor is asked to hold here.
    """
    if d > 128:
        raise InputError(f'window_attention: heads must be at most 128 long, got {d}; use device="cpu"')
    pitch = -(-d * precision.storage.itemsize // 32) * 32 + 16
    strips = -(-N // 16)
    if precision.storage.itemsize == 2:
        most_warps, resident = 9, 28 if N <= 64 else 18
    else:
        most_warps, resident = 5, 20 if N <= 64 and precision.name == "tf32" else 16
    resident = resident * 32 // max(d, 32)
    for most in range(most_warps, 0, -1):
        warps = -(-strips // -(-strips // most))
        for key_block in _key_blocks(N, precision):
            blocks = -(-N // key_block)
            for stages in range(blocks, min(blocks, 2) - 1, -1):
                shared = (16 * warps + 2 * stages * key_block) * pitch + 4 * key_block + blocks * key_block
                if shared <= _SHARED:
                    return Tiling(warps, key_block, stages, min(max(resident // warps, 1), _BLOCKS))
    raise AssertionError("one warp and two stages of 16 keys fit for d <= 128")


def _key_blocks(N: int, precision: Precision) -> list[int]:
    """Key blocks to try: a small window whole, a large one with the least padding; then what fits."""
    if N <= 64:
        first = [-(-N // 16) * 16]
    elif precision.name == "fp32":  # its products take three times the registers
        first = []
    else:
        first = sorted((64, 48), key=lambda size: (-(-N // size) * size, size))
    return [*first, 32, 16]


def _bias_dtype(precision: Precision) -> type:
    return np.float16 if precision.storage.itemsize == 2 else np.float32


def variants() -> Iterator[jit.Variant]:
    """The kernels of published models and of odd sizes, for checks that they compile."""
    sizes: list[tuple[int, Pair, bool]] = [
        (32, (7, 7), False), (32, (12, 12), False), (32, (8, 8), True), (32, (16, 16), True), (32, (24, 24), True),
        (24, (7, 7), False), (16, (4, 4), True), (64, (6, 6), True), (5, (14, 7), False),
    ]  # fmt: skip
    for name in ("fp32", "tf32", "fp16", "bf16"):
        precision = precisions.of(name)
        for d, window, cosine in sizes:
            mode: PadMode = "roll_pad" if d == 24 else "pad_roll"
            fixed, _ = constants(d, window, precision, cosine=cosine, pad_mode=mode)
            yield jit.Variant("window_attention", fixed, precision.min_sm)
