"""Models on a GPU, on the CPU: the backend, the engine and its graphs, with host memory for the device's."""

from __future__ import annotations

import gc
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

import swincupy
import swincupy.model as model_module
from swincupy import cli, engine, forward, jit
from swincupy.config import SwinConfig
from swincupy.errors import InputError, OutOfMemoryError
from swincupy.ops import fused
from swincupy.parameters import parameter_shapes
from swincupy.preprocess import Preprocess
from tests.host import device, emulator
from tests.parity import recipe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU")

CONFIG = SwinConfig(
    img_size=16, patch_size=2, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4, num_classes=3
)
LIMITS = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 5e-3, "bf16": 4e-2}


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with emulator.installed():
        device.default_pool.free_all_blocks()
        yield
    device.card.total = 1 << 30


def make(config: SwinConfig = CONFIG, precision: str = "fp32", **options: Any) -> swincupy.SwinTransformer:
    params = recipe.state_dict(parameter_shapes(config), seed=1)
    return swincupy.load(params, config=config, device="cuda", precision=precision, **options)


def exact(config: SwinConfig = CONFIG) -> swincupy.SwinTransformer:
    params = recipe.state_dict(parameter_shapes(config), seed=1)
    return swincupy.load(params, config=config, device="cpu", precision="fp64")


def distance(x: Any, want: Any) -> float:
    d = float(np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want))
    return d if d == d else float("inf")


def images(*shape: int, seed: int = 1) -> np.ndarray:
    return recipe.images(shape, seed)


# ------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", LIMITS)
def test_all_outputs(version: int, name: str) -> None:
    config = CONFIG.replace(version=version)
    model, want = make(config, name), exact(config)
    x = images(2, 3, 18, 27)
    assert (model.device, model.precision) == ("cuda:0", name)
    for ask in (
        lambda m: [m(x)],
        lambda m: [m.embed(x, normalize=True)],
        lambda m: m.features(x, norm=True),
        lambda m: m.features(x, out_indices=(1,), layout="NHWC"),
    ):
        for got, expected in zip(ask(model), ask(want), strict=True):
            assert type(got) is np.ndarray and got.dtype == np.float32
            assert distance(got, expected) <= LIMITS[name]


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_graphs_are_bitwise_what_eager_is(name: str) -> None:
    graphs, eager = make(precision=name), make(precision=name, graphs=False)
    for seed, shape in enumerate([(1, 3, 16, 16), (3, 3, 16, 16), (1, 3, 16, 16), (2, 3, 9, 21)]):
        x = images(*shape, seed=seed)
        for _ in range(2):
            np.testing.assert_array_equal(graphs(x), eager(x))


@pytest.mark.parametrize(("version", "name", "window", "size"), [(1, "fp16", 7, (56, 28)), (2, "bf16", 8, (64, 64))])
def test_models_of_whole_blocks(
    version: int, name: str, window: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SM 9.0 half a block is one kernel where windows divide the image, else several launches: the same model."""
    seen = set[tuple[str, int]]()
    original = jit.kernel

    def kernel(kernel_name: str, **constants: Any) -> Any:
        seen.add((kernel_name, constants.get("C", 0)))
        return original(kernel_name, **constants)

    monkeypatch.setattr(jit, "kernel", kernel)
    monkeypatch.setattr(jit, "compute_capability", lambda: 90)
    monkeypatch.setattr(jit, "multiprocessors", lambda device: 132)
    config = SwinConfig(
        version=version, img_size=size, embed_dim=96, depths=(2, 1), num_heads=(3, 6), window_size=window, num_classes=3
    )
    x = images(1, 3, *size)
    assert distance(make(config, name)(x), exact(config)(x)) <= LIMITS[name]
    assert seen >= {("attention_block", 96), ("mlp_block", 96), ("mlp_block", 192)}
    assert (("attention_block", 192) in seen) == (version == 2)  # V1's second stage is 7 x 4 here


@pytest.mark.parametrize("name", ["fp16", "tf32"])
@pytest.mark.parametrize("graphs", [False, True])
def test_norms_are_part_of_products(name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SM 9.0 V1's norms are, except the first of all; tokens of padding, which have no norm, still have none."""
    seen = list[str]()
    original = jit.kernel

    def kernel(kernel_name: str, **constants: Any) -> Any:
        seen.append(kernel_name)
        return original(kernel_name, **constants)

    monkeypatch.setattr(jit, "kernel", kernel)
    monkeypatch.setattr(jit, "compute_capability", lambda: 90)
    config = CONFIG.replace(embed_dim=64)
    model, want = make(config, name, graphs=graphs), exact(config)
    for shape in ((2, 3, 16, 16), (1, 3, 18, 27)):
        x = images(*shape)
        seen.clear()
        assert distance(model(x), want(x)) <= LIMITS[name]
        assert seen.count("layer_norm") == 1 + graphs  # a capture is the second time
        for got, expected in zip(model.features(x, norm=True), want.features(x, norm=True), strict=True):
            assert distance(got, expected) <= LIMITS[name]


# ------------------------------------------------------------------ pictures


def pictures(n: int, size: tuple[int, int] = (20, 30), channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *size, channels), np.uint8)


