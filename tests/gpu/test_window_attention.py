"""window_attention on the GPU against the float64 pieces of ops/reference.py."""

from __future__ import annotations

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.ops import attention
from tests.window_attention_cases import CASES, Case, distance, draw, expected

cupy = pytest.importorskip("cupy", reason="needs CuPy")
pytestmark = pytest.mark.gpu

PRECISIONS = [p.name for p in precisions.PRECISIONS.values() if p.ctype]


def run(case: Case, name: str, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The kernel's result, the one wanted, and how far the plain composition is from that."""
    precision = precisions.of(name, sm=jit.compute_capability())
    arrays = draw(case, precision, seed)
    on_gpu = {k: None if a is None else cupy.asarray(a) for k, a in arrays.items()}
    out = cupy.asarray(precisions.encode(np.full((len(arrays["qkv"]), case.num_heads * case.d), np.nan), precision))
    attention.window_attention(**on_gpu, **case.options, precision=precision, out=out)
    want = expected(case, arrays, precision)
    plain = distance(expected(case, arrays, precision, plain=True), want)
    return precisions.decode(cupy.asnumpy(out), precision), want, plain


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PRECISIONS)
def test_window_attention(case: Case, name: str) -> None:
    seed = int(np.random.SeedSequence().entropy % 2**32)
    out, want, plain = run(case, name, seed)
    error = distance(out, want)
    # a window of one token returns its values, which the plain composition does without an error
    assert error <= max(2 * plain, 1e-7), f"seed {seed}: error {error:.2e}, of the plain composition {plain:.2e}"


def test_window_attention_masks_by_a_hundred() -> None:
    """The mask is a number, not an infinity: logits beyond it attend across regions."""
    case = Case((7, 7), (14, 14), (3, 3), cosine=True)
    precision = precisions.of("fp32")
    arrays = draw(case, precision, seed=1)
    arrays["logit_scale"][:] = 100
    arrays["position_bias"][:] += 90 * (np.arange(49) == 48)
    out = attention.window_attention(
        **{k: cupy.asarray(a) for k, a in arrays.items()}, **case.options, precision=precision
    )
    want = expected(case, arrays, precision)
    hard = expected(case, {**arrays, "position_bias": np.clip(arrays["position_bias"], -20, 20)}, precision)
    assert distance(want, hard) > 0.1
    assert distance(cupy.asnumpy(out), want) <= 1e-5


def test_window_attention_of_zero_vectors() -> None:
    case = Case((8, 8), (9, 9), (4, 4), cosine=True)
    for name in PRECISIONS:
        precision = precisions.of(name)
        arrays = draw(case, precision, seed=2)
        arrays["qkv"][::3] = 0
        out = attention.window_attention(
            **{k: cupy.asarray(a) for k, a in arrays.items()}, **case.options, precision=precision
        )
        want = expected(case, arrays, precision)
        assert distance(precisions.decode(cupy.asnumpy(out), precision), want) <= precision.tolerance


def test_window_attention_prepared_bias_is_the_same() -> None:
    case = Case((7, 7), (14, 14), (3, 3))
    precision = precisions.of("fp16")
    arrays = {k: None if a is None else cupy.asarray(a) for k, a in draw(case, precision, seed=3).items()}
    once = attention.window_attention(**arrays, **case.options, precision=precision)
    arrays["position_bias"] = attention.prepare_position_bias(arrays["position_bias"], precision)
    assert cupy.array_equal(once, attention.window_attention(**arrays, **case.options, precision=precision))


def test_window_attention_refuses() -> None:
    case = Case((7, 7), (7, 7))
    precision = precisions.of("fp16")
    arrays = {k: None if a is None else cupy.asarray(a) for k, a in draw(case, precision, seed=4).items()}
    for changes, message in [
        (dict(batch=2), "qkv must be"),
        (dict(shift=(7, 0)), "shift must be"),
        (dict(num_heads=7), "qkv must be"),
        (dict(num_heads=4), "position_bias must be"),
        (dict(window=(8, 8)), "position_bias must be"),
        (dict(logit_scale=cupy.ones(3, np.float32)), "logit_scale must be"),
        (dict(qkv_bias=cupy.ones(3, np.float16)), "qkv_bias must be"),
        (dict(out=cupy.ones((3, 3), np.float16)), "out must be"),
    ]:
        with pytest.raises(InputError, match=message):
            attention.window_attention(**{**arrays, **case.options, **changes}, precision=precision)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_window_attention_as_built_for_sm_75(name: str) -> None:
    """The oldest GPUs' code, which newer ones run from PTX."""
    from cupy.cuda import function

    case = Case((7, 7), (9, 16), (3, 3), batch=2)
    precision = precisions.of(name)
    arrays = draw(case, precision, seed=5)
    fixed, tiling = attention.constants(case.d, case.window, precision, cosine=False, pad_mode=case.pad_mode)
    module = function.Module()
    module.load(jit.compile_to_cubin(jit.Variant("window_attention", fixed, arch="compute_75"), 75))
    kernel = module.get_function("window_attention")
    out = cupy.zeros((len(arrays["qkv"]), case.num_heads * case.d), precision.storage)
    bias = cupy.asarray(attention.prepare_position_bias(arrays["position_bias"], precision))
    blocks = -(-16 // 7) * case.num_heads * -(-4 // tiling.warps), 2, case.batch
    kernel(
        blocks, (32 * tiling.warps, 1, 1),
        (cupy.asarray(arrays["qkv"]), cupy.asarray(arrays["qkv_bias"]), bias, np.uint64(0), out,
         *np.int32((*case.grid, *case.shift, case.num_heads)), np.float32(case.d**-0.5)),
    )  # fmt: skip
    assert distance(cupy.asnumpy(out), expected(case, arrays, precision)) <= precision.tolerance
