"""The reference operations on the CPU's cores: the same compositions, tile by tile.

A tile of rows or windows stays in a core's cache through a whole half block, and the cores take
tiles in turn, each with single-threaded matrix products. Work that makes too few tiles is left
whole and to the BLAS library's own threads. How many cores are used is what that library is set
to (OMP_NUM_THREADS, threadpoolctl).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from swincupy.ops import reference
from swincupy.ops.reference import global_pool, layer_norm, linear

__all__ = [
    "attention_block", "cosine_attention_block", "global_pool", "layer_norm", "linear",
    "mlp_block", "patch_embed", "patch_merge",
]  # fmt: skip

Array = Any
WHOLE_ROWS = 500  # tokens a core below which the weights, read by every core, cost more than tiles save
TILE_ROWS = 400  # tokens a tile: a few hundred rows feed a matrix product well and fit a 1 MB cache


def patch_embed(x: Array, *args: Any, **kwargs: Any) -> Array:
    """`reference.patch_embed`, image by image."""
    return _concatenate(
        [functools.partial(reference.patch_embed, x[b : b + 1], *args, **kwargs) for b in range(len(x))]
    )


def patch_merge(x: Array, *args: Any, **kwargs: Any) -> Array:
    """`reference.patch_merge`, image by image."""
    if len(x) * x.shape[1] * x.shape[2] < 4 * TILE_ROWS * _blas().threads():
        return reference.patch_merge(x, *args, **kwargs)
    return _concatenate(
        [functools.partial(reference.patch_merge, x[b : b + 1], *args, **kwargs) for b in range(len(x))]
    )


def mlp_block(x: Array, *args: Any, **kwargs: Any) -> Array:
    """`reference.mlp_block`, in tiles of rows."""
    rows = x.reshape(-1, x.shape[-1])
    flat = np.empty_like(rows, order="C")

    def tile(lo: int, hi: int) -> None:
        flat[lo:hi] = reference.mlp_block(rows[lo:hi], *args, **kwargs)

    _for_tiles(tile, len(rows), 1)
    return flat.reshape(x.shape)


def attention_block(
    x: Array, norm_weight: Array, norm_bias: Array, *weights: Array, eps: float = 1e-5, **kwargs: Any
) -> Array:
    """`reference.attention_block`, in tiles of windows."""
    norm = functools.partial(reference.layer_norm, weight=norm_weight, bias=norm_bias, eps=eps)
    return _windowed(x, norm, reference.window_attention, lambda y: y, *weights, **kwargs)


def cosine_attention_block(
    x: Array, norm_weight: Array, norm_bias: Array, *weights: Array, eps: float = 1e-5, **kwargs: Any
) -> Array:
    """`reference.cosine_attention_block`, in tiles of windows."""
    norm = functools.partial(reference.layer_norm, weight=norm_weight, bias=norm_bias, eps=eps)
    return _windowed(x, lambda y: y, reference.cosine_window_attention, norm, *weights, **kwargs)


def _windowed(
    x: Array,
    before: Callable[[Array], Array],
    attention: Callable[..., Array],
    after: Callable[[Array], Array],
    *weights: Array,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    pad_mode: reference.PadMode = "pad_roll",
    mask: Array | None = None,
    **kwargs: Any,
) -> Array:
    """``x + after(attention(before(x)))`` over shifted windows."""
    B, H, W, C = x.shape
    mask = reference.mask_of(x, mask, window, shift)
    nW, N = -(-H // window[0]) * -(-W // window[1]), window[0] * window[1]
    windows, out = np.empty((B * nW, N, C), x.dtype), np.empty_like(x)

    def gather(b: int) -> None:
        windows[b * nW : (b + 1) * nW] = reference.shifted_windows(before(x[b : b + 1]), window, shift, pad_mode)

    def attend(lo: int, hi: int) -> None:
        part = mask
        if mask is not None and hi - lo < nW:
            part = mask[lo % nW : lo % nW + hi - lo]
        windows[lo:hi] = attention(windows[lo:hi], *weights, mask=part, **kwargs)

    def scatter(b: int) -> None:
        y = reference.unshifted_windows(windows[b * nW : (b + 1) * nW], window, shift, H, W, pad_mode)
        np.add(x[b : b + 1], after(y), out=out[b : b + 1])

    _for_each(gather, B)
    _for_tiles(attend, B * nW, N, group=nW)
    _for_each(scatter, B)
    return out


def _for_tiles(work: Callable[[int, int], None], count: int, rows: int, group: int = 1) -> None:
    """``work(lo, hi)`` over ranges of ``count`` units of ``rows`` rows: ranges within a group, or of whole groups."""
    threads = _blas().threads()
    if count * rows < WHOLE_ROWS * threads:
        work(0, count)
        return
    size = min(max(1, TILE_ROWS // rows), -(-count // threads))
    if size >= group:
        size -= size % group
        tiles = [(lo, min(lo + size, count)) for lo in range(0, count, size)]
    else:
        tiles = [
            (start + lo, start + min(lo + size, group))
            for start in range(0, count, group)
            for lo in range(0, group, size)
        ]
    if len(tiles) < threads:
        work(0, count)
    else:
        _run([functools.partial(work, *tile) for tile in tiles])


def _for_each(work: Callable[[int], None], count: int) -> None:
    _run([functools.partial(work, i) for i in range(count)])


def _concatenate(work: list[Callable[[], Array]]) -> Array:
    parts: list[Array] = [None] * len(work)

    def part(i: int) -> None:
        parts[i] = work[i]()

    _for_each(part, len(work))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _run(work: list[Callable[[], None]]) -> None:
    """Run independent pieces of work on all cores, with single-threaded matrix products."""
    threads = min(_blas().threads(), len(work))
    if threads <= 1:
        for piece in work:
            piece()
        return
    todo, lock = list(reversed(work)), threading.Lock()

    def worker() -> None:
        try:
            while True:
                with lock:
                    if not todo:
                        return
                    piece = todo.pop()
                piece()
        except BaseException:
            with lock:
                todo.clear()  # the others need not finish what nobody will get
            raise

    with _blas().single_threaded():
        others = [_pool(threads - 1).submit(worker) for _ in range(threads - 1)]
        try:
            worker()
        finally:
            wait(others)  # before the thread counts go back, and before anyone reuses the arrays
        for other in others:
            other.result()


class _Blas:
    """The thread counts of the loaded BLAS libraries, which are one setting for the whole process.

    While any tiled work runs they are 1; `threads` is what they are set to otherwise.
    """

    def __init__(self) -> None:
        from threadpoolctl import ThreadpoolController

        self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        self._lock = threading.Lock()
        self._users = 0
        self._saved: list[int] = []

    def threads(self) -> int:
        with self._lock:
            counts = self._saved if self._users else [lib.num_threads for lib in self._libraries]
        return max(counts, default=os.cpu_count() or 1)

    @contextlib.contextmanager
    def single_threaded(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._saved = [lib.num_threads for lib in self._libraries]
                self._set([1] * len(self._saved))
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._set(self._saved)

    def _set(self, counts: list[int]) -> None:
        for lib, count in zip(self._libraries, counts, strict=True):
            # newer threadpoolctl obeys one thread only, the first to set a count; here that is any thread in turn
            release = getattr(lib, "clear_controlling_thread", lambda force: None)
            release(force=True)
            lib.set_num_threads(count)
            release(force=True)

    def after_fork(self) -> None:
        """In the child, where the threads that were at work are gone and cannot clean up."""
        if self._users:
            self._set(self._saved)
        self._users, self._lock = 0, threading.Lock()


@functools.cache
def _only_blas() -> _Blas:
    return _Blas()


def _blas() -> _Blas:
    with _creation:  # the cache by itself may make two at the same time
        return _only_blas()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="swincupy")


def _after_fork() -> None:
    """A child process has none of its parent's threads, and perhaps locks that nobody will release."""
    global _creation
    _creation = threading.Lock()
    _pool.cache_clear()
    if _only_blas.cache_info().currsize:
        _only_blas().after_fork()


_creation = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
