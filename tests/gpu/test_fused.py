"""Every operation of ops/fused.py on the GPU, and through it its kernels, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import fused, kernels, reference
from tests.op_cases import CASES, Case, check, distance

cupy = pytest.importorskip("cupy", reason="needs CuPy")

NAMES = [p.name for p in precisions.PRECISIONS.values() if p.ctype]

# What is too large for the CPU: Swin-T's own shapes, batch 3
LARGE = [
    Case("layer_norm", {"x": (3, 56, 56, 96), "weight": (96,), "bias": (96,)}),
    Case("layer_norm_residual", {"x": (3, 64, 64, 96), "y": (3, 64, 64, 96), "weight": (96,), "bias": (96,)}),
    Case("gelu", {"x": (3, 56, 56, 384)}),
    Case(
        "patch_embed",
        {"x": (3, 3, 224, 224), "weight": (96, 3, 4, 4), "bias": (96,), "norm_weight": (96,), "norm_bias": (96,)},
        pixels="float32",
    ),
    Case(
        "patch_embed",
        {"x": (3, 230, 384, 3), "weight": (192, 3, 4, 4), "bias": (192,), "norm_weight": (192,), "norm_bias": (192,)},
        pixels="uint8",
    ),
    Case(
        "patch_merge",
        {"x": (3, 57, 56, 96), "norm_weight": (384,), "norm_bias": (384,), "reduction_weight": (192, 384)},
    ),
    Case("global_pool", {"x": (3, 12, 12, 1536), "weight": (1536,), "bias": (1536,)}),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Fresh memory holds NaN: what no kernel writes is found."""
    cupy.cuda.Stream.null.synchronize()
    block = cupy.empty(1 << 24, np.uint8)
    block.fill(0xFF)
    del block


@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda c: f"{c.op}-{c}")
@pytest.mark.parametrize("name", NAMES)
def test_operation(case: Case, name: str) -> None:
    check(case, name, fused.Fused(name), cupy.asarray)


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_batch(name: str) -> None:
    precision, ops = precisions.of(name), fused.Fused(name)
    x = cupy.asarray(precisions.encode(np.random.default_rng().standard_normal((5, 40, 37, 96)), precision))
    for op in (ops.gelu, ops.global_pool):
        assert cupy.array_equal(op(x)[3:4], op(x[3:4]))
    x = cupy.asarray(precisions.encode(np.random.default_rng().standard_normal((200, 7, 7, 768)), precision))
    assert cupy.array_equal(ops.global_pool(x)[3:4], ops.global_pool(x[3:4]))  # by a block alone, by a cluster


def test_shared_memory_beyond_what_is_given_unasked() -> None:
    precision = precisions.of("fp32")
    shape = (384, 3, 4, 4)
    _, shared = kernels.patch_embed_constants(shape, np.dtype(np.float32), 16, False, precision)
    assert shared > 48 * 1024
    rng = np.random.default_rng()
    x, w = rng.standard_normal((1, 3, 16, 16)), rng.standard_normal(shape)
    y = fused.Fused("fp32").patch_embed(*(cupy.asarray(a, np.float32) for a in (x, w)))
    assert distance(y.get(), reference.patch_embed(x, w)) <= 2e-6


def test_registers_are_not_spilled() -> None:
    for v in kernels.variants():
        if v.min_sm <= jit.compute_capability():
            raw = jit.kernel(v.name, **v.constants).raw
            few = 80 if v.name == "patch_embed" and v.constants["scalar_t"] == "float" else 0  # read once a tile
            assert raw.local_size_bytes <= few, f"{v.name} {v.constants}: {raw.local_size_bytes} bytes of local memory"


def test_launch_checks_what_it_is_given() -> None:
    x = cupy.ones((4, 96), np.float16)
    kernel = jit.kernel("layer_norm", **kernels.row_constants(96, precisions.of("fp16"))[0])
    with pytest.raises(TypeError, match="takes 6 arguments, got 2"):
        kernel(1, 128, x, x)
    with pytest.raises(TypeError, match="gamma must hold __half"):
        kernel(1, 128, x, x[0].astype(np.float32), x[0], x, 4, 1e-5)
    with pytest.raises(ValueError, match="x must be C-contiguous"):
        kernel(1, 128, x.T, x[0], x[0], x, 4, 1e-5)


def test_stream_and_capture() -> None:
    """Work goes to CuPy's current stream, and can be captured."""
    ops = fused.Fused("fp16")
    x = cupy.asarray(np.random.default_rng().standard_normal((2, 14, 14, 96)).astype(np.float16))
    w, b = cupy.ones(96, np.float16), cupy.zeros(96, np.float16)
    want = ops.global_pool(ops.layer_norm_residual(x, ops.layer_norm(x, w, b), w, b), w, b)
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for capturing in (False, True):
            if capturing:
                stream.begin_capture()
            y = ops.global_pool(ops.layer_norm_residual(x, ops.layer_norm(x, w, b), w, b), w, b)
        graph = stream.end_capture()
        y.fill(0)
        graph.launch()
    stream.synchronize()
    assert cupy.array_equal(y, want)
