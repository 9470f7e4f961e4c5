"""Times window_attention on the shapes of published models: checks each, then prints microseconds and bandwidth.

    python benchmarks/window_attention.py [--precision fp16 bf16 ...] [--sweep] [--csv FILE]

Bytes are those that must move: the QKV rows read and the result written once. "cold" rotates inputs
of more than the L2 holds, "hot" repeats one; both are medians of graph replays. --sweep also tries
other tilings and residencies than `attention.tiling` chooses.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swincupy import jit
from swincupy import precision as precisions
from swincupy.ops import attention
from tests.window_attention_cases import Case, distance, draw, expected

COPY_BANDWIDTH = 4.16e12  # bytes a second, read and written, of a device copy on an H200
LAUNCHES = 24  # a graph

MODELS = [  # name, tokens a side by stage, window, heads of the first stage, cosine
    ("v1-T", (56, 28, 14, 7), 7, 3, False),
    ("v1-B-384", (96, 48, 24, 12), 12, 4, False),
    ("v2-T-w8", (64, 32, 16, 8), 8, 3, True),
    ("v2-T-w16", (64, 32, 16), 16, 3, True),
    ("v2-B-w24", (96, 48, 24), 24, 4, True),
]
CASES = {
    f"{name} stage {i} batch {batch}": Case(
        (m, m), (side, side), (m // 2, m // 2) if side > m else (0, 0), batch, heads << i, 32, cosine=cosine
    )
    for name, sides, m, heads, cosine in MODELS
    for i, side in enumerate(sides)
    for batch in (1, 32)
}


def tilings(case: Case, precision: precisions.Precision, sweep: bool) -> list[attention.Tiling]:
    """The chosen tiling, and its neighbours if asked for."""
    chosen = attention.tiling(case.window[0] * case.window[1], case.d, precision)
    if not sweep:
        return [chosen]
    blocks = range(max(1, chosen.min_blocks - 2), chosen.min_blocks + 3)
    return [chosen, *(chosen._replace(min_blocks=b) for b in blocks if b != chosen.min_blocks)]


def time(case: Case, precision: precisions.Precision, tiling: attention.Tiling) -> dict[str, Any]:
    """Microseconds of one launch, with inputs from memory and from the L2."""
    import cupy

    mode: Any = case.pad_mode
    fixed, _ = attention.constants(case.d, case.window, precision, cosine=case.cosine, pad_mode=mode)
    fixed |= dict(
        WARPS=tiling.warps, KEY_BLOCK=tiling.key_block, STAGES=tiling.stages, MIN_BLOCKS=tiling.min_blocks
    )  # fmt: skip
    kernel = jit.kernel("window_attention", **fixed)
    (H, W), (mh, mw), C = case.grid, case.window, case.num_heads * case.d
    rows = case.batch * H * W
    moved = rows * 4 * C * precision.storage.itemsize
    sets = min(max(-(-200_000_000 // moved), 2), 16)
    random = cupy.random.default_rng(0)
    qkv = [precisions.encode(random.standard_normal((rows, 3 * C), np.float32), precision) for _ in range(sets)]
    outs = [cupy.empty((rows, C), precision.storage) for _ in range(sets)]
    qkv_bias = precisions.encode(random.standard_normal(3 * C, np.float32), precision)
    bias = random.standard_normal((case.num_heads, mh * mw, mh * mw), np.float32)
    bias = attention.prepare_position_bias(bias, precision)
    logit_scale = cupy.full(case.num_heads, 10, np.float32) if case.cosine else None
    strips = -(-mh * mw // 16)
    blocks = -(-W // mw) * case.num_heads * -(-strips // tiling.warps), -(-H // mh), case.batch

    def launch(i: int) -> None:
        kernel(
            blocks, 32 * tiling.warps, qkv[i], qkv_bias, bias, logit_scale, outs[i],
            H, W, *case.shift, case.num_heads, case.d**-0.5,
        )  # fmt: skip

    times = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        launch(0)
        for rotate in (sets, 1):
            stream.begin_capture()
            for i in range(LAUNCHES):
                launch(i % rotate)
            graph = stream.end_capture()
            replays = []
            for _ in range(12):
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.synchronize()
                replays.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / LAUNCHES)
            times.append(float(np.median(replays[3:])))
    floor = moved / COPY_BANDWIDTH * 1e6
    return dict(
        **tiling._asdict(), registers=kernel.raw.num_regs, local_bytes=kernel.raw.local_size_bytes,
        cold_us=round(times[0], 2), hot_us=round(times[1], 2), floor_us=round(floor, 2),
        percent_of_bandwidth=round(100 * floor / times[0], 1),
    )  # fmt: skip


def check(case: Case, precision: precisions.Precision) -> float:
    """Distance from float64 at batch 1; an error where it is more than twice the plain composition's."""
    import cupy

    case = Case(case.window, (case.window[0] + 3,) * 2, case.shift, 1, 3, case.d, cosine=case.cosine)
    arrays = draw(case, precision, seed=0)
    on_gpu = {k: None if a is None else cupy.asarray(a) for k, a in arrays.items()}
    out = attention.window_attention(**on_gpu, **case.options, precision=precision)
    want = expected(case, arrays, precision)
    error = distance(precisions.decode(cupy.asnumpy(out), precision), want)
    if error > 2 * distance(expected(case, arrays, precision, plain=True), want):
        raise SystemExit(f"{case} in {precision.name} is wrong: error {error:.2e}")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16", "tf32", "fp32"])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    results = []
    for name in args.precision:
        precision = precisions.of(name, sm=jit.compute_capability())
        for title, case in CASES.items():
            if args.only not in title:
                continue
            error = check(case, precision)
            for tiling in tilings(case, precision, args.sweep):
                result = dict(case=title, precision=name, error=f"{error:.1e}", **time(case, precision, tiling))
                results.append(result)
                print(*(f"{k} {v}" for k, v in result.items()), sep="  ", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, results[0])
            writer.writeheader()
            writer.writerows(results)


if __name__ == "__main__":
    main()
