"""Models, inputs and limits that the tests of whole models on a GPU share."""

from __future__ import annotations

from typing import Any

import numpy as np

import swincupy
from swincupy import bench
from swincupy.config import SwinConfig

#: Relative L2 distance of a whole model's outputs from float64. A composition of plain operations that are each
#: rounded comes to half of it, at the worst: the feature maps of V2, whose residuals are small beside its blocks.
LIMITS = {"fp32": 1e-5, "tf32": 4e-3, "fp16": 5e-3, "bf16": 4e-2}

SMALL = SwinConfig(img_size=56, embed_dim=96, depths=(2, 2), num_heads=(3, 6), num_classes=10)


def small(version: int = 1, **changes: Any) -> SwinConfig:
    window = {"window_size": 8, "img_size": 64} if version == 2 else {}
    return SMALL.replace(version=version, **window | changes)


def make(config: SwinConfig, device: str = "cuda", precision: str = "fp32", **options: Any) -> Any:
    """A model with the random weights of its configuration, equal ones in every place and precision."""
    params = bench.random_weights(config)
    extra = {
        f"norm{i}.{k}": np.full(C, v, np.float32)
        for i, C in enumerate(config.dims) for k, v in (("weight", 1.5), ("bias", 0.25))
    }  # fmt: skip
    if options.pop("norms", False):
        params |= extra
    return swincupy.SwinTransformer(params, config, device=device, precision=precision, **options)


def images(*shape: int, seed: int | None = None) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def distance(x: Any, want: Any) -> float:
    """Relative L2 distance of arrays of NumPy or CuPy; NaN is infinitely far."""
    x, want = (np.asarray(a.get() if hasattr(a, "get") else a, np.float64) for a in (x, want))
    return bench.distance(x, want)
