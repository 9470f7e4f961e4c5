"""Matrix products on the GPU against float64, every backend, epilogue and precision."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swincupy import SwinConfig, jit, tune
from swincupy import precision as precisions
from swincupy.errors import DeviceError
from swincupy.ops import gemm
from tests.gpu.products import EPILOGUES, distance, draw, plain

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu

PRECISIONS = ["fp32", "tf32", "fp16", "bf16"]
# rows of a head, of windows, of none of the tiles; N and K of classes and channels, odd ones too
SIZES = [(3136, 288, 96), (1, 1000, 768), (49, 768, 3072), (64, 10, 40), (7, 21841, 24), (33, 27, 51), (130, 1, 8)]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWINCUPY_CACHE_DIR", str(tmp_path))
    tune._entries.cache_clear()
    gemm.forget()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("parts", EPILOGUES, ids=lambda p: "+".join(p) or "none")
@pytest.mark.parametrize("name", PRECISIONS)
def test_gemm(name: str, parts: tuple[str, ...], size: tuple[int, int, int]) -> None:
    x, want = draw(name, *size, parts)
    gelu = "gelu" in parts
    error = distance(gemm.gemm(**x, gelu=gelu, precision=name), want, name)
    assert error <= precisions.of(name).tolerance
    if name in ("fp16", "bf16"):  # the float32 ones are bounded by their products
        assert error <= 2 * distance(plain(x, name, gelu), want, name)


@pytest.mark.parametrize("tile", gemm.TILES, ids=str)
@pytest.mark.parametrize("parts", EPILOGUES, ids=lambda p: "+".join(p) or "none")
@pytest.mark.parametrize("name", PRECISIONS)
def test_gemm_kernel(name: str, parts: tuple[str, ...], tile: gemm.Tile) -> None:
    for size in ((333, 104, 200), (1, 120, 16), (24, 8, 16), (64, 384, 96)):
        x, want = draw(name, *size, parts)
        problem = gemm.Problem(*size, name, "bias" in parts, "gelu" in parts, "residual" in parts)
        out = cupy.full(size[:2], 3, precisions.of(name).storage)
        run = gemm.runner(problem, tile)
        run(x["a"], x["w"], x.get("bias"), x.get("residual"), out)
        assert distance(out, want, name) <= precisions.of(name).tolerance, size


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_algorithm_agrees(name: str) -> None:
    """Among them those that split K: their parts are summed in float32."""
    size = (49, 768, 3072)
    x, want = draw(name, *size, ("bias", "residual"))
    problem = gemm.Problem(*size, name, True, False, True)
    found = gemm.choices(problem, 16, ())
    assert found
    for choice in found:
        out = cupy.empty(size[:2], precisions.of(name).storage)
        gemm.runner(problem, choice)(x["a"], x["w"], x["bias"], x["residual"], out)
        assert distance(out, want, name) <= precisions.of(name).tolerance, choice.hex()


def test_unaligned_views() -> None:
    x, want = draw("fp16", 50, 64, 64, ("bias", "residual"))
    moved = {}
    for k, v in x.items():
        moved[k] = cupy.empty(v.size + 3, v.dtype)[3:].reshape(v.shape)
        moved[k][...] = v
    assert distance(gemm.gemm(**moved, precision="fp16"), want, "fp16") <= 1e-3


def test_in_place() -> None:
    x, want = draw("fp16", 3136, 96, 384, ("bias", "residual"))
    out = gemm.gemm(**x, out=x["residual"], precision="fp16")  # a search at first use must not touch the residual
    assert out is x["residual"] and distance(out, want, "fp16") <= 1e-3


@pytest.mark.parametrize("warmed", [True, False])
def test_in_a_capture(warmed: bool) -> None:
    x, want = draw("fp16", 784, 768, 192, ("bias", "gelu"))
    x2, want2 = draw("fp16", 49, 768, 3072, ("bias", "residual"))
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):

        def run() -> tuple[Any, Any]:
            return gemm.gemm(**x, gelu=True, precision="fp16"), gemm.gemm(**x2, precision="fp16")

        if warmed:
            run()
            stream.synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        try:
            out, out2 = run()
        finally:
            graph = stream.end_capture()
        for _ in range(3):
            out.fill(0)
            graph.launch(stream)
        stream.synchronize()
    assert distance(out, want, "fp16") <= 1e-3 and distance(out2, want2, "fp16") <= 1e-3


def test_threads_and_streams_do_not_mix() -> None:
    """Products with a workspace at the same time on several streams, of one shape with different biases."""
    size, failures = (49, 768, 3072), list[float]()
    cases = [draw("fp16", *size, ("bias",)) for _ in range(4)]
    gemm.gemm(**cases[0][0], precision="fp16")
    cupy.cuda.Device().synchronize()

    def work(x: dict[str, Any], want: np.ndarray) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            results = [gemm.gemm(**x, precision="fp16") for _ in range(50)]
            stream.synchronize()
            failures.extend(e for y in results if not (e := distance(y, want, "fp16")) <= 1e-3)

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.alone
def test_search() -> None:
    size = (3136, 384, 96)
    x, _ = draw("fp16", *size, ("bias",))
    problem = gemm.Problem(*size, "fp16", True, True, False)
    out = cupy.empty(size[:2], np.float16)
    found = gemm.choices(problem, 8, gemm.TILES[:2])
    timed = gemm.search(problem, found, (x["a"], x["w"], x["bias"], None, out))
    assert {t.choice for t in timed} == set(found)
    assert [t.microseconds for t in timed] == sorted(t.microseconds for t in timed)
    assert all(0.5 < t.microseconds < 1000 for t in timed)


def test_search_drops_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (64, 64, 64)
    x, _ = draw("fp16", *size, ())
    problem = gemm.Problem(*size, "fp16", False, False, False)
    right, wrong = gemm.TILES[:2]
    runner = gemm.runner

    def tampered(problem: gemm.Problem, choice: gemm.Choice) -> gemm.Run:
        run = runner(problem, choice)
        return (lambda a, w, *rest, overlap: run(w, a, *rest)) if choice is wrong else run

    monkeypatch.setattr(gemm, "runner", tampered)
    out = cupy.empty(size[:2], np.float16)
    timed = gemm.search(problem, [right, wrong, b"no algorithm"], (x["a"], x["w"], None, None, out))
    assert [t.choice for t in timed] == [right]


def test_tune(tmp_path: Path) -> None:
    config = SwinConfig(img_size=56, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=10)
    results = tune.measure(config, 2, "fp16", progress=False)
    assert tune.save(results, "fp16") == tmp_path / "gemm.json"
    assert len(tune.table(results).splitlines()) == len(results) + 2
    few = jit.compute_capability() == 90  # few rows' norms are parts of products there
    assert few == any("moments" in r.shape.epilogue for r in results)
    for shape in (r.shape for r in results):
        choice = tune.lookup(tune.problem(shape, "fp16"))
        assert choice is not None
        parts = tuple(shape.epilogue.split("+"))
        if not {"norm", "moments"} & {*parts}:
            x, want = draw("fp16", shape.M, shape.N, shape.K, parts)
            out = gemm.gemm(**x, gelu="gelu" in parts, precision="fp16")
            assert distance(out, want, "fp16") <= 1e-3


def test_an_algorithm_of_another_shape_is_refused() -> None:
    problem = gemm.Problem(49, 768, 3072, "fp16", True, False, False)
    with pytest.raises(DeviceError):
        gemm.runner(problem, b"\xff" * 64)
