"""The wgmma kernel against float64: every tile, epilogue and type; rows that fill no tile; early starts."""

from __future__ import annotations

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import gemm, reference, wgmma
from tests.gpu.products import EPILOGUES, distance, draw, plain

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu

# fewer rows than a tile has; more tiles than multiprocessors, so that warpgroups take turns; K of no whole slab
SIZES = [(333, 160, 200), (1, 32, 512), (9000, 288, 96), (49, 768, 3072)]

# rows, channels that are normed, width of what follows: moments are of 32 neighbours, of many rows of 96 or 128
NORMED = [
    (333, 192, 96), (9000, 192, 288), (2000, 384, 96), (500, 768, 288), (49, 768, 1536), (70, 1536, 96),
    (6200, 512, 96), (9000, 96, 288), (25000, 128, 96),
]  # fmt: skip


@pytest.fixture(autouse=True)
def usable() -> None:
    if jit.compute_capability() != 90:
        pytest.skip("the kernel is for SM 9.0")


@pytest.mark.parametrize("tile", wgmma.TILES, ids=str)
@pytest.mark.parametrize("parts", EPILOGUES, ids=lambda p: "+".join(p) or "none")
@pytest.mark.parametrize("name", ["tf32", "fp16", "bf16"])
def test_wgmma_gemm(name: str, parts: tuple[str, ...], tile: wgmma.Tile) -> None:
    for size in SIZES:
        if not wgmma.takes(*size[1:], precisions.of(name), tile):
            continue
        x, want = draw(name, *size, parts)
        problem = gemm.Problem(*size, name, "bias" in parts, "gelu" in parts, "residual" in parts)
        storage = precisions.of(name).storage
        guarded = cupy.full((size[0] + 1, size[1] * storage.itemsize), 0xFF, "uint8").view(storage)  # NaN
        out, beyond = guarded[:-1], guarded[-1].copy()
        for overlap in (False, True):
            gemm.runner(problem, tile)(x["a"], x["w"], x.get("bias"), x.get("residual"), out, overlap=overlap)
            error = distance(out, want, name)
            assert error <= precisions.of(name).tolerance, size
            if name != "tf32":  # which is bounded by its products
                assert error <= 2 * distance(plain(x, name, "gelu" in parts), want, name), size
        assert cupy.array_equal(guarded[-1].view("uint8"), beyond.view("uint8")), "wrote past the last row"


