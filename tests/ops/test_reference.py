"""Every operation against a second formulation: loops over pixels and tokens, einsum, math.erf."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from swincupy import ops
from swincupy.errors import InputError

Array = np.ndarray
EPS = 1e-5


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def near(got: Array, want: Array, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


# ---------------------------------------------------------------- the second formulation


def normed(x: Array, weight: Array, bias: Array, eps: float = EPS) -> Array:
    out = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        row = [float(v) for v in x[at]]
        mean = math.fsum(row) / len(row)
        var = math.fsum((v - mean) ** 2 for v in row) / len(row)
        out[at] = [(v - mean) / math.sqrt(var + eps) * g + b for v, g, b in zip(row, weight, bias, strict=True)]
    return out


def erf_gelu(x: Array) -> Array:
    return np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x.ravel().tolist()]).reshape(x.shape)


def source_of(r: int, c: int, H: int, W: int, window: Any, shift: Any, pad_mode: str) -> tuple[int, int] | None:
    """Which token of the map lies at row r, column c of the padded, shifted map; None for padding."""
    if pad_mode == "pad_roll":
        Hp, Wp = math.ceil(H / window[0]) * window[0], math.ceil(W / window[1]) * window[1]
        at = (r + shift[0]) % Hp, (c + shift[1]) % Wp
        return at if at[0] < H and at[1] < W else None
    return ((r + shift[0]) % H, (c + shift[1]) % W) if r < H and c < W else None


def region(i: int, size: int, m: int, s: int) -> int:
    """Number of the slice (0, -m), (-m, -s), (-s, end) that row i is in; the last one is all where s is 0."""
    found = -1
    for n, part in enumerate((slice(0, -m), slice(-m, -s), slice(-s, None))):
        if i in range(*part.indices(size)):
            found = n
    return found


def attention_by_tokens(y: Array, a: dict[str, Any], cosine: bool) -> Array:
    """Shifted window attention of y [H, W, C]: one token, one head, one key at a time; result before the residual."""
    H, W, C = y.shape
    (mh, mw), shift, heads = a["window"], a["shift"], a["num_heads"]
    Hp, Wp, d = math.ceil(H / mh) * mh, math.ceil(W / mw) * mw, C // heads
    out = np.zeros_like(y)
    for top, left in itertools.product(range(0, Hp, mh), range(0, Wp, mw)):
        cells = list(itertools.product(range(top, top + mh), range(left, left + mw)))
        sources = [source_of(r, c, H, W, (mh, mw), shift, a["pad_mode"]) for r, c in cells]
        regions = [(region(r, Hp, mh, shift[0]), region(c, Wp, mw, shift[1])) for r, c in cells]
        tokens = [np.zeros(C) if at is None else y[at] for at in sources]
        qkv = [a["qkv_weight"] @ t + a["qkv_bias"] for t in tokens]
        for i, at in enumerate(sources):
            if at is None:
                continue
            joined = []
            for h in range(heads):
                q, k, v = ([row[part * C + h * d : part * C + (h + 1) * d] for row in qkv] for part in range(3))
                logits = []
                for j in range(len(cells)):
                    if cosine:
                        lengths = max(np.linalg.norm(q[i]), 1e-12) * max(np.linalg.norm(k[j]), 1e-12)
                        logit = q[i] @ k[j] / lengths * a["logit_scale"][h]
                    else:
                        logit = q[i] @ k[j] / math.sqrt(d)
                    logits.append(logit + a["position_bias"][h, i, j] - 100.0 * (regions[i] != regions[j]))
                p = np.exp(np.array(logits) - max(logits))
                joined.append(sum(w * value for w, value in zip(p / p.sum(), v, strict=True)))
            out[at] = a["proj_weight"] @ np.concatenate(joined) + a["proj_bias"]
    return out


def attention_weights(C: int, heads: int, window: tuple[int, int], cosine: bool) -> dict[str, Any]:
    N = window[0] * window[1]
    weights: dict[str, Any] = dict(
        qkv_weight=rand(3 * C, C) / math.sqrt(C), qkv_bias=rand(3 * C), proj_weight=rand(C, C), proj_bias=rand(C),
        position_bias=rand(heads, N, N), num_heads=heads,
    )  # fmt: skip
    return weights | ({"logit_scale": 5 + rand(heads) ** 2} if cosine else {})


# ---------------------------------------------------------------- linear, norms, activations


def test_linear() -> None:
    x, w, b = rand(2, 3, 5), rand(7, 5), rand(7)
    near(ops.linear(x, w, b), np.einsum("abk,nk->abn", x, w) + b)
    near(ops.linear(x[0, 0], w), np.einsum("k,nk->n", x[0, 0], w))
    assert ops.linear(x[:0], w, b).shape == (0, 3, 7)


def test_layer_norm() -> None:
    x, w, b = 3 * rand(2, 3, 5) + 1, rand(5), rand(5)
    near(ops.layer_norm(x, w, b), normed(x, w, b))
    near(ops.layer_norm(x, w, b, eps=0.5), normed(x, w, b, eps=0.5))


@pytest.mark.parametrize("mean", [1e3, -3e4])
def test_layer_norm_of_a_large_mean_keeps_the_deviations(mean: float) -> None:
    """A variance from sums of squares would be off by 100 % here."""
    x = (rand(4, 96) + mean).astype(np.float32)
    got = ops.layer_norm(x, np.ones(96, np.float32), np.zeros(96, np.float32))
    near(got, normed(x.astype(np.float64), np.ones(96), np.zeros(96)), tolerance=1e-3)


def test_layer_norm_of_constant_rows_is_the_bias() -> None:
    near(ops.layer_norm(np.full((2, 6), 4.25), rand(6), rand(6, seed=1)), np.stack([rand(6, seed=1)] * 2), 1e-15)


def test_gelu_is_erf_to_float32_rounding() -> None:
    """On a grid over all that matters, and far out on both sides."""
    far = np.concatenate([np.geomspace(12, 3e38, 500), np.geomspace(1e-38, 1e-3, 500)])
    x = np.concatenate([np.linspace(-12, 12, 200_001), far, -far]).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ops.gelu(x)
    error = np.abs(got - erf_gelu(x.astype(np.float64)))
    assert (error <= 2e-7 * np.maximum(1, np.abs(x.astype(np.float64)))).all()
    assert got.dtype == np.float32


def test_gelu_of_infinities_and_nan() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ops.gelu(np.array([np.inf, 0.0, np.nan], np.float32))
    assert got[0] == np.inf and got[1] == 0 and np.isnan(got[2])


def test_gelu_float64_is_exact() -> None:
    x = np.linspace(-9, 9, 2001).reshape(3, -1)
    near(ops.gelu(x), erf_gelu(x), 1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax(dtype: Any) -> None:
    x = (300 * rand(2, 3, 7)).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ops.softmax(x)
    p = np.exp(np.longdouble(x) - np.longdouble(x).max(-1, keepdims=True))
    near(got, (p / p.sum(-1, keepdims=True)).astype(dtype), 4 * np.finfo(dtype).eps)
    assert got.dtype == dtype


def test_mlp() -> None:
    x, w1, b1, w2, b2 = rand(2, 3, 4), rand(9, 4), rand(9), rand(4, 9), rand(4)
    near(ops.mlp(x, w1, b1, w2, b2), erf_gelu(x @ w1.T + b1) @ w2.T + b2)


@pytest.mark.parametrize("post_norm", [False, True])
def test_mlp_block(post_norm: bool) -> None:
    x, g, b, w1, b1, w2, b2 = rand(2, 3, 2, 4), rand(4), rand(4, seed=1), rand(9, 4), rand(9), rand(4, 9), rand(4)
    got = ops.mlp_block(x, g, b, w1, b1, w2, b2, post_norm=post_norm, eps=1e-3)
    inner = x if post_norm else normed(x, g, b, eps=1e-3)
    inner = erf_gelu(inner @ w1.T + b1) @ w2.T + b2
    near(got, x + (normed(inner, g, b, eps=1e-3) if post_norm else inner))


# ---------------------------------------------------------------- patches and pooling


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 1), (3, 30)])
@pytest.mark.parametrize("patch", [(4, 4), (2, 3)])
def test_patch_embed_pads(size: tuple[int, int], patch: tuple[int, int]) -> None:
    (H, W), (ph, pw) = (math.ceil(s / p) for s, p in zip(size, patch, strict=True)), patch
    x, w, b, g, beta = rand(2, 3, *size), rand(5, 3, *patch), rand(5), rand(5, seed=1), rand(5, seed=2)
    embedded = np.zeros((2, H, W, 5))
    for n, c, y, z in np.ndindex(x.shape):
        embedded[n, y // ph, z // pw] += w[:, c, y % ph, z % pw] * x[n, c, y, z]
    embedded += b
    near(ops.patch_embed(x, w, b), embedded)
    near(ops.patch_embed(x, w, b, g, beta), normed(embedded, g, beta))
    position = rand(1, H, W, 5)
    near(ops.patch_embed(x, w, b, g, beta, position), normed(embedded, g, beta) + position)


def test_patch_embed_crops() -> None:
    x, w, b = rand(2, 3, 11, 13), rand(5, 3, 4, 4), rand(5)
    near(ops.patch_embed(x, w, b, patch_pad="crop"), ops.patch_embed(x[:, :, :8, :12], w, b))
    with pytest.raises(InputError, match=r"at least one 4 x 4 patch, got 3 x 13 pixels"):
        ops.patch_embed(x[:, :, :3], w, b, patch_pad="crop")


@pytest.mark.parametrize("size", [(4, 6), (3, 6), (4, 5), (3, 5), (1, 1), (1, 4)])
@pytest.mark.parametrize("post_norm", [False, True])
def test_patch_merge(size: tuple[int, int], post_norm: bool) -> None:
    """Order of the neighbours: (row 0, column 0), (1, 0), (0, 1), (1, 1); outside the map they are 0."""
    (H, W), C = size, 3
    x, w = rand(2, H, W, C), rand(2 * C, 4 * C)
    g, b = (rand(2 * C if post_norm else 4 * C, seed=s) for s in (1, 2))
    joined = np.zeros((2, math.ceil(H / 2), math.ceil(W / 2), 4 * C))
    for n, i, j, k in np.ndindex(joined.shape[:3] + (4,)):
        row, column = 2 * i + k % 2, 2 * j + k // 2
        if row < H and column < W:
            joined[n, i, j, k * C : (k + 1) * C] = x[n, row, column]
    want = normed(joined @ w.T, g, b) if post_norm else normed(joined, g, b) @ w.T
    near(ops.patch_merge(x, g, b, w, post_norm=post_norm), want)


def test_global_pool() -> None:
    x = rand(2, 3, 5, 4)
    near(ops.global_pool(x), np.array([[x[b, :, :, c].sum() / 15 for c in range(4)] for b in range(2)]))
    g, b = rand(4), rand(4, seed=1)
    near(ops.global_pool(x, g, b, eps=1e-3), normed(x, g, b, eps=1e-3).mean(axis=(1, 2)))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [(2, 2), (1, 1), (2, 3), (6, 1), (6, 9)])
def test_window_partition(window: tuple[int, int]) -> None:
    x, (mh, mw) = rand(2, 6, 18, 3), window
    windows = ops.window_partition(x, window)
    assert windows.shape == (2 * 6 * 18 // (mh * mw), mh * mw, 3)
    for b, r, c in np.ndindex(2, 6, 18):
        n = b * (6 // mh * 18 // mw) + r // mh * (18 // mw) + c // mw
        assert (windows[n, r % mh * mw + c % mw] == x[b, r, c]).all()
    assert (ops.window_reverse(windows, window, 6, 18) == x).all()


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (3, 11), (2, 3)])
@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("pad_mode", ["pad_roll", "roll_pad"])
def test_shifted_windows(size: tuple[int, int], shift: tuple[int, int], pad_mode: Any) -> None:
    (H, W), window = size, (2, 3)
    x = rand(2, H, W, 3)
    windows = ops.shifted_windows(x, window, shift, pad_mode)
    Hp, Wp = math.ceil(H / 2) * 2, math.ceil(W / 3) * 3
    padded = ops.window_reverse(windows, window, Hp, Wp)
    for r, c in np.ndindex(Hp, Wp):
        at = source_of(r, c, H, W, window, shift, pad_mode)
        assert (padded[:, r, c] == (0 if at is None else x[:, at[0], at[1]])).all()
    assert (ops.unshifted_windows(windows, window, shift, H, W, pad_mode) == x).all()


@pytest.mark.parametrize("window", [(4, 4), (2, 3), (7, 5), (1, 4)])
@pytest.mark.parametrize("shifted", [(True, True), (True, False), (False, True), (False, False)])
def test_shift_mask(window: tuple[int, int], shifted: tuple[bool, bool]) -> None:
    H, W = 2 * window[0], 3 * window[1]
    shift = tuple(m // 2 if s else 0 for m, s in zip(window, shifted, strict=True))
    mask = ops.shift_mask(H, W, window, shift)
    N = window[0] * window[1]
    assert mask.shape == (6, N, N) and mask.dtype == np.float32
    for n, i, j in np.ndindex(mask.shape):
        (ri, ci), (rj, cj) = ((n // 3 * window[0] + t // window[1], n % 3 * window[1] + t % window[1]) for t in (i, j))
        same = all(
            region(a, size, m, s) == region(b, size, m, s)
            for a, b, size, m, s in ((ri, rj, H, window[0], shift[0]), (ci, cj, W, window[1], shift[1]))
        )
        assert mask[n, i, j] == (0 if same else -100)


def test_shift_mask_separates_what_the_shift_brought_together() -> None:
    """Without padding: two tokens see each other exactly if their distance in the picture is that in the window."""
    H, W, window, shift = 6, 8, (3, 4), (1, 2)
    place = np.stack(np.meshgrid(np.arange(H), np.arange(W), indexing="ij"), -1)[None]
    there = ops.shifted_windows(place, window, shift)  # [nW, N, 2]
    here = ops.window_partition(np.broadcast_to(place, place.shape), window)
    near_by = (there[:, :, None] - there[:, None] == here[:, :, None] - here[:, None]).all(-1)
    assert ((ops.shift_mask(H, W, window, shift) == 0) == near_by).all()


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (2, 4), (5, 1)])
def test_relative_position_index(window: tuple[int, int]) -> None:
    mh, mw = window
    index = ops.relative_position_index(window)
    offsets = list(itertools.product(range(-(mh - 1), mh), range(-(mw - 1), mw)))
    for i, j in np.ndindex(index.shape):
        offset = i // mw - j // mw, i % mw - j % mw
        assert offsets[index[i, j]] == offset
    assert sorted(set(index.ravel().tolist())) == list(range(len(offsets)))


def test_relative_position_bias() -> None:
    table = rand(3 * 7, 2)
    bias = ops.relative_position_bias(table, (2, 4))
    for h, i, j in np.ndindex(2, 8, 8):
        row = (i // 4 - j // 4 + 1) * 7 + (i % 4 - j % 4 + 3)
        assert bias[h, i, j] == table[row, h]


@pytest.mark.parametrize("window", [(4, 4), (2, 3), (1, 1), (1, 5)])
@pytest.mark.parametrize("pretrained", [(0, 0), (3, 7), (0, 6)])
def test_continuous_position_bias(window: tuple[int, int], pretrained: tuple[int, int]) -> None:
    w1, b1, w2 = rand(512, 2), rand(512), rand(3, 512) / 20
    got = ops.continuous_position_bias(w1, b1, w2, window, pretrained)
    assert got.shape == (3, window[0] * window[1], window[0] * window[1])
    P = [p if p > 0 else m for m, p in zip(window, pretrained, strict=True)]
    for i, j in np.ndindex(got.shape[1:]):
        t = []
        for delta, p in zip((i // window[1] - j // window[1], i % window[1] - j % window[1]), P, strict=True):
            r = 8 * delta / (p - 1) if delta else 0.0
            t.append(math.copysign(math.log2(abs(r) + 1) / math.log2(8), r))
        hidden = np.maximum(w1 @ np.array(t) + b1, 0)
        near(got[:, i, j], 16 / (1 + np.exp(-(w2 @ hidden))))


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_window_attention(cosine: bool, masked: bool) -> None:
    """By einsum; windows of two images share the mask."""
    heads, d, nW, N = 2, 3, 4, 6
    C = heads * d
    x, a = rand(2 * nW, N, C), attention_weights(C, heads, (2, 3), cosine)
    mask = np.where(rand(nW, N, N) > 0, -100.0, 0.0) if masked else None
    q, k, v = np.moveaxis((x @ a["qkv_weight"].T + a["qkv_bias"]).reshape(2, nW, N, 3, heads, d), 3, 0)
    if cosine:
        q, k = (t / np.sqrt(np.einsum("...d,...d", t, t))[..., None] for t in (q, k))
        q = q * a["logit_scale"][:, None]
    else:
        q = q / math.sqrt(d)
    logits = np.einsum("bwihd,bwjhd->bwhij", q, k) + a["position_bias"]
    if mask is not None:
        logits += mask[None, :, None]
    p = np.exp(logits)
    y = np.einsum("bwhij,bwjhd->bwihd", p / p.sum(-1, keepdims=True), v).reshape(2 * nW, N, C)
    op = ops.cosine_window_attention if cosine else ops.window_attention
    near(op(x, mask=mask, **a), y @ a["proj_weight"].T + a["proj_bias"])
    without = {**a, "qkv_bias": None, "proj_bias": None}
    zero = {**a, "qkv_bias": np.zeros(3 * C), "proj_bias": np.zeros(C)}
    near(op(x, mask=mask, **without), op(x, mask=mask, **zero))


def test_cosine_attention_takes_zero_vectors_as_zero() -> None:
    """Padding in V2 has no key at all; nothing is divided by 0."""
    a = attention_weights(4, 2, (1, 3), True)
    a["qkv_bias"][:8] = 0
    x = rand(1, 3, 4)
    x[0, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ops.cosine_window_attention(x, **a)
        got32 = ops.cosine_window_attention(
            **{k: v.astype(np.float32) if isinstance(v, np.ndarray) else v for k, v in {"x": x, **a}.items()}
        )
    near(got[0], attention_by_tokens(x, {**a, "window": (1, 3), "shift": (0, 0), "pad_mode": "pad_roll"}, True)[0])
    near(got32, got, 1e-6)


SHIFTED = [  # size, window, shift
    ((4, 6), (2, 3), (1, 1)),
    ((5, 7), (2, 3), (1, 1)),  # padded on both sides
    ((4, 7), (4, 3), (0, 1)),  # one axis unshifted
    ((3, 2), (4, 5), (2, 2)),  # smaller than a window and shifted all the same
    ((1, 1), (1, 1), (0, 0)),
    ((5, 4), (3, 2), (0, 0)),
]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("pad_mode", ["pad_roll", "roll_pad"])
@pytest.mark.parametrize(("size", "window", "shift"), SHIFTED)
def test_attention_block(size: Any, window: Any, shift: Any, pad_mode: Any, cosine: bool) -> None:
    """Token by token, with the padding taking part in the softmax."""
    (H, W), C = size, 4
    x, g, b = rand(2, H, W, C), rand(C), rand(C, seed=1)
    a = attention_weights(C, 2, window, cosine) | {"window": window, "shift": shift, "pad_mode": pad_mode}
    Hp, Wp = (math.ceil(s / m) * m for s, m in zip(size, window, strict=True))
    mask = ops.shift_mask(Hp, Wp, window, shift, like=x) if any(shift) else None
    if cosine:
        got = ops.cosine_attention_block(x, g, b, mask=mask, eps=1e-3, **a)
        want = [normed(attention_by_tokens(image, a, True), g, b, eps=1e-3) for image in x]
    else:
        got = ops.attention_block(x, g, b, mask=mask, eps=1e-3, **a)
        want = [attention_by_tokens(normed(image, g, b, eps=1e-3), a, False) for image in x]
    near(got, x + np.stack(want), 1e-11)
    block = ops.cosine_attention_block if cosine else ops.attention_block
    np.testing.assert_array_equal(
        block(x, g, b, eps=1e-3, **a), got
    )  # the mask of the shift is made where none is given


def test_padding_modes_differ_where_there_is_padding() -> None:
    a = attention_weights(4, 2, (2, 2), False)
    mask = ops.shift_mask(4, 4, (2, 2), (1, 1), like=a["proj_bias"])

    def block(x: Array, pad_mode: Any) -> Array:
        return ops.attention_block(
            x, np.ones(4), np.zeros(4), mask=mask, window=(2, 2), shift=(1, 1), pad_mode=pad_mode, **a
        )

    near(block(rand(1, 4, 4, 4), "pad_roll"), block(rand(1, 4, 4, 4), "roll_pad"))
    assert np.abs(block(rand(1, 3, 3, 4), "pad_roll") - block(rand(1, 3, 3, 4), "roll_pad")).max() > 0.01


# ---------------------------------------------------------------- libraries, dtypes, memory


def _calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    C, N = 8, 6
    norm, attn = (rand(C), rand(C, seed=1)), (rand(3 * C, C), rand(3 * C), rand(C, C), rand(C))
    bias, mask = rand(2, N, N), np.where(rand(4, N, N) > 0, -100.0, 0.0)
    x, windows = rand(2, 3, 5, C), rand(8, N, C)
    shifted: dict[str, Any] = dict(num_heads=2, window=(2, 3), shift=(1, 1))
    return {
        "linear": (ops.linear, (x, rand(5, C), rand(5)), {}),
        "layer_norm": (ops.layer_norm, (x, *norm), {}),
        "gelu": (ops.gelu, (x,), {}),
        "softmax": (ops.softmax, (x,), {}),
        "mlp": (ops.mlp, (x, rand(9, C), rand(9), rand(C, 9), rand(C)), {}),
        "patch_embed": (ops.patch_embed, (rand(2, 3, 9, 10), rand(C, 3, 4, 4), rand(C), *norm, rand(1, 3, 3, C)), {}),
        "patch_embed crop": (ops.patch_embed, (rand(2, 3, 9, 10), rand(C, 3, 4, 4)), {"patch_pad": "crop"}),
        "patch_merge": (ops.patch_merge, (x, rand(4 * C), rand(4 * C), rand(2 * C, 4 * C)), {}),
        "patch_merge v2": (
            ops.patch_merge, (x, rand(2 * C), rand(2 * C), rand(2 * C, 4 * C)), {"post_norm": True},
        ),
        "global_pool": (ops.global_pool, (x,), {}),
        "window_partition": (ops.window_partition, (x, (3, 5)), {}),
        "window_reverse": (ops.window_reverse, (windows, (2, 3), 4, 6), {}),
        "shifted_windows": (ops.shifted_windows, (x, (2, 3), (1, 1)), {}),
        "unshifted_windows": (ops.unshifted_windows, (windows, (2, 3), (1, 1), 3, 5, "roll_pad"), {}),
        "relative_position_bias": (ops.relative_position_bias, (rand(15, 2), (2, 3)), {}),
        "continuous_position_bias": (ops.continuous_position_bias, (rand(512, 2), rand(512), rand(2, 512), (2, 3)), {}),
        "window_attention": (ops.window_attention, (windows, *attn, bias, mask), {"num_heads": 2}),
        "cosine_window_attention": (
            ops.cosine_window_attention, (windows, *attn, rand(2), bias, mask), {"num_heads": 2},
        ),
        "attention_block": (ops.attention_block, (x, *norm, *attn, bias, mask), shifted),
        "cosine_attention_block": (
            ops.cosine_attention_block, (x, *norm, *attn, rand(2), bias, mask), shifted | {"pad_mode": "roll_pad"},
        ),
        "mlp_block": (ops.mlp_block, (x, *norm, rand(9, C), rand(9), rand(C, 9), rand(C)), {}),
        "shift_mask": (lambda like: ops.shift_mask(4, 6, (2, 3), (1, 1), like=like), (x,), {}),
    }  # fmt: skip


CALLS = _calls()


def test_every_operation_is_called_here() -> None:
    # relative_position_index takes no array
    assert {name.split()[0] for name in CALLS} | {"relative_position_index"} == set(ops.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_dtype_stays_and_inputs_are_left_alone(name: str) -> None:
    op, args, options = CALLS[name]
    exact = op(*args, **options)
    assert exact.dtype == np.float64
    single = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in args]
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in single]
    got = op(*single, **options)
    assert got.dtype == np.float32
    near(got, exact, 2e-5)
    assert all(np.array_equal(a, b) for a, b in zip(single, before, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_strided_inputs(name: str) -> None:
    """Views of every kind give what contiguous arrays give."""
    op, args, options = CALLS[name]
    views = [np.repeat(a, 2, axis=-1)[..., ::2] if isinstance(a, np.ndarray) else a for a in args]
    fortran = [np.asfortranarray(a) if isinstance(a, np.ndarray) else a for a in args]
    near(op(*views, **options), op(*args, **options), 1e-13)
    near(op(*fortran, **options), op(*args, **options), 1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_needs_the_array_api_only(name: str, dtype: str) -> None:
    """Any array library will do: here one that has nothing beyond the standard."""
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    op, args, options = CALLS[name]
    plain = [a.astype(dtype) if isinstance(a, np.ndarray) else a for a in args]
    got = op(*(strict.asarray(a) if isinstance(a, np.ndarray) else a for a in plain), **options)
    assert type(got) is type(strict.asarray(0.0)) and got.dtype == getattr(strict, dtype)
    assert np.array_equal(np.asarray(got), op(*plain, **options))


# ---------------------------------------------------------------- errors

WRONG: list[tuple[str, dict[int | str, Any], str]] = [
    ("linear", {0: rand(2, 7)}, r"linear: x must be \[\.\.\., 8\], got shape \(2, 7\)"),
    ("linear", {1: rand(5)}, r"linear: weight must be \[N, K\], got shape \(5,\)"),
    ("linear", {2: rand(1)}, r"linear: bias must be \[5\], got shape \(1,\)"),
    ("layer_norm", {0: rand(2, 7)}, r"layer_norm: weight must be \[C\] of x \(2, 7\), got shape \(8,\)"),
    ("layer_norm", {2: rand(1)}, r"layer_norm: bias must be \[8\], got shape \(1,\)"),
    ("mlp", {3: rand(8, 7)}, r"linear: x must be \[\.\.\., 7\], got shape \(2, 3, 5, 9\)"),
    ("patch_embed", {0: rand(2, 4, 9, 9)}, r"patch_embed: x must be \[B, 3, H, W\], got shape \(2, 4, 9, 9\)"),
    ("patch_embed", {0: rand(3, 9, 9)}, r"patch_embed: x must be \[B, 3, H, W\], got shape \(3, 9, 9\)"),
    ("patch_embed", {1: rand(8, 3)}, r"patch_embed: weight must be \[C, Cin, Ph, Pw\], got shape \(8, 3\)"),
    ("patch_embed", {5: rand(1, 1, 1, 8)}, r"position_embedding must be \[1, 3, 3, 8\], got shape \(1, 1, 1, 8\)"),
    ("patch_merge", {0: rand(2, 15, 8)}, r"patch_merge: x must be \[B, H, W, C\], got shape \(2, 15, 8\)"),
    ("patch_merge", {1: rand(8)}, r"layer_norm: weight must be .*, got shape \(8,\)"),
    ("global_pool", {0: rand(2, 8)}, r"global_pool: x must be \[B, H, W, C\], got shape \(2, 8\)"),
    ("window_partition", {1: (2, 5)}, r"window_partition: 3 x 5 tokens must be a multiple of the window 2 x 5; pad"),
    ("window_partition", {0: rand(3, 5, 8)}, r"window_partition: x must be \[B, H, W, C\], got shape \(3, 5, 8\)"),
    ("window_reverse", {2: 5}, r"window_reverse: windows must be the 2 x 3 windows of 5 x 6 tokens.*\(8, 6, 8\)"),
    ("window_reverse", {0: rand(7, 6, 8)}, r"window_reverse: .*got shape \(7, 6, 8\)"),
    ("window_reverse", {0: rand(6, 8)}, r"window_reverse: .*got shape \(6, 8\)"),
    ("shifted_windows", {0: rand(3, 5, 8)}, r"shifted_windows: x must be \[B, H, W, C\], got shape \(3, 5, 8\)"),
    ("unshifted_windows", {3: 99}, r"window_reverse: windows must be the 2 x 3 windows of 100 x 6 tokens"),
    ("relative_position_bias", {0: rand(9, 2)}, r"table must be \[15, nH\] for window \(2, 3\), got shape \(9, 2\)"),
    ("continuous_position_bias", {0: rand(512, 3)}, r"linear: x must be \[\.\.\., 3\], got shape \(15, 2\)"),
    ("window_attention", {0: rand(6, 8)}, r"window_attention: x must be \[B \* nW, N, C\], got shape \(6, 8\)"),
    ("window_attention", {1: rand(8, 8)}, r"window_attention: qkv_weight must be \[24, 8\], got shape \(8, 8\)"),
    ("window_attention", {5: rand(1, 6, 6)}, r"position_bias must be \[2, 6, 6\], got shape \(1, 6, 6\)"),
    ("window_attention", {6: rand(3, 6, 6)}, r"mask must be \[nW, 6, 6\], nW a divisor of the 8 windows.*\(3, 6, 6\)"),
    ("window_attention", {"num_heads": 3}, r"num_heads must be a divisor of the 8 channels, got 3"),
    ("window_attention", {"num_heads": 0}, r"num_heads must be a divisor of the 8 channels, got 0"),
    ("cosine_window_attention", {5: rand(2, 1, 1)}, r"logit_scale must be \[2\], got shape \(2, 1, 1\)"),
    ("attention_block", {0: rand(15, 8)}, r"attention_block: x must be \[B, H, W, C\], got shape \(15, 8\)"),
    ("cosine_attention_block", {0: rand(15, 8)}, r"cosine_attention_block: x must be \[B, H, W, C\], got shape"),
    ("mlp_block", {1: rand(7)}, r"layer_norm: weight must be .*, got shape \(7,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_shapes_are_named(name: str, change: dict[int | str, Any], message: str) -> None:
    op, args, options = CALLS[name]
    changed = [change.get(i, a) for i, a in enumerate(args)]
    with pytest.raises(InputError, match=message):
        op(*changed, **options | {k: v for k, v in change.items() if isinstance(k, str)})


@pytest.mark.parametrize("shift", [(2, 0), (0, 3), (-1, 0)])
def test_shift_mask_refuses_shifts_beyond_the_window(shift: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"shift must be at least 0 and below the window \(2, 3\), got"):
        ops.shift_mask(4, 6, (2, 3), shift)
    with pytest.raises(InputError, match="5 x 6 tokens must be a multiple of the window 2 x 3"):
        ops.shift_mask(5, 6, (2, 3), (1, 1))
