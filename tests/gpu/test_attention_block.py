"""attention_block, the attention half of a block in one launch, on the GPU against ops/reference.py in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.ops import fused_attention
from swincupy.ops.fused_attention import Packed, Tiling
from swincupy.precision import Precision
from tests.op_cases import Case, attention, distance, draw, expected

cupy = pytest.importorskip("cupy", reason="needs CuPy")
pytestmark = pytest.mark.gpu

WIDTHS = (96, 128, 192, 256, 384, 512)
NAMES = ("fp16", "bf16")


@pytest.fixture(autouse=True)
def only_on_hopper() -> None:
    if jit.compute_capability() != 90:
        pytest.skip("needs SM 9.0")


def block(x: tuple[int, ...], M: int, shift: tuple[int, int] = (0, 0), **options: Any) -> Case:
    return attention(x, x[-1] // 32, window=(M, M), shift=shift, **options)


def arrays_of(case: Case, precision: Precision, seed: int) -> dict[str, np.ndarray]:
    """Fresh numbers; x has a mean beside its deviation."""
    rng = np.random.default_rng(seed)
    arrays = draw(case, precision, rng)
    x = rng.uniform(-1, 1) + rng.uniform(0.5, 2) * rng.standard_normal(case.shapes["x"])
    return arrays | {"x": precisions.encode(x, precision)}


def pack(arrays: dict[str, np.ndarray], precision: Precision) -> tuple[Packed, Any]:
    """The parameters as the kernel reads them, on the device."""

    def exact(name: str) -> Any:
        x = arrays.get(name)
        if x is None or x.dtype == np.float32:
            return x
        return precisions.decode(x, precision)

    names = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    num_heads = len(arrays["position_bias"])
    packed = fused_attention.pack(
        *map(exact, names), num_heads=num_heads, logit_scale=exact("logit_scale"), precision=precision
    )
    bias = fused_attention.prepare_position_bias(exact("position_bias"), precision)
    return Packed(*map(cupy.asarray, packed)), cupy.asarray(bias)


def launch(case: Case, arrays: dict[str, np.ndarray], precision: Precision, **more: Any) -> Any:
    packed, bias = pack(arrays, precision)
    x = cupy.asarray(arrays["x"])
    out = cupy.full(x.shape, 0xFFFF, np.uint16).view(precision.storage)  # NaN
    options = {k: case.options[k] for k in ("window", "shift")}
    return fused_attention.attention_block(x, packed, bias, **options, precision=precision, out=out, **more)


def check(case: Case, name: str, tiling: Tiling | None = None) -> None:
    """At most twice as far from float64 as the composition of rounded steps; also without the residual."""
    precision = precisions.of(name)
    seed = int(np.random.default_rng().integers(2**32))
    arrays = arrays_of(case, precision, seed)
    out = launch(case, arrays, precision, tiling=tiling)
    assert cupy.array_equal(out.view(np.uint16), launch(case, arrays, precision, tiling=tiling).view(np.uint16))
    want, plain = expected(case, arrays, precision), expected(case, arrays, precision, plain=True)
    x, got = (precisions.decode(a, precision).astype(np.float64) for a in (arrays["x"], out.get()))
    for residual in (0, x):
        error, bound = distance(got - residual, want - residual), distance(plain - residual, want - residual)
        assert error <= 2 * bound, f"seed {seed}: error {error:.2e}, of the plain composition {bound:.2e}"


def tilings(C: int, cosine: bool) -> Iterator[Tiling | None]:
    """All that are chosen for some number of windows; None where clusters take each a window."""
    if C > 256:
        yield None
        return
    yield from dict.fromkeys(fused_attention.choose(C, cosine, n, 132) for n in (1, 16, 40, 64, 100, 200, 300, 9999))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("C", WIDTHS)
def test_attention_block(C: int, cosine: bool, name: str) -> None:
    """Both windows, shifts, batches, with every tiling."""
    for tiling in tilings(C, cosine):
        check(block((1, 14, 21, C), 7, (3, 3), cosine=cosine), name, tiling)
        check(block((3, 16, 8, C), 8, (0, 5), cosine=cosine, biased=False), name, tiling)
        check(block((3, 7, 14, C), 7, (0, 0), cosine=cosine, biased=False), name, tiling)
        check(block((1, 16, 24, C), 8, (4, 1), cosine=cosine), name, tiling)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("C", WIDTHS)
def test_more_windows_than_fit_at_once(C: int, cosine: bool) -> None:
    size = (5, 49, 63) if C < 384 else (2, 35, 42)
    for tiling in tilings(C, cosine):
        check(block((*size, C), 7, (3, 2), cosine=cosine), "fp16", tiling)


@pytest.mark.parametrize("cosine", [False, True])
def test_in_place_and_as_chosen(cosine: bool) -> None:
    precision, case = precisions.of("fp16"), block((2, 28, 28, 192), 7, (3, 3), cosine=cosine)
    arrays = arrays_of(case, precision, seed=1)
    packed, bias = pack(arrays, precision)
    x = cupy.asarray(arrays["x"])
    want = launch(case, arrays, precision)
    got = fused_attention.attention_block(x, packed, bias, window=(7, 7), shift=(3, 3), precision=precision, out=x)
    assert got is x and cupy.array_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cosine", [False, True])
def test_results_do_not_depend_on_the_batch(cosine: bool, name: str) -> None:
    precision, case = precisions.of(name), block((5, 28, 28, 96), 7, (3, 3), cosine=cosine)
    arrays = arrays_of(case, precision, seed=2)
    for tiling in tilings(96, cosine):
        whole = launch(case, arrays, precision, tiling=tiling)
        part = launch(case, arrays | {"x": arrays["x"][3:4]}, precision, tiling=tiling)
        assert cupy.array_equal(whole[3:4], part)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("C", WIDTHS)
def test_extremes_stay_finite(C: int, cosine: bool) -> None:
    """Zero vectors, rows far from zero, logits far apart and beyond the mask, cosine scales of 100."""
    for name in NAMES:
        precision = precisions.of(name)
        for shift, factor in (((0, 0), 30), ((3, 3), 1000)):
            case = block((1, 14, 14, C), 7, shift, cosine=cosine)
            arrays = arrays_of(case, precision, seed=3)
            x = precisions.decode(arrays["x"], precision)
            x[0, ::3], x[0, 1::3] = 0, 1000 + x[0, 1::3]
            arrays["x"] = precisions.encode(x, precision)
            arrays["position_bias"] *= factor
            if cosine:
                arrays["logit_scale"][:] = 100
                arrays["qkv_bias"][:] = 0
            want, plain = expected(case, arrays, precision), expected(case, arrays, precision, plain=True)
            for tiling in tilings(C, cosine):
                out = precisions.decode(launch(case, arrays, precision, tiling=tiling).get(), precision)
                assert np.isfinite(out).all()
                if not any(shift):  # of the logits of a masked row the largest are known to 11 bits
                    assert distance(out, want) <= 2 * distance(plain, want)


def test_stream_and_capture() -> None:
    """Work goes to CuPy's current stream and can be captured; launches in a row overlap and still wait."""
    precision, case = precisions.of("fp16"), block((1, 28, 28, 192), 7, (3, 3))
    arrays = arrays_of(case, precision, seed=4)
    packed, bias = pack(arrays, precision)

    def twice(x: Any) -> Any:
        for shift in ((0, 0), (3, 3)) * 4:
            x = fused_attention.attention_block(x, packed, bias, window=(7, 7), shift=shift, precision=precision)
        return x

    x = cupy.asarray(arrays["x"])
    want = twice(x)
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for capturing in (False, True):
            if capturing:
                stream.begin_capture()
            y = twice(x)
        graph = stream.end_capture()
        y.fill(0)
        for _ in range(20):
            graph.launch()
    stream.synchronize()
    assert cupy.array_equal(y, want)


