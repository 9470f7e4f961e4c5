"""The array vocabulary, written as literally as the paper writes it.

Every function takes arrays of one library (NumPy, CuPy, or anything array-api-compat knows) and
returns arrays of the same library, dtype and device. These compositions are the CPU path, and in
float64 the oracle that kernels are tested against.

Dimensions: B batch, H W rows and columns of tokens, C channels, M the window's side (Mh, Mw where
it is not square), N = Mh * Mw tokens of a window, nW windows of an image, nH heads, d = C / nH.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
from array_api_compat import array_namespace, is_cupy_array

from swincupy.errors import InputError

Array: TypeAlias = Any
Pair: TypeAlias = tuple[int, int]
PadMode: TypeAlias = Literal["pad_roll", "roll_pad"]

MASKED = -100.0  # what upstream adds to the logits of tokens from different regions; not -inf

# q of gelu(x) = x / (1 + exp(-x q(x^2))), a minimax fit on |x| <= 5.5: the error is at most
# 1.7e-7 max(1, |x|), one float32 rounding
_GELU_Q = (1.5957684516906738, 0.07266857475042343, -6.626439426327124e-05, -1.104788898373954e-04,
           7.938005182950292e-06, -2.6687828835747496e-07, 3.610874488302329e-09)  # fmt: skip


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x @ weight.T + bias`` over the last axis.

    Parameters
    ----------
    x : [..., K]
    weight : [N, K]
    bias : [N], optional

    Returns
    -------
    [..., N]

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    _need(weight.ndim == 2, "linear: weight must be [N, K]", weight)
    _need(x.ndim > 0 and x.shape[-1] == weight.shape[1], f"linear: x must be [..., {weight.shape[1]}]", x)
    _need(bias is None or bias.shape == weight.shape[:1], f"linear: bias must be [{weight.shape[0]}]", bias)
    xp = array_namespace(x)
    y = xp.matmul(xp.reshape(x, (-1, x.shape[-1])), weight.T)  # one matrix product, whatever the leading axes
    if bias is not None:
        y += bias
    return xp.reshape(y, (*x.shape[:-1], weight.shape[0]))


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-5) -> Array:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis, biased variance.

    Parameters
    ----------
    x : [..., C]
    weight, bias : [C]

    Returns
    -------
    [..., C]

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    _need(x.ndim > 0 and weight.shape == x.shape[-1:], f"layer_norm: weight must be [C] of x {tuple(x.shape)}", weight)
    _need(bias.shape == weight.shape, f"layer_norm: bias must be [{weight.shape[0]}]", bias)
    xp = array_namespace(x)
    y = x - xp.mean(x, axis=-1, keepdims=True)
    var = xp.mean(y * y, axis=-1, keepdims=True)
    y *= 1.0 / xp.sqrt(var + eps)
    y *= weight
    y += bias
    return y


def gelu(x: Array) -> Array:
    """``x / 2 * (1 + erf(x / sqrt(2)))``, the exact (erf) GELU, not the tanh approximation.

    Parameters
    ----------
    x : array of floats of any shape

    Returns
    -------
    array like x
        float32 goes through a fit that is as accurate as float32 is; float64 through erf itself.
    """
    xp = array_namespace(x)
    if x.dtype == xp.float64:
        return 0.5 * x * (1.0 + _erf(x * math.sqrt(0.5)))
    z = xp.clip(x, -5.5, 5.5)
    u = z * z
    q = u * -_GELU_Q[-1]
    for coefficient in _GELU_Q[-2:0:-1]:
        q -= coefficient
        q *= u
    q -= _GELU_Q[0]
    z *= q
    z = xp.exp(z)
    z += 1.0
    return x / z


def softmax(x: Array) -> Array:
    """``exp(x_i) / sum_j exp(x_j)`` over the last axis.

    Parameters
    ----------
    x : [..., N]

    Returns
    -------
    [..., N]
    """
    xp = array_namespace(x)
    y = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    y /= xp.sum(y, axis=-1, keepdims=True)
    return y


def mlp(x: Array, fc1_weight: Array, fc1_bias: Array, fc2_weight: Array, fc2_bias: Array) -> Array:
    """``gelu(x W1^T + b1) W2^T + b2``.

    Parameters
    ----------
    x : [..., C]
    fc1_weight, fc1_bias : [R * C, C], [R * C]
    fc2_weight, fc2_bias : [C, R * C], [C]

    Returns
    -------
    [..., C]

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    return linear(gelu(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def patch_embed(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    position_embedding: Array | None = None,
    *,
    patch_pad: Literal["pad", "crop"] = "pad",
    eps: float = 1e-5,
) -> Array:
    """Linear embedding of non-overlapping patches: ``LN(W vec(patch) + b) + position``.

    Parameters
    ----------
    x : [B, Cin, Hpx, Wpx]
        Normalised pixels.
    weight : [C, Cin, Ph, Pw]
    bias : [C], optional
    norm_weight, norm_bias : [C], optional
        No LayerNorm where they are None.
    position_embedding : [1, H, W, C], optional
    patch_pad : {"pad", "crop"}
        Zero-pad the pixels at the bottom and right to whole patches, or drop those that do not fill one.

    Returns
    -------
    [B, H, W, C] with H = ceil(Hpx / Ph), W = ceil(Wpx / Pw) (floor for "crop").

    Raises
    ------
    InputError
        The shapes do not fit together, or x does not hold one patch.
    """
    _need(weight.ndim == 4, "patch_embed: weight must be [C, Cin, Ph, Pw]", weight)
    C, Cin, ph, pw = weight.shape
    _need(x.ndim == 4 and x.shape[1] == Cin, f"patch_embed: x must be [B, {Cin}, H, W]", x)
    xp, given = array_namespace(x), x.shape[2:]
    if patch_pad == "crop":
        x = x[:, :, : x.shape[2] // ph * ph, : x.shape[3] // pw * pw]
    else:
        x = _pad(x, (0, 0, -x.shape[2] % ph, -x.shape[3] % pw))
    B, _, hpx, wpx = x.shape
    H, W = hpx // ph, wpx // pw
    if min(H, W) == 0:
        raise InputError(f"patch_embed: x must hold at least one {ph} x {pw} patch, got {given[0]} x {given[1]} pixels")
    x = xp.permute_dims(xp.reshape(x, (B, Cin, H, ph, W, pw)), (0, 2, 4, 1, 3, 5))
    x = linear(xp.reshape(x, (B, H, W, Cin * ph * pw)), xp.reshape(weight, (C, -1)), bias)
    if norm_weight is not None:
        x = layer_norm(x, norm_weight, norm_bias, eps=eps)
    if position_embedding is None:
        return x
    fits = position_embedding.shape == (1, H, W, C)
    _need(fits, f"patch_embed: position_embedding must be [1, {H}, {W}, {C}]", position_embedding)
    return x + position_embedding


def window_partition(x: Array, window: Pair) -> Array:
    """Cut a feature map into windows, row-major.

    Parameters
    ----------
    x : [B, H, W, C], H and W multiples of the window
    window : (Mh, Mw)

    Returns
    -------
    [B * nW, N, C]

    Raises
    ------
    InputError
        x is not [B, H, W, C], or its sides are not multiples of the window.
    """
    _need(x.ndim == 4, "window_partition: x must be [B, H, W, C]", x)
    B, H, W, C = x.shape
    mh, mw = window
    if H % mh or W % mw:
        raise InputError(f"window_partition: {H} x {W} tokens must be a multiple of the window {mh} x {mw}; pad first")
    xp = array_namespace(x)
    x = xp.permute_dims(xp.reshape(x, (B, H // mh, mh, W // mw, mw, C)), (0, 1, 3, 2, 4, 5))
    return xp.reshape(x, (-1, mh * mw, C))


def window_reverse(windows: Array, window: Pair, H: int, W: int) -> Array:
    """The inverse of `window_partition`.

    Parameters
    ----------
    windows : [B * nW, N, C]
    window : (Mh, Mw)
    H, W : int
        Multiples of the window.

    Returns
    -------
    [B, H, W, C]

    Raises
    ------
    InputError
        These are not the windows of whole H x W maps.
    """
    mh, mw = window
    fits = windows.ndim == 3 and windows.shape[1] == mh * mw and H % mh == 0 and W % mw == 0
    fits = fits and windows.shape[0] % (H // mh * (W // mw)) == 0
    _need(fits, f"window_reverse: windows must be the {mh} x {mw} windows of {H} x {W} tokens, [B * nW, N, C]", windows)
    C = windows.shape[-1]
    xp = array_namespace(windows)
    x = xp.reshape(windows, (-1, H // mh, W // mw, mh, mw, C))
    return xp.reshape(xp.permute_dims(x, (0, 1, 3, 2, 4, 5)), (-1, H, W, C))


def shift_mask(H: int, W: int, window: Pair, shift: Pair, *, like: Array | None = None) -> Array:
    """Mask of shifted windows: 0 between tokens of one region, -100 between tokens of different ones.

    An axis that is shifted has three regions: before the last window, the last window without the
    tokens that the shift brought round, and those. An axis that is not shifted has one.

    Parameters
    ----------
    H, W : int
        Padded to a multiple of the window.
    window, shift : (int, int)
    like : array, optional
        Take namespace, dtype and device from it; NumPy float32 where None.

    Returns
    -------
    [nW, N, N]

    Raises
    ------
    InputError
        H or W is not a multiple of the window, or a shift is not below its window.

    Notes
    -----
    The constant is upstream's; it is not -inf, and in V2, where logits reach 116, it shows.
    """
    if not all(0 <= s < m for s, m in zip(shift, window, strict=True)):
        raise InputError(f"shift_mask: shift must be at least 0 and below the window {window}, got {shift}")
    xp: Any = np if like is None else array_namespace(like)
    device = {} if like is None else {"device": like.device}
    dtype = np.float32 if like is None else like.dtype

    def region(size: int, m: int, s: int) -> Array:
        i = xp.arange(size, **device)
        return xp.astype(i >= size - m, xp.int64) + xp.astype(i >= size - s, xp.int64) if s else i * 0

    rows, columns = region(H, window[0], shift[0]), region(W, window[1], shift[1])
    regions = xp.reshape(rows[:, None] * 3 + columns[None, :], (1, H, W, 1))
    regions = window_partition(regions, window)  # [nW, N, 1]
    differ = regions != xp.permute_dims(regions, (0, 2, 1))
    return xp.astype(differ, dtype) * MASKED


def relative_position_index(window: Pair) -> np.ndarray:
    """Row of the bias table for every pair of tokens: ``(dh + Mh - 1) (2 Mw - 1) + (dw + Mw - 1)``.

    Parameters
    ----------
    window : (Mh, Mw)

    Returns
    -------
    [N, N] int64, a NumPy array; (dh, dw) = position of token i - position of token j.
    """
    mh, mw = window
    h, w = (a.reshape(-1) for a in np.indices((mh, mw)))
    return (h[:, None] - h[None, :] + mh - 1) * (2 * mw - 1) + (w[:, None] - w[None, :] + mw - 1)


def relative_position_bias(table: Array, window: Pair) -> Array:
    """V1's bias of every pair of tokens, gathered from its table: ``B[h, i, j] = table[index[i, j], h]``.

    Parameters
    ----------
    table : [(2 Mh - 1) (2 Mw - 1), nH]
    window : (Mh, Mw)

    Returns
    -------
    [nH, N, N]

    Raises
    ------
    InputError
        The table is not that of the window.
    """
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    fits = table.ndim == 2 and table.shape[0] == rows
    _need(fits, f"relative_position_bias: table must be [{rows}, nH] for window {tuple(window)}", table)
    xp = array_namespace(table)
    index = xp.asarray(relative_position_index(window).reshape(-1), device=table.device)
    N = window[0] * window[1]
    bias = xp.reshape(xp.take(table, index, axis=0), (N, N, -1))
    return xp.reshape(xp.permute_dims(bias, (2, 0, 1)), (-1, N, N))


def continuous_position_bias(
    fc1_weight: Array, fc1_bias: Array, fc2_weight: Array, window: Pair, pretrained_window: Pair = (0, 0)
) -> Array:
    """V2's bias of every pair of tokens: ``B = 16 sigmoid(W2 relu(W1 t + b1))``.

    ``t = sign(r) log2(1 + |r|) / log2(8)``, ``r = 8 (dh, dw) / (P - 1)``, P the pretrained window
    where that is given and the window itself where it is 0. Source: Swin Transformer V2, eq. 4.

    Parameters
    ----------
    fc1_weight, fc1_bias : [512, 2], [512]
    fc2_weight : [nH, 512]
    window, pretrained_window : (int, int)

    Returns
    -------
    [nH, N, N]

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    xp = array_namespace(fc1_weight)
    offsets = []
    for m, p in zip(window, pretrained_window, strict=True):
        r = np.arange(-(m - 1), m, dtype=np.float64) * (8.0 / max((p or m) - 1, 1))
        offsets.append(np.sign(r) * np.log2(1.0 + np.abs(r)) / 3.0)
    t = np.stack(np.meshgrid(*offsets, indexing="ij"), axis=-1).reshape(-1, 2)
    t = xp.asarray(t, dtype=fc1_weight.dtype, device=fc1_weight.device)
    hidden = linear(t, fc1_weight, fc1_bias)
    table = linear(xp.where(hidden > 0, hidden, 0.0 * hidden), fc2_weight)
    return 16.0 / (1.0 + xp.exp(-relative_position_bias(table, window)))


def window_attention(
    x: Array,
    qkv_weight: Array,
    qkv_bias: Array | None,
    proj_weight: Array,
    proj_bias: Array | None,
    position_bias: Array,
    mask: Array | None = None,
    *,
    num_heads: int,
) -> Array:
    """V1's attention within windows: ``softmax(Q K^T / sqrt(d) + B + mask) V``, then the projection.

    Parameters
    ----------
    x : [B * nW, N, C]
    qkv_weight, qkv_bias : [3 C, C], [3 C]
        Rows q, k, v, each [nH, d].
    proj_weight, proj_bias : [C, C], [C]
    position_bias : [nH, N, N]
    mask : [nW, N, N], optional
        For shifted windows, see `shift_mask`.
    num_heads : int

    Returns
    -------
    [B * nW, N, C]

    Raises
    ------
    InputError
        The shapes do not fit together.

    Notes
    -----
    Source: Swin Transformer, eq. 4.
    """
    _check_attention("window_attention", x, qkv_weight, position_bias, mask, num_heads)
    q, k, v = _heads(linear(x, qkv_weight, qkv_bias), num_heads)
    q = q * (q.shape[-1] ** -0.5)
    return linear(_attend(q, k, v, position_bias, mask), proj_weight, proj_bias)


def cosine_window_attention(
    x: Array,
    qkv_weight: Array,
    qkv_bias: Array | None,
    proj_weight: Array,
    proj_bias: Array | None,
    logit_scale: Array,
    position_bias: Array,
    mask: Array | None = None,
    *,
    num_heads: int,
) -> Array:
    """V2's attention within windows: ``softmax(scale cos(Q, K) + B + mask) V``, then the projection.

    Parameters
    ----------
    logit_scale : [nH]
        The factor itself, ``exp(min(stored logit_scale, ln 100))``.

    The others, and what is returned, are those of `window_attention`.

    Raises
    ------
    InputError
        The shapes do not fit together.

    Notes
    -----
    Source: Swin Transformer V2, eq. 2. A vector of norm 0 counts as 0 (upstream divides by
    ``max(norm, 1e-12)``).
    """
    _check_attention("cosine_window_attention", x, qkv_weight, position_bias, mask, num_heads)
    fits = logit_scale.shape == (num_heads,)
    _need(fits, f"cosine_window_attention: logit_scale must be [{num_heads}]", logit_scale)
    xp = array_namespace(x)
    q, k, v = _heads(linear(x, qkv_weight, qkv_bias), num_heads)
    q = _unit(q) * xp.reshape(logit_scale, (num_heads, 1, 1))
    return linear(_attend(q, _unit(k), v, position_bias, mask), proj_weight, proj_bias)


def shifted_windows(x: Array, window: Pair, shift: Pair, pad_mode: PadMode = "pad_roll") -> Array:
    """Pad to a window multiple, shift cyclically up and left, partition into windows.

    Parameters
    ----------
    x : [B, H, W, C]
    window, shift : (int, int)
    pad_mode : {"pad_roll", "roll_pad"}
        Which of the two comes first.

    Returns
    -------
    [B * nW, N, C]

    Raises
    ------
    InputError
        x is not [B, H, W, C].
    """
    _need(x.ndim == 4, "shifted_windows: x must be [B, H, W, C]", x)
    pads = (0, -x.shape[1] % window[0], -x.shape[2] % window[1], 0)
    if pad_mode == "roll_pad":
        x = _pad(_roll(x, (-shift[0], -shift[1])), pads)
    else:
        x = _roll(_pad(x, pads), (-shift[0], -shift[1]))
    return window_partition(x, window)


def unshifted_windows(
    windows: Array, window: Pair, shift: Pair, H: int, W: int, pad_mode: PadMode = "pad_roll"
) -> Array:
    """The inverse of `shifted_windows`, without the padding.

    Parameters
    ----------
    windows : [B * nW, N, C]
    window, shift, pad_mode
        Those of `shifted_windows`.
    H, W : int
        Before padding.

    Returns
    -------
    [B, H, W, C]

    Raises
    ------
    InputError
        These are not the windows of padded H x W maps.
    """
    x = window_reverse(windows, window, H + -H % window[0], W + -W % window[1])
    if pad_mode == "roll_pad":
        return _roll(x[:, :H, :W, :], shift)
    return _roll(x, shift)[:, :H, :W, :]


def mask_of(x: Array, mask: Array | None, window: Pair, shift: Pair) -> Array | None:
    """The mask that was given, or that of the shift of x [B, H, W, C]."""
    if mask is not None or not any(shift):
        return mask
    _, H, W, _ = x.shape
    return shift_mask(H + -H % window[0], W + -W % window[1], window, shift, like=x)


def attention_block(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    qkv_weight: Array,
    qkv_bias: Array | None,
    proj_weight: Array,
    proj_bias: Array | None,
    position_bias: Array,
    mask: Array | None = None,
    *,
    num_heads: int,
    window: Pair,
    shift: Pair = (0, 0),
    pad_mode: PadMode = "pad_roll",
    eps: float = 1e-5,
) -> Array:
    """First half of a V1 block: ``x + window_attention(LN(x))`` over shifted windows.

    Parameters
    ----------
    x : [B, H, W, C]
    norm_weight, norm_bias : [C]
    mask : [nW, N, N], optional
        `shift_mask` of the padded size, which is made here where it is not given.
    window, shift : (int, int)
    pad_mode : see `shifted_windows`

    The others are those of `window_attention`.

    Returns
    -------
    [B, H, W, C]

    Raises
    ------
    InputError
        The shapes do not fit together.

    Notes
    -----
    Padding is zeros inserted after the norm. It is not masked: its keys and values are the biases.
    """
    _need(x.ndim == 4, "attention_block: x must be [B, H, W, C]", x)
    _, H, W, _ = x.shape
    y = shifted_windows(layer_norm(x, norm_weight, norm_bias, eps=eps), window, shift, pad_mode)
    mask = mask_of(x, mask, window, shift)
    y = window_attention(y, qkv_weight, qkv_bias, proj_weight, proj_bias, position_bias, mask, num_heads=num_heads)
    return x + unshifted_windows(y, window, shift, H, W, pad_mode)


def cosine_attention_block(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    qkv_weight: Array,
    qkv_bias: Array | None,
    proj_weight: Array,
    proj_bias: Array | None,
    logit_scale: Array,
    position_bias: Array,
    mask: Array | None = None,
    *,
    num_heads: int,
    window: Pair,
    shift: Pair = (0, 0),
    pad_mode: PadMode = "pad_roll",
    eps: float = 1e-5,
) -> Array:
    """First half of a V2 block: ``x + LN(cosine_window_attention(x))`` over shifted windows.

    Parameters, result and errors are those of `attention_block`, with `cosine_window_attention`'s ``logit_scale``.
    """
    _need(x.ndim == 4, "cosine_attention_block: x must be [B, H, W, C]", x)
    _, H, W, _ = x.shape
    y = shifted_windows(x, window, shift, pad_mode)
    mask = mask_of(x, mask, window, shift)
    y = cosine_window_attention(
        y, qkv_weight, qkv_bias, proj_weight, proj_bias, logit_scale, position_bias, mask, num_heads=num_heads
    )
    return x + layer_norm(unshifted_windows(y, window, shift, H, W, pad_mode), norm_weight, norm_bias, eps=eps)


def mlp_block(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    fc1_weight: Array,
    fc1_bias: Array,
    fc2_weight: Array,
    fc2_bias: Array,
    *,
    post_norm: bool = False,
    eps: float = 1e-5,
) -> Array:
    """Second half of a block: V1 ``x + mlp(LN(x))``, V2 (``post_norm``) ``x + LN(mlp(x))``.

    Parameters
    ----------
    x : [..., C]
    norm_weight, norm_bias : [C]

    The others are those of `mlp`.

    Returns
    -------
    [..., C]

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if post_norm:
        return x + layer_norm(mlp(x, *weights), norm_weight, norm_bias, eps=eps)
    return x + mlp(layer_norm(x, norm_weight, norm_bias, eps=eps), *weights)


def patch_merge(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    reduction_weight: Array,
    *,
    post_norm: bool = False,
    eps: float = 1e-5,
) -> Array:
    """Merge 2 x 2 neighbours: V1 ``W LN([x00 x10 x01 x11])``, V2 (``post_norm``) ``LN(W [x00 x10 x01 x11])``.

    Parameters
    ----------
    x : [B, H, W, C]
        Odd sides are padded with zeros at the bottom and right.
    norm_weight, norm_bias : [4 C], for V2 [2 C]
    reduction_weight : [2 C, 4 C]

    Returns
    -------
    [B, ceil(H / 2), ceil(W / 2), 2 C]

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    _need(x.ndim == 4, "patch_merge: x must be [B, H, W, C]", x)
    B, H, W, C = x.shape
    xp = array_namespace(x)
    x = _pad(x, (0, H % 2, W % 2, 0))
    H, W = (H + 1) // 2, (W + 1) // 2
    x = xp.permute_dims(xp.reshape(x, (B, H, 2, W, 2, C)), (0, 1, 3, 4, 2, 5))  # column, row, channel
    x = xp.reshape(x, (B, H, W, 4 * C))
    if post_norm:
        return layer_norm(linear(x, reduction_weight), norm_weight, norm_bias, eps=eps)
    return linear(layer_norm(x, norm_weight, norm_bias, eps=eps), reduction_weight)


def global_pool(x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5) -> Array:
    """Mean over the tokens of each image of ``LN(x)``, of ``x`` where weight is None.

    Parameters
    ----------
    x : [B, H, W, C]
    weight, bias : [C], optional

    Returns
    -------
    [B, C]

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    _need(x.ndim == 4, "global_pool: x must be [B, H, W, C]", x)
    xp = array_namespace(x)
    if weight is not None:
        x = layer_norm(x, weight, bias, eps=eps)
    return xp.mean(xp.reshape(x, (x.shape[0], -1, x.shape[-1])), axis=1)


def _need(fits: bool, rule: str, got: Array) -> None:
    if not fits:
        raise InputError(f"{rule}, got shape {tuple(got.shape)}")


def _check_attention(
    op: str, x: Array, qkv_weight: Array, position_bias: Array, mask: Array | None, num_heads: int
) -> None:
    _need(x.ndim == 3, f"{op}: x must be [B * nW, N, C]", x)
    n, N, C = x.shape
    _need(qkv_weight.shape == (3 * C, C), f"{op}: qkv_weight must be [{3 * C}, {C}]", qkv_weight)
    if num_heads < 1 or C % num_heads:
        raise InputError(f"{op}: num_heads must be a divisor of the {C} channels, got {num_heads}")
    fits = position_bias.shape == (num_heads, N, N)
    _need(fits, f"{op}: position_bias must be [{num_heads}, {N}, {N}]", position_bias)
    if mask is not None:
        fits = mask.ndim == 3 and mask.shape[1:] == (N, N) and mask.shape[0] > 0 and n % mask.shape[0] == 0
        _need(fits, f"{op}: mask must be [nW, {N}, {N}], nW a divisor of the {n} windows", mask)


def _heads(qkv: Array, num_heads: int) -> tuple[Array, Array, Array]:
    """[B * nW, N, 3 C] -> q, k, v, each [B * nW, nH, N, d] (views)."""
    n, N, C3 = qkv.shape
    xp = array_namespace(qkv)
    qkv = xp.reshape(qkv, (n, N, 3, num_heads, C3 // (3 * num_heads)))
    q, k, v = (xp.permute_dims(qkv[:, :, i, ...], (0, 2, 1, 3)) for i in range(3))
    return q, k, v


def _attend(q: Array, k: Array, v: Array, position_bias: Array, mask: Array | None) -> Array:
    """``softmax(q k^T + B + mask) v``, heads joined: [B * nW, nH, N, d] -> [B * nW, N, C]."""
    xp = array_namespace(q)
    n, nH, N, d = q.shape
    scores = xp.matmul(q, xp.permute_dims(k, (0, 1, 3, 2)))  # [B * nW, nH, N, N]
    scores += position_bias
    if mask is not None:
        scores = xp.reshape(scores, (-1, mask.shape[0], nH, N, N))
        scores += mask[:, None, ...]
        scores = xp.reshape(scores, (n, nH, N, N))
    y = xp.permute_dims(xp.matmul(softmax(scores), v), (0, 2, 1, 3))
    return xp.reshape(y, (n, N, nH * d))


def _unit(x: Array) -> Array:
    """``x / max(|x|, 1e-12)`` over the last axis."""
    xp = array_namespace(x)
    norm = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
    return x / xp.clip(norm, 1e-12, None)


def _pad(x: Array, after: tuple[int, int, int, int]) -> Array:
    """Zeros after the end of each axis."""
    xp = array_namespace(x)
    for axis, size in enumerate(after):
        if size:
            shape = tuple(size if i == axis else s for i, s in enumerate(x.shape))
            x = xp.concat([x, xp.zeros(shape, dtype=x.dtype, device=x.device)], axis=axis)
    return x


def _roll(x: Array, shift: Pair) -> Array:
    """Cyclic shift of rows and columns."""
    return array_namespace(x).roll(x, shift, axis=(1, 2)) if any(shift) else x


def _erf(x: Array) -> Array:
    """erf in float64, from the library that has it."""
    if is_cupy_array(x):
        from cupyx.scipy.special import erf

        return erf(x)
    y = np.asarray(np.frompyfunc(math.erf, 1, 1)(np.asarray(x)), dtype=np.float64)
    return array_namespace(x).asarray(y, device=x.device)
