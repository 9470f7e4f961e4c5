"""Speed on a GPU against PyTorch: eager, traced, and compiled (reduce-overhead); timm's models, the same weights.

    python benchmarks/peers.py [--csv benchmarks/peers.csv] [--markdown benchmarks/peers.md] [--seconds 480]
                               [--model "v1-T 224" ...] [--batch 1 32 ...] [--precision fp16 ...] [--peer ...]

All on one GPU, in one process, in turn; inputs are on the GPU; a time is the median of 50 calls between
events. Before it is timed, each answer is compared with timm's in float32. Rows are appended to the CSV as
they are measured, those that it has already are not measured again, and nothing new is begun after so many
seconds: call it again until it says that nothing is left (compiling a model takes PyTorch a minute).
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import swincupy
from benchmarks import peers_common as common
from swincupy import bench

PEERS = ("swincupy", "torch eager", "torch trace", "torch compile")
BATCHES, PRECISIONS = (1, 8, 32, 64, 128), ("fp16", "bf16", "tf32", "fp32")
#: What is asked about first.
FIRST = (
    ("v1-T 224", 1, "fp16"), ("v1-T 224", 32, "fp16"), ("v1-B 224", 1, "fp16"), ("v1-B 224", 32, "fp16"),
    ("v2-T 256", 32, "fp16"), ("v1-L 384", 32, "fp16"), ("v1-T 224", 32, "bf16"), ("v1-T 224", 32, "tf32"),
    ("v1-T 224", 1, "bf16"), ("v2-T 256", 1, "fp16"),
)  # fmt: skip
KEY = ("model", "batch", "precision", "peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=common.MODELS, default=list(common.MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--precision", nargs="+", choices=common.DTYPES, default=list(PRECISIONS))
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing new after these")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    began, made_on = time.perf_counter(), common.versions(args.device if args.device == "cpu" else "cuda:0")
    rows = read(args.csv)
    done = {tuple(str(r[k]) for k in KEY) for r in rows if all(r.get(k) == v for k, v in made_on.items())}
    wanted = [
        (m, b, p) for m in args.model for p in args.precision for b in args.batch
    ]  # one model's and precision's batches together
    wanted.sort(key=lambda w: FIRST.index(w) if w in FIRST else len(FIRST))
    left, models = 0, Models(args.device)
    for model, batch, precision in wanted:
        todo = [peer for peer in args.peer if (model, str(batch), precision, peer) not in done]
        for peer in todo:
            if time.perf_counter() - began > args.seconds:
                left += 1
                continue
            try:
                ms, error = models.measure(model, batch, precision, peer, args.repeats)
            except Exception as problem:  # one peer that cannot is no reason to lose the others' rows
                print(
                    f"{model} batch {batch} {precision} {peer}: {type(problem).__name__}: {problem}"[:300], flush=True
                )
                continue
            row = dict(
                model=model, batch=batch, precision=precision, peer=peer, ms=f"{ms:.4f}",
                images_s=f"{1e3 * batch / ms:.1f}", error=f"{error:.2e}", **made_on,
            )  # fmt: skip
            rows.append(row)
            write(args.csv, rows)
            print(model, f"batch {batch}", precision, peer, f"{ms:.3f} ms", f"error {error:.1e}", sep="  ", flush=True)
    table = markdown([r for r in rows if all(r.get(k) == v for k, v in made_on.items())], made_on)
    print(table)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    print(f"{left} rows left: call again" if left else "nothing is left")


class Models:
    """timm's module and swincupy's weights of one architecture at a time, and its answers in float32."""

    def __init__(self, device: str) -> None:
        self.device, self._name = device, ""

    def measure(self, name: str, batch: int, precision: str, peer: str, repeats: int) -> tuple[float, float]:
        """Milliseconds of a call, and the distance of its answer from timm's in float32."""
        self._load(name)
        pixels = bench.images(batch, self._config, self._config.image)
        with torch.inference_mode(), common.precision(precision):
            call = (self._ours if peer == "swincupy" else self._torch)(pixels, precision, peer)
            error = bench.distance(_numpy(call())[:2], self._expected(batch))
            if not error <= 4 * bench.tolerance(precision):
                raise SystemExit(f"{name} in {precision} by {peer} is wrong: {error:.1e} from timm in float32")
            if peer == "swincupy" and self.device != "cpu":
                ms = bench.on_events(call, repeats)
            else:
                ms = common.milliseconds(call, repeats, self.device)
        del call
        _free(self.device)
        return ms, error

    def _load(self, name: str) -> None:
        if name == self._name:
            return
        architecture = common.MODELS[name]
        self._name, self._config = name, common.config(architecture)
        self._module = common.timm_module(architecture)
        self._arrays = common.arrays(self._module)
        self._answers: np.ndarray | None = None
        self._architecture = architecture

    def _expected(self, images: int) -> np.ndarray:
        if self._answers is None:
            x = torch.from_numpy(bench.images(2, self._config, self._config.image)).to(self.device)
            with common.precision("fp32"):
                self._answers = self._copy(torch.float32)(x).cpu().numpy()
        return self._answers[:images]

    def _copy(self, dtype: torch.dtype) -> torch.nn.Module:
        module = common.references._library("timm").create_model(self._architecture, pretrained=False)
        module.load_state_dict(self._module.state_dict())
        return module.eval().to(self.device, dtype)

    def _ours(self, pixels: np.ndarray, precision: str, peer: str) -> Callable[[], Any]:
        model = swincupy.load(self._arrays, config=self._config, device=self.device, precision=precision)
        if self.device == "cpu":
            return lambda: model(pixels)
        import cupy

        x = cupy.asarray(pixels)
        return lambda: model(x)

    def _torch(self, pixels: np.ndarray, precision: str, peer: str) -> Callable[[], Any]:
        dtype = common.DTYPES[precision]
        module, x = self._copy(dtype), torch.from_numpy(pixels).to(self.device, dtype)
        if peer == "torch trace":
            module = torch.jit.freeze(torch.jit.trace(module, x, check_trace=False))
        elif peer == "torch compile":
            torch._dynamo.reset()
            module = torch.compile(module, mode="reduce-overhead")
        return lambda: module(x)


