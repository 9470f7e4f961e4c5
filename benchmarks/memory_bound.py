"""Times the kernels that are bound by memory on a model's shapes: checks each, then prints microseconds and bandwidth.

    python benchmarks/memory_bound.py [--precision fp16 bf16 ...] [--batch 32] [--width 96] [--csv FILE]

Bytes are those that must move: inputs read and the result written once. Calls rotate through inputs of
more than the L2 holds; times are medians of graph replays.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swincupy import precision as precisions
from swincupy.ops import kernels
from tests.op_cases import MEAN, STD, Case, check, embed, norm, rows

COPY_BANDWIDTH = 4.16e12  # bytes a second, read and written, of a device copy on an H200
ROTATE = 256 << 20  # bytes of inputs, four times the L2 of an H200


def cases(batch: int, C: int) -> Iterator[Case]:
    """The shapes of a model on 224 x 224 pixels, V1's and V2's."""
    yield embed((batch, 3, 224, 224), (C, 3, 4, 4))
    yield embed((batch, 224, 224, 3), (C, 3, 4, 4), "uint8")
    for i in range(4):
        side, dim = 56 >> i, C << i
        yield from rows("layer_norm", (batch, side, side, dim))
        yield from rows("layer_norm_residual", (batch, side, side, dim))
        if i < 3:
            yield Case("patch_merge", {"x": (batch, side, side, dim), **norm(4 * dim)})
    yield Case("gelu", {"x": (batch, 56, 56, 4 * C)})
    yield Case("global_pool", {"x": (batch, 7, 7, 8 * C), **norm(8 * C, "")})


def launcher(case: Case, precision: precisions.Precision) -> Callable[..., Any]:
    """The operation without its checks, and without the product that follows a patch_merge."""
    from swincupy.ops import fused

    if case.op == "patch_embed":
        ops = fused.Fused(precision)
        extra = {"mean": MEAN[:3], "std": STD[:3]} if case.pixels == "uint8" else {}
        return functools.partial(ops.patch_embed, **extra)
    options: dict[str, Any] = {"precision": precision}
    if case.op != "gelu":
        options["eps"] = 1e-5
    return functools.partial(getattr(kernels, case.op), **options)


def time(case: Case, precision: precisions.Precision) -> dict[str, Any]:
    import cupy

    run, rng = launcher(case, precision), np.random.default_rng()

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        if name == "x" and case.pixels == "uint8":
            return cupy.asarray(rng.integers(0, 256, shape, np.uint8))
        x = rng.standard_normal(shape, np.float32)
        return cupy.asarray(x if name == "x" and case.pixels else precisions.encode(x, precision))

    big = {k: s for k, s in case.shapes.items() if k in ("x", "y")}
    small = [draw(k, s) for k, s in case.shapes.items() if k not in big]
    first = [draw(k, s) for k, s in big.items()]
    copies = max(4, min(64, ROTATE // sum(a.nbytes for a in first)))
    inputs = [first] + [[a.copy() for a in first] for _ in range(copies - 1)]
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        kept = [run(*given, *small) for given in inputs]
        written = kept[0].nbytes
        kept.clear()
        stream.begin_capture()
        kept = [run(*given, *small) for given in inputs]
        graph = stream.end_capture()
        samples = []
        for _ in range(20):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            graph.launch()
            end.record()
            end.synchronize()
            samples.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / copies)
    moved = sum(a.nbytes for a in first + small) + written
    microseconds = float(np.median(samples[4:]))
    return {
        "op": case.op, "case": str(case), "precision": precision.name, "us": round(microseconds, 2),
        "MB": round(moved / 1e6, 2), "TB/s": round(moved / microseconds / 1e6, 2),
        "% of copy": round(100 * moved / microseconds / 1e-6 / COPY_BANDWIDTH, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp16", "fp32"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=96, help="channels of the first stage")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()

    import cupy

    from swincupy.ops import fused

    table = []
    for name in given.precision:
        for case in cases(1, given.width):
            if case.op != "patch_merge":  # with its product it is an operation of its own; the tests have it
                check(case, name, fused.Fused(name), cupy.asarray)
        for case in cases(given.batch, given.width):
            table.append(time(case, precisions.of(name)))
            print("  ".join(f"{v!s:>{w}}" for v, w in zip(table[-1].values(), (20, 56, 5, 8, 8, 6, 6), strict=True)))
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys())
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
