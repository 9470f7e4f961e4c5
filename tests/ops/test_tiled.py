"""The tiled operations give what the reference gives, from any number of threads, and leave no trace."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from swincupy.errors import InputError
from swincupy.ops import reference, tiled

Array = np.ndarray
THREADS = 4


def blas_threads() -> list[int]:
    return [lib.num_threads for lib in ThreadpoolController().select(user_api="blas").lib_controllers]


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine of four cores, and as it was afterwards; even little work is tiled."""
    monkeypatch.setattr(tiled, "WHOLE_ROWS", 0)
    with threadpool_limits(THREADS, user_api="blas"):
        before = blas_threads()
        yield
        assert blas_threads() == before


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def near(got: Array, want: Array) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())))


def attention(C: int, heads: int, window: tuple[int, int], shift: tuple[int, int], size: Any) -> dict[str, Any]:
    N = math.prod(window)
    H, W = (s + -s % m for s, m in zip(size, window, strict=True))
    return dict(
        norm_weight=rand(C), norm_bias=rand(C, seed=1), qkv_weight=rand(3 * C, C) / math.sqrt(C), qkv_bias=rand(3 * C),
        proj_weight=rand(C, C) / math.sqrt(C), proj_bias=rand(C, seed=2), position_bias=rand(heads, N, N),
        mask=reference.shift_mask(H, W, window, shift) if any(shift) else None,
        num_heads=heads, window=window, shift=shift,
    )  # fmt: skip


def mlp(C: int) -> tuple[Array, ...]:
    return (
        rand(C),
        rand(C, seed=1),
        rand(4 * C, C) / math.sqrt(C),
        rand(4 * C),
        rand(C, 4 * C) / math.sqrt(4 * C),
        rand(C),
    )


SHAPES = [  # batch, size, window, shift
    (1, (28, 28), (7, 7), (3, 3)),
    (2, (13, 30), (7, 7), (3, 3)),
    (3, (9, 5), (4, 4), (2, 2)),
    (5, (16, 12), (4, 6), (0, 3)),
    (9, (7, 7), (7, 7), (0, 0)),
    (7, (3, 2), (4, 4), (2, 2)),
    (1, (1, 1), (1, 1), (0, 0)),
    (4, (1, 90), (1, 5), (0, 2)),
]


@pytest.mark.parametrize("tile_rows", [tiled.TILE_ROWS, 30])  # 30: most windows have more rows than a tile
@pytest.mark.parametrize("pad_mode", ["pad_roll", "roll_pad"])
@pytest.mark.parametrize(("batch", "size", "window", "shift"), SHAPES)
def test_attention_blocks(
    batch: int, size: Any, window: Any, shift: Any, pad_mode: Any, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "TILE_ROWS", tile_rows)
    a = attention(12, 3, window, shift, size) | {"pad_mode": pad_mode, "eps": 1e-3}
    x = rand(batch, *size, 12)
    near(tiled.attention_block(x, **a), reference.attention_block(x, **a))
    a["logit_scale"] = 5 + rand(3) ** 2
    near(tiled.cosine_attention_block(x, **a), reference.cosine_attention_block(x, **a))


def test_attention_block_has_the_defaults_of_the_reference() -> None:
    a = attention(8, 2, (4, 4), (0, 0), (8, 8))
    del a["shift"]
    near(tiled.attention_block(rand(2, 8, 8, 8), **a), reference.attention_block(rand(2, 8, 8, 8), **a))


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 56, 56), (9, 5, 7), (3, 20, 20), (8, 14, 14)])
def test_mlp_block(shape: tuple[int, ...], post_norm: bool) -> None:
    x, w = rand(*shape, 12), mlp(12)
    near(tiled.mlp_block(x, *w, post_norm=post_norm), reference.mlp_block(x, *w, post_norm=post_norm))


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 5), (5, 56, 55), (9, 41, 20)])
def test_patch_merge(shape: tuple[int, ...], post_norm: bool) -> None:
    x, width = rand(*shape, 6), 12 if post_norm else 24
    w = rand(width), rand(width, seed=1), rand(12, 24)
    near(tiled.patch_merge(x, *w, post_norm=post_norm), reference.patch_merge(x, *w, post_norm=post_norm))


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_patch_embed(batch: int) -> None:
    x, w = rand(batch, 3, 33, 18), (rand(6, 3, 4, 4), rand(6), rand(6, seed=1), rand(6, seed=2))
    position = rand(1, 9, 5, 6)
    near(tiled.patch_embed(x, *w, position), reference.patch_embed(x, *w, position))
    near(tiled.patch_embed(x, *w, patch_pad="crop"), reference.patch_embed(x, *w, patch_pad="crop"))


