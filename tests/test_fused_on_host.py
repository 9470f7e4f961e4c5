"""ops/fused.py and its kernels on the CPU: their logic, where there is no GPU."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swincupy import forward, jit
from swincupy import precision as precisions
from swincupy.config import SwinConfig
from swincupy.errors import InputError
from swincupy.ops import fused, reference, wgmma
from swincupy.parameters import fold, parameter_shapes, plan
from tests.host import emulator
from tests.op_cases import CASES, Case, check, distance, draw, norm

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU")

FIRST = {c.op: c for c in reversed(CASES)}.values()  # float and bfloat16 share the kernels' logic with float16


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with emulator.installed():
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c}")
def test_fp16(case: Case) -> None:
    check(case, "fp16", fused.Fused("fp16"), emulator.asarray)


@pytest.mark.parametrize("size", [(2, 7, 7, 768), (1, 3, 5, 1024), (1, 2, 1, 1536)], ids=str)
def test_a_cluster_pools_as_one_block_does(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("global_pool", {"x": size, **norm(size[-1], "")})
    x = {k: emulator.asarray(v) for k, v in draw(case, precisions.of("fp16"), np.random.default_rng()).items()}
    alone = fused.Fused("fp16").global_pool(**x)
    monkeypatch.setattr(jit, "compute_capability", lambda: 90)
    monkeypatch.setattr(jit, "multiprocessors", lambda device: 16)
    check(case, "fp16", fused.Fused("fp16"), emulator.asarray)
    assert np.array_equal(fused.Fused("fp16").global_pool(**x), alone)


@pytest.mark.parametrize("case", FIRST, ids=lambda c: f"{c.op}-{c}")
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_other_precisions(case: Case, name: str) -> None:
    check(case, name, fused.Fused(name), emulator.asarray)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_forward_pass(version: int, name: str) -> None:
    """A whole model, small, on a size that needs padding at every stage."""
    config = SwinConfig(
        version=version, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5,
        mlp_ratio=2.0, pad_mode="pad_roll",
    )  # fmt: skip
    rng = np.random.default_rng()
    params = {
        k: (1.0 if "norm" in k and k.endswith("weight") else 0.0) + 0.2 * rng.standard_normal(s).astype(np.float32)
        for k, s in parameter_shapes(config).items()
    }
    x = rng.standard_normal((2, 3, 18, 29))
    precision = precisions.of(name)
    block = forward.BLOCK[version]

    def run(convert, ops, x):  # type: ignore[no-untyped-def]
        w = fold(params, config, convert, merge_in_place=ops is not reference)
        sized = plan(w, config, *x.shape[2:], convert)
        return forward.logits(forward.patches(x, w, sized, ops), w, sized, block, ops)

    want = run(lambda a: np.asarray(a, np.float64), reference, x)
    y = run(
        lambda a: emulator.asarray(precisions.encode(np.asarray(a), precision)),
        fused.Fused(name),
        emulator.asarray(x.astype(np.float32)),
    )
    limit = {"fp32": 1e-5, "bf16": 3e-2}[name]
    assert distance(precisions.decode(np.asarray(y), precision), want) <= limit


@pytest.mark.parametrize(
    ("few", "dim", "norms", "merges"),
    [(1 << 18, 192, 2 * 3 - 1, 1), (0, 192, 2 * 3 - 1, 1), (0, 256, 3, 0)], ids=["few rows", "many rows", "wide rows"],
)  # fmt: skip
def test_norms_that_are_parts_of_products(
    monkeypatch: pytest.MonkeyPatch, few: int, dim: int, norms: int, merges: int
) -> None:
    """A whole model whose products give moments and take norms, as on SM 9.0; the first norm follows no product.

    Of wide rows only fc1's: what comes before the others is deep. A merge gathers neighbours where none are missing.
    """
    normed, product = list[bool](), fused.gemm

    def gemm(*args: Any, **options: Any) -> Any:
        normed.append(options["norm"] is not None)
        return product(*args, **options)

    monkeypatch.setattr(wgmma, "_FEW", few)
    monkeypatch.setattr(fused, "gemm", gemm)
    monkeypatch.setattr(fused, "takes_norm", lambda N, K, precision: wgmma.takes_norm(K))
    monkeypatch.setattr(fused, "takes_gather", lambda N, K, *of_map: wgmma.takes_gather(of_map[0], K, of_map[1]))
    monkeypatch.setattr(fused, "gives_moments", lambda M, N, K, precision: wgmma.better_with_moments(M, N, K))
    config = SwinConfig(
        patch_size=2, embed_dim=dim, depths=(2, 1), num_heads=(dim // 32, dim // 16), window_size=4, num_classes=5,
        mlp_ratio=2.0, pad_mode="pad_roll",
    )  # fmt: skip
    rng, precision, ops = np.random.default_rng(), precisions.of("fp16"), fused.Fused("fp16")
    params = {
        k: 1.0 * ("norm" in k and k.endswith("weight")) + rng.standard_normal(s).astype(np.float32) * s[-1] ** -0.5
        for k, s in parameter_shapes(config).items()
    }

    def run(convert: Any, ops: Any, x: np.ndarray, **options: Any) -> Any:
        w = fold(params, config, convert, **options)
        sized = plan(w, config, *x.shape[2:], convert)
        return forward.logits(forward.patches(x, w, sized, ops), w, sized, forward.block_v1, ops)

    for height, gathered in ((18, 0), (16, merges)):
        x = rng.standard_normal((2, 3, height, 20))
        want = run(lambda a: np.asarray(a, np.float64), reference, x)
        y = run(
            lambda a: emulator.asarray(precisions.encode(np.asarray(a), precision)), ops,
            emulator.asarray(x.astype(np.float32)), fold_norm=ops.fold_norm, merge_in_place=True,
        )  # fmt: skip
        assert distance(np.asarray(y), want) <= 5e-3
        assert normed.count(True) == norms + gathered
        normed.clear()


def test_inputs_that_are_not_as_kernels_need_them() -> None:
    """Strided and misaligned arrays are copied, and no argument is written to."""
    ops = fused.Fused("fp16")
    rng = np.random.default_rng(0)
    buffer = emulator.asarray(rng.standard_normal((7, 2 * 24 + 1)).astype(np.float16))
    weight, bias = (emulator.asarray(rng.standard_normal(24).astype(np.float16)) for _ in range(2))
    for x in (buffer[:, 1:25], buffer[:, :48:2], buffer.reshape(-1)[1:-6].reshape(14, 24)):
        before = buffer.copy()
        y = ops.layer_norm(x, weight, bias)
        want = reference.layer_norm(*(np.asarray(a, np.float64) for a in (x, weight, bias)))
        assert distance(np.asarray(y), want) <= 1e-3
        assert np.array_equal(buffer, before)


def test_moments_end_with_the_result_that_they_are_of() -> None:
    """Nothing holds on to memory of a graph's pool, which loses what outlives it."""
    ops = fused.Fused("fp16")
    result, moments = (emulator.asarray(np.ones((4, 64), np.float32)) for _ in range(2))
    there = weakref.ref(moments)
    ops._remember(result, moments)
    assert ops._moments_of(result) is moments
    del moments
    assert there() is not None
    del result
    assert there() is None


