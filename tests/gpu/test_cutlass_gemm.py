"""The CUTLASS kernel against float64: every tile, epilogue and precision, rows and slabs that fill no tile."""

from __future__ import annotations

import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import DeviceError
from swincupy.ops import cutlass, gemm
from tests.gpu.products import EPILOGUES, distance, draw

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def usable() -> None:
    if jit.compute_capability() != 90:
        pytest.skip("the kernel is for SM 9.0")
    try:
        jit.cutlass()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "tile"),
    [*(("tf32", t) for t in cutlass.TILES), *((name, cutlass.TILES[0]) for name in ("fp16", "bf16"))],
    ids=str,
)
@pytest.mark.parametrize("parts", EPILOGUES, ids=lambda p: "+".join(p) or "none")
def test_cutlass_gemm(name: str, parts: tuple[str, ...], tile: cutlass.Tile) -> None:
    for size in ((333, 160, 200), (5, 32, 8), (3136, 288, 96), (49, 768, 3072)):
        x, want = draw(name, *size, parts)
        problem = gemm.Problem(*size, name, "bias" in parts, "gelu" in parts, "residual" in parts)
        assert tile in gemm.choices(problem, 1, cutlass.TILES)
        out = x["residual"] if "residual" in x else cupy.full(size[:2], 3, precisions.of(name).storage)
        gemm.runner(problem, tile)(x["a"], x["w"], x.get("bias"), x.get("residual"), out)
        assert distance(out, want, name) <= precisions.of(name).tolerance, size


def test_cutlass_gemm_in_a_capture() -> None:
    """Replays read what the arrays hold then; the tensor maps know their addresses."""
    size = (784, 384, 96)
    x, _ = draw("fp16", *size, ("bias", "gelu"))
    later, want = draw("fp16", *size, ("bias", "gelu"))
    out = cupy.empty(size[:2], "float16")
    run = gemm.runner(gemm.Problem(*size, "fp16", True, True, False), cutlass.TILES[0])
    run(x["a"], x["w"], x["bias"], None, out)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.cuda.Device().synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            run(x["a"], x["w"], x["bias"], None, out)
        finally:
            graph = stream.end_capture()
        for k, v in later.items():
            x[k][...] = v
        graph.launch(stream)
        stream.synchronize()
    assert distance(out, want, "fp16") <= 1e-3


def test_widths_that_it_does_not_take() -> None:
    assert not cutlass.takes(1000, precisions.of("fp16"))
    assert not cutlass.takes(96, precisions.of("fp32"))