def test_uint8_images_and_classify() -> None:
    model, want, x = make(), exact(), pictures(3)
    for got, expected in zip(model.classify(x, topk=3), want.classify(x, topk=3), strict=True):
        np.testing.assert_allclose([p.score for p in got], [p.score for p in expected], rtol=1e-4)


#: Relative distance of what comes of the same numbers, rounded once more or once less.
ROUNDING = {"fp32": 2e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}


@pytest.mark.parametrize("name, graphs", [*((name, True) for name in ROUNDING), ("fp32", False)])
def test_pictures_are_what_the_cpu_makes_of_them(name: str, graphs: bool) -> None:
    """Resized and cropped as on the CPU, and normalised here: the logits of the CPU's normalised pixels."""
    for config, preset in ((CONFIG, "timm"), (CONFIG.replace(in_chans=1, img_size=(15, 22), version=2), "hf")):
        model, arrays = make(config, name, preset=preset, graphs=graphs), list(pictures(3, seed=1))
        floats = model.preprocess(arrays)
        for x in (arrays, np.stack(arrays), [Image.fromarray(a) for a in arrays]):
            for got, want in (
                (model(x), model(floats)),
                (model.embed(x, normalize=True, batch_size=2), model.embed(floats, normalize=True, batch_size=2)),
                *zip(model.features(x), model.features(floats), strict=True),
            ):
                assert type(got) is np.ndarray and got.dtype == np.float32
                assert distance(got, want) <= ROUNDING[name]
        assert distance(model(arrays), exact(config)(floats)) <= LIMITS[name]


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What goes from the host into a graph's input."""
    seen: list[np.ndarray] = []
    original = device.DeviceArray.set

    def noted(self: Any, x: np.ndarray, stream: Any = None) -> None:
        seen.append(x)
        original(self, x, stream)

    monkeypatch.setattr(device.DeviceArray, "set", noted)
    return seen


def test_bytes_are_uploaded(uploads: list[np.ndarray]) -> None:
    """A quarter of what floats are; of floats nothing changes."""
    model, x = make(), pictures(4)
    for ask in (model, model.embed, model.classify, model.features):
        ask(x)
        assert (uploads[-1].shape, uploads[-1].dtype) == ((4, 16, 16, 3), np.uint8)
        np.testing.assert_array_equal(uploads[-1], model.preprocess.crops(x))
    model(model.preprocess(x))
    assert (uploads[-1].shape, uploads[-1].dtype) == ((4, 3, 16, 16), np.float32)
    assert len(uploads) == 5


