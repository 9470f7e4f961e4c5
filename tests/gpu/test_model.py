"""Whole models on the GPU against float64 on the CPU: every output, convention and precision; the demo's accuracy."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import swincupy
from swincupy import bench, devices, registry
from swincupy.config import SwinConfig
from tests.gpu.models import LIMITS, distance, images, make, small

cupy = pytest.importorskip("cupy", reason="needs CuPy")

#: Conventions and parts that change what is computed; sizes are odd, H != W, and fit no window.
CONFIGS = {
    "v1": small(),
    "v1-roll_pad": small(pad_mode="roll_pad", window_clamp="axis", clamp_at="build"),
    "v1-crop": small(patch_pad="crop", window_clamp="padded"),
    "v1-no_qkv_bias": small(qkv_bias=False, pad_mode="roll_pad"),
    "v1-ape": small(ape=True, patch_norm=False),
    "v1-head24": small(window_size=12, num_heads=(4, 8)),
    "v1-rectangle": small(img_size=(56, 84), window_size=((7, 14), (7, 7)), in_chans=4, patch_size=(4, 2)),
    "v2": small(2),
    "v2-roll_pad": small(2, pad_mode="roll_pad", window_clamp="axis", clamp_at="build"),
    "v2-window16": small(2, window_size=16, img_size=128, pretrained_window_sizes=8),
    "v2-window24": small(2, window_size=24, img_size=192, pretrained_window_sizes=12),
    "v2-no_qkv_bias": small(2, qkv_bias=False),
}


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", LIMITS)
def test_all_outputs(name: str, key: str) -> None:
    config = CONFIGS[key]
    model, exact = (make(config, d, p, norms=True) for d, p in (("cuda", name), ("cpu", "fp64")))
    for shape in [(2, config.in_chans, 75, 102), (1, config.in_chans, 129, 61)]:
        x = images(*shape)
        for got, want in zip(_all_outputs(model, x), _all_outputs(exact, x), strict=True):
            assert got.dtype == np.float32 and got.shape == want.shape
            assert distance(got, want) <= LIMITS[name], shape


def _all_outputs(m: Any, x: np.ndarray) -> list[Any]:
    return [
        m(x), m.embed(x), m.embed(x, normalize=True), *m.features(x), *m.features(x, norm=True, layout="NHWC"),
        *m.features(x, out_indices=(-1, 0), norm=True),
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["swin_tiny", "swin_base_patch4_window12_384", "swin_s3_tiny", "swinv2_tiny"])
@pytest.mark.parametrize("name", LIMITS)
def test_published_architectures(name: str, model: str) -> None:
    config = registry.named_config(model)
    params, x = bench.random_weights(config), images(1, 3, *config.image)
    want = _exact(model)(x)
    got = swincupy.SwinTransformer(params, config, device="cuda", precision=name)(x)
    assert distance(got, want) <= (2e-3 if name == "tf32" else LIMITS[name])


def _exact(name: str) -> Any:
    config = registry.named_config(name)
    return swincupy.SwinTransformer(bench.random_weights(config), config, device="cpu", precision="fp64")


def test_sizes_that_are_hard() -> None:
    """One token, one row, more than one image's worth of any block, an image of a thousand windows."""
    model, exact = make(small()), make(small(), "cpu", "fp64")
    for shape in [(1, 3, 1, 1), (3, 3, 4, 200), (2, 3, 5, 3), (33, 3, 28, 28), (1, 3, 900, 420)]:
        x = images(*shape)
        assert distance(model(x), exact(x)) <= LIMITS["fp32"], shape


@pytest.mark.parametrize("name", LIMITS)
def test_extreme_values_stay_finite(name: str) -> None:
    """Pixels far out of range: LayerNorm brings them back; what is masked or padded must not become NaN."""
    model = make(small(2), precision=name)
    for scale in (0.0, 1e-4, 1e3):
        assert np.isfinite(model(images(2, 3, 50, 71) * np.float32(scale))).all()


