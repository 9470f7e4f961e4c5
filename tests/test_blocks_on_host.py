"""The kernels of whole half blocks, compiled by g++ and run on the CPU, clusters of blocks included: their logic."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import fused_attention, fused_mlp, reference
from tests.host import emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU")

EPS = 1e-5


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    # which has two multiprocessors, so that there is more than one round
    with emulator.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "compute_capability", lambda: 90)
        yield  # what a test changes is changed back before this is


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    return (mean + scale * rng.standard_normal(shape)).astype(np.float32)


def close(y: np.ndarray, x: np.ndarray, want: np.ndarray, name: str) -> None:
    """The result, and what the block adds to its input, are within the rounding of storage."""
    precision = precisions.of(name)
    got = precisions.decode(np.asarray(y), precision).astype(np.float64)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= precision.tolerance * np.linalg.norm(want)
    assert np.linalg.norm(got - want) <= 2 * precision.tolerance * np.linalg.norm(want - x)


Plan = fused_mlp.Plan
# walking: weights resident, weights streamed, rows in shared memory; clusters of one block, of some; ragged tiles
MLPS = [
    (96, 384, 300, fused_mlp.walk(96, 384), "fp16", False),
    (96, 768, 70, fused_mlp.walk(96, 768), "fp16", True),
    (192, 768, 200, fused_mlp.walk(192, 768), "fp16", False),
    (128, 256, 65, fused_mlp.walk(128, 256), "bf16", True),
    (96, 384, 37, Plan(1, 24, 4), "fp16", False),
    (96, 384, 50, Plan(2, 48, 4), "fp16", True),
    (192, 768, 33, Plan(4, 32, 4), "fp16", False),
    (256, 1024, 9, Plan(8, 64, 4), "bf16", True),
]


@pytest.mark.parametrize(("C", "hidden", "M", "plan", "name", "post_norm"), MLPS, ids=str)
def test_mlp_block(C: int, hidden: int, M: int, plan: fused_mlp.Plan, name: str, post_norm: bool) -> None:
    rng, precision = np.random.default_rng(), precisions.of(name)
    w = dict(
        norm_weight=draw(rng, C, scale=0.25, mean=1), norm_bias=draw(rng, C),
        fc1_weight=draw(rng, hidden, C, scale=C**-0.5), fc1_bias=draw(rng, hidden),
        fc2_weight=draw(rng, C, hidden, scale=hidden**-0.5), fc2_bias=draw(rng, C),
    )  # fmt: skip
    packed = fused_mlp.Packed(*map(emulator.asarray, fused_mlp.pack(**w, precision=precision, post_norm=post_norm)))
    stored = precisions.encode(draw(rng, M, C, mean=0.5), precision)
    guarded = emulator.asarray(precisions.encode(np.full((M + 1, C), np.nan, np.float32), precision))
    moments = None if post_norm else emulator.asarray(np.full((M + 1, 1, 2), np.nan, np.float32))
    options = dict(eps=EPS, precision=precision, out=guarded[:M], plan=plan)
    fused_mlp.mlp_block(emulator.asarray(stored), packed, moments=None if moments is None else moments[:M], **options)
    x = precisions.decode(stored, precision).astype(np.float64)
    want = reference.mlp_block(x, **{k: v.astype(np.float64) for k, v in w.items()}, post_norm=post_norm, eps=EPS)
    close(guarded[:M], x, want, name)
    assert np.isnan(precisions.decode(np.asarray(guarded[M]), precision)).all(), "wrote past the last row"
    if moments is not None:
        y = precisions.decode(np.asarray(guarded[:M]), precision).astype(np.float64)
        np.testing.assert_allclose(moments[:M, 0, 0], y.mean(axis=1), atol=2e-3)
        np.testing.assert_allclose(moments[:M, 0, 1], y.var(axis=1) * C, rtol=1e-2)
        assert np.isnan(moments[M]).all(), "wrote past the last row"


# each width's tilings for few windows and for many, both versions and windows; shifts of both axes, of one, of none
ATTENTIONS = [
    (96, False, 7, (2, 14, 21), (3, 2), "fp16", None),
    (96, True, 8, (1, 16, 8), (0, 4), "bf16", None),
    (96, False, 7, (1, 7, 14), (3, 3), "fp16", fused_attention._FEW[96][0][0]),
    (128, False, 7, (1, 14, 14), (3, 3), "fp16", fused_attention._FEW[128][0][0]),
    (128, True, 7, (1, 7, 21), (0, 0), "fp16", None),
    (192, False, 7, (1, 14, 14), (3, 0), "fp16", None),
    (192, False, 7, (1, 7, 14), (3, 3), "fp16", fused_attention._FEW[192][0][0]),
    (192, True, 8, (1, 8, 16), (4, 4), "fp16", fused_attention._FEW[192][1][0]),
    (256, False, 8, (1, 8, 16), (4, 4), "bf16", None),
    (256, True, 7, (1, 7, 14), (0, 3), "fp16", fused_attention._FEW[256][0][0]),
    (384, False, 7, (1, 14, 7), (3, 2), "fp16", None),
    (384, True, 8, (1, 8, 16), (0, 4), "bf16", None),
    (512, False, 8, (1, 8, 8), (4, 4), "bf16", None),
    (512, True, 7, (1, 7, 14), (0, 3), "fp16", None),
]


@pytest.mark.parametrize(("C", "cosine", "window", "size", "shift", "name", "tiling"), ATTENTIONS, ids=str)
def test_attention_block(
    C: int, cosine: bool, window: int, size: tuple[int, int, int], shift: tuple[int, int], name: str,
    tiling: fused_attention.Tiling | None,
) -> None:  # fmt: skip
    rng, precision, nH, N = np.random.default_rng(), precisions.of(name), C // 32, window * window
    w = dict(
        norm_weight=draw(rng, C, scale=0.25, mean=1), norm_bias=draw(rng, C),
        qkv_weight=draw(rng, 3 * C, C, scale=C**-0.5), qkv_bias=draw(rng, 3 * C),
        proj_weight=draw(rng, C, C, scale=C**-0.5), proj_bias=draw(rng, C),
    )  # fmt: skip
    if cosine:
        w["qkv_bias"][C : 2 * C] = 0
    scale = np.exp(draw(rng, nH, mean=2, scale=0.5)) if cosine else None
    packed = fused_attention.pack(**w, num_heads=nH, logit_scale=scale, precision=precision)
    packed = fused_attention.Packed(*map(emulator.asarray, packed))
    bias = draw(rng, nH, N, N)
    stored = precisions.encode(draw(rng, *size, C, mean=0.5), precision)
    moments = None
    if fused_attention.gives_moments(C) and not cosine:
        moments = emulator.asarray(np.full((stored.size // C, nH, 2), np.nan, np.float32))
    y = fused_attention.attention_block(
        emulator.asarray(stored), packed, emulator.asarray(fused_attention.prepare_position_bias(bias, precision)),
        window=(window, window), shift=shift, eps=EPS, precision=precision, moments=moments,
        tiling=tiling or (fused_attention._MANY[C][cosine] if C <= 256 else None),
    )  # fmt: skip
    x = precisions.decode(stored, precision).astype(np.float64)
    exact = {k: v.astype(np.float64) for k, v in w.items()} | {"position_bias": bias.astype(np.float64)}
    H, W = size[1:]
    mask = reference.shift_mask(H, W, (window, window), shift) if any(shift) else None
    options = dict(mask=mask, num_heads=nH, window=(window, window), shift=shift, eps=EPS)
    if scale is None:
        want = reference.attention_block(x, **exact, **options)
    else:
        want = reference.cosine_attention_block(x, **exact, logit_scale=scale.astype(np.float64), **options)
    close(y, x, want, name)
    if moments is not None:
        parts = precisions.decode(np.asarray(y), precision).astype(np.float64).reshape(-1, nH, 32)
        of_y = np.stack([parts.mean(-1), 32 * parts.var(-1)], axis=-1)
        assert np.linalg.norm(np.asarray(moments) - of_y) <= precision.tolerance * np.linalg.norm(of_y)