def _numpy(answer: Any) -> np.ndarray:
    if isinstance(answer, torch.Tensor):
        return answer.float().cpu().numpy()
    return answer.get() if hasattr(answer, "get") else answer


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        import cupy

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        cupy.get_default_memory_pool().free_all_blocks()


# ---------------------------------------------------------------- the files


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    fields = list(dict.fromkeys(k for row in rows for k in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict[str, Any]], made_on: dict[str, str]) -> str:
    """Milliseconds, a column for each peer, and how many times as long the fastest of PyTorch's takes."""
    cells: dict[tuple[str, str, int], dict[str, float]] = {}
    for r in rows:
        cells.setdefault((r["model"], r["precision"], int(r["batch"])), {})[r["peer"]] = float(r["ms"])
    order = {name: i for i, name in enumerate((*common.MODELS, *PRECISIONS))}
    lines = [", ".join(f"{k} {v}" for k, v in made_on.items()), ""]
    lines.append(
        "| model | precision | batch | " + " | ".join(f"{p} ms" for p in PEERS) + " | fastest torch / swincupy |"
    )
    lines.append("| --- | --- |" + " ---: |" * (len(PEERS) + 2))
    for (model, precision, batch), ms in sorted(cells.items(), key=lambda c: (order[c[0][0]], order[c[0][1]], c[0][2])):
        peers = [ms[p] for p in PEERS[1:] if p in ms]
        ratio = f"{min(peers) / ms['swincupy']:.2f}" if peers and "swincupy" in ms else "-"
        shown = " | ".join(f"{ms[p]:.3f}" if p in ms else "-" for p in PEERS)
        lines.append(f"| {model} | {precision} | {batch} | {shown} | {ratio} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
