"""The models that swincupy is compared with, with random weights, and how PyTorch runs them in each precision."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swincupy import bench, registry
from swincupy.config import SwinConfig
from tests.parity import references  # finds timm and transformers, also where torchvision's operators are missing

#: Rows of the tables: label -> architecture.
MODELS = {
    "v1-T 224": "swin_tiny_patch4_window7_224",
    "v1-S 224": "swin_small_patch4_window7_224",
    "v1-B 224": "swin_base_patch4_window7_224",
    "v1-L 224": "swin_large_patch4_window7_224",
    "v1-B 384": "swin_base_patch4_window12_384",
    "v1-L 384": "swin_large_patch4_window12_384",
    "v2-T 256": "swinv2_tiny_window8_256",
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def timm_module(architecture: str) -> torch.nn.Module:
    """timm's model of that name, with random weights."""
    return _drawn(references._library("timm").create_model(architecture, pretrained=False))


def transformers_module(architecture: str) -> torch.nn.Module:
    """transformers' model of the same configuration, with random weights; its answer has ``logits``."""
    library, c = references._library("transformers"), registry.named_config(architecture)
    v2 = "v2" if c.version == 2 else ""
    settings = getattr(library, f"Swin{v2}Config")(
        image_size=c.img_size, patch_size=c.patch_size, num_channels=c.in_chans, embed_dim=c.embed_dim,
        depths=list(c.depths), num_heads=list(c.num_heads), window_size=c.window_size, mlp_ratio=c.mlp_ratio,
        qkv_bias=c.qkv_bias, num_labels=c.num_classes,
        **({"pretrained_window_sizes": [w for w, _ in c.pretrained_windows]} if v2 else {}),
    )  # fmt: skip
    return _drawn(getattr(library, f"Swin{v2}ForImageClassification")(settings))


def _drawn(module: torch.nn.Module) -> torch.nn.Module:
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.from_numpy(bench.random_parameter(name, tuple(p.shape), rng)))
    return module.eval()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """What `swincupy.load` takes."""
    return {name: t.detach().cpu().numpy().copy() for name, t in module.state_dict().items()}


def config(architecture: str) -> SwinConfig:
    return registry.named_config(architecture)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """How PyTorch multiplies float32 matrices."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = kept


def milliseconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """As `swincupy.bench.on_events`, on PyTorch's stream: the median of calls that do not wait for each other."""
    for _ in range(3):
        call()
    if device == "cpu":
        taken = []
        for _ in range(min(repeats, 5)):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
        return statistics.median(taken)
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start_event, stop_event in pairs:
        start_event.record()
        call()
        stop_event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def logits(answer: Any) -> torch.Tensor:
    """The logits of timm's or transformers' answer."""
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def versions(device: str) -> dict[str, str]:
    """`swincupy.bench.where`, and PyTorch's and the models' versions."""
    found = bench.where(device) | {"torch": torch.__version__}
    for name in ("timm", "transformers"):
        with contextlib.suppress(references.Missing):
            found[name] = references._library(name).__version__
    return found