def test_the_command_line_uploads_bytes(uploads: list[np.ndarray], digits: list[Any], tmp_path: Any) -> None:
    common = [*map(str, digits[:3]), "--device", "cuda", "--batch-size", "2"]
    for args in (["classify", *common], ["embed", *common, "-o", str(tmp_path / "v.npy")]):
        assert cli.main(args) == 0
        assert [(x.dtype, x.shape) for x in uploads] == [(np.uint8, (n, 32, 32, 3)) for n in (2, 1)]
        uploads.clear()
    want = swincupy.load("demo", device="cpu").embed(digits[:3])
    assert distance(np.load(tmp_path / "v.npy"), want) <= 1e-5


@pytest.mark.parametrize("graphs", [True, False])
def test_bytes_on_the_device_stay_there(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With resize=False, at any size: no copy to the host and back, results on the device."""
    model = make(graphs=graphs)
    host = model_module.host
    for size in ((16, 16), (9, 21)):
        x = pictures(3, size)
        want = model(model.preprocess.normalise(x))
        given = device.asarray(x)
        assert model._backend.pixels(given) is given
        monkeypatch.setattr(model_module, "host", lambda x: pytest.fail("to the host"))
        results = [model(given, resize=False), *model.features(given, resize=False), model.embed(given, resize=False)]
        assert all(isinstance(y, device.DeviceArray) for y in results)
        assert distance(results[0], want) <= ROUNDING["fp32"]
        monkeypatch.setattr(model_module, "host", host)
        of_host = model(x, resize=False)
        assert type(of_host) is np.ndarray
        np.testing.assert_array_equal(of_host, np.asarray(results[0]))
        assert model.classify(given, resize=False) == model.classify(x, resize=False)
        np.testing.assert_array_equal(np.asarray(model(given[::-1, ::-1, ::-1], resize=False)[0]), np.asarray(
            model(np.ascontiguousarray(x[::-1, ::-1, ::-1]), resize=False)[0]
        ))  # fmt: skip


def test_bytes_on_the_device_that_need_no_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As images they may stay, too, where preprocessing leaves them as they are; what comes back is then NumPy's."""
    model, x = make(preset="hf"), pictures(3, (16, 16))
    want = model([Image.fromarray(a) for a in x])
    monkeypatch.setattr(model_module, "host", lambda x: pytest.fail("to the host"))
    got = model(device.asarray(x))
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, want)


def test_bytes_of_other_libraries_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), pictures(2, (16, 16))
    monkeypatch.setattr(sys.modules["cupy"], "from_dlpack", lambda given: given.x, raising=False)
    foreign = Foreign(x, dlpack=True)
    assert model._backend.pixels(foreign) is foreign.x


def test_graphs_tell_bytes_from_floats() -> None:
    """The same shape may be either; and bytes differ by what they are normalised with."""
    model = make()
    floats, x = images(2, 3, 16, 3), pictures(2, (3, 16))
    wanted = {}
    for mean in (0.5, 0.25):
        model.preprocess = Preprocess((3, 16), "none", mean=(mean,) * 3, std=(0.5, 0.25, 1.0))
        wanted[mean] = make(graphs=False)(model.preprocess.normalise(x))
    before = model(floats)
    for _ in range(2):
        for mean, want in wanted.items():
            model.preprocess = Preprocess((3, 16), "none", mean=(mean,) * 3, std=(0.5, 0.25, 1.0))
            assert distance(model(x), want) <= ROUNDING["fp32"]
        np.testing.assert_array_equal(model(floats), before)
    assert [key[2] for key in model._engine._replays] == 2 * [(2, 3, 16, 3)] + [(2, 3, 16, 3)]
    assert len({key[3] for key in model._engine._replays}) == 3


def test_graphs_of_bytes_are_bitwise_what_eager_is() -> None:
    graphs, eager = make(), make(graphs=False)
    for n in (1, 18, 17, 3):
        x = pictures(n, (16, 16), seed=n)
        np.testing.assert_array_equal(graphs(x, resize=False), eager(x, resize=False))
    assert [key[2][0] for key in graphs._engine._replays] == [1, 18, 3]


