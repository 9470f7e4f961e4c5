"""CPU speed against eager PyTorch float32: same weights, same threads, same process, taken in turn.

    python benchmarks/cpu.py [--variant swin_tiny_patch4_window7_224] [--batch 1 8] [--threads N]
    python benchmarks/cpu.py --memory swin_large_patch4_window12_384

The peer is the timm model; needs torch and timm. With ``--memory`` only swincupy runs, once, and the
peak resident memory of the process is printed.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", metavar="VARIANT", help="peak memory of one image through a variant")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)  # read as they load
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if args.memory:
        memory(args.memory)
    else:
        speed(args.variant, args.batch, args.threads, args.rounds)


def speed(variant: str, batches: list[int], threads: int, rounds: int) -> None:
    import numpy as np
    import torch

    from tests.parity import references

    timm = references._library("timm")  # also on a CPU build of torch, where torchvision's operators are missing

    import swincupy
    from swincupy.registry import CONFIGS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    peer = timm.create_model(variant, pretrained=False).eval()
    model = swincupy.load(peer.state_dict(), config=CONFIGS[variant], device="cpu")
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    print(f"{variant}, {threads} threads, float32; {versions}; median of {rounds}")
    print(f"{'batch':>5} {'torch ms':>9} {'swincupy ms':>12} {'ratio':>6} {'max difference':>15}")
    for batch in batches:
        pixels = np.random.default_rng(batch).standard_normal((batch, *peer.default_cfg["input_size"]), np.float32)
        tensor = torch.from_numpy(pixels)
        with torch.inference_mode():
            expected = peer(tensor).numpy()
            difference = np.abs(model(pixels) - expected).max() / np.abs(expected).max()
            times = in_turn([lambda t=tensor: peer(t), lambda p=pixels: model(p)], rounds)
        torch_ms, ours = (statistics.median(t) * 1e3 for t in times)
        print(f"{batch:5d} {torch_ms:9.1f} {ours:12.1f} {ours / torch_ms:6.2f} {difference:15.1e}")


def in_turn(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call over the rounds; one warm-up; the machine's moods fall on all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if round_:
                taken.append(time.perf_counter() - start)
    return times


def memory(variant: str) -> None:
    import numpy as np

    import swincupy
    from swincupy.checkpoint import save_checkpoint
    from swincupy.parameters import parameter_shapes
    from swincupy.registry import CONFIGS

    config = CONFIGS[variant]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if os.fork() == 0:  # the weights are drawn in another process, so that this one only loads them
            rng = np.random.default_rng(0)
            shapes = parameter_shapes(config)
            save_checkpoint(path, {k: rng.standard_normal(s, np.float32) * 0.02 for k, s in shapes.items()}, config)
            os._exit(0)
        os.wait()
        weights = path.stat().st_size
        model = swincupy.load(path, device="cpu")
        pixels = np.zeros((1, config.in_chans, *config.image), np.float32)
        start = time.perf_counter()
        model(pixels)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = f"weights {weights / 2**20:.0f} MiB, peak resident {peak / 2**20:.0f} MiB"
    print(f"{variant}, batch 1: {sizes}, {seconds:.2f} s")


if __name__ == "__main__":
    main()
