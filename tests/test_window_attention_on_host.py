"""cuda/window_attention.cu compiled by g++ and run on the CPU, one fiber a CUDA thread: its logic, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import attention
from tests.window_attention_cases import Case, distance, draw, expected

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernel for the CPU")

ENTRY = """
static struct { const scalar_t *qkv, *qkv_bias; const bias_t* bias; const float* logit_scale; scalar_t* out;
                int H, W, shift_h, shift_w, heads; float scale; } args;
extern "C" void run(int x, int y, int z, void* qkv, void* qkv_bias, void* bias, void* logit_scale, void* out,
                    int H, int W, int shift_h, int shift_w, int heads, float scale) {
    gridDim = {unsigned(x), unsigned(y), unsigned(z)};
    args = {(scalar_t*)qkv, (scalar_t*)qkv_bias, (bias_t*)bias, (float*)logit_scale, (scalar_t*)out,
            H, W, shift_h, shift_w, heads, scale};
    host::launch(gridDim, 32 * WARPS, [] {
        window_attention(args.qkv, args.qkv_bias, args.bias, args.logit_scale, args.out, args.H, args.W,
                         args.shift_h, args.shift_w, args.heads, args.scale);
    });
}
"""


def run_on_host(case: Case, name: str, folder: Path, root: Path) -> tuple[np.ndarray, np.ndarray]:
    precision = precisions.of(name)
    arrays = draw(case, precision, seed=hash(case) % 2**32)
    fixed, tiling = attention.constants(case.d, case.window, precision, cosine=case.cosine, pad_mode=case.pad_mode)
    fixed = {k: "_Float16" if v == "__half" else v for k, v in fixed.items()}
    shutil.copy(root / "cuda" / "window_attention.cu", folder)
    source = f'#include "common.cuh"\n{jit.prelude(fixed)}#include "window_attention.cu"\n{ENTRY}'
    (folder / "run.cpp").write_text(source)
    build = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", "run.cpp", "-o", "run.so", "-I"]
    subprocess.run([*build, root / "tests" / "host"], cwd=folder, check=True)

    bias = attention.prepare_position_bias(arrays["position_bias"], precision)
    out = precisions.encode(np.full((len(arrays["qkv"]), case.num_heads * case.d), np.nan), precision)
    (H, W), (mh, mw) = case.grid, case.window
    blocks = -(-W // mw) * case.num_heads * -(-(-(-mh * mw // 16)) // tiling.warps)
    pointers = (arrays["qkv"], arrays["qkv_bias"], bias, arrays["logit_scale"], out)
    ctypes.CDLL(str(folder / "run.so")).run(
        blocks, -(-H // mh), case.batch,
        *(None if a is None else a.ctypes.data_as(ctypes.c_void_p) for a in pointers),
        H, W, *case.shift, case.num_heads, ctypes.c_float(case.d**-0.5),
    )  # fmt: skip
    return precisions.decode(out, precision), expected(case, arrays, precision)


# padding in both modes, mask, one warp and more, key blocks whole, resident and streamed, rows that no wide copy fits
HOST_CASES = [
    Case((7, 7), (9, 16), (3, 3), num_heads=1),
    Case((7, 7), (2, 9), (5, 6), pad_mode="roll_pad", batch=2),
    Case((7, 7), (10, 11), (3, 3), d=24, cosine=True, biased=False),
    Case((7, 7), (7, 7), d=5, num_heads=3),
    Case((14, 7), (20, 9), (7, 3), num_heads=1),
    Case((12, 12), (13, 12), (6, 6), num_heads=1, d=24),
    Case((16, 16), (16, 17), (0, 8), num_heads=1, d=48, cosine=True),
    Case((1, 1), (3, 2)),
]


@pytest.mark.parametrize("case", HOST_CASES, ids=str)
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_window_attention_on_host(case: Case, name: str, tmp_path: Path, root: Path) -> None:
    out, want = run_on_host(case, name, tmp_path, root)
    assert distance(out, want) <= precisions.of(name).tolerance
