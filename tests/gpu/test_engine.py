"""Graphs: bitwise what single operations give, from any thread and stream, in memory of their own that is bounded."""

from __future__ import annotations

import gc
import os
import random
import threading
from typing import Any

import numpy as np
import pytest

from swincupy import forward, tune
from swincupy.errors import OutOfMemoryError
from swincupy.ops import gemm
from tests.gpu.models import images, make, small

cupy = pytest.importorskip("cupy", reason="needs CuPy")

NAMES = ["fp32", "tf32", "fp16", "bf16"]
SOAK = int(os.environ.get("SWINCUPY_SOAK", "500"))  # calls of the soak test
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """What someone once tuned here decides nothing."""
    monkeypatch.setenv("SWINCUPY_CACHE_DIR", str(tmp_path))
    tune._entries.cache_clear()


def used() -> int:
    """Bytes of the device's memory in use, CuPy's own store given back first."""
    gc.collect()
    cupy.cuda.Device().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()
    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


# ------------------------------------------------------------------ what replays give


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_graphs_are_bitwise_what_eager_is(name: str, version: int) -> None:
    config = small(version)
    graphs, eager = make(config, precision=name), make(config, precision=name, graphs=False)
    for shape in [(1, 3, 56, 56), (3, 3, 56, 56), (2, 3, 61, 94), (1, 3, 56, 56)]:
        x = cupy.asarray(images(*shape))
        for _ in range(3):
            assert cupy.array_equal(graphs(x), eager(x))
        for got, want in zip(graphs.features(x, norm=True), eager.features(x, norm=True), strict=True):
            assert cupy.array_equal(got, want)
        assert cupy.array_equal(graphs.embed(x), eager.embed(x))


def test_a_batch_is_rounded_up() -> None:
    """Batches of one bucket share a graph; the rows that fill it up change nothing."""
    model = make(small())
    x = images(18, 3, 56, 56)
    want = model(x)
    assert model(np.full_like(x, np.nan)).shape == (18, 10)  # what lies in the buffer afterwards is NaN
    np.testing.assert_array_equal(model(x[:17]), want[:17])
    assert [key[2][0] for key in model._engine._replays] == [18]


