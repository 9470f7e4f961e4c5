"""Images a second over batch size, a panel for each model, from the CSV of benchmarks/peers.py.

python benchmarks/plot.py benchmarks/peers.csv benchmarks/peers.png [--precision fp16]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--precision", default="fp16")
    args = parser.parse_args()
    with open(args.csv, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["precision"] == args.precision]
    if not rows:
        raise SystemExit(f"{args.csv} holds nothing in {args.precision}")
    plot(rows, args.precision).savefig(args.image, dpi=150)


def plot(rows: list[dict[str, str]], precision: str) -> plt.Figure:
    models, peers = (list(dict.fromkeys(r[k] for r in rows)) for k in ("model", "peer"))
    columns = min(4, len(models))
    lines = -(-len(models) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False, layout="constrained")
    for axis, model in zip(axes.flat, models, strict=False):
        for peer in peers:
            points = sorted(
                (int(r["batch"]), float(r["images_s"])) for r in rows if (r["model"], r["peer"]) == (model, peer)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=peer)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(model)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(models) :]:
        axis.axis("off")
    axes[0][0].legend(fontsize="small")
    figure.supxlabel("batch")
    figure.supylabel("images / s")
    figure.suptitle(f"{rows[0].get('device', '')}, {precision}")
    return figure


if __name__ == "__main__":
    main()
