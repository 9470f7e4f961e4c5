"""Products for the tests of all their backends: operands, exact results, and how far off plain arithmetic is."""

from __future__ import annotations

from typing import Any

import numpy as np

from swincupy import precision as precisions
from swincupy.ops import reference

EPILOGUES = [(), ("bias",), ("bias", "gelu"), ("gelu",), ("residual",), ("bias", "residual")]


def draw(name: str, M: int, N: int, K: int, parts: tuple[str, ...]) -> tuple[dict[str, Any], np.ndarray]:
    """Arrays on the GPU, and the exact result for the numbers that they hold.

    Pre-activations are mostly negative, but of no draw all in the tail of the GELU, where a relative error says
    nothing: biases are spread evenly.
    """
    import cupy

    precision, rng = precisions.of(name), np.random.default_rng()
    shapes = {"a": (M, K), "w": (N, K), "bias": (N,), "residual": (M, N)}
    scale = {"w": K**-0.5}
    host = {
        k: precisions.encode(
            rng.permutation(3 * (np.arange(N) + 0.5) / N - 2) if k == "bias"
            else rng.standard_normal(shapes[k]) * scale.get(k, 1.0), precision
        )
        for k in ("a", "w", *parts) if k in shapes
    }  # fmt: skip
    exact = {k: precisions.decode(v, precision).astype(np.float64) for k, v in host.items()}
    want = reference.linear(exact["a"], exact["w"], exact.get("bias"))
    want = reference.gelu(want) if "gelu" in parts else want + exact.get("residual", 0.0)
    return {k: cupy.asarray(v) for k, v in host.items()}, want


def distance(got: Any, want: np.ndarray, name: str) -> float:
    import cupy

    x = precisions.decode(cupy.asnumpy(got), precisions.of(name)).astype(np.float64)
    return float(np.linalg.norm(x - want) / np.linalg.norm(want))


def plain(x: dict[str, Any], name: str, gelu: bool) -> Any:
    """The composition operation by operation, each result rounded to storage; the product in float64."""
    import cupy

    p = precisions.of(name)
    x = {k: precisions.decode(cupy.asnumpy(v), p).astype(np.float64) for k, v in x.items()}

    def rounded(y: np.ndarray) -> np.ndarray:
        return precisions.decode(precisions.encode(y, p), p).astype(np.float64)

    y = rounded(x["a"] @ x["w"].T)
    y = rounded(y + x["bias"]) if "bias" in x else y
    y = rounded(reference.gelu(y)) if gelu else y
    y = rounded(y + x["residual"]) if "residual" in x else y
    return cupy.asarray(precisions.encode(y, p))
