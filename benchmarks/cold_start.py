"""From nothing to a first result, Swin-T in FP16: with empty caches, with warm ones; and what is installed.

    python benchmarks/cold_start.py [--csv benchmarks/cold_start.csv] [--precision fp16] [--device cuda]

Each start is a process of its own. "cold" has empty folders for the kernels that CuPy keeps, for the
driver's and for swincupy's; "warm" runs again with what cold left there. Installed sizes are those of a
package and all that it needs, as it is installed here, optional parts left out unless they are named.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

START = """
import json, sys, time
began = time.perf_counter()
import numpy
numpy_there = time.perf_counter()
import swincupy
imported = time.perf_counter()
model = swincupy.load(sys.argv[1], device=sys.argv[2], precision=sys.argv[3])
loaded = time.perf_counter()
x = numpy.random.default_rng(0).standard_normal((1, 3, 224, 224), numpy.float32)
assert numpy.isfinite(model(x)).all()
first = time.perf_counter()
model(x)
again = time.perf_counter()
print(json.dumps({"numpy": numpy_there - began, "import": imported - numpy_there, "load": loaded - imported,
                  "first result": first - loaded, "load to first result": first - imported,
                  "process": first - began, "second result": again - first}))
"""
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--model", default="swin_tiny")
    parser.add_argument("--warm", type=int, default=3, help="warm starts, of which the fastest counts")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def add(what: str, value: float, unit: str) -> None:
        rows.append({"what": what, "value": round(value, 3), "unit": unit})
        print(f"{what:<40}{value:10.3f} {unit}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_model(path, args.model)
        caches = {"CUPY_CACHE_DIR": "cupy", "CUDA_CACHE_PATH": "cuda", "SWINCUPY_CACHE_DIR": "swincupy"}
        environment = os.environ | {name: str(Path(folder) / where) for name, where in caches.items()}

        def start() -> dict[str, float]:
            command = [sys.executable, "-c", START, str(path), args.device, args.precision]
            root = Path(__file__).resolve().parents[1]
            paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
            run = subprocess.run(command, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            found: dict[str, float] = json.loads(run.stdout)
            return found

        for what, seconds in start().items():
            add(f"cold: {what}", seconds, "s")
        warm = [start() for _ in range(args.warm)]
        for what in warm[0]:
            add(f"warm: {what}", min(w[what] for w in warm), "s")
    for module in ("numpy", "swincupy", "cupy", "torch"):
        run = subprocess.run([sys.executable, "-c", IMPORT.format(module)], capture_output=True, text=True)
        if run.returncode == 0:
            add(f"import {module}", float(run.stdout), "s")
    cpu = ("swincupy", "numpy", "array-api-compat", "safetensors", "pillow", "threadpoolctl", "tqdm")
    for label, names in (
        ("swincupy[cuda13]", (*cpu, "cupy-cuda13x[ctk]", "nvmath-python", "cuda-bindings")),
        ("swincupy on the CPU", cpu),
        ("torch", ("torch",)),
        ("torch, torchvision, timm", ("torch", "torchvision", "timm")),
    ):
        size, packages = installed(names)
        if size:
            add(f"installed {label}, {packages} packages", size / 2**20, "MiB")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def write_model(path: Path, name: str) -> None:
    from swincupy import bench
    from swincupy.checkpoint import save_checkpoint

    params, config = bench.weights(name)
    save_checkpoint(path, dict(params), config)


def installed(names: tuple[str, ...]) -> tuple[int, int]:
    """Bytes and number of the packages of these names, ``name[extra]``, and of all that they need, as far as here."""
    todo, seen, total = [_split(n) for n in names], set[str](), 0
    visited = set[tuple[str, str]]()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in visited:
            continue
        visited.add((name, extra))
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in seen:
            seen.add(name)
            for file in package.files or ():
                path = Path(str(package.locate_file(file)))
                total += path.stat().st_size if path.is_file() else 0
        for requirement in package.requires or ():
            needed, _, marker = requirement.partition(";")
            if _applies(marker, extra):
                todo.append(_split(needed))
    return total, len(seen)


def _split(requirement: str) -> tuple[str, str]:
    found = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[1]).lower(), found[2] or ""


def _applies(marker: str, extra: str) -> bool:
    if not marker.strip():
        return True
    from packaging.markers import Marker

    return any(Marker(marker).evaluate({"extra": e.strip()}) for e in (extra or "").split(","))


if __name__ == "__main__":
    main()
