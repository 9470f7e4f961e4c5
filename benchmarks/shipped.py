"""Measures the products that published models compute on this GPU, for ``swincupy/tuned.json``, which is shipped.

    python benchmarks/shipped.py [--seconds 500] [--precision fp16 bf16] [--model NAME:BATCH,BATCH ...]

As `swincupy tune`, without CUTLASS, whose kernels take a user seconds to compile. What the file has of this GPU with
this driver, library and these kernels is not measured again, so that a run that was cut off can be gone on with. What
it has of this GPU with others is dropped, what it has of other GPUs is kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swincupy import bench, tune
from swincupy.model import SwinTransformer
from swincupy.ops import gemm

MODELS = (
    "swin_tiny:1,8,32,64,128", "swin_base:1,8,32", "swinv2_tiny:1,8,32", "swin_large:1,8,32",
    "swin_base_patch4_window12_384:1,32", "swin_large_patch4_window12_384:32",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16"])
    parser.add_argument("--model", nargs="+", default=MODELS)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    here = tune.environment(0)
    path = tune.shipped_path()
    known = tune.read(path) if path.exists() else {}
    known = {k: v for k, v in known.items() if k == here or k.split(" | ")[0] != here.split(" | ")[0]}
    entries = known.setdefault(here, {})
    for precision in args.precision:
        for name, batches in (m.split(":") for m in args.model):
            params, config = bench.weights(name)
            model = SwinTransformer(params, config, device="cuda", precision=precision, graphs=False)
            for batch in map(int, batches.split(",")):
                if time.monotonic() > end:
                    sys.exit("out of time: run it again")
                gemm.forget()
                bench.answer(model, bench.images(batch, config, config.image))
                for problem in [p for _, p in gemm._plans]:
                    if tune._key(problem) in entries or time.monotonic() > end:
                        continue
                    choice, us, guess = tune.measured(problem, gemm.likely(problem))
                    entries[tune._key(problem)] = {"choice": tune._encode(choice), "microseconds": round(us, 2)}
                    print(f"{tune._key(problem)}: {us:.2f} us, first guess {guess:.2f}", flush=True)
                tune.write(path, known)


if __name__ == "__main__":
    main()
