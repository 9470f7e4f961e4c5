"""cuda/gemm.cu compiled by g++ and run on the CPU, one fiber a CUDA thread: its logic, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import gemm, reference

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernel for the CPU")

ENTRY = """
#include "common.cuh"
#undef __shared__
#define __shared__  // dynamic shared memory is an array of its own
alignas(128) unsigned char smem[1 << 18];
%s#include "gemm.cu"
static struct { const scalar_t *a, *w, *bias, *residual; scalar_t* out; int M, N, K; } args;
extern "C" void run(int blocks, void* a, void* w, void* bias, void* residual, void* out, int M, int N, int K) {
    args = {(scalar_t*)a, (scalar_t*)w, (scalar_t*)bias, (scalar_t*)residual, (scalar_t*)out, M, N, K};
    std::fill(smem, smem + sizeof smem, 0xff);  // NaN: nothing may be read that was not copied
    host::launch({unsigned(blocks), 1, 1}, THREADS, [] {
        gemm(args.a, args.w, args.bias, args.residual, args.out, args.M, args.N, args.K);
    });
}
"""

# M, N and K that fill no tile, K of less than a slab, of several, of half a slab more; one row
SIZES = [(1, 8, 16), (70, 40, 24), (130, 104, 200), (67, 136, 96)]
CASES = [
    (gemm.TILES[0], "fp16", dict(bias=True, gelu=True)),
    (gemm.TILES[1], "fp16", dict(bias=True, residual=True)),
    (gemm.TILES[2], "fp32", dict(bias=True, gelu=True)),
    (gemm.TILES[5], "fp32", dict(residual=True)),
    (gemm.TILES[7], "fp16", dict()),
]


@pytest.mark.parametrize(("tile", "name", "epilogue"), CASES, ids=str)
def test_gemm_on_host(tile: gemm.Tile, name: str, epilogue: dict[str, bool], tmp_path: Path, root: Path) -> None:
    precision = precisions.of(name)
    constants = gemm.constants(tile, precision, gelu=epilogue.get("gelu", False))
    constants = {k: "_Float16" if v == "__half" else v for k, v in constants.items()}
    shutil.copy(root / "cuda" / "gemm.cu", tmp_path)
    (tmp_path / "run.cpp").write_text(ENTRY % jit.prelude(constants))
    build = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", f"-I{root / 'tests' / 'host'}", "run.cpp"]
    subprocess.run([*build, "-o", "run.so"], cwd=tmp_path, check=True)
    run = ctypes.CDLL(str(tmp_path / "run.so")).run

    rng = np.random.default_rng()
    for M, N, K in SIZES:
        draws = {"a": (M, K), "w": (N, K)}
        draws |= {"bias": (N,)} if epilogue.get("bias") else {}
        draws |= {"residual": (M, N)} if epilogue.get("residual") else {}
        arrays = {k: precisions.encode(rng.standard_normal(shape), precision) for k, shape in draws.items()}
        out = np.full((M, N), np.nan, precision.storage)
        pointers = [
            ctypes.c_void_p(arrays[k].ctypes.data if k in arrays else None) for k in ("a", "w", "bias", "residual")
        ]
        run(gemm.blocks(tile, M, N), *pointers, ctypes.c_void_p(out.ctypes.data), M, N, K)

        exact = {k: v.astype(np.float64) for k, v in arrays.items()}
        want = reference.linear(exact["a"], exact["w"], exact.get("bias"))
        want = reference.gelu(want) if epilogue.get("gelu") else want + exact.get("residual", 0.0)
        assert np.linalg.norm(out - want) <= precision.tolerance * np.linalg.norm(want), (M, N, K)
