"""What the kernels of whole half blocks are given: packed weights are the weights, and who gets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import fused, fused_attention, fused_mlp, reference
from tests.host import emulator

FP16, BF16 = precisions.of("fp16"), precisions.of("bf16")


@pytest.fixture
def hopper() -> Iterator[None]:
    with emulator.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "compute_capability", lambda: 90)
        patch.setattr(jit, "multiprocessors", lambda device: 132)
        yield  # what a test changes is changed back before this is


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def of_thread(places: np.ndarray) -> np.ndarray:
    """In each 32 columns, place 16 s + 8 h + 2 q + e holds column 8 q + 4 s + 2 h + e: a thread's are neighbours."""
    s, h, q, e = places // 16 % 2, places // 8 % 2, places // 2 % 4, places % 2
    return places // 32 * 32 + 8 * q + 4 * s + 2 * h + e


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(("C", "hidden"), [(96, 384), (128, 256), (256, 64)])
def test_packed_mlp(C: int, hidden: int, post_norm: bool) -> None:
    """The arithmetic of cuda/mlp_block.cu, on its own image, gives the block."""
    rng = np.random.default_rng()
    w = dict(
        norm_weight=1 + draw(rng, C) / 4, norm_bias=draw(rng, C) / 4, fc1_weight=draw(rng, hidden, C) / C**0.5,
        fc1_bias=draw(rng, hidden), fc2_weight=draw(rng, C, hidden) / hidden**0.5, fc2_bias=draw(rng, C),
    )  # fmt: skip
    packed = fused_mlp.pack(**w, precision=FP16, post_norm=post_norm)
    image = packed.weights.astype(np.float64)
    w1 = image[: hidden * C].reshape(hidden // 8, C // 8, 8, 8).transpose(0, 2, 1, 3).reshape(hidden, C)
    w2 = image[hidden * C :].reshape(hidden // 8, C // 8, 8, 8).transpose(1, 2, 0, 3).reshape(C, hidden)
    columns = of_thread(np.arange(C))
    x = rng.standard_normal((7, C))

    def norm(y: np.ndarray) -> np.ndarray:
        return reference.layer_norm(y, np.ones(C), np.zeros(C))

    b1, b2, *last = np.split(packed.vectors.astype(np.float64), np.cumsum([hidden, C, C])[: 1 + 2 * post_norm])
    y = x if post_norm else norm(x)
    y = reference.gelu(2 * (y[:, columns] @ w1.T + b1))  # W1 and b1 are halved
    z = np.empty_like(x)
    z[:, columns] = y @ w2.T
    z += b2
    got = x + (norm(z) * last[0] + last[1] if post_norm else z)
    want = reference.mlp_block(x, **{k: v.astype(np.float64) for k, v in w.items()}, post_norm=post_norm)
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("C", [96, 384])
def test_packed_attention(C: int, cosine: bool) -> None:
    """Every weight is in the image once, where the slabs say; biases and scales are what the algebra says."""
    nH = C // 32
    rng = np.random.default_rng()
    gamma, beta = 1 + draw(rng, C) / 4, draw(rng, C) / 4
    qkv, bias, proj, proj_bias = draw(rng, 3 * C, C), draw(rng, 3 * C), draw(rng, C, C), draw(rng, C)
    scale = np.abs(draw(rng, nH)) if cosine else None
    packed = fused_attention.pack(
        gamma, beta, qkv, bias, proj, proj_bias, num_heads=nH, logit_scale=scale, precision=FP16
    )

    def rows(slabs: np.ndarray, R: int) -> np.ndarray:
        """[C / 32, R, 4, 8], pieces of 8 permuted by row -> [R, C]."""
        slabs = slabs.astype(np.float64).reshape(C // 32, R, 4, 8)
        of = np.arange(4) ^ (np.arange(R)[:, None] // 2 % 4)
        return np.take_along_axis(slabs, of[None, :, :, None], axis=2).transpose(1, 0, 2, 3).reshape(R, C)

    heads, outputs = packed.image[: 3 * C * C].reshape(nH, -1), packed.image[3 * C * C :]
    log2_e = np.log2(np.e)
    folded, folded_bias = qkv.astype(np.float64), bias.astype(np.float64)
    if not cosine:
        folded_bias = folded_bias + folded @ beta
        folded = folded * gamma
        folded[:C] *= log2_e / 32**0.5
        folded_bias[:C] *= log2_e / 32**0.5
    for h in range(nH):
        want = folded.reshape(3, nH, 32, C)[:, h].reshape(96, C)
        np.testing.assert_allclose(rows(heads[h], 96), want, rtol=1e-3, atol=1e-3)
    place = np.arange(C)
    j, t, e = place // 8 % 4, place // 2 % 4, place % 2
    column = place // 32 * 32 + 8 * t + 2 * j + e
    out_bias = proj_bias + proj @ folded_bias[2 * C :]
    if C > 256:  # a cluster's: 64 rows of the projection and the vectors that a block needs
        got = np.concatenate([rows(of_pair, 64) for of_pair in outputs.reshape(nH // 2, -1)])
        np.testing.assert_allclose(got, proj[:, column], rtol=1e-3, atol=1e-3)
        of_pairs = [np.repeat(v.reshape(-1, 64), 2, axis=0) for v in (out_bias, gamma, beta)]
        of_heads = [folded_bias[place][column].reshape(nH, 32) for place in np.arange(2 * C).reshape(2, C)]
        sums = np.stack([rows(h, 96).sum(axis=1) for h in heads])
        if scale is not None:
            want = np.concatenate([*of_heads, *of_pairs, scale[:, None] * log2_e, np.zeros((nH, 3))], axis=1)
        else:
            sums = sums.reshape(nH, 3, 32)[:, :, column[:32]].reshape(nH, 96)
            want = np.concatenate([of_heads[0], sums, of_pairs[0]], axis=1)
        np.testing.assert_allclose(packed.vectors.reshape(nH, -1), want, rtol=1e-4, atol=1e-4)
        return
    np.testing.assert_allclose(rows(outputs, C), proj[column], rtol=1e-3, atol=1e-3)
    at = 2 * C if cosine else C
    np.testing.assert_allclose(packed.vectors[at : at + C], out_bias, rtol=1e-4, atol=1e-4)
    if scale is not None:
        np.testing.assert_allclose(packed.vectors[at + 3 * C :][:nH], scale * log2_e, rtol=1e-5)


def test_position_bias_of_the_block_changes_no_softmax() -> None:
    bias = draw(np.random.default_rng(), 3, 49, 49)
    got, want = (
        f(bias, FP16).astype(np.float32) / np.log2(np.e)
        for f in (fused_attention.prepare_position_bias, lambda b, p: fused.attention.prepare_position_bias(b, p))
    )
    finite = np.isfinite(want)
    difference = (
        np.where(finite, got - np.where(finite, want, 0), 0)
        .reshape(3, 4, 4, 8, 4, 2, 2, 2)
        .transpose(0, 1, 6, 3, 2, 5, 4, 7)
        .reshape(3, 64, 64)
    )
    rows = difference[:, :49, :49]
    np.testing.assert_allclose(rows, -np.broadcast_to(bias.max(-1, keepdims=True), rows.shape), atol=2e-2)


def test_who_gets_the_whole_block(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the kernel takes go to it, with what was packed; others take several launches."""
    C, nH, rng = 96, 3, np.random.default_rng()
    ops, seen = fused.Fused("fp16"), list[tuple[Any, ...]]()
    raw = dict(
        norm_weight=1 + draw(rng, C) / 4, norm_bias=draw(rng, C), qkv_weight=draw(rng, 3 * C, C) / C**0.5,
        qkv_bias=draw(rng, 3 * C), proj_weight=draw(rng, C, C) / C**0.5, proj_bias=draw(rng, C),
    )  # fmt: skip
    packed = ops.pack_attention(raw, num_heads=nH, logit_scale=None)
    assert packed is not None
    assert ops.pack_attention({**raw, "norm_weight": raw["norm_weight"][:48]}, num_heads=nH, logit_scale=None) is None
    assert fused.Fused("fp32").pack_attention(raw, num_heads=nH, logit_scale=None) is None
    weights = {k: emulator.asarray(v.astype(np.float16)) for k, v in raw.items()}
    bias = ops.position_bias(draw(rng, nH, 49, 49))
    assert bias.block is not None and ops.position_bias(bias) is bias

    def block(x: Any, packed: Any, position_bias: Any, **options: Any) -> Any:
        seen.append((x.shape, packed, position_bias, options["window"], options["shift"]))
        return "one kernel"

    monkeypatch.setattr(fused_attention, "attention_block", block)
    for H, W in ((14, 21), (14, 20)):
        x = emulator.asarray(draw(rng, 1, H, W, C).astype(np.float16))
        options = dict(num_heads=nH, window=(7, 7), shift=(3, 3), position_bias=bias)
        y = ops.attention_block(x, **weights, **options, packed=packed)
        alone = ops.attention_block(x, **weights, **options)
        if W == 21:
            assert isinstance(y, str)
        else:
            np.testing.assert_array_equal(np.asarray(y), np.asarray(alone))
    assert seen == [((1, 14, 21, C), packed, bias.block, (7, 7), (3, 3))]


def test_which_mlps_are_one_kernel(hopper: None) -> None:
    for C in (96, 128, 192, 256):
        assert fused_mlp.takes(C, 4 * C, FP16) and fused_mlp.takes(C, 4 * C, BF16, 100_000)
        assert not fused_mlp.takes(C, 4 * C, precisions.of("tf32")) and not fused_mlp.takes(C, 4 * C + 8, FP16)
    assert not fused_mlp.takes(768, 3072, FP16) and not fused_mlp.takes(45, 192, FP16)
    assert fused_mlp.takes(192, 768, FP16, 784) and fused_mlp.takes(192, 768, FP16, 25088)


def test_which_attentions_are_one_kernel(hopper: None) -> None:
    """The narrow ones for all batches, wider ones for few windows."""
    for C in (96, 128, 192, 256, 384, 512):
        assert fused_attention.takes(C, C // 32, (7, 7), (14, 14), FP16)
        assert fused_attention.takes(C, C // 32, (8, 8), (16, 16), BF16, 1)
        assert fused_attention.takes(C, C // 32, (7, 7), (14, 14), FP16, 32) == (C <= 256)
        assert not fused_attention.takes(C, C // 32, (7, 7), (14, 15), FP16)
    assert not fused_attention.takes(768, 24, (7, 7), (7, 7), FP16, 1)


def test_older_gpus_have_other_kernels(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for sm in (80, 89, 100, 120):
        monkeypatch.setattr(jit, "compute_capability", lambda sm=sm: sm)
        assert not fused_mlp.takes(96, 384, FP16) and not fused_attention.takes(96, 3, (7, 7), (14, 14), FP16)
        assert fused.Fused("fp16").position_bias(np.zeros((3, 49, 49), np.float32)).block is None