def test_what_normalises_bytes_is_in_no_graphs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs share it, and one of them may go. It is there before calls on any stream read it."""
    original, allocators = fused.pixel_affine, []

    def noted(*args: Any) -> Any:
        known = original.cache_info().misses
        y = original(*args)
        if original.cache_info().misses > known:
            allocators.append(len(device._state().allocators))
        return y

    monkeypatch.setattr(fused, "pixel_affine", noted)
    model = make()
    model._engine._capacity = 1
    model.preprocess = Preprocess((16, 16), "none", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    second = pictures(2, (16, 16))
    want = make(graphs=False)(model.preprocess.normalise(second))
    waits = device.card.waits
    model(pictures(1, (16, 16)))
    assert device.card.waits == waits + 3  # for the plan, what normalises, and the graph's first run
    model(second)
    assert allocators == [1]  # the caller's own
    gc.collect()
    device.default_pool.free_all_blocks()
    for size in (1 << 9, 1 << 12, 1 << 16):
        device.empty(size, np.uint8).fill(0xFF)
    assert distance(model(second), want) <= ROUNDING["fp32"]


def test_preprocessing_of_ones_own_is_the_cpus(uploads: list[np.ndarray]) -> None:
    """What a class derived from Preprocess makes of an image, nobody else knows to make."""

    class Doubled(Preprocess):
        def pixels(self, image: Any, name: str = "image") -> Any:
            return 2 * super().pixels(image, name)

    model, x = make(), pictures(2, (16, 16))
    model.preprocess = Doubled((16, 16), "none")
    got, embedded = model(x), model.embed(x)
    assert [u.dtype for u in uploads] == [np.float32, np.float32]
    doubled = 2 * Preprocess((16, 16), "none")(x)
    np.testing.assert_array_equal(got, model(doubled))
    np.testing.assert_array_equal(embedded, model.embed(doubled))


def test_bytes_of_wrong_shapes() -> None:
    model = make()
    for x, message in (
        (pictures(1, (16, 16), 4), r"x must be uint8 \[B, H, W, 3\], got shape \(1, 16, 16, 4\)"),
        (pictures(1, (3, 16), 16), "uint8 arrays have channels last"),
        (pictures(1)[0], r"add a batch axis: x\[None\]"),
    ):
        with pytest.raises(InputError, match=message):
            model(device.asarray(x), resize=False)


# ------------------------------------------------------------------ what goes in


def test_arrays_come_back_where_they_were() -> None:
    model = make()
    x = images(2, 3, 16, 16)
    on_device = model(device.asarray(x))
    assert isinstance(on_device, device.DeviceArray) and on_device.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(on_device), model(x))


@pytest.mark.parametrize("where", ["host", "device"])
def test_strided_inputs(where: str) -> None:
    model, x = make(), images(4, 3, 16, 32)
    upload = device.asarray if where == "device" else np.asarray
    want = model(np.ascontiguousarray(x[::-2, :, :, ::2]))
    np.testing.assert_array_equal(np.asarray(model(upload(x)[::-2, :, :, ::2])), want)
    np.testing.assert_array_equal(np.asarray(model(upload(x.astype(np.float64))[::-2, :, :, ::2])), want)


class Foreign:
    """An array of another library with memory on the device, float16."""

    def __init__(self, x: np.ndarray, dlpack: bool) -> None:
        self.x, self.shape, self.dtype, self.asked = device.asarray(x), x.shape, x.dtype, []
        if dlpack:
            self.__dlpack_device__ = lambda: (2, 0)
        self.__cuda_array_interface__ = {}


@pytest.mark.parametrize("dlpack", [True, False])
def test_foreign_device_arrays_are_not_copied(monkeypatch: pytest.MonkeyPatch, dlpack: bool) -> None:
    """DLPack goes first: it orders our stream after theirs, the other interface's version 2 does not."""
    model, x = make(), images(2, 3, 16, 16)
    cupy, seen = sys.modules["cupy"], []

    def take(name: str) -> Any:
        return lambda given: seen.append((name, given)) or given.x

    monkeypatch.setattr(cupy, "from_dlpack", take("dlpack"), raising=False)
    monkeypatch.setattr(cupy, "asarray", take("interface"))
    foreign = Foreign(x, dlpack)
    pixels = model._backend.pixels(foreign)
    assert pixels is foreign.x
    assert seen == [("dlpack" if dlpack else "interface", foreign)]


