"""Whole models against timm and transformers in every precision: relative L2 distance of the logits from float64.

    python benchmarks/accuracy.py [--csv benchmarks/accuracy.csv] [--device cuda] [--model "v1-T 224" ...]

The same random weights and images for all; float64 is the source's own model on the CPU. Then the demo
model's held-out accuracy in every precision. The exit code is 1 where a limit is broken: FP32 1e-5, TF32
2e-3, FP16 and BF16 no more than 1.2 times as far from FP64 as the source's own model in that precision.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import swincupy
from benchmarks import peers_common as common
from swincupy import bench
from tests.parity import references

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"timm": common.timm_module, "transformers": common.transformers_module}
LIMITS = {"fp32": 1e-5, "tf32": 2e-3}
RATIO = 1.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=common.MODELS, default=list(common.MODELS))
    parser.add_argument("--precision", nargs="+", choices=common.DTYPES, default=list(common.DTYPES))
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    made_on = common.versions(args.device if args.device == "cpu" else "cuda:0")
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        rows.append(row | made_on)
        print(*row.values(), sep="  ", flush=True)
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    for label in args.model:
        for source in args.source:
            for precision, ours, theirs in compare(label, source, args.precision, args.batch, args.device):
                limit = LIMITS.get(precision, RATIO * theirs)
                add(
                    model=label, source=source, precision=precision, error=f"{ours:.2e}", source_error=f"{theirs:.2e}",
                    limit=f"{limit:.2e}", ok=ours <= limit,
                )  # fmt: skip
    for precision in args.precision:
        right = demo(args.device, precision)
        add(
            model="demo, held out", source="digits", precision=precision, error=f"{right:.2f} %",
            source_error=f"{(stated := demo('cpu', 'fp32')):.2f} %", limit="two digits", ok=abs(right - stated) <= 0.35,
        )  # fmt: skip
    return 0 if all(r["ok"] for r in rows) else 1


def compare(label: str, source: str, precisions: list[str], batch: int, device: str) -> list[tuple[str, float, float]]:
    """For each precision our distance from float64, and the source's own."""
    architecture = common.MODELS[label]
    try:
        module = SOURCES[source](architecture)
    except references.Missing as missing:
        print(f"{label} {source}: {missing}")
        return []
    arrays, config = common.arrays(module), common.config(architecture)
    pixels = bench.images(batch, config, config.image)
    found = []
    with torch.inference_mode():
        module.double()
        references._exact_constants(module)
        exact = common.logits(module(torch.from_numpy(pixels).double())).numpy()
        for precision in precisions:
            ours = swincupy.load(arrays, config=config, device=device, precision=precision)(pixels)
            peer = SOURCES[source](architecture).to(device, common.DTYPES[precision])
            with common.precision(precision):
                theirs = common.logits(peer(torch.from_numpy(pixels).to(device, common.DTYPES[precision])))
            found.append((precision, bench.distance(ours, exact), bench.distance(theirs.double().cpu().numpy(), exact)))
            del peer, theirs
            gc.collect()
    return found


def demo(device: str, precision: str) -> float:
    """Per cent of the held-out digits that the demo model names."""
    spec = importlib.util.spec_from_file_location("weights_digits", ROOT / "weights" / "digits.py")
    digits: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    counts: np.ndarray = digits.confusion(swincupy.load(digits.WEIGHTS, device=device, precision=precision))
    return float(100 * counts.trace() / counts.sum())


if __name__ == "__main__":
    sys.exit(main())