@pytest.mark.parametrize("name", LIMITS)
def test_classify_images(name: str) -> None:
    """Paths, pictures and bytes go through the same preprocessing as on the CPU."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "digits"
    paths = sorted(folder.glob("*.png"))
    model = swincupy.load("demo", device="cuda", precision=name)
    want = swincupy.load("demo", device="cpu").classify(paths, topk=1)
    got = model.classify(paths, topk=1, batch_size=3)
    assert [p[0].label for p in got] == [p[0].label for p in want]
    np.testing.assert_allclose([p[0].score for p in got], [p[0].score for p in want], atol=0.02)


def test_the_gpu_is_the_default() -> None:
    found = devices.find()
    assert found.usable and found.reason is None, found.reason
    model = swincupy.load("demo")
    assert (model.device, model.precision) == (f"cuda:{found.usable[0]}", "fp32")
    assert swincupy.load("demo", precision="fp64").device == swincupy.load("demo", device="cpu").device == "cpu"
    assert swincupy.load("demo", precision="fp16").device == model.device


#: Relative distance of what comes of the same numbers, rounded once more or once less on the way.
ROUNDING = {"fp32": 2e-6, "tf32": 2e-3, "fp16": 3e-3, "bf16": 2e-2}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", LIMITS)
def test_pictures_are_what_the_cpu_makes_of_them(name: str, version: int, graphs: bool) -> None:
    """Uploaded as bytes and normalised here: what comes of the pixels that the CPU has normalised."""
    config = small(version)
    model, exact = make(config, precision=name, graphs=graphs), make(config, "cpu", "fp64")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 90, 130, 3), np.uint8)
    floats = model.preprocess(pictures)
    for _ in range(2):
        for got, want in (
            (model(pictures), model(floats)),
            (model.embed(list(pictures), batch_size=2), model.embed(floats, batch_size=2)),
            *zip(model.features(pictures), model.features(floats), strict=True),
        ):
            assert type(got) is np.ndarray and distance(got, want) <= ROUNDING[name] * (2 if version == 2 else 1)
    assert distance(model(pictures), exact(floats)) <= LIMITS[name]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_bytes_on_the_device_stay_there(name: str, graphs: bool) -> None:
    """With resize=False: at any size and in any layout in memory, on any stream, with results on the device."""
    model = make(small(), precision=name, graphs=graphs)
    for shape in [(2, 56, 56, 3), (3, 61, 94, 3), (1, 7, 5, 3)]:
        x = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        want = model(x, resize=False)
        assert type(want) is np.ndarray
        assert distance(want, model(model.preprocess.normalise(x))) <= ROUNDING[name]
        planes = cupy.asarray(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        for given in (cupy.asarray(x), planes.transpose(0, 2, 3, 1), cupy.asarray(x[:, ::-1])[:, ::-1]):
            before = given.copy()
            with model._backend.active():
                assert model._backend.pixels(given).data.ptr == given.data.ptr
            cupy.cuda.Device().synchronize()  # the stream does not wait for the one of the upload
            with cupy.cuda.Stream(non_blocking=True) as stream:
                y = model(given, resize=False)
                stream.synchronize()
            assert isinstance(y, cupy.ndarray) and np.array_equal(y.get(), want)
            assert cupy.array_equal(given, before)
        for y in (*model.features(given, resize=False), model.embed(given, normalize=True, resize=False)):
            assert isinstance(y, cupy.ndarray)
        assert model.classify(given, resize=False) == model.classify(x, resize=False)


def test_graphs_tell_bytes_from_floats() -> None:
    model, x = make(small()), np.random.default_rng(2).integers(0, 256, (2, 3, 56, 3), np.uint8)
    floats = images(2, 3, 56, 3)
    want = model(floats), model(x, resize=False)
    for _ in range(3):
        assert np.array_equal(model(floats), want[0]) and np.array_equal(model(x, resize=False), want[1])
    model.preprocess = dataclasses.replace(model.preprocess, mean=(0.1, 0.2, 0.3))
    other = model(x, resize=False)
    assert distance(other, model(model.preprocess.normalise(x))) <= ROUNDING["fp32"]
    assert len(model._engine._replays) == 4 and not np.array_equal(other, want[1])


@pytest.mark.parametrize("name", LIMITS)
def test_held_out_accuracy(name: str) -> None:
    """Unchanged in every precision."""
    pytest.importorskip("sklearn", reason="needs scikit-learn: it holds the digits")
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("weights_digits", root / "weights" / "digits.py")
    data: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(data)  # type: ignore[union-attr]
    counts = data.confusion(swincupy.load(data.WEIGHTS, device="cuda", precision=name))
    stated = re.search(r"accuracy: \*\*(\d+\.\d+) %\*\*", (root / "weights" / "swin_digits.md").read_text())
    assert stated is not None
    assert 100 * counts.trace() / counts.sum() == pytest.approx(float(stated[1]), abs=0.35)  # two digits of 640


@pytest.mark.alone
def test_memory_of_a_large_model() -> None:
    """Swin-L in FP16: at most 1.3 times its weights' bytes, before there are activations."""
    config = registry.named_config("swin_large_patch4_window12_384")
    params = bench.random_weights(config)
    x = images(1, 3, 384, 384)

    def used() -> int:
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        free, total = cupy.cuda.runtime.memGetInfo()
        return int(total - free)

    def load() -> swincupy.SwinTransformer:
        return swincupy.SwinTransformer(params, config, device="cuda", precision="fp16")

    assert np.isfinite(load()(x)).all()  # context, modules, handles and threads' local memory are there already
    before = used()
    model = load()
    loaded = used() - before
    weights = 2 * model.num_parameters
    assert loaded <= 1.3 * weights
    model(x)
    activations = sum(r._pool.total_bytes() for r in model._engine._replays.values())
    assert used() - before <= 1.3 * weights + activations


def test_saved_models_are_the_same(tmp_path: Path) -> None:
    model = make(small(), precision="fp16")
    model.save(tmp_path / "model.safetensors")
    again = swincupy.load(tmp_path / "model.safetensors", device="cuda", precision="fp16")
    x = images(2, 3, 56, 56)
    np.testing.assert_array_equal(again(x), model(x))


def test_a_backbone_without_head_and_norm() -> None:
    config = SwinConfig(img_size=56, embed_dim=96, depths=(2, 2), num_heads=(3, 6), num_classes=0)
    params = {k: v for k, v in bench.random_weights(config).items() if not k.startswith("norm.")}
    x = images(1, 3, 60, 44)
    got, want = (
        swincupy.SwinTransformer(params, config, device=d, precision=p).features(x)
        for d, p in (("cuda", "fp32"), ("cpu", "fp64"))
    )
    for y, z in zip(got, want, strict=True):
        assert distance(y, z) <= LIMITS["fp32"]
