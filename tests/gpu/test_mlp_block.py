"""The MLP half of a block in one launch against float64: every plan, both versions and types, rows that fill none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.ops import fused_mlp, reference
from tests.op_cases import rounded, steps_rounded

cupy = pytest.importorskip("cupy", reason="needs CuPy")

EPS = 1e-5
NAMES = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")

SHARES = [
    (96, 4, fused_mlp.Plan(2, 48, 4)), (96, 4, fused_mlp.Plan(1, 24, 4)), (128, 4, fused_mlp.Plan(2, 48, 4)),
    (192, 4, fused_mlp.Plan(4, 24, 4)), (192, 4, fused_mlp.Plan(8, 64, 4)), (256, 4, fused_mlp.Plan(8, 64, 4)),
    (96, 2, fused_mlp.Plan(4, 16, 4)), (128, 3, fused_mlp.Plan(4, 32, 4)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def usable() -> None:
    if jit.compute_capability() != 90:
        pytest.skip("the kernel is for SM 9.0")


def draw(C: int, hidden: int, seed: int) -> dict[str, np.ndarray]:
    """Weights of a trained network's size, none of mean 0."""
    rng = np.random.default_rng(seed)

    def normal(mean: float, deviation: float, *shape: int) -> np.ndarray:
        return (mean + deviation * rng.standard_normal(shape)).astype(np.float32)

    return {
        "norm_weight": normal(1, 0.2, C), "norm_bias": normal(0.05, 0.1, C),
        "fc1_weight": normal(0.01, 1.5 * C**-0.5, hidden, C), "fc1_bias": normal(-0.1, 0.3, hidden),
        "fc2_weight": normal(0.002, 1.5 * hidden**-0.5, C, hidden), "fc2_bias": normal(0.1, 0.1, C),
    }  # fmt: skip


def errors(
    C: int, hidden: int, M: int, name: str, post_norm: bool, plan: fused_mlp.Plan | None, scale: float = 3.0
) -> tuple[list[float], list[float], int]:
    """Distances from float64 of ``out`` and of ``out - x``: of the kernel, of its steps in this precision; the seed.

    Asserts that every element is written, nothing past the end, and the same bits every time.
    """
    precision = precisions.of(name)
    seed = int(np.random.SeedSequence().entropy % 2**32)
    weights = {k: rounded(w, precision) for k, w in draw(C, hidden, seed).items()}
    packed = fused_mlp.pack(*(weights[k] for k in NAMES), precision=precision, post_norm=post_norm)
    packed = fused_mlp.Packed(*map(cupy.asarray, packed))
    x = 1 + scale * np.random.default_rng(seed + 1).standard_normal((M, C), np.float32)
    x = precisions.encode(cupy.asarray(x), precision)
    canary = 0x7E01 if name == "fp16" else 0x7FC1  # a NaN
    runs = []
    for _ in range(3):
        memory = cupy.full((M + 64) * C, canary, np.uint16)
        out = memory[: M * C].view(precision.storage).reshape(M, C)
        moments = None if post_norm else cupy.full((M + 1, 1, 2), np.nan, np.float32)
        options = dict(eps=EPS, precision=precision, out=out, plan=plan)
        assert fused_mlp.mlp_block(x, packed, moments=None if moments is None else moments[:M], **options) is out
        assert bool((memory[M * C :] == canary).all()), f"seed {seed}: wrote past the end"
        runs.append(memory)
    assert all(bool((r == runs[0]).all()) for r in runs[1:]), f"seed {seed}: differs from run to run"

    if moments is not None:
        y = cupy.asarray(precisions.decode(out, precision), np.float64)
        mean, squares = moments[:M, 0].T
        assert bool((abs(mean - y.mean(axis=1)) <= 0.01 * y.std(axis=1)).all()), f"seed {seed}"
        assert bool((abs(squares / C / y.var(axis=1) - 1) <= 0.02).all()), f"seed {seed}"
        assert bool(cupy.isnan(moments[M]).all()), f"seed {seed}: wrote past the end"

    exact = cupy.asarray(precisions.decode(x, precision), np.float64)
    args: dict[str, Any] = {k: cupy.asarray(w, np.float64) for k, w in weights.items()}
    args |= {"post_norm": post_norm, "eps": EPS}
    want = reference.mlp_block(exact, **args)
    with steps_rounded(precision):
        plain = rounded(reference.mlp_block(exact, **args), precision)
    got = precisions.decode(out, precision).astype(np.float64)

    def distances(y: Any) -> list[float]:
        found = [float(cupy.linalg.norm(y - want) / cupy.linalg.norm(r)) for r in (want, want - exact)]
        return [d if d == d else float("inf") for d in found]

    return distances(got), distances(plain), seed


