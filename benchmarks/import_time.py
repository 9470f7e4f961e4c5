"""How long ``import swincupy`` takes, what it offers, and ``import numpy``.

    python benchmarks/import_time.py

Each figure is the median of fresh processes, the imports taking turns; bytecode caches are warm, as they
are for anyone who imports the package a second time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

TIMER = "import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"


def seconds(statement: str) -> float:
    """Wall time of a statement in a process of its own, the interpreter's start not included."""
    run = subprocess.run(
        [sys.executable, "-c", TIMER.format(statement=statement)], check=True, capture_output=True, text=True
    )
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=15, help="processes for each")
    count = parser.parse_args().processes
    statements = ("import numpy", "import swincupy", "from swincupy import load")
    seconds(statements[-1])  # writes the bytecode, warms the disk cache
    turns = [[seconds(statement) for statement in statements] for _ in range(count)]
    for statement, taken in zip(statements, zip(*turns, strict=True), strict=True):
        print(f"{statement}: {statistics.median(taken) * 1e3:.0f} ms (median of {count} processes)")


if __name__ == "__main__":
    main()
