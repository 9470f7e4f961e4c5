"""What benchmarks/sanitize.sh runs under compute-sanitizer: every operation's cases, or a small forward pass.

    python benchmarks/sanitize.py ops | forward [--precision fp16 ...]

Memory comes from cudaMalloc, an array at a time: in a pool an access beyond an array's end hits another one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swincupy import bench
from swincupy.config import SwinConfig
from swincupy.model import SwinTransformer
from swincupy.ops.fused import Fused

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ops", "forward"))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS))
    args = parser.parse_args()
    import cupy

    cupy.cuda.set_allocator(None)
    for name in args.precision:
        {"ops": operations, "forward": forward}[args.what](name)
        cupy.cuda.Device().synchronize()
        print(f"{args.what} in {name}: done", flush=True)


def operations(name: str) -> None:
    """Every case of the operations' tests; results are compared as there."""
    import cupy

    from tests.op_cases import CASES, check

    ops = Fused(name)
    for case in CASES:
        check(case, name, ops, cupy.asarray)


def forward(name: str) -> None:
    """A small model of each version, call by call and as a graph, with padding at every stage and with none."""
    for version, window in ((1, 7), (2, 8)):
        config = SwinConfig(
            version=version, img_size=56, embed_dim=96, depths=(2, 2), num_heads=(3, 6), window_size=window,
            num_classes=10,
        ).with_conventions("microsoft")  # fmt: skip
        params = bench.random_weights(config)
        exact = SwinTransformer(params, config, device="cpu", precision="fp64")
        for size in ((50, 71), (8 * window, 8 * window)):
            x = bench.images(2, config, size)
            for graphs in (False, True):
                y = SwinTransformer(params, config, device="cuda", precision=name, graphs=graphs)(x)
                error = bench.distance(y, np.asarray(exact(x)))
                if not error <= bench.tolerance(name):
                    raise SystemExit(f"version {version} in {name} is wrong: {error:.1e}")


if __name__ == "__main__":
    main()