def test_single_images_do_not_depend_on_their_batch_much() -> None:
    model, x = make(small()), images(5, 3, 56, 56)
    np.testing.assert_allclose(model(x)[2:3], model(x[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ask", ["call", "features", "embed"])
def test_outputs_are_the_callers(ask: str) -> None:
    model = make(small(), precision="fp16")
    call = {"call": model, "features": model.features, "embed": model.embed}[ask]
    x, other = (cupy.asarray(images(2, 3, 56, 56)) for _ in range(2))
    kept = call(x)
    kept = kept if isinstance(kept, list) else [kept]
    before = [y.copy() for y in kept]
    for _ in range(3):
        call(other)
    assert all(cupy.array_equal(y, was) for y, was in zip(kept, before, strict=True))


def test_inputs_are_not_written_to() -> None:
    x = cupy.asarray(images(2, 3, 56, 56))
    before = x.copy()
    make(small())(x)
    assert cupy.array_equal(x, before)


def test_inputs_may_be_overwritten_at_once() -> None:
    """The host array when the call returns, the device array by work queued after it."""
    model, x = make(small()), images(4, 3, 56, 56)
    want = model(x)
    on_gpu, pinned = cupy.asarray(x), x.copy()
    got = model(on_gpu)
    on_gpu.fill(0)
    assert np.array_equal(got.get(), want)
    got = model(pinned)
    pinned.fill(0)
    assert np.array_equal(got, want)


def test_strided_inputs() -> None:
    model, x = make(small()), images(4, 3, 60, 112)
    want = model(np.ascontiguousarray(x[::-2, :, 2:58, ::2]))
    for kind in (np.asarray, cupy.asarray):
        y = model(kind(x)[::-2, :, 2:58, ::2])
        assert isinstance(y, type(kind(x))) and np.array_equal(cupy.asnumpy(y), want)
    y = model(cupy.asarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)[::-2, :, 2:58, ::2])
    assert np.array_equal(y.get(), want)
    assert np.array_equal(model(cupy.asarray(x, np.float64)[::-2, :, 2:58, ::2]).get(), want)


# ------------------------------------------------------------------ streams, threads, models, devices


def test_user_streams() -> None:
    """Inputs made, and results used, on streams that wait for nobody else."""
    model, x = make(small(), precision="fp16"), images(8, 3, 56, 56)
    want = model(x)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    sums = []
    for i in range(30):
        with streams[i % 3]:
            late = cupy.zeros((1 << 22,), np.float32)
            for _ in range(5):
                late += 1  # keeps the stream busy before the input is there
            y = model(cupy.asarray(x) + late[0] * 0)
            sums.append(y * 1)
    cupy.cuda.Device().synchronize()
    assert all(np.array_equal(y.get(), want) for y in sums)


def test_weights_are_there_for_any_stream() -> None:
    config, x = small(embed_dim=192, num_heads=(6, 12)), images(2, 3, 56, 56)
    want = make(config, graphs=False)(x)
    for graphs in (True, False):
        model = make(config, graphs=graphs)
        with cupy.cuda.Stream(non_blocking=True):
            assert np.array_equal(model(x), want)


def test_several_models() -> None:
    """Their graphs do not share memory."""
    configs = [small(), small(2), small(num_classes=7)]
    models = [make(c, precision="fp16") for c in configs]
    x = cupy.asarray(images(3, 3, 56, 56))
    want = [m(x).get() for m in models]
    for _ in range(20):
        i = random.randrange(3)
        assert np.array_equal(models[i](x).get(), want[i])


def test_threads_capture_together() -> None:
    """Shapes that are new to all of four threads at once, in two models."""
    models = [make(small(), precision=p) for p in ("fp16", "fp32")]
    shapes = [(1, 3, 56, 56), (2, 3, 56, 56), (2, 3, 40, 77), (3, 3, 64, 64)]
    inputs = [cupy.asarray(images(*s, seed=i)) for i, s in enumerate(shapes)]
    together, wrong = threading.Barrier(4), list[Any]()
    results: dict[tuple[int, int], list[Any]] = {}

    def work(seed: int) -> None:
        order = [(m, i) for m in range(2) for i in range(len(shapes))]
        random.Random(seed).shuffle(order)
        together.wait()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for m, i in order:
                y = models[m](inputs[i])
                stream.synchronize()
                results.setdefault((m, i), []).append(y.get())

    _in_threads(work, wrong)
    assert not wrong
    for (m, i), found in results.items():
        alone = models[m](inputs[i]).get()
        assert all(np.array_equal(y, alone) for y in found)
    assert all(len(model._engine._replays) == len(shapes) for model in models)


def _in_threads(work: Any, wrong: list[Any], count: int = 4) -> None:
    def guarded(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_two_devices(name: str) -> None:
    """The same results on both, wherever the input lies, whichever device and stream are current, in any thread."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    models = [make(small(), precision=name, device=f"cuda:{i}") for i in range(2)]
    x = images(2, 3, 56, 56)
    want = models[0](x)
    assert np.array_equal(models[1](x), want)
    assert cupy.cuda.Device().id == 0
    with cupy.cuda.Device(1):
        there = cupy.asarray(x)
        scattered = cupy.asfortranarray(there)
    for index, model in enumerate(models):
        for given in (cupy.asarray(x), there, scattered):
            y = model(given)
            assert y.device.id == index and np.array_equal(y.get(), want)
        vectors = model.embed(x, normalize=True, batch_size=1)
        assert np.array_equal(vectors, models[0].embed(x, normalize=True, batch_size=1))

    def work(seed: int) -> None:
        with cupy.cuda.Device(seed // 2), cupy.cuda.Stream(non_blocking=True):
            given = cupy.asarray(x)
            for _ in range(20):
                y = models[seed % 2](given)
            assert y.device.id == seed % 2 and np.array_equal(cupy.asnumpy(y), want)

    wrong: list[Any] = []
    _in_threads(work, wrong)
    assert not wrong


# ------------------------------------------------------------------ memory


def test_graphs_keep_what_they_read() -> None:
    """Whatever is forgotten, collected or overwritten elsewhere, a graph's replays stay right."""
    model = make(small(2), precision="fp16")
    x = cupy.asarray(images(3, 3, 64, 64))
    want = model(x).get()
    for side in range(65, 75):  # its plan is no longer among those kept
        model(images(1, 3, side, 64))
    gemm.forget()
    used()
    for _ in range(50):
        cupy.empty(MIB, np.uint8).fill(0xFF)
    assert np.array_equal(model(x).get(), want)


@pytest.mark.alone
def test_replays_allocate_nothing_new() -> None:
    model = make(small(), precision="fp16")
    x = cupy.asarray(images(4, 3, 56, 56))
    model(x)
    pools = [r._pool.total_bytes() for r in model._engine._replays.values()]
    before = used()
    for _ in range(100):
        model(x)
    assert [r._pool.total_bytes() for r in model._engine._replays.values()] == pools
    assert used() <= before


@pytest.mark.alone
def test_least_recently_used_graphs_go() -> None:
    model = make(small(), precision="fp16")
    model._engine._capacity = 3
    for batch in (1, 2, 3):
        model(images(batch, 3, 56, 56))
    full = used()
    for batch in (1, 4, 1, 5, 1, 6):
        model(images(batch, 3, 56, 56))
    assert [key[2][0] for key in model._engine._replays] == [5, 1, 6]
    assert used() <= full + 64 * MIB
    assert model._engine._find((forward.logits, (), (2, 3, 56, 56), None)) is None


@pytest.mark.alone
def test_a_deleted_model_gives_its_memory_back() -> None:
    x = images(32, 3, 224, 224)  # much more than the driver hands out at once
    model = make(small(), precision="fp16")
    model(x), model.features(x)  # modules, handles, what the driver keeps for local memory
    del model
    before = used()
    model = make(small(), precision="fp16")
    model(x), model.features(x)
    assert used() > before + 16 * MIB
    del model
    assert used() <= before + 2 * MIB


@pytest.mark.alone
def test_out_of_memory() -> None:
    """An error that says what was needed and what there is; nothing leaks, and what fits goes on."""
    model, x = make(small(), precision="fp32"), images(2, 3, 56, 56)
    want = model(x)
    make(small(), precision="fp32").embed(images(64, 3, 224, 224))  # modules
    before = used()
    free, _ = cupy.cuda.runtime.memGetInfo()
    filler = cupy.cuda.runtime.malloc(free - 192 * MIB)
    try:
        for ask in (model, model.embed):
            with pytest.raises(
                OutOfMemoryError,
                match=r"x of shape \(64, 3, 224, 224\) must fit into the memory of cuda:0, got: Out of memory "
                r"allocating [\d,]+ bytes .* \d+ of \d+ MiB are free; use a smaller batch",
            ):
                ask(np.zeros((64, 3, 224, 224), np.float32))
            assert np.array_equal(model(x), want)
        with pytest.raises(OutOfMemoryError, match="load: the weights must fit"):
            make(small(embed_dim=768, num_heads=(24, 48), depths=(2, 4)))
        assert np.array_equal(model(x), want)
    finally:
        cupy.cuda.runtime.free(filler)
    assert used() <= before + 2 * MIB
    assert model(images(64, 3, 224, 224)).shape == (64, 10)


@pytest.mark.alone
def test_too_large_a_batch_without_graphs() -> None:
    model = make(small(), graphs=False)
    used()
    free, _ = cupy.cuda.runtime.memGetInfo()
    filler = cupy.cuda.runtime.malloc(free - 192 * MIB)
    try:
        with pytest.raises(OutOfMemoryError, match="use a smaller batch"):
            model(np.zeros((64, 3, 224, 224), np.float32))
        assert model(images(1, 3, 56, 56)).shape == (1, 10)
    finally:
        cupy.cuda.runtime.free(filler)


# ------------------------------------------------------------------ for long


@pytest.mark.alone
@pytest.mark.slow
def test_soak() -> None:
    """Many calls with random batch sizes and shapes over four threads: bitwise what single calls give, memory flat."""
    models = [make(small(), precision="fp16"), make(small(2), precision="bf16")]
    rng = np.random.default_rng(0)
    sizes = [(56, 56), (64, 64), (45, 83)]
    shapes = [(int(b), 3, *sizes[int(s)]) for b, s in zip(rng.integers(1, 33, 12), rng.integers(0, 3, 12), strict=True)]
    inputs = [cupy.asarray(images(*shape, seed=i)) for i, shape in enumerate(shapes)]
    want = [[model(x).get() for x in inputs] for model in models]
    before, wrong = used(), list[Any]()

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        with cupy.cuda.Stream(non_blocking=True):
            for _ in range(SOAK // 4):
                m, i = chosen.randrange(2), chosen.randrange(len(inputs))
                x = inputs[i] if chosen.random() < 0.5 else inputs[i].get()
                if not np.array_equal(cupy.asnumpy(models[m](x)), want[m][i]):
                    wrong.append((m, shapes[i]))

    _in_threads(work, wrong)
    assert not wrong
    assert used() <= before + 4 * MIB
