"""Distance from the reference implementations, run side by side on random weights: a table by source.

    python benchmarks/agreement.py [--microsoft DIR]

Every case of ``tests/parity/cases.py`` runs in float32 and float64; a figure is the largest
``max |ours - theirs| / max |theirs|`` over logits, embeddings and all feature maps of the cases of a
source. Needs torch and the libraries; microsoft's code is taken from a checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import swincupy
from tests.parity import cases, recipe, references
from tests.parity.ask import ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microsoft", type=Path, help="a checkout of microsoft/Swin-Transformer")
    checkout = parser.parse_args().microsoft
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for case in cases.CASES:
        try:
            reference = references.build(case, checkout)
        except references.Missing as missing:
            print(f"left out: {case.name}: {missing}", file=sys.stderr)
            continue
        x = recipe.images(case.shape, case.seed)
        distances = []
        for precision, pixels in (("fp64", x.astype(np.float64)), ("fp32", x)):
            theirs = reference.answers(pixels)
            model = swincupy.load(reference.state_dict(), config=case.config, precision=precision, device="cpu")
            ours = ask(model, pixels, theirs)
            distances.append(max(float(np.abs(ours[k] - y).max() / np.abs(y).max()) for k, y in theirs.items()))
        found[case.source, case.config.version].append((distances[1], distances[0]))
    print("| source | version | cases | float32 | float64 |\n|---|---|---|---|---|")
    for (source, version), pairs in found.items():
        single, double = (max(column) for column in zip(*pairs, strict=True))
        print(f"| {source} | v{version} | {len(pairs)} | {single:.1e} | {double:.1e} |")


if __name__ == "__main__":
    main()
