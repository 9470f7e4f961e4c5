"""Cases of window_attention, and its result in float64: shared by the tests with and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from swincupy import precision as precisions
from swincupy.ops import reference
from swincupy.precision import Precision


@dataclass(frozen=True)
class Case:
    window: tuple[int, int]
    grid: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    batch: int = 1
    num_heads: int = 2
    d: int = 32
    pad_mode: Any = "pad_roll"
    cosine: bool = False
    biased: bool = True  # whether the QKV product has a bias

    def __str__(self) -> str:
        (mh, mw), (H, W), (sh, sw) = self.window, self.grid, self.shift
        kind = "cosine" if self.cosine else "scaled"
        bias = "" if self.biased else "-unbiased"
        return f"{kind}-m{mh}x{mw}-{H}x{W}-s{sh}x{sw}-b{self.batch}-h{self.num_heads}-d{self.d}-{self.pad_mode}{bias}"

    @property
    def options(self) -> dict[str, Any]:
        """Sizes as window_attention takes them."""
        return dict(
            batch=self.batch, grid=self.grid, window=self.window, shift=self.shift,
            pad_mode=self.pad_mode, num_heads=self.num_heads,
        )  # fmt: skip


# Every window and head length, padding on either axis, in both modes, one axis shifted or both, one image or more.
CASES = [
    Case((7, 7), (14, 21), batch=3, num_heads=3),
    Case((7, 7), (14, 21), (3, 3), batch=3, num_heads=3),
    Case((7, 7), (9, 16), (3, 3), num_heads=1),
    Case((7, 7), (9, 16), (3, 3), pad_mode="roll_pad"),
    Case((7, 7), (9, 16), (3, 3), pad_mode="roll_pad", cosine=True),
    Case((7, 7), (5, 15), (0, 3), biased=False),
    Case((7, 7), (3, 4), (3, 3), pad_mode="roll_pad"),
    Case((7, 7), (2, 9), (5, 6), pad_mode="roll_pad", batch=2),
    Case((7, 7), (8, 7), (3, 0), d=16),
    Case((7, 7), (10, 11), (3, 3), d=24, batch=3),
    Case((7, 7), (10, 11), (3, 3), d=24, cosine=True),
    Case((7, 7), (10, 11), (3, 3), d=48),
    Case((7, 7), (10, 11), (3, 3), d=64),
    Case((7, 7), (7, 7), d=20),
    Case((7, 7), (7, 7), d=6, num_heads=5),
    Case((7, 7), (7, 7), d=5, num_heads=3),
    Case((7, 7), (8, 8), d=128, num_heads=1),
    Case((8, 8), (16, 24), (4, 4), cosine=True, batch=3),
    Case((8, 8), (13, 17), (4, 4), cosine=True, biased=False),
    Case((8, 8), (13, 17), (4, 4), cosine=True, d=64),
    Case((12, 12), (24, 25), (6, 6)),
    Case((12, 12), (13, 24), (6, 6), d=16, cosine=True),
    Case((12, 12), (12, 12), d=64, num_heads=1),
    Case((16, 16), (32, 17), (8, 8), cosine=True),
    Case((16, 16), (16, 16), d=24),
    Case((24, 24), (25, 47), (12, 12), cosine=True, num_heads=1),
    Case((24, 24), (24, 24), num_heads=1, d=64),
    Case((14, 7), (20, 9), (7, 3), num_heads=3),
    Case((3, 13), (9, 20), (1, 6), num_heads=3),
    Case((10, 10), (21, 19), (5, 5)),
    Case((14, 14), (28, 27), (7, 7)),
    Case((6, 6), (13, 7), (3, 3), batch=3),
    Case((4, 4), (6, 9), (2, 2), cosine=True),
    Case((5, 1), (7, 3), (2, 0)),
    Case((1, 1), (3, 2), cosine=True),
    Case((1, 1), (1, 1)),
]


def draw(case: Case, precision: Precision, seed: int) -> dict[str, np.ndarray | None]:
    """Arguments of window_attention in the precision's storage: arrays on the host."""
    rng = np.random.default_rng(seed)
    C, N = case.num_heads * case.d, case.window[0] * case.window[1]
    rows = case.batch * case.grid[0] * case.grid[1]
    qkv = rng.standard_normal((rows, 3 * C)) * np.repeat([1.5, 1.5, 1.0], C) + 0.3
    return dict(
        qkv=precisions.encode(qkv, precision),
        qkv_bias=precisions.encode(rng.standard_normal(3 * C), precision) if case.biased else None,
        position_bias=rng.standard_normal((case.num_heads, N, N)).astype(np.float32) * 2,
        logit_scale=rng.uniform(4, 40, case.num_heads).astype(np.float32) if case.cosine else None,
    )


def expected(case: Case, arrays: dict[str, np.ndarray | None], precision: Precision, plain: bool = False) -> np.ndarray:
    """The result from the pieces of ops/reference.py, in float64.

    plain: as a composition of array operations in the precision would have it, each result
    rounded to its storage, the softmax in float32.
    """
    work = np.float32 if plain else np.float64

    def rounded(x: np.ndarray) -> np.ndarray:
        return precisions.decode(precisions.encode(x, precision), precision) if plain else x

    def factor(x: np.ndarray) -> np.ndarray:  # of a matrix product
        if not plain or precision.name != "tf32":
            return x
        bits = np.ascontiguousarray(x).view(np.uint32)
        return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)

    B, (H, W), nH, window = case.batch, case.grid, case.num_heads, case.window
    qkv = precisions.decode(arrays["qkv"], precision).astype(work).reshape(B, H, W, -1)
    real = reference.shifted_windows(np.ones((B, H, W, 1), work), window, case.shift, case.pad_mode)
    windows = reference.shifted_windows(qkv, window, case.shift, case.pad_mode)
    if arrays["qkv_bias"] is not None:
        windows = np.where(real > 0, windows, precisions.decode(arrays["qkv_bias"], precision).astype(work))
    n, N, C3 = windows.shape
    q, k, v = windows.reshape(n, N, 3, nH, -1).transpose(2, 0, 3, 1, 4)
    if case.cosine:
        unit = [x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), work(1e-12)) for x in (q, k)]
        q, k = (rounded(x) for x in unit)
        scale = arrays["logit_scale"].astype(work)[:, None, None]
        scores = rounded(rounded(np.matmul(factor(q), factor(k).swapaxes(-1, -2))) * scale)
    else:
        q = rounded(q * work(q.shape[-1] ** -0.5))
        scores = rounded(np.matmul(factor(q), factor(k).swapaxes(-1, -2)))
    scores = rounded(scores + rounded(arrays["position_bias"].astype(work)))
    if any(case.shift):
        mask = reference.shift_mask(H + -H % window[0], W + -W % window[1], window, case.shift).astype(work)
        scores = rounded(scores.reshape(B, -1, nH, N, N) + mask[:, None]).reshape(n, nH, N, N)
    p = rounded(reference.softmax(scores))
    y = rounded(np.matmul(factor(p), factor(v))).transpose(0, 2, 1, 3).reshape(n, N, C3 // 3)
    y = reference.unshifted_windows(y, window, case.shift, H, W, case.pad_mode)
    return y.reshape(B * H * W, -1).astype(np.float64)


def distance(out: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 distance; infinite where something is not finite."""
    if not np.isfinite(out).all():
        return np.inf
    return float(np.linalg.norm(out - want) / np.linalg.norm(want))