# ------------------------------------------------------------------ memory


def test_outputs_are_the_callers() -> None:
    model = make()
    x, other = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=2)
    for ask in (lambda x: [model(x)], lambda x: model.features(x)):
        kept = ask(device.asarray(x))
        before = [np.array(y) for y in kept]
        ask(device.asarray(other))
        for y, was in zip(kept, before, strict=True):
            np.testing.assert_array_equal(np.asarray(y), was)


def test_inputs_are_not_written_to() -> None:
    model, x = make(), device.asarray(images(2, 3, 16, 16))
    before = np.array(x)
    model(x), model.features(x)
    np.testing.assert_array_equal(np.asarray(x), before)


def test_graphs_keep_what_they_read() -> None:
    """Whatever is forgotten, collected or overwritten elsewhere, a graph's replays stay right."""
    model, x = make(), images(3, 3, 16, 16)
    want = model(x)
    for side in range(17, 17 + engine._PLANS):  # its plan is no longer among those kept
        model(images(1, 3, side, 16))
    gc.collect()
    device.default_pool.free_all_blocks()
    for size in (1 << 10, 1 << 14, 1 << 18):
        device.empty(size, np.uint8).fill(0xFF)
    np.testing.assert_array_equal(model(x), want)


@pytest.mark.parametrize("pixels", ["floats", "bytes"])
def test_memory_of_a_forgotten_model_is_given_back(pixels: str) -> None:
    """Without the help of the garbage collector, which runs when it likes."""
    x = images(2, 3, 16, 16) if pixels == "floats" else pictures(2, (16, 16))
    make()(x, resize=False)  # what normalises bytes is kept
    gc.collect()
    device.default_pool.free_all_blocks()
    before = device.card.used
    gc.disable()
    try:
        model = make()
        model(x, resize=False), model.features(x, resize=False)
        assert device.card.used > before
        del model
        device.default_pool.free_all_blocks()
        assert device.card.used == before
    finally:
        gc.enable()


def test_loading_keeps_the_weights_and_no_more() -> None:
    """Most of these are of a mebibyte and some, of which CUDA makes two."""
    config = CONFIG.replace(embed_dim=192, num_heads=(6, 12))
    gc.collect()
    device.default_pool.free_all_blocks()
    before, model = device.card.used, make(config, "fp16")
    assert device.card.used - before <= 1.15 * 2 * model.num_parameters


def test_weights_are_there_when_load_returns() -> None:
    """Calls may come on streams that do not wait for the one on which they were uploaded; so with new sizes."""
    model, waits = None, device.card.waits
    model = make(graphs=False)
    assert device.card.waits == waits + 1
    model(images(1, 3, 16, 16)), model(images(1, 3, 16, 16))
    assert device.card.waits == waits + 2


def test_least_recently_used_graph_goes_first() -> None:
    model = make()
    model._engine._capacity = 2
    sizes = [(1, 3, 16, 16), (2, 3, 16, 16), (3, 3, 16, 16)]
    model(images(*sizes[0])), model(images(*sizes[1]))
    used = device.card.used
    first = model._engine._find((forward.logits, (), sizes[0], None))
    assert first is not None
    model(images(*sizes[0])), model(images(*sizes[2]))
    assert [key[2] for key in model._engine._replays] == [sizes[0], sizes[2]]
    assert model._engine._find((forward.logits, (), sizes[0], None)) is first
    device.default_pool.free_all_blocks()
    assert device.card.used <= used * 1.5  # the second one's memory is free


# ------------------------------------------------------------------ out of memory