def check(C: int, hidden: int, M: int, name: str, post_norm: bool, plan: fused_mlp.Plan | None = None) -> None:
    got, plain, seed = errors(C, hidden, M, name, post_norm, plan)
    for g, p, what in zip(got, plain, ("out", "out - x"), strict=True):
        assert g <= 2 * p, f"seed {seed}, M {M}: error of {what} {g:.2e}, of the plain composition {p:.2e}"


@pytest.mark.parametrize("post_norm", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("C", [96, 128, 192, 256])
def test_mlp_block(C: int, name: str, post_norm: bool) -> None:
    for M in (1, 63, 65, 1000, 8449):
        check(C, 4 * C, M, name, post_norm)
    for M in (65, 8449):
        check(C, 2 * C, M, name, post_norm)


@pytest.mark.parametrize(("name", "post_norm"), [("fp16", False), ("bf16", True)])
@pytest.mark.parametrize(
    ("C", "ratio", "plan"), SHARES, ids=lambda v: str(v) if isinstance(v, int) else f"{v.split}x{v.rows}"
)
def test_clusters(C: int, ratio: int, plan: fused_mlp.Plan, name: str, post_norm: bool) -> None:
    for M in (1, 63, 65, 784):
        check(C, ratio * C, M, name, post_norm, plan)


@pytest.mark.parametrize("C", [96, 128, 192, 256])
def test_walks(C: int) -> None:
    """Few rows and many by the plan for many; a hidden layer that fills no ring."""
    for ratio in (1, 3, 4, 8):
        if not fused_mlp.takes(C, ratio * C, precisions.of("fp16")):
            continue  # no whole chunks, or too many vectors for shared memory
        plan = fused_mlp.walk(C, ratio * C)
        for M in (1, 65, 132 * 64 * 3 + 7):
            check(C, ratio * C, M, "fp16", ratio == 3, plan)


@pytest.mark.parametrize("post_norm", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_extreme_values_stay_finite(name: str, post_norm: bool) -> None:
    """Rows of no variance, near the end of the range, next to nothing; V2's hidden layer grows with x."""
    precision = precisions.of(name)
    weights = draw(96, 384, 1)
    packed = fused_mlp.pack(*(weights[k] for k in NAMES), precision=precision, post_norm=post_norm)
    packed = fused_mlp.Packed(*map(cupy.asarray, packed))
    largest = 600 if post_norm else 6e4
    for M in (70, 8449):
        deviation = np.array([0, 1e-6, 1, largest / 6])[np.arange(M) % 4]
        x = np.random.default_rng(2).standard_normal((M, 96)) * deviation[:, None]
        x[::8] = largest
        x = precisions.encode(cupy.asarray(x), precision)
        y = fused_mlp.mlp_block(x, packed, eps=EPS, precision=precision)
        assert bool(cupy.isfinite(precisions.decode(y, precision)).all())


def test_weights_of_another_size_are_refused() -> None:
    precision = precisions.of("fp16")
    packed = fused_mlp.pack(*(draw(96, 384, 1)[k] for k in NAMES), precision=precision, post_norm=False)
    with pytest.raises(InputError, match="must be packed for the 128 channels"):
        fused_mlp.mlp_block(cupy.zeros((5, 128), np.float16), packed, eps=EPS, precision=precision)