@pytest.mark.parametrize("tile", wgmma.TILES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("name", ["tf32", "fp16", "bf16"])
def test_norms_and_moments(name: str, gelu: bool, tile: wgmma.Tile) -> None:
    """A product that gives the moments of its rows, and one that takes them, against the operations one by one."""
    precision = precisions.of(name)
    for M, C, N in NORMED:
        fits = wgmma.takes(C, 64, precision, tile) and wgmma.takes(N, C, precision, tile)
        if not fits or not wgmma.gives_moments(M, C, tile) or not wgmma.takes_norm(C, tile):
            continue
        first, z = draw(name, M, C, 64, ("bias", "residual"))
        second, _ = draw(name, 1, N, C, ("bias",))
        x, y = (cupy.empty((M, n), precision.storage) for n in (C, N))
        guarded = cupy.full((M + 1, C // wgmma.neighbours(M, C), 2), 7, "float32")
        sums = precisions.decode(cupy.asnumpy(second["w"]), precision).astype(np.float64).sum(axis=1)
        norm = wgmma.Norm(guarded[:-1], cupy.asarray(sums, "float32"), 1e-5)
        problem = gemm.Problem(M, C, 64, name, True, False, True, moments=True)
        gemm.runner(problem, tile)(first["a"], first["w"], first["bias"], first["residual"], x, None, guarded[:-1])
        problem = gemm.Problem(M, N, C, name, True, gelu, False, norm=True)
        gemm.runner(problem, tile)(x, second["w"], second["bias"], None, y, norm, None)
        assert distance(x, z, name) <= precision.tolerance
        assert (guarded[-1] == 7).all(), "wrote past the last row"
        exact = {k: precisions.decode(cupy.asnumpy(v), precision).astype(np.float64) for k, v in second.items()}
        rows = precisions.decode(cupy.asnumpy(x), precision).astype(np.float64)
        normed = reference.layer_norm(rows, np.ones(C), np.zeros(C))
        want = reference.linear(normed, exact["w"], exact["bias"])
        want = reference.gelu(want) if gelu else want
        stored = second | {"a": cupy.asarray(precisions.encode(normed.astype(np.float32), precision))}
        got, separate = distance(y, want, name), distance(plain(stored, name, gelu), want, name)
        assert got <= (2 * separate if name != "tf32" else 2 * precision.tolerance), (M, C, N)


@pytest.mark.parametrize("tile", wgmma.TILES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("name", ["tf32", "fp16", "bf16"])
def test_neighbours_in_a_map(name: str, normed: bool, tile: wgmma.Tile) -> None:
    """What `patch_merge` does: more tiles than multiprocessors, a map of odd shape, K beyond the ring."""
    precision = precisions.of(name)
    for B, H, W, C, N in ((3, 112, 112, 64, 96), (2, 10, 28, 192, 224), (1, 2, 128, 384, 64), (1, 14, 14, 384, 768)):
        M, K, gather = B * H * W // 4, 4 * C, W // 2
        fits = wgmma.takes(N, K, precision, tile) and wgmma.takes_gather(gather, K, precision)
        if not fits or (normed and not wgmma.takes_norm(K, tile)):
            continue
        x, _ = draw(name, M, N, K, ("bias",))
        exact = {k: precisions.decode(cupy.asnumpy(v), precision).astype(np.float64) for k, v in x.items()}
        parts = exact["a"].reshape(4 * M, -1, 64)
        of_tokens = np.stack([parts.mean(axis=2), parts.var(axis=2) * 64], axis=2)
        sums = cupy.asarray(exact["w"].sum(axis=1), "float32")
        norm = wgmma.Norm(cupy.asarray(of_tokens, "float32"), sums, 1e-5) if normed else None
        guarded = cupy.zeros((M + 1, N), precision.storage)
        problem = gemm.Problem(M, N, K, name, True, False, False, norm=normed, gather=gather)
        gemm.runner(problem, tile)(x["a"], x["w"], x["bias"], None, guarded[:-1], norm, None)
        rows = exact["a"].reshape(B, H // 2, 2, W // 2, 2 * C).swapaxes(2, 3).reshape(M, K)
        rows = reference.layer_norm(rows, np.ones(K), np.zeros(K)) if normed else rows
        want = reference.linear(rows, exact["w"], exact["bias"])
        stored = x | {"a": cupy.asarray(precisions.encode(rows.astype(np.float32), precision))}
        got, separate = distance(guarded[:-1], want, name), distance(plain(stored, name, False), want, name)
        assert got <= (2 * separate if name != "tf32" else 2 * precision.tolerance), (B, H, W, C, N)
        assert not guarded[-1].any(), "wrote past the last row"


def test_in_place() -> None:
    x, want = draw("fp16", 3136, 96, 384, ("bias", "residual"))
    problem = gemm.Problem(3136, 96, 384, "fp16", True, False, True)
    gemm.runner(problem, wgmma.TILES[2])(x["a"], x["w"], x["bias"], x["residual"], x["residual"])
    assert distance(x["residual"], want, "fp16") <= 1e-3


def test_a_chain_of_kernels_that_start_early() -> None:
    """Each reads what the one ahead of it writes, and writes over what that one reads; replays find every race."""
    size = (784, 384, 384)
    x, _ = draw("fp16", *size, ("bias",))
    problem = gemm.Problem(*size, "fp16", True, False, False)
    run = gemm.runner(problem, wgmma.TILES[5])
    first = x["a"].copy()
    other = cupy.empty_like(first)

    def steps(overlap: bool) -> None:
        for _ in range(8):
            run(first, x["w"], x["bias"], None, other, overlap=overlap)
            run(other, x["w"], x["bias"], None, first, overlap=overlap)

    steps(False)
    want = first.copy()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.cuda.Device().synchronize()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            steps(True)
        finally:
            graph = stream.end_capture()
        for _ in range(20):
            first[...] = x["a"]
            graph.launch(stream)
            assert cupy.array_equal(first, want)


def test_what_it_does_not_take() -> None:
    fp16 = precisions.of("fp16")
    assert wgmma.takes(96, 96, fp16) and not wgmma.takes(1000, 768, fp16) and not wgmma.takes(96, 100, fp16)
    assert not wgmma.takes(96, 96, precisions.of("fp32"))
    assert not wgmma.takes(96, 96, fp16, next(t for t in wgmma.TILES if t.split == 4))
