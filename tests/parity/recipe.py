"""Random weights and inputs that any NumPy makes bit for bit: a hash of (seed, name, position).

Goldens hold outputs only; the weights behind them are made again from the names and shapes of the
source's own state dict. NumPy does not promise equal random streams between versions, so the bits
come from SplitMix64: element n of an array is the hash of its key plus n times the golden gamma,
its four 16-bit pieces add up to something near enough to a normal deviate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float64 deviates of mean 0 and variance 1 within [-3.5, 3.5], a function of the arguments alone."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], dtype="<u8")
    z = key + _GAMMA * np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    for shift, factor in _MIX:
        z = (z ^ (z >> shift)) * factor
    z ^= z >> np.uint64(31)
    pieces = sum(((z >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return ((pieces - 2 * 65535) / (65536.0 * math.sqrt(1 / 3))).reshape(shape)


def parameter(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 weight of that name, on a scale that makes its term count and keeps activations near 1.

    Told by the end of its name, in any layout, and by its rank: a gain is a vector named weight.
    """
    r = normal(name, shape, seed)
    if name.endswith("logit_scale"):
        r = math.log(40.0) + 0.6 * r  # a twentieth of them above the clamp at ln 100
    elif name.endswith(("relative_position_bias_table", "absolute_pos_embed", "position_embeddings")):
        pass
    elif len(shape) == 1:
        r = 1.0 + 0.3 * r if name.endswith("weight") else 0.4 * r
    else:
        r = r / math.sqrt(math.prod(shape[1:]))
    return r.astype(np.float32)


def state_dict(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """A whole state dict in the source's own key layout."""
    return {name: parameter(name, tuple(shape), seed) for name, shape in shapes.items()}


def images(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Input pixels, as if normalised: float32 [B, Cin, H, W]."""
    return normal("images", shape, seed).astype(np.float32)