def test_strided_inputs() -> None:
    """Whatever the order of the axes in memory, the result is filled."""
    a, w = attention(12, 3, (4, 4), (2, 2), (9, 10)), mlp(12)
    for x in (
        np.asfortranarray(rand(3, 9, 10, 12)),
        rand(3, 12, 9, 10).transpose(0, 2, 3, 1),
        rand(3, 9, 20, 12)[:, :, ::2],
    ):
        near(tiled.attention_block(x, **a), reference.attention_block(x, **a))
        near(tiled.mlp_block(x, *w), reference.mlp_block(x, *w))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads(threads: int) -> None:
    a, w, x = attention(12, 3, (7, 7), (3, 3), (28, 30)), mlp(12), rand(2, 28, 30, 12)
    with threadpool_limits(threads, user_api="blas"):
        near(tiled.attention_block(x, **a), reference.attention_block(x, **a))
        near(tiled.mlp_block(x, *w), reference.mlp_block(x, *w))
        assert blas_threads() == [threads] * len(blas_threads())


@pytest.mark.parametrize(("rows", "whole"), [(4 * 499, True), (4 * 500, False)])
def test_little_work_is_left_whole(rows: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "WHOLE_ROWS", 500)
    tiles: list[tuple[int, int]] = []
    tiled._for_tiles(lambda lo, hi: tiles.append((lo, hi)), rows, 1)
    assert (tiles == [(0, rows)]) is whole
    assert sum(hi - lo for lo, hi in tiles) == rows


def test_equal_calls_give_equal_bits() -> None:
    a, w, x = attention(12, 3, (7, 7), (3, 3), (28, 30)), mlp(12), rand(3, 28, 30, 12)
    first = tiled.mlp_block(tiled.attention_block(x, **a), *w)
    for _ in range(5):
        assert np.array_equal(tiled.mlp_block(tiled.attention_block(x, **a), *w), first)


@pytest.mark.parametrize("caller", ["main thread", "another thread"])
def test_each_tile_runs_with_single_threaded_products(caller: str) -> None:
    seen: list[list[int]] = []
    work = [lambda: seen.append(blas_threads())] * 8
    if caller == "main thread":
        tiled._run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(tiled._run, work).result(timeout=60)
    assert len(seen) == 8 and all(set(counts) == {1} for counts in seen)


