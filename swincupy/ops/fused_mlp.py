"""The whole second half of a block in one launch: ``cuda/mlp_block.cu``, for SM 9.0.

The hidden layer stays in registers and shared memory. With many rows, warpgroups walk over tiles of
64 and share the weights that stream past; with few, a cluster of blocks shares a tile, a part of the
hidden layer each. Weights are packed once, for every number of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.precision import Precision

Array = Any

_MORE_THAN_HALF = 116 * 1024  # no two blocks on one multiprocessor: started early, they would leave others empty


class Packed(NamedTuple):
    """The weights of one block's MLP and norm as the kernel reads them; arrays of NumPy, or of CuPy once uploaded.

    Attributes
    ----------
    weights : [2 * hidden * C], the precision's storage
        W1 [hidden, C], then W2 [C, hidden], in pieces of 8 x 8 that follow each other along C, then along hidden.
    vectors : [hidden + C] or [hidden + 3 * C] float32
        b1, b2 and, where the norm comes last, its weight and bias.
    """

    weights: Array
    vectors: Array


class Plan(NamedTuple):
    """How the rows are cut.

    Attributes
    ----------
    split : int
        0: warpgroups walk over tiles of 64 rows. Else blocks of a cluster that share a tile.
    rows : int
        Rows of a cluster's tile.
    groups : int
        Warpgroups a block.
    chunk, pairs : int
        Columns of the hidden layer at a time, and how many such chunks fit shared memory (split 0).
    a_shared : bool
        The rows are in shared memory, not in registers (split 0).
    """

    split: int
    rows: int
    groups: int
    chunk: int = 64
    pairs: int = 0
    a_shared: bool = False

    def shared(self, C: int, hidden: int, post_norm: bool) -> int:
        """Bytes of shared memory, as laid out in ``cuda/mlp_block.cu``."""
        vectors = (3 if post_norm else 1) * C * 4
        if not self.split:
            ahead = self.pairs * self.chunk == hidden and not self.a_shared
            tiles = self.groups * 64 * C * 2 if ahead or self.a_shared else 0
            barriers = 8 * (2 * self.pairs + self.groups)
            return self.pairs * self.chunk * C * 4 + tiles + hidden * 8 + vectors + barriers
        part, chunks = hidden // self.split, -(-hidden // (64 * self.split))
        operands = 2 * part * C * 2 + self.rows * C * 2 + max(self.rows * part * 2, 1024)
        bytes = operands + max(chunks * 64, 16 * self.groups) * 4 + vectors + 8 * (2 * chunks + 1)
        return max(bytes, _MORE_THAN_HALF)


_WALKS = {
    96: Plan(0, 64, 3, pairs=6),
    128: Plan(0, 64, 3, pairs=5),
    192: Plan(0, 64, 3, pairs=3, a_shared=True),
    256: Plan(0, 64, 2, pairs=3),
}
_LEAST = {192: 6000, 256: 9000}  # rows for which walking beats a kernel for each step


def takes(C: int, hidden: int, precision: Precision, M: int | None = None) -> bool:
    """Whether the kernel is for this GPU, precision and size, and with M rows worth its launch.

    Parameters
    ----------
    C, hidden : int
    precision : Precision
    M : int, optional
    """
    if precision.storage.itemsize != 2 or hidden % 64 or hidden <= 0 or jit.compute_capability() != 90:
        return False
    if C not in _WALKS or walk(C, hidden).shared(C, hidden, True) > jit.HOPPER_SHARED:
        return False
    return M is None or _LEAST.get(C, 0) <= M or choose(M, C, hidden, 132).split > 0


def pack(
    norm_weight: np.ndarray,
    norm_bias: np.ndarray,
    fc1_weight: np.ndarray,
    fc1_bias: np.ndarray,
    fc2_weight: np.ndarray,
    fc2_bias: np.ndarray,
    *,
    precision: Precision,
    post_norm: bool,
) -> Packed:
    """The weights as the kernel reads them.

    V1's norm is folded into W1 and b1: ``W1 (n gamma + beta) + b1 = (W1 gamma) n + (W1 beta + b1)``.
    W1 and b1 are halved, which the kernel's GELU makes up for.

    Parameters
    ----------
    norm_weight, norm_bias : [C] float32
    fc1_weight, fc1_bias : [hidden, C], [hidden] float32
    fc2_weight, fc2_bias : [C, hidden], [C] float32
    precision : Precision
        "fp16" or "bf16".
    post_norm : bool
        V2: the norm comes last.

    Returns
    -------
    Packed
        Of NumPy arrays; the kernel takes one of CuPy arrays, ``Packed(*map(cupy.asarray, packed))``.
    """
    hidden, C = fc1_weight.shape
    w1, b1 = fc1_weight.astype(np.float32), fc1_bias.astype(np.float32)
    if not post_norm:
        b1 = b1 + w1 @ norm_bias.astype(np.float32)
        w1 = w1 * norm_weight.astype(np.float32)
    order = _order(C)
    w1 = (0.5 * w1[:, order]).reshape(hidden // 8, 8, C // 8, 8).transpose(0, 2, 1, 3)
    w2 = fc2_weight.astype(np.float32)[order].reshape(C, hidden // 8, 8).transpose(1, 0, 2)
    weights = precisions.encode(np.concatenate([w1.reshape(-1), w2.reshape(-1)]), precision)
    last = [norm_weight, norm_bias] if post_norm else []
    return Packed(weights, np.concatenate([0.5 * b1, fc2_bias, *last]).astype(np.float32))


@functools.cache
def _order(C: int) -> np.ndarray:
    """The channel at each place: place 16 s + 8 h + 2 q + e of 32 has channel 8 q + 4 s + 2 h + e."""
    place = np.arange(C)
    s, h, q, e = place // 16 % 2, place // 8 % 2, place // 2 % 4, place % 2
    return place // 32 * 32 + 8 * q + 4 * s + 2 * h + e


def mlp_block(
    x: Array, packed: Packed, *, eps: float, precision: Precision, out: Array | None = None,
    moments: Array | None = None, plan: Plan | None = None,
) -> Array:  # fmt: skip
    """V1: ``x + W2 gelu(W1 LN(x) + b1) + b2``; V2: ``x + LN(W2 gelu(W1 x + b1) + b2)``.

    Sums and norms are float32; the hidden layer is rounded to storage, and the exact GELU is computed
    to within that rounding. The same rows give the same bits for the same number of rows.

    Parameters
    ----------
    x : [..., C], C-contiguous, the precision's storage, aligned to 16 bytes
    packed : Packed
        Of CuPy arrays, from `pack`; it knows which version it is for.
    eps : float
        Of the norm.
    precision : Precision
    out : like x, optional
        Where the result is written. It must not overlap ``x``.
    moments : [M, 1, 2] float32, optional
        Where those of V1's rows are written, see `swincupy.ops.wgmma.Norm`.
    plan : Plan, optional
        For tests and measurements; what is right for the number of rows where None.

    Returns
    -------
    [..., C]

    Raises
    ------
    InputError
        Weights that do not belong to x, or a size that the kernel does not take.
    """
    import cupy

    C = x.shape[-1]
    hidden = packed.weights.size // (2 * C)
    post_norm = packed.vectors.size == hidden + 3 * C
    if packed.weights.size != 2 * C * hidden or packed.vectors.size != hidden + (3 if post_norm else 1) * C:
        raise InputError(
            f"mlp_block: weights must be packed for the {C} channels of x, got {packed.weights.size} weights and "
            f"{packed.vectors.size} others"
        )
    out = cupy.empty(x.shape, precision.storage) if out is None else out
    M = x.size // C
    if not M:
        return out
    sms = jit.multiprocessors(x.data.device_id)
    plan = plan or choose(M, C, hidden, sms)
    kernel = jit.kernel(
        "mlp_block", arch=jit.HOPPER, **constants(C, hidden, precision, post_norm, plan, moments is not None)
    )
    jit.allow_clusters(kernel, plan.split)
    blocks = -(-M // plan.rows)
    blocks = blocks * plan.split if plan.split else min(blocks, sms)
    shared = plan.shared(C, hidden, post_norm)
    kernel(blocks, plan.groups * 128, x, packed.weights, packed.vectors, out, moments, M, eps, shared=shared)
    return out


@functools.lru_cache(maxsize=1024)
def choose(M: int, C: int, hidden: int, multiprocessors: int) -> Plan:
    """The plan that should take M rows the least time.

    Raises
    ------
    InputError
        No plan takes this size.
    """
    share, time = _share(M, C, hidden, multiprocessors)
    plan = walk(C, hidden)
    rounds = -(-M // (64 * multiprocessors * plan.groups))
    return plan if share is None or 2.5 + 70e-6 * C * hidden * rounds < time else share


def walk(C: int, hidden: int) -> Plan:
    """The plan for many rows.

    Raises
    ------
    InputError
        There is none for this C.
    """
    if C not in _WALKS:
        raise InputError(f"mlp_block: x must have {', '.join(map(str, _WALKS))} channels for so many rows, got {C}")
    plan = _WALKS[C]
    return plan._replace(pairs=min(plan.pairs, hidden // plan.chunk))


def _share(M: int, C: int, hidden: int, multiprocessors: int) -> tuple[Plan | None, float]:
    """The clusters that should take the least time, and a rough idea of that: microseconds on an H100."""
    best, least = None, float("inf")
    for split in (1, 2, 4, 8):
        # clusters lie within groups of up to 18 multiprocessors, some of which are not there
        at_once = multiprocessors * (1 if split <= 2 else 0.91 if split <= 4 else 0.85)
        for rows in (16, 24, 32, 48, 64):
            plan = Plan(split, rows, 4)
            shared = plan.shared(C, hidden, True)
            if hidden % (16 * split) or rows % (2 * split) or rows > hidden // split or shared > jit.HOPPER_SHARED:
                continue
            weights, exchanged = 4 * C * hidden / split, 4 * C * rows * (split - 1) / split
            time = 2.7 + 8e-6 * weights + 50e-6 * exchanged + 0.03 * rows
            time *= math.ceil(-(-M // rows) * split / at_once)
            if time < least:
                best, least = plan, time
    return best, least


def constants(
    C: int, hidden: int, precision: Precision, post_norm: bool, plan: Plan, moments: bool = False
) -> dict[str, jit.Constant]:
    """The kernel's compile-time constants."""
    return {
        "scalar_t": precision.ctype, "C": C, "HIDDEN": hidden, "POST_NORM": post_norm, "SPLIT": plan.split,
        "ROWS": plan.rows, "GROUPS": plan.groups, "CH": plan.chunk, "PAIRS": plan.pairs, "A_SHARED": plan.a_shared,
        "MOMENTS": moments,
    }  # fmt: skip


def variants() -> Iterator[jit.Variant]:
    """The kernels of published models, for checks that they compile."""
    sizes = (
        (96, 4, 100352), (128, 4, 100352), (192, 4, 25088), (256, 4, 25088), (96, 8, 100352), (192, 2, 25088),
        (96, 4, 3136), (128, 4, 3136), (192, 4, 784), (256, 4, 784), (96, 2, 1),
    )  # fmt: skip
    for precision in (precisions.of(name) for name in ("fp16", "bf16")):
        for post_norm in (False, True):
            for C, ratio, M in sizes:
                plan = choose(M, C, ratio * C, 132)
                fixed = constants(C, ratio * C, precision, post_norm, plan, not post_norm and precision.name == "bf16")
                yield jit.Variant("mlp_block", fixed, 90, jit.HOPPER)