def test_registers_are_not_spilled() -> None:
    for v in fused_attention.variants():
        raw = jit.kernel(v.name, arch=v.arch, **v.constants).raw
        assert raw.local_size_bytes == 0, f"{v.constants}: {raw.local_size_bytes} bytes of local memory"


def test_takes_and_refuses() -> None:
    fp16 = precisions.of("fp16")
    assert fused_attention.takes(96, 3, (7, 7), (56, 49), fp16)
    assert fused_attention.takes(256, 8, (8, 8), (8, 16), precisions.of("bf16"))
    assert fused_attention.takes(384, 12, (7, 7), (14, 14), fp16, batch=1)
    for C, num_heads, window, grid, name in (
        (96, 3, (7, 7), (56, 50), "fp16"),
        (96, 3, (7, 8), (56, 56), "fp16"),
        (96, 6, (7, 7), (56, 56), "fp16"),
        (320, 10, (7, 7), (14, 14), "fp16"),
        (768, 24, (7, 7), (7, 7), "fp16"),
        (96, 3, (7, 7), (56, 56), "tf32"),
    ):
        assert not fused_attention.takes(C, num_heads, window, grid, precisions.of(name))
    case = block((1, 14, 14, 96), 7)
    arrays = arrays_of(case, fp16, seed=5)
    packed, bias = pack(arrays, fp16)
    x = cupy.asarray(arrays["x"])
    for x_, window, shift in ((x[:, :13].copy(), (7, 7), (0, 0)), (x, (8, 8), (0, 0)), (x, (7, 7), (7, 0))):
        with pytest.raises(InputError, match="^attention_block: "):
            fused_attention.attention_block(x_, packed, bias, window=window, shift=shift, precision=fp16)
    with pytest.raises(InputError, match="^attention_block: packed and position_bias must"):
        fused_attention.attention_block(x, packed, bias[:2].copy(), window=(7, 7), precision=fp16)