def test_threads_that_overlap_leave_the_counts_as_they_were() -> None:
    """The last to finish is not the one that set them."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with tiled._blas().single_threaded():
            first_in.set()
            assert second_in.wait(20)
        first_out.set()

    def second() -> None:
        assert first_in.wait(20)
        with tiled._blas().single_threaded():
            second_in.set()
            assert first_out.wait(20)
            assert set(blas_threads()) == {1} and tiled._blas().threads() == THREADS

    with ThreadPoolExecutor(2) as pool:
        for job in (pool.submit(first), pool.submit(second)):
            job.result(timeout=60)
    assert set(blas_threads()) == {THREADS}
    with threadpool_limits(2, user_api="blas"):  # and the caller can still set them
        assert set(blas_threads()) == {2}


def test_calls_from_four_threads() -> None:
    """Each its own size; results as alone, and the BLAS threads as before (the fixture looks)."""
    jobs = []
    for i, size in enumerate(((28, 28), (14, 30), (21, 9), (56, 40))):
        a, x = attention(12, 3, (7, 7), (3, 3), size), rand(2, *size, 12, seed=i)
        jobs.append((x, a, tiled.mlp_block(tiled.attention_block(x, **a), *mlp(12))))
    together = threading.Barrier(len(jobs))

    def work(x: Array, a: dict[str, Any], want: Array) -> None:
        together.wait()
        for _ in range(10):
            near(tiled.mlp_block(tiled.attention_block(x, **a), *mlp(12)), want)

    with ThreadPoolExecutor(len(jobs)) as pool:
        for job in [pool.submit(work, *job) for job in jobs]:
            job.result(timeout=60)


def test_concurrent_first_calls_make_one_table_of_thread_counts() -> None:
    tiled._only_blas.cache_clear()
    together = threading.Barrier(8)

    def first() -> Any:
        together.wait()
        return tiled._blas()

    with ThreadPoolExecutor(8) as pool:
        found = [job.result() for job in [pool.submit(first) for _ in range(8)]]
    assert all(one is found[0] for one in found)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("failing", range(8))
def test_an_error_in_a_tile_comes_out_and_nothing_runs_on(failing: int) -> None:
    running, ran = [0], []

    def piece(i: int) -> None:
        running[0] += 1
        try:
            if i == failing:
                raise KeyError(i)
            time.sleep(0.005)
            ran.append(i)
        finally:
            running[0] -= 1

    with pytest.raises(KeyError):
        tiled._run([lambda i=i: piece(i) for i in range(40)])
    assert running == [0] and blas_threads() == [THREADS] * len(blas_threads())
    assert len(ran) < 39  # the rest was dropped
    near(tiled.mlp_block(rand(3, 20, 20, 12), *mlp(12)), reference.mlp_block(rand(3, 20, 20, 12), *mlp(12)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_waits_for_the_other_tiles(error: type[BaseException]) -> None:
    main, started, ended = threading.get_ident(), threading.Event(), threading.Event()

    def piece() -> None:
        if threading.get_ident() == main:
            started.wait(5)
            raise error
        started.set()
        time.sleep(0.05)
        ended.set()

    with pytest.raises(error):
        tiled._run([piece] * 4)
    assert ended.is_set()


def test_wrong_shapes_are_refused_as_by_the_reference() -> None:
    with pytest.raises(InputError, match=r"layer_norm: weight must be .* got shape \(12,\)"):
        tiled.mlp_block(rand(3, 20, 20, 8), *mlp(12))
    with pytest.raises(InputError, match=r"qkv_weight must be \[24, 8\], got shape \(36, 12\)"):
        a = attention(12, 3, (7, 7), (3, 3), (28, 28)) | {"norm_weight": rand(8), "norm_bias": rand(8)}
        tiled.attention_block(rand(2, 28, 28, 8), **a)


# ---------------------------------------------------------------- processes

FORK = """
import os, signal, sys, threading, time
import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits
from swincupy.ops import tiled

blas = lambda: [lib.num_threads for lib in ThreadpoolController().select(user_api="blas").lib_controllers]
threadpool_limits(4, user_api="blas")
rng = np.random.default_rng(0)
w = [rng.normal(size=s).astype(np.float32) for s in ((16,), (16,), (64, 16), (64,), (16, 64), (16,))]
x = rng.normal(size=(4, 30, 30, 16)).astype(np.float32)
want = tiled.mlp_block(x, *w)
before = blas()

busy = sys.argv[1] == "busy"
if busy:  # fork while another thread has tiles at work and the BLAS libraries at one thread
    at_work, done = threading.Event(), threading.Event()
    threading.Thread(target=lambda: tiled._run([lambda: (at_work.set(), done.wait(20))] * 4)).start()
    at_work.wait()
child = os.fork()
if not child:
    signal.alarm(20)  # a hang ends as a signal
    good = blas() == before and np.allclose(tiled.mlp_block(x, *w), want, atol=1e-5) and blas() == before
    os._exit(0 if good else 3)
status = os.waitpid(child, 0)[1]
if busy:
    done.set()
assert np.allclose(tiled.mlp_block(x, *w), want, atol=1e-5)  # the parent's threads are still there
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
@pytest.mark.parametrize("when", ["idle", "busy"])
def test_works_in_a_forked_process(when: str) -> None:
    """The threads of the parent are not in the child: work handed to them would wait for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, when], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