def test_too_large_a_batch() -> None:
    model = make()
    x = images(2, 3, 16, 16)
    want = model(x)
    gc.collect()
    device.default_pool.free_all_blocks()
    before = device.card.used
    device.card.total = device.card.used + (1 << 20)
    with pytest.raises(
        OutOfMemoryError,
        match=r"model: x of shape \(200, 3, 16, 16\) must fit into the memory of cuda:0, got: Out of memory allocating "
        r"[\d,]+ bytes .*\d+ of \d+ MiB are free; use a smaller batch",
    ) as caught:
        model(np.zeros((200, 3, 16, 16), np.float32))
    device.default_pool.free_all_blocks()
    assert device.card.used <= before, "the error holds memory"  # graphs were given up to make room
    assert isinstance(caught.value, MemoryError)
    np.testing.assert_array_equal(model(x), want)


def test_other_graphs_make_room() -> None:
    """A batch that fits once the graphs of others are gone goes through."""
    model = make()
    model(images(16, 3, 16, 16))
    one = sum(r._pool.total_bytes() for r in model._engine._replays.values())
    device.default_pool.free_all_blocks()
    device.card.total = device.card.used + one // 2
    x = images(15, 3, 16, 16)
    got = model(x)
    assert len(model._engine._replays) == 1
    device.card.total = 1 << 30
    np.testing.assert_array_equal(got, make()(x))


def test_too_large_a_model() -> None:
    gc.collect()
    device.default_pool.free_all_blocks()
    before = device.card.used
    device.card.total = before + 20_000
    with pytest.raises(OutOfMemoryError, match="load: the weights must fit into the memory of cuda:0") as caught:
        make()
    device.default_pool.free_all_blocks()
    assert device.card.used == before and caught.value


def test_memory_given_back_in_a_capture_is_noticed() -> None:
    """A pool that is short frees what it does not use, which the graph does: such a capture counts as out of memory."""
    model = make()
    (patches, rest), x = model._engine._forward(forward.logits, (1, 3, 16, 16), {}), images(1, 3, 16, 16)
    calls = []

    def greedy(z: Any) -> Any:
        calls.append(None)
        y = rest(z)
        if len(calls) == 2:  # the capture
            device.card.total = device.card.used + 512
            device._state().allocators[-1](60_000)
        return y

    gc.collect()
    device.default_pool.free_all_blocks()
    before = device.card.used
    with pytest.raises(device.OutOfMemoryError):
        engine._Replay(patches, greedy, (1, 3, 16, 16))
    device.card.total = 1 << 30
    device.default_pool.free_all_blocks()
    assert device.card.used == before
    np.testing.assert_array_equal(model(x), make()(x))


# ------------------------------------------------------------------ failures, threads


def test_a_failing_capture_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), images(2, 3, 16, 16)
    original, calls = model._engine.ops.global_pool, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(device.get_current_stream())
        if len(calls) == 2:
            raise InputError("not today")
        return original(*args, **options)

    monkeypatch.setattr(model._engine.ops, "global_pool", failing)
    before = device.card.used
    with pytest.raises(InputError, match="not today"):
        model(x)
    assert not calls[1].is_capturing() and device.get_current_stream() is device.null
    assert device.card.used <= before + (1 << 16)  # the plan of this size is kept
    np.testing.assert_array_equal(model(x), make()(x))


def test_a_model_without_a_head() -> None:
    with pytest.raises(InputError, match="no classification head"):
        make(CONFIG.replace(num_classes=0))(images(1, 3, 16, 16))


def test_threads() -> None:
    """Random batch sizes and shapes over four threads with a stream each: bitwise what single calls give."""
    model = make(precision="fp16")
    shapes = [(1, 3, 16, 16), (2, 3, 16, 16), (2, 3, 18, 27), (3, 3, 8, 8)]
    inputs = [images(*s, seed=i) for i, s in enumerate(shapes)]
    want, wrong = [model(x) for x in inputs], []
    model._engine.clear()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with device.Stream():
            for i in rng.integers(0, len(shapes), 8):
                if not np.array_equal(model(inputs[i]), want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and len(model._engine._replays) == len(shapes)
