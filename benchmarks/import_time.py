"""How long ``import swincupy`` takes beyond ``import numpy``.

    python benchmarks/import_time.py

Each figure is the median of fresh processes, the two imports taking turns; bytecode caches are warm, as they
are for anyone who imports the package a second time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

TIMER = "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"


def seconds(module: str) -> float:
    """Wall time of importing ``module`` in a process of its own, the interpreter's start not included."""
    run = subprocess.run(
        [sys.executable, "-c", TIMER.format(module=module)], check=True, capture_output=True, text=True
    )
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=15, help="processes for each of the two imports")
    count = parser.parse_args().processes
    seconds("swincupy")  # writes the bytecode, warms the disk cache
    pairs = [(seconds("numpy"), seconds("swincupy")) for _ in range(count)]
    numpy, swincupy = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"import numpy {numpy * 1e3:.0f} ms, import swincupy {swincupy * 1e3:.0f} ms: "
        f"{(swincupy - numpy) * 1e3:.0f} ms beyond numpy (median of {count} processes)"
    )


if __name__ == "__main__":
    main()
