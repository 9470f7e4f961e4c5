"""Ask a swincupy model for outputs under the names that references give them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from swincupy import SwinTransformer


def ask(model: SwinTransformer, images: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
    """``logits``, ``embed``, ``stage{i}`` (before its downsampling) and ``norm{i}`` (the same, normalised), NCHW."""
    names = set(names)
    out: dict[str, np.ndarray] = {}
    if "logits" in names:
        out["logits"] = model(images)
    if "embed" in names:
        out["embed"] = model.embed(images)
    for kind, norm in (("stage", False), ("norm", True)):
        if any(name.startswith(kind) for name in names):
            out |= {f"{kind}{i}": z for i, z in enumerate(model.features(images, norm=norm))}
    return out
