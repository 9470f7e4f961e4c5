"""Write tests/goldens again: ``python -m tests.parity.make_goldens --microsoft DIR [name ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from tests.parity import cases, goldens, recipe, references


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases to write; all stored ones where none is named")
    parser.add_argument("--microsoft", type=Path, help="a checkout of microsoft/Swin-Transformer")
    args = parser.parse_args()
    for case in cases.CASES:
        if not case.stored or (args.names and case.name not in args.names):
            continue
        try:
            reference = references.build(case, args.microsoft)
        except references.Missing as missing:
            print(f"{case.name}: left as it is, {missing}")
            continue
        path = goldens.FOLDER / f"{case.name}.safetensors"
        golden = goldens.Golden(
            config=case.config,
            shape=case.shape,
            parameters=reference.shapes,
            provenance={
                "case": case.name,
                "seed": str(case.seed),
                "source": references.version(case.source, args.microsoft),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "made by": "tests/parity/make_goldens.py",
                "weights and input": "tests/parity/recipe.py",
            },
            outputs=reference.answers(recipe.images(case.shape, case.seed)),
        )
        golden.save(path)
        print(f"{case.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