def test_bfloat16_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes for its bfloat16")
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(ml_dtypes.bfloat16)
    y = fused.Fused("bf16").gelu(x.view(emulator.DeviceArray))
    assert y.dtype == np.uint16
    want = reference.gelu(x.astype(np.float64))
    assert distance(precisions.decode(np.asarray(y), precisions.of("bf16")), want) <= 8e-3


def test_what_is_refused() -> None:
    ops = fused.Fused("fp16")
    half, single = emulator.asarray(np.ones((2, 3, 4, 8), np.float16)), emulator.asarray(np.ones(8, np.float32))
    row = emulator.asarray(np.ones(8, np.float16))
    with pytest.raises(InputError, match="layer_norm: x must be a CuPy array, got ndarray"):
        ops.layer_norm(np.ones((2, 8), np.float16), row, row)
    with pytest.raises(InputError, match="layer_norm: weight must hold float16 for fp16, got float32"):
        ops.layer_norm(half, single, row)
    with pytest.raises(InputError, match=r"layer_norm: the norm's weight must be \[8\], got shape \(4,\)"):
        ops.layer_norm(half, row[:4], row)
    with pytest.raises(InputError, match=r"linear: x must have 6 channels"):
        ops.linear(half, emulator.asarray(np.ones((2, 6), np.float16)))
    with pytest.raises(InputError, match=r"patch_embed: images must hold less than 2\^31 numbers each, got \(1, 2, 3"):
        ops.patch_embed(np.broadcast_to(half[:1, :2, :1, :1], (1, 2, 32768, 32768)), half)
    with pytest.raises(InputError, match=r"patch_embed: x must be \[B, 5, H, W\]"):
        ops.patch_embed(half, emulator.asarray(np.ones((8, 5, 2, 2), np.float16)))
    with pytest.raises(InputError, match="mean and std must be given for uint8 pixels"):
        ops.patch_embed(
            emulator.asarray(np.ones((1, 4, 4, 3), np.uint8)), emulator.asarray(np.ones((8, 3, 2, 2), np.float16))
        )
    with pytest.raises(InputError, match=r"at least one 9 x 2 patch"):
        ops.patch_embed(half, emulator.asarray(np.ones((8, 3, 9, 2), np.float16)), patch_pad="crop")
    with pytest.raises(InputError, match="num_heads must divide the 8 channels"):
        ops.window_attention(
            half.reshape(6, 4, 8), *(emulator.asarray(np.ones(s, np.float16)) for s in ((24, 8), (24,), (8, 8), (8,))),
            single, num_heads=3,
        )  # fmt: skip
