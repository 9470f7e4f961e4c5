"""What benchmarks/sanitize.sh runs under compute-sanitizer: every operation's cases, or a small forward pass.

    python benchmarks/sanitize.py ops | forward [--precision fp16 ...] [--own-products]

Memory comes from cudaMalloc, an array at a time: in a pool an access beyond an array's end hits another one.
Products run on the first kernel that fits, without a search. With --own-products, nothing runs on cuBLASLt: initcheck
does not see what its kernels write by bulk copies, and racecheck takes what they order by barriers for races.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swincupy import backend, bench
from swincupy import precision as precisions
from swincupy.config import SwinConfig
from swincupy.model import SwinTransformer
from swincupy.ops import gemm, wgmma
from swincupy.ops.fused import Fused

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ops", "forward"))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--own-products", action="store_true")
    args = parser.parse_args()
    import cupy

    cupy.cuda.set_allocator(None)
    backend.Slabs = lambda allocate: allocate  # type: ignore[assignment,misc]
    choose(args.own_products)
    for name in args.precision:
        {"ops": operations, "forward": forward}[args.what](name)
        cupy.cuda.Device().synchronize()
        print(f"{args.what} in {name}: done", flush=True)


def choose(own: bool) -> None:
    """Products by the first kernel that fits, of cuBLASLt or of ``cuda/``: a search would run hundreds."""
    of_all = gemm.choices

    def first(problem: gemm.Problem, algorithms: int, tiles: Any) -> Any:
        found = of_all(problem, 1, tiles or (*gemm.likely(problem), gemm.TILES[1]))
        ours = [c for c in found if not isinstance(c, bytes)]  # empty for a width that our tiles do not take
        return (ours if own and ours else found)[:1]

    gemm.choices = first


def operations(name: str) -> None:
    """Every case of the operations' tests, results compared as there, and every tile of our products."""
    import cupy

    from tests.gpu.products import distance, draw
    from tests.op_cases import CASES, check

    ops, precision = Fused(name), precisions.of(name)
    for case in CASES:
        check(case, name, ops, cupy.asarray)
    for M, N, K in ((333, 96, 200), (1, 64, 256)):
        for parts in (("bias", "gelu"), ("bias", "residual")):
            x, want = draw(name, M, N, K, parts)
            problem = gemm.Problem(M, N, K, name, True, "gelu" in parts, "residual" in parts)
            fit: list[gemm.Choice] = [t for t in wgmma.TILES if wgmma.takes(N, K, precision, t)]
            for tile in (*gemm.TILES, *fit):
                out = cupy.empty((M, N), precision.storage)
                gemm.runner(problem, tile)(x["a"], x["w"], x["bias"], x.get("residual"), out)
                assert distance(out, want, name) <= 2 * precision.tolerance, (tile, M, N, K, parts)


def forward(name: str) -> None:
    """Small models of each version, eager and as graphs: padded at every stage, not at all, of one wide stage."""
    for version, window, heads in ((1, 7, (3, 6)), (2, 8, (3, 6)), (1, 7, (12,)), (2, 8, (12,))):
        config = SwinConfig(
            version=version, img_size=56, embed_dim=32 * heads[0], depths=(2,) * len(heads), num_heads=heads,
            window_size=window, num_classes=10,
        ).with_conventions("microsoft")  # fmt: skip
        params = bench.random_weights(config)
        exact = SwinTransformer(params, config, device="cpu", precision="fp64")
        whole, wide = (8 * window, 8 * window), len(heads) == 1
        for size in (whole,) if wide else ((50, 71), whole):
            x = bench.images(1 if wide else 2, config, size)  # few windows have a kernel of their own there
            for graphs in (False, True):
                y = SwinTransformer(params, config, device="cuda", precision=name, graphs=graphs)(x)
                error = bench.distance(y, np.asarray(exact(x)))
                if not error <= bench.tolerance(name):
                    raise SystemExit(f"version {version} in {name} is wrong: {error:.1e}")


if __name__ == "__main__":
    main()
