"""The attention half of a block in one launch, on SM 9.0.

For heads of 32 and windows of 7 x 7 or 8 x 8 that divide the image. In the narrow stages
``cuda/attention_block.cu``: a window's rows are fetched once and written once, and what lies between
never leaves the multiprocessor. In wider ones, for few windows, ``cuda/attention_cluster.cu``: each has a
cluster of blocks, one a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.ops import attention
from swincupy.ops.reference import Pair
from swincupy.precision import Precision, encode

Array = Any

_NARROW = (96, 128, 192, 256)
_WIDE = {384: 7, 512: 7}  # and the most windows: as many clusters as run at once
WINDOWS = ((7, 7), (8, 8))
_HEAD = 32
_LOG2_E = math.log2(math.e)  # the kernel's exponentials are powers of two


class Packed(NamedTuple):
    """A block's parameters as the kernel reads them, see `pack`."""

    image: Array  # of the storage type: what shared memory holds of the weights
    vectors: Array  # float32: biases; of V2 the norm and the heads' scales with them


class Tiling(NamedTuple):
    """How the kernel shares its work, see cuda/attention_block.cu."""

    groups: int  # warpgroups a block
    split: int  # warpgroups a window
    cluster: int  # blocks a window
    resident: bool  # all weights in shared memory
    tiles: int  # of x a window
    a_registers: bool  # LN(x) in registers
    kv_buffers: int
    bias_shared: bool  # the position bias in shared memory
    pipelined: bool = False  # products of a head during the softmax of the one before


def takes(C: int, num_heads: int, window: Pair, grid: Pair, precision: Precision, batch: int | None = None) -> bool:
    """Whether a kernel computes blocks of this kind on CuPy's current device, and for this batch is worth it.

    Without a batch, whether for some.
    """
    windows = (batch or 0) * math.prod(n // m for n, m in zip(grid, window, strict=True))
    return (
        (C in _NARROW or windows <= _WIDE.get(C, -1))
        and _HEAD * num_heads == C
        and window in WINDOWS
        and not any(n % m or not n for n, m in zip(grid, window, strict=True))
        and precision.storage.itemsize == 2
        and jit.compute_capability() == 90
    )


def gives_moments(C: int) -> bool:
    """Whether V1's blocks of so many channels may come with the moments of their result."""
    return C in _WIDE


def pack(
    norm_weight: np.ndarray,
    norm_bias: np.ndarray,
    qkv_weight: np.ndarray,
    qkv_bias: np.ndarray | None,
    proj_weight: np.ndarray,
    proj_bias: np.ndarray,
    *,
    num_heads: int,
    logit_scale: np.ndarray | None = None,
    precision: Precision,
) -> Packed:
    """The parameters of a block as the kernel reads them, for all windows and batches.

    V1's norm and 1 / sqrt(d) go into the weights and biases, log2(e) into what is exponentiated. The
    keys' bias of V1 adds the same to all logits of a row, and is left out; the values' bias becomes
    part of the projection's, as the rows of the softmax sum to one.

    Parameters
    ----------
    norm_weight, norm_bias : [C] float32
    qkv_weight, qkv_bias : [3 C, C], [3 C] float32
        Rows q, k, v, each [nH, 32].
    proj_weight, proj_bias : [C, C], [C] float32
    num_heads : int
    logit_scale : [nH] float32, optional
        The factor itself; cosine attention with the norm after it (V2) where given, else V1.
    precision : Precision
        Of 16 bits.

    Returns
    -------
    Packed
        Of NumPy arrays, to be uploaded once.
    """
    C = norm_weight.shape[0]
    if _HEAD * num_heads != C:
        raise InputError(f"attention_block: heads must be {_HEAD} long, got {C} channels for {num_heads} heads")
    gamma, beta, w, wp, bp = (
        np.asarray(a, np.float64) for a in (norm_weight, norm_bias, qkv_weight, proj_weight, proj_bias)
    )
    b = np.zeros(3 * C) if qkv_bias is None else np.asarray(qkv_bias, np.float64)
    if logit_scale is None:
        b = b + w @ beta
        w = w * gamma
        w[:C] *= _LOG2_E / math.sqrt(_HEAD)
        b[:C] *= _LOG2_E / math.sqrt(_HEAD)
    heads = w.reshape(3, num_heads, _HEAD, C).transpose(1, 0, 2, 3).reshape(num_heads, 3 * _HEAD, C)
    if C in _WIDE:
        return _pack_wide(heads, b, wp, bp, gamma, beta, logit_scale, precision)
    # The accumulators' columns 8 j + 2 t + e, which thread t has, become columns 8 t + 2 j + e: 16 bytes a thread.
    outputs = wp.reshape(num_heads, 4, 4, 2, C).transpose(0, 2, 1, 3, 4).reshape(C, C)
    image = np.concatenate([*(_slabs(h) for h in heads), _slabs(outputs)])
    vectors = [_of_lanes(b[:C]), bp + wp @ b[2 * C :]]
    if logit_scale is not None:
        vectors[1:1] = [_of_lanes(b[C : 2 * C])]
        scales = np.asarray(logit_scale, np.float64) * _LOG2_E
        vectors += [gamma, beta, np.pad(scales, (0, -num_heads % 4))]
    return Packed(encode(image.astype(np.float32), precision), np.concatenate(vectors).astype(np.float32))


def _pack_wide(
    heads: np.ndarray,
    b: np.ndarray,
    wp: np.ndarray,
    bp: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    logit_scale: np.ndarray | None,
    precision: Precision,
) -> Packed:
    """As cuda/attention_cluster.cu reads them: vectors block by block, the projection's rows in sixty-fours."""
    C, nH = len(bp), len(heads)
    # The heads' results have columns 8 j + 2 t + e at 8 t + 2 j + e: 16 bytes are a thread's.
    outputs = wp.reshape(C, nH, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(nH // 2, 64, C)
    image = encode(np.concatenate([_slabs(w) for w in (*heads, *outputs)]).astype(np.float32), precision)

    def of_blocks(x: np.ndarray) -> np.ndarray:  # two have the same 64 columns of the result
        return np.repeat(x.reshape(nH // 2, 64), 2, axis=0)

    vectors = [_of_lanes(b[:C]).reshape(nH, _HEAD)]
    if logit_scale is None:  # (x - mean) W^T = x W^T - mean sums, of weights as they are stored
        stored = precisions.decode(encode(heads.astype(np.float32), precision), precision)
        vectors += [_of_lanes(stored.sum(axis=-1, dtype=np.float64)).reshape(nH, 3 * _HEAD)]
    else:
        vectors += [_of_lanes(b[C : 2 * C]).reshape(nH, _HEAD)]
    vectors += [of_blocks(bp + wp @ b[2 * C :])]
    if logit_scale is not None:
        scales = np.asarray(logit_scale, np.float64)[:, None] * _LOG2_E
        vectors += [of_blocks(gamma), of_blocks(beta), np.pad(scales, ((0, 0), (0, 3)))]
    return Packed(image, np.concatenate(vectors, axis=1).astype(np.float32).reshape(-1))


def _slabs(rows: np.ndarray) -> np.ndarray:
    """[R, C] in slabs of 32 columns, [C / 32, R, 32]; of row r, piece i of 8 elements lies at i ^ (r / 2 % 4)."""
    R, C = rows.shape
    pieces = rows.reshape(R, C // _HEAD, 4, 8).transpose(1, 0, 2, 3)
    from_ = np.arange(4) ^ (np.arange(R)[:, None] // 2 % 4)
    return np.take_along_axis(pieces, from_[None, :, :, None], axis=2).reshape(-1)


def _of_lanes(bias: np.ndarray) -> np.ndarray:
    """[nH, 32] as [nH, t, e]: the eight that thread t of a row has, columns 8 j + 2 t + e % 2 of j = e / 2."""
    return bias.reshape(-1, 4, 4, 2).transpose(0, 2, 1, 3).reshape(-1)


def prepare_position_bias(position_bias: np.ndarray, precision: Precision) -> np.ndarray:
    """A bias [nH, N, N] as the kernel reads it: in float16, less the largest of each row.

    That changes no softmax, and leaves the logits that count the least rounded. Otherwise it is what
    `swincupy.ops.attention.prepare_position_bias` returns.
    """
    bias = position_bias - position_bias.max(axis=-1, keepdims=True)
    return attention.prepare_position_bias(bias, precision)  # type: ignore[no-any-return]


def attention_block(
    x: Array,
    packed: Packed,
    position_bias: Array,
    *,
    window: Pair,
    shift: Pair = (0, 0),
    eps: float = 1e-5,
    precision: Precision,
    out: Array | None = None,
    moments: Array | None = None,
    tiling: Tiling | None = None,
) -> Array:
    """``x + Proj(softmax(Q K^T / sqrt(d) + B + mask) V)`` with Q, K, V of LN(x), within shifted windows; or V2's.

    V2 (where `pack` had a ``logit_scale``): ``x + LN(Proj(softmax(scale cos(Q, K) + B + mask) V))``.
    One launch on CuPy's current stream; results do not depend on the batch beside them, nor on the
    run, only on the tiling, which the number of windows decides.

    Parameters
    ----------
    x : [B, H, W, C], C-contiguous, the precision's storage
    packed : Packed
        Of CuPy arrays.
    position_bias : [nH, 4, 4, 32, 8] float16
        Of `prepare_position_bias`.
    window : (7, 7) or (8, 8)
        H and W are multiples of it.
    shift : (int, int)
        Of the cyclic shift up and left, less than the window. The mask goes with it.
    eps : float
        More than 0: the rows that fill up a window's tile are zeros.
    precision : Precision
    out : [B, H, W, C], optional
        May be x.
    moments : [B * H * W, C / 32, 2] float32, optional
        Where those of out are written, see `swincupy.ops.wgmma.Norm`. Where `gives_moments` only.
    tiling : Tiling, optional
        Of the narrow stages; chosen by the number of windows where None.

    Returns
    -------
    [B, H, W, C]

    Raises
    ------
    InputError
        What `takes` says no to, or shapes that do not fit together.
    """
    import cupy

    B, H, W, C = x.shape
    num_heads = C // _HEAD
    if not takes(C, num_heads, window, (H, W), precision):
        raise InputError(
            f"attention_block: x must be what takes() accepts, got shape {tuple(x.shape)} in windows of {window}, "
            f"{precision.name}; use window_attention and gemm"
        )
    if any(not 0 <= s < m for s, m in zip(shift, window, strict=True)):
        raise InputError(f"attention_block: shift must be from 0 to less than the window {window}, got {shift}")
    wide, cosine = C in _WIDE, packed.vectors.size != (6 if C in _WIDE else 2) * C
    if packed.image.size != 4 * C * C or position_bias.shape != (num_heads, 4, 4, 32, 8):
        raise InputError(
            f"attention_block: packed and position_bias must be those of {num_heads} heads, got an image of "
            f"{packed.image.size} elements and a bias of shape {tuple(position_bias.shape)}"
        )
    out = cupy.empty(x.shape, precision.storage) if out is None else out
    if out.shape != x.shape:
        raise InputError(f"attention_block: out must be {tuple(x.shape)}, got shape {tuple(out.shape)}")
    if moments is not None and (cosine or not wide or moments.shape != (B * H * W, num_heads, 2)):
        raise InputError(
            f"attention_block: moments must be [{B * H * W}, {num_heads}, 2], of V1 and C in {tuple(_WIDE)}, got shape "
            f"{tuple(moments.shape)} and C = {C}"
        )
    windows = B * (H // window[0]) * (W // window[1])
    if not windows:
        return out
    if wide:
        fixed = _wide_constants(C, window[0], precision, cosine=cosine)
        kernel = jit.kernel("attention_cluster", arch=jit.HOPPER, **fixed)
        jit.allow_clusters(kernel, num_heads)
        grid = (W // window[1] * num_heads, H // window[0], B)
        kernel(
            grid, 128, x, *packed, position_bias, out, moments, H, W, *shift, eps,
            shared=_wide_shared_bytes(C, window[0], cosine=cosine),
        )  # fmt: skip
        return out
    multiprocessors = jit.multiprocessors(x.data.device_id)
    if tiling is None:
        tiling = choose(C, cosine, windows, multiprocessors)
    kernel = jit.kernel("attention_block", arch=jit.HOPPER, **constants(C, window[0], tiling, precision, cosine=cosine))
    blocks = min(windows, max(multiprocessors // tiling.cluster, 1)) * tiling.cluster
    kernel(
        blocks, 128 * tiling.groups, x, *packed, position_bias, out, H, W, windows, *shift, eps,
        shared=shared_bytes(C, tiling, cosine=cosine),
    )  # fmt: skip
    return out


def choose(C: int, cosine: bool, windows: int, multiprocessors: int) -> Tiling:
    """The tiling for so many windows: few are split between warpgroups and blocks, many share a block's weights."""
    for tiling, turns in _FEW[C]:
        fits = shared_bytes(C, tiling, cosine=cosine) <= jit.HOPPER_SHARED
        if fits and windows * tiling.cluster <= turns * multiprocessors:
            return tiling
    return _MANY[C][cosine]


# Tilings for few windows, the fastest first, and how many times the multiprocessors' number of blocks they are good for
_FEW = {
    96: ((Tiling(3, 3, 1, True, 2, False, 1, True), 1),),
    128: ((Tiling(2, 4, 2, True, 2, False, 1, True), 1), (Tiling(4, 2, 1, True, 1, False, 1, False), 2)),
    192: ((Tiling(2, 6, 3, True, 2, False, 1, True), 1), (Tiling(3, 6, 2, True, 1, False, 1, True), 1)),
    256: ((Tiling(2, 8, 4, True, 1, False, 1, True), 1),),
}
_MANY = {  # of V1, of V2
    96: (Tiling(4, 1, 1, True, 2, False, 1, True),) * 2,
    128: (Tiling(3, 1, 1, True, 1, False, 1, False), Tiling(2, 1, 1, True, 2, True, 1, False, True)),
    192: (Tiling(4, 2, 1, False, 2, False, 1, False), Tiling(4, 2, 1, False, 1, False, 1, True)),
    256: (Tiling(4, 2, 1, False, 1, False, 1, False), Tiling(2, 1, 1, False, 1, False, 2, False, True)),
}


def constants(C: int, window: int, tiling: Tiling, precision: Precision, *, cosine: bool) -> dict[str, jit.Constant]:
    """The kernel's compile-time constants."""
    names = ("GROUPS", "SPLIT", "CLUSTER", "RESIDENT", "TILES", "A_REGISTERS", "KV_BUFFERS", "BIAS_SHARED", "PIPELINED")
    return {
        "scalar_t": precision.ctype, "C": C, "WINDOW": window, "COSINE": cosine,
        **dict(zip(names, tiling, strict=True)),
    }  # fmt: skip


def shared_bytes(C: int, tiling: Tiling, *, cosine: bool) -> int:
    """Bytes of shared memory of a block, as the kernel lays them out."""
    t, num_heads = tiling, C // _HEAD
    team, block_heads = t.split // t.cluster, num_heads // t.cluster
    teams, slots = t.groups // team, 0 if t.resident else team * (2 if t.split == 1 or t.pipelined else 1)
    weights = block_heads * 4 * _HEAD * C * 2 if t.resident else slots * 3 * _HEAD * C * 2
    tiles = teams * t.tiles * 64 * C * 2
    buffers = t.groups * t.kv_buffers * 2 * 64 * _HEAD * 2
    bias = block_heads * 64 * 64 * 2 if t.bias_shared else 0
    sums = teams * t.split * 64 * 8 if cosine and t.split > 1 else 0
    vectors = 4 * (5 * C + -(-num_heads // 4) * 4 if cosine else 2 * C)
    barriers = 8 * ((block_heads + 1 if t.resident else slots) + 1 + (slots + 1) // 2)
    return weights + tiles + buffers + bias + sums + vectors + 2 * 128 * 4 + barriers


def _wide_constants(C: int, window: int, precision: Precision, *, cosine: bool) -> dict[str, jit.Constant]:
    return {"scalar_t": precision.ctype, "C": C, "WINDOW": window, "COSINE": cosine}


def _wide_shared_bytes(C: int, window: int, *, cosine: bool) -> int:
    """Bytes of shared memory of a block of a cluster, as the kernel lays them out."""
    x = -(-(window * window * (2 * C + 16)) // 1024) * 1024
    kv = 2 * 64 * _HEAD * 2 if C <= 384 else 0
    return (96 + 64) * C * 2 + x + kv + 4 * (260 if cosine else 192) + 8 * (3 + 3 * (C // 128))


def variants() -> Iterator[jit.Variant]:
    """The kernels of every width, window and tiling, for checks that they compile."""
    for C in _NARROW:
        for cosine, window, name in ((False, 7, "fp16"), (True, 8, "bf16")):
            for tiling in dict.fromkeys(choose(C, cosine, windows, 132) for windows in (1, 60, 120, 9999)):
                fixed = constants(C, window, tiling, precisions.of(name), cosine=cosine)
                yield jit.Variant("attention_block", fixed, 90, jit.HOPPER)
    for C in _WIDE:
        for cosine, window, name in ((False, 7, "fp16"), (True, 8, "bf16"), (False, 8, "bf16"), (True, 7, "fp16")):
            fixed = _wide_constants(C, window, precisions.of(name), cosine=cosine)
            yield jit.Variant("attention_cluster", fixed, 90, jit.HOPPER)
