"""The object that people hold: what it takes, what it gives, what it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import swincupy
from swincupy import ConfigError, DeviceError, InputError, Prediction, SwinConfig, SwinTransformer
from swincupy.parameters import parameter_shapes
from swincupy.preprocess import Preprocess, preset
from tests.parity import recipe

Array = np.ndarray
CONFIG = SwinConfig(img_size=32, embed_dim=12, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=7)
LABELS = ("zero", "one", "two", "three", "four", "five", "six")


def make(config: SwinConfig = CONFIG, *, drop: str = "\0", **options: Any) -> SwinTransformer:
    params = recipe.state_dict(parameter_shapes(config), seed=5)
    return SwinTransformer({k: v for k, v in params.items() if not k.startswith(drop)}, config, **options)


@pytest.fixture(scope="module")
def model() -> SwinTransformer:
    return make(labels=LABELS)


def pixels(*shape: int, seed: int = 1) -> Array:
    return recipe.images(shape, seed)


def pictures(n: int, size: tuple[int, int] = (40, 50), seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def near(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max())))


# ---------------------------------------------------------------- outputs


def test_logits_embeddings_and_features_belong_together(model: SwinTransformer) -> None:
    x = pixels(3, 3, 36, 44)
    params = recipe.state_dict(parameter_shapes(CONFIG), seed=5)
    maps = model.features(x, norm=True)
    assert [m.shape for m in maps] == [(3, 12, 9, 11), (3, 24, 5, 6)]
    near(model.embed(x), maps[-1].mean(axis=(2, 3)))
    near(model(x), model.embed(x) @ params["head.weight"].T + params["head.bias"])
    assert model(x).dtype == model.embed(x).dtype == maps[0].dtype == np.float32


def test_pickled_and_copied_models_answer_alike(model: SwinTransformer) -> None:
    x = pixels(2, 3, 32, 32)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert (twin.config, twin.labels, twin.preprocess) == (model.config, model.labels, model.preprocess)
        np.testing.assert_array_equal(twin(x), model(x))


def test_double_precision(model: SwinTransformer) -> None:
    exact = make(precision="fp64")
    x = pixels(2, 3, 36, 44)
    assert exact(x).dtype == np.float64
    near(model(x), exact(x), 1e-5)
    near(exact(x.astype(np.float64)), exact(x), 0)


@pytest.mark.parametrize("version", [1, 2])
def test_a_batch_is_its_images(version: int) -> None:
    """To the rounding of float32: matrix products of other shapes add up in another order."""
    model, x = make(CONFIG.replace(version=version)), pixels(9, 3, 33, 46)
    together, alone = model(x), np.concatenate([model(x[i : i + 1]) for i in range(9)])
    near(together, alone, 2e-6)
    near(model.embed(x, batch_size=4), np.concatenate([model.embed(one[None]) for one in x]), 2e-6)
    exact = make(CONFIG.replace(version=version), precision="fp64")
    near(exact(x), np.concatenate([exact(x[i : i + 1]) for i in range(9)]), 1e-13)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 40), (32, 32), (33, 31), (200, 5), (4, 4)])
@pytest.mark.parametrize("source", ["microsoft", "timm", "huggingface-v2", "openmmlab", "torchvision"])
def test_any_size(source: str, size: tuple[int, int]) -> None:
    config = CONFIG.with_conventions(source)
    model, x = make(config), pixels(2, 3, *size)
    if config.patch_pad == "crop" and min(size) < 4:
        with pytest.raises(InputError, match=rf"at least one 4 x 4 patch, got {size[0]} x {size[1]} pixels"):
            model(x)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, maps = model(x), model.features(x)
    grid = [s // 4 if config.patch_pad == "crop" else math.ceil(s / 4) for s in size]
    assert logits.shape == (2, 7) and np.isfinite(logits).all()
    assert [m.shape for m in maps] == [(2, 12, *grid), (2, 24, *(math.ceil(g / 2) for g in grid))]


def test_equal_calls_give_equal_bits(model: SwinTransformer) -> None:
    x = pixels(2, 3, 100, 84)
    first = model(x)
    model(pixels(1, 3, 40, 40))
    assert np.array_equal(model(x), first)


def test_the_input_is_left_alone(model: SwinTransformer) -> None:
    x = pixels(2, 3, 36, 44)
    before = x.copy()
    model(x)
    model.features(x)
    assert np.array_equal(x, before)
    x.flags.writeable = False
    near(model(x), model(before), 0)


# ---------------------------------------------------------------- kinds of arrays


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f4"])
def test_float_arrays(model: SwinTransformer, dtype: Any) -> None:
    x = pixels(2, 3, 36, 44)
    got = model(x.astype(dtype))
    assert type(got) is np.ndarray and got.dtype == np.float32
    near(got, model(x), 1e-2 if dtype is np.float16 else 1e-6)


def test_strided_arrays(model: SwinTransformer) -> None:
    x = pixels(2, 3, 36, 44)
    want = model(x)
    views = {
        "channels last in memory": np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "every second": np.repeat(x, 2, axis=3)[..., ::2],
        "reversed twice": np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1],
        "fortran": np.asfortranarray(x),
        "unaligned": np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
    }
    for name, view in views.items():
        near(model(view), want, 0), name
    near(model.features(views["fortran"])[1], model.features(x)[1], 0)


def test_torch_tensors(model: SwinTransformer) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = pixels(3, 3, 36, 44)
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    for got in (model(tensor), model.embed(tensor, batch_size=2), *model.features(tensor)):
        assert isinstance(got, torch.Tensor) and got.dtype == torch.float32 and not got.requires_grad
    near(model(tensor), model(x), 0)
    near(model.embed(tensor, batch_size=2), model.embed(x, batch_size=2), 0)
    assert isinstance(next(model.embed_stream(tensor)), torch.Tensor)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        near(model(tensor.detach().to(dtype)), model(x), 0.1 if dtype is torch.bfloat16 else 1e-2)
    near(model(torch.from_numpy(pictures(2))), model(pictures(2)), 0)  # images: NumPy comes back
    with pytest.raises(InputError, match="uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.int32))


def test_arrays_of_another_library(model: SwinTransformer) -> None:
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    x = pixels(2, 3, 36, 44)
    got = model(strict.asarray(x))
    assert type(got) is type(strict.asarray(0.0))
    near(got, model(x), 0)


# ---------------------------------------------------------------- images


@pytest.fixture
def folder(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, pictures(5), strict=True):
        Image.fromarray(picture).save(path)
    return paths


def test_images_of_every_kind(model: SwinTransformer, folder: list[Path]) -> None:
    array = pictures(5)
    want = model(model.preprocess(array))
    assert type(want) is np.ndarray
    pil = [Image.fromarray(a) for a in array]
    files = [io.BytesIO(path.read_bytes()) for path in folder]
    near(model(array), want, 0)
    for images in (
        list(array),
        pil,
        tuple(pil),
        folder,
        [str(p) for p in folder],
        files,
        iter(pil),
        [*pil[:2], *folder[2:]],
    ):
        near(model(images), want, 0)
    for one in (array[0], pil[0], folder[0], str(folder[0]), folder[0].read_bytes()):
        near(model(one), want[:1])
        near(model.embed(one), model.embed(array[:1]), 0)
        assert len(model.classify(one)) == 1
    near(model.features(array[:2])[0], model.features(model.preprocess(array[:2]))[0], 0)
    near(model(array[:, ::-1, ::-1]), model(array[:, ::-1, ::-1].copy()), 0)


def test_images_of_several_sizes(model: SwinTransformer) -> None:
    images = [Image.fromarray(pictures(1, size)[0]) for size in ((40, 50), (33, 90), (64, 64))]
    near(model(images), np.concatenate([model(image) for image in images]))


def test_bytes_of_the_final_size(model: SwinTransformer) -> None:
    """With resize=False they are normalised and no more, at any size; without it, resized as any image is."""
    for size in ((32, 32), (57, 40)):
        crops = pictures(3, size)
        floats = model.preprocess.normalise(crops)
        for x in (crops, np.asfortranarray(crops), crops[:, ::-1, ::-1].copy()[:, ::-1, ::-1]):
            near(model(x, resize=False), model(floats), 0)
        near(model.embed(crops, batch_size=2, resize=False), model.embed(floats, batch_size=2), 0)
        near(model.features(crops, resize=False)[1], model.features(floats)[1], 0)
        assert model.classify(crops, 2, resize=False) == model.classify(floats, 2)
        near(model(crops), model(model.preprocess(crops)), 0)
        assert np.abs(model(crops) - model(floats)).max() > 1e-3
    near(model(pixels(2, 3, 20, 30), resize=False), model(pixels(2, 3, 20, 30)), 0)


def test_bytes_of_another_library(model: SwinTransformer) -> None:
    """Taken as they are, the answer is in their library; as images, in NumPy."""
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    crops = pictures(2, (32, 32))
    given = strict.asarray(crops)
    for got in (model(given, resize=False), model.embed(given, resize=False), *model.features(given, resize=False)):
        assert type(got) is type(given)
    near(model(given, resize=False), model(crops, resize=False), 0)
    assert type(model(given)) is type(model.embed(given)) is np.ndarray


def test_arrays_that_preprocessing_leaves_as_they_are() -> None:
    """Bit by bit what goes through Pillow."""
    model, crops = make(preprocess=preset("hf", 32, CONFIG)), pictures(5, (32, 32))
    near(model(crops), model([Image.fromarray(a) for a in crops]), 0)
    near(model.embed(crops, batch_size=2), model.embed(list(crops), batch_size=2), 0)


class Upside(Preprocess):
    def pixels(self, image: Any, name: str = "image") -> Any:
        return super().pixels(image, name)[:, ::-1]


def test_preprocessing_of_ones_own() -> None:
    """A class derived from Preprocess may do anything with an image, also with one that has the final size."""
    model, flipping = (make(preprocess=p((32, 32), "none")) for p in (Preprocess, Upside))
    crops = pictures(3, (32, 32))
    near(flipping(crops), model(crops[:, ::-1]), 0)
    near(flipping.embed(crops), model.embed(crops[:, ::-1]), 0)


@pytest.mark.parametrize("call", ["__call__", "embed", "features", "classify"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (pictures(1)[0], r"x must be uint8 \[B, H, W, 3\], got shape \(40, 50, 3\); add a batch axis: x\[None\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got shape \(2, 3, 8, 8\); uint8 arrays have channels last: x.transpose"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"x must be uint8 \[B, H, W, 3\], got shape \(2, 8, 8, 4\)"),
        (pictures(2)[:0], "at least one image and one pixel"),
        (pictures(2)[:, :0], "at least one image and one pixel"),
        (list(pictures(2)), r"must be a uint8 array \[B, H, W, C\] where resize is False, got list"),
        ("x.png", "where resize is False, got str"),
        (np.zeros((2, 8, 8, 3), np.int32), "where resize is False, got int32"),
    ],
    ids=range(8),
)
def test_refuses_what_would_have_to_be_resized(model: SwinTransformer, call: str, x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(model, call)(x, resize=False)


def test_gray_model_takes_arrays_and_images() -> None:
    model = make(CONFIG.replace(in_chans=1))
    assert model(pixels(2, 1, 20, 30)).shape == (2, 7)
    gray = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 1), dtype=np.uint8)
    near(model(gray), model([Image.fromarray(g[..., 0]) for g in gray]), 0)
    near(model(gray, resize=False), model(model.preprocess.normalise(gray)), 0)


# ---------------------------------------------------------------- embeddings


def test_embed_of_a_generator_is_that_of_the_array(model: SwinTransformer) -> None:
    array = pictures(11)
    want = model.embed(array)
    assert want.shape == (11, 24)
    near(model.embed(Image.fromarray(a) for a in array), want, 0)
    for batch_size in (1, 4, 11, 100):
        near(model.embed((a for a in array), batch_size=batch_size), want)
        parts = list(model.embed_stream((a for a in array), batch_size=batch_size))
        assert [len(p) for p in parts] == [min(batch_size, 11 - i) for i in range(0, 11, batch_size)]
        near(np.concatenate(parts), want)


def test_embed_stream_reads_an_endless_generator_as_needed(model: SwinTransformer) -> None:
    read = [0]

    def camera() -> Iterator[Array]:
        for picture in itertools.cycle(pictures(3)):
            read[0] += 1
            yield picture

    stream = model.embed_stream(camera(), batch_size=4)
    assert read == [0]  # nothing before the first is asked for
    first = next(stream)
    assert 4 <= read[0] <= 16  # one batch and what is decoded ahead
    near(np.concatenate([first, *itertools.islice(stream, 2)]), model.embed([*pictures(3)] * 4))
    before = read[0]
    stream.close()  # type: ignore[attr-defined]
    assert read[0] == before
    assert not [t for t in threading.enumerate() if t.name.startswith("swincupy-decode")]


def test_an_error_in_the_callers_generator_comes_out(model: SwinTransformer) -> None:
    def broken() -> Iterator[Array]:
        yield from pictures(3)
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera unplugged"):
        model.embed(broken(), batch_size=2)


def test_normalize(model: SwinTransformer) -> None:
    x = pixels(3, 3, 36, 44)
    unit = model.embed(x, normalize=True)
    near(np.linalg.norm(unit, axis=1), np.ones(3))
    near(unit * np.linalg.norm(model.embed(x), axis=1, keepdims=True), model.embed(x))
    silent = make()
    silent._engine.weights["norm"].update(weight=np.zeros(24, np.float32), bias=np.zeros(24, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(silent.embed(x, normalize=True), np.zeros((3, 24)), 0)


def test_progress_bar(model: SwinTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    near(model.embed(pixels(5, 3, 8, 8), batch_size=2, progress=True), model.embed(pixels(5, 3, 8, 8), batch_size=2), 0)
    assert "5/5" in capsys.readouterr().err
    model.embed(pictures(1)[0], progress=True)
    assert "1/1" in capsys.readouterr().err
    model.embed((p for p in pictures(3)), progress=True)
    shown = capsys.readouterr()
    assert "3image" in shown.err and not shown.out
    model.embed(pictures(2))
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- features


def test_out_indices(model: SwinTransformer) -> None:
    x = pixels(2, 3, 36, 44)
    first, second = model.features(x)
    for indices, want in (
        ((0,), [first]),
        ([1, 0], [second, first]),
        ((-1, -2, -1), [second, first, second]),
        (range(1, 2), [second]),
    ):
        got = model.features(x, indices)
        assert len(got) == len(want) and all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("indices", [(), (2,), (-3,), (0, 5), (0.0,), ("0",), 1, "01", None])
def test_wrong_out_indices(model: SwinTransformer, indices: Any) -> None:
    if indices is None:
        assert len(model.features(pixels(1, 3, 8, 8), None)) == 2
        return
    with pytest.raises(InputError, match="features: out_indices must be stages from 0 to 1, got "):
        model.features(pixels(1, 3, 8, 8), indices)


def test_feature_layouts(model: SwinTransformer) -> None:
    x = pixels(2, 3, 36, 44)
    for first, last in zip(model.features(x), model.features(x, layout="NHWC"), strict=True):
        assert np.array_equal(first, last.transpose(0, 3, 1, 2))
    with pytest.raises(InputError, match="features: layout must be 'NCHW' or 'NHWC', got 'CHW'"):
        model.features(x, layout="CHW")  # type: ignore[arg-type]


def test_feature_norms() -> None:
    """Each map through its own norm where there is one; the last through the final norm where it has none."""
    extra = {"norm0.weight": (12,), "norm0.bias": (12,)}
    params = recipe.state_dict(parameter_shapes(CONFIG) | extra, seed=5)
    model, x = SwinTransformer(params, CONFIG), pixels(2, 3, 36, 44)
    for i, name in enumerate(("norm0", "norm")):
        raw, got = (model.features(x, (i,), norm=norm, layout="NHWC")[0].astype(np.float64) for norm in (False, True))
        centred = raw - raw.mean(-1, keepdims=True)
        want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        near(got, want * params[f"{name}.weight"] + params[f"{name}.bias"])


# ---------------------------------------------------------------- classes


def test_classify(model: SwinTransformer) -> None:
    images = pictures(5)
    logits = model(images).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for topk in (1, 3, 7, 50):
        found = model.classify(images, topk, batch_size=2)
        assert [len(row) for row in found] == [min(topk, 7)] * 5
        for row, scores in zip(found, p, strict=True):
            best = np.argsort(-scores)[:topk]
            assert [r.index for r in row] == best.tolist()
            assert [r.label for r in row] == [LABELS[i] for i in best]
            near([r.score for r in row], scores[best], 1e-5)
    prediction = model.classify(images[0])[0][0]
    assert (
        isinstance(prediction, Prediction) and isinstance(prediction.score, float) and isinstance(prediction.index, int)
    )
    near(
        [r.score for r in model.classify(model.preprocess(images))[2]],
        [r.score for r in model.classify(images)[2]],
        1e-6,
    )


def test_classes_without_names_are_numbered() -> None:
    row = make().classify(pictures(1)[0], 2)[0]
    assert [r.label for r in row] == [f"class {r.index}" for r in row]


# ---------------------------------------------------------------- models without some parts


def test_headless() -> None:
    model = make(CONFIG.replace(num_classes=0))
    x = pixels(2, 3, 36, 44)
    near(model.embed(x), make().embed(x), 0)
    near(model.features(x)[1], make().features(x)[1], 0)
    for call, name in ((model, r"model\(x\)"), (model.classify, "classify")):
        with pytest.raises(
            InputError, match=f"{name}: the checkpoint has no classification head; use embed or features"
        ):
            call(x)


def test_detection_backbone_has_no_embedding() -> None:
    model, x = make(CONFIG.replace(num_classes=0), drop="norm."), pixels(2, 3, 36, 44)
    near(model.features(x)[1], make().features(x)[1], 0)
    for call in (model.embed, lambda x: next(model.embed_stream(x))):
        with pytest.raises(InputError, match="embed: the checkpoint has no final norm .* use features"):
            call(x)


def test_labels_must_name_the_classes() -> None:
    with pytest.raises(ConfigError, match="labels must name the 7 classes, got 3 labels"):
        make(labels=["a", "b", "c"])


# ---------------------------------------------------------------- what is refused

BAD: list[tuple[Any, str]] = [
    (pixels(2, 4, 8, 8), r"x must be \[B, 3, H, W\], got shape \(2, 4, 8, 8\)"),
    (pixels(2, 8, 8, 3), r"got shape \(2, 8, 8, 3\); float arrays have channels second: x.transpose\(0, 3, 1, 2\)"),
    (pixels(3, 8, 8), r"got shape \(3, 8, 8\); add a batch axis: x\[None\]"),
    (pixels(8, 8), r"x must be \[B, 3, H, W\], got shape \(8, 8\)"),
    (pixels(1, 1, 3, 8, 8), r"x must be \[B, 3, H, W\], got shape \(1, 1, 3, 8, 8\)"),
    (np.float32(1), r"x must be \[B, 3, H, W\], got shape \(\)"),
    (pixels(2, 3, 8, 8)[:0], r"at least one image and one pixel, got shape \(0, 3, 8, 8\)"),
    (pixels(2, 3, 8, 8)[:, :, :0], r"at least one image and one pixel, got shape \(2, 3, 0, 8\)"),
    (pictures(2)[:0], "at least one image, got none"),
    ([], "at least one image, got none"),
    (iter(()), "at least one image, got none"),
    (np.zeros((2, 3, 8, 8), np.int32), "must be uint8 with values 0..255, got int32 of shape"),
    (np.zeros((2, 3, 8, 8), np.complex64), "must be uint8 with values 0..255, got complex64 of shape"),
    (np.zeros((2, 3, 8, 8), bool), "must be uint8 with values 0..255, got bool of shape"),
    (np.zeros((2, 3, 8, 8), object), "must be uint8 with values 0..255, got object of shape"),
    (np.zeros((8, 8, 3), np.int64), "must be uint8 with values 0..255, got int64 of shape"),
    (np.zeros((1, 8, 8, 4), np.uint8), r"image 0 must be uint8 \[H, W\], .* got shape \(8, 8, 4\)"),
    (np.zeros((1, 3, 8, 8), np.uint8), r"image 0 must be uint8 \[H, W\], .* got shape \(3, 8, 8\)"),
    (np.zeros((2, 3), "U5"), "must be uint8 with values 0..255, got <U5 of shape"),
    ([pixels(3, 8, 8)], "image 0 must be uint8 with values 0..255, got float32"),
    ([pictures(1)[0], None], "image 1 must be a path, a PIL image, .* got NoneType"),
    (None, "must be an image or an iterable of images, got NoneType"),
    (7, "must be an image or an iterable of images, got int"),
    ("nowhere.png", "nowhere.png must be an existing file"),
]  # fmt: skip


@pytest.mark.parametrize(("x", "message"), BAD, ids=lambda v: str(v)[:30] if isinstance(v, str) else "")
@pytest.mark.parametrize("call", ["__call__", "embed", "features", "classify"])
def test_refuses(model: SwinTransformer, call: str, x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(model, call)(x)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_refuses_batch_sizes(model: SwinTransformer, batch_size: int) -> None:
    for call in (model.embed, model.classify):
        with pytest.raises(InputError, match=f"batch_size must be at least 1, got {batch_size}"):
            call(pixels(2, 3, 8, 8), batch_size=batch_size)  # type: ignore[operator]
    with pytest.raises(InputError, match="classify: topk must be at least 1, got 0"):
        model.classify(pixels(2, 3, 8, 8), 0)


# ---------------------------------------------------------------- devices and precisions


@pytest.mark.parametrize("device", [None, "cpu"])
def test_cpu(device: Any) -> None:
    model = make(device=device, precision=None)
    assert (model.device, model.precision) == ("cpu", "fp32")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", -1, "cuda:²", "mps", "cpu:0", True, ""])
def test_unknown_devices(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r'device must be "cpu", "cuda" or "cuda:N", got|needs CuPy'):
        make(device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0])
def test_cuda_without_cupy(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r'"cuda:\d" needs CuPy; pip install "swincupy\[cuda13\]"'):
        make(device=device)


def test_cuda_without_a_driver_or_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDARuntimeError(RuntimeError):
        pass

    def no_driver() -> int:
        raise CUDARuntimeError("cudaErrorInsufficientDriver: too old")

    runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=no_driver)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime)))
    with pytest.raises(
        DeviceError, match='"cuda:0" cannot be used: cudaErrorInsufficientDriver: too old; use device="cpu"'
    ):
        make(device="cuda")
    runtime.getDeviceCount = lambda: 2
    with pytest.raises(DeviceError, match="must be one of the 2 CUDA devices, got 2; they count from 0"):
        make(device="cuda:2")


@pytest.mark.parametrize("precision", ["fp8", "float32", "", 32])
def test_unknown_precisions(precision: Any) -> None:
    with pytest.raises(DeviceError, match=f"load: precision must be one of fp32, .*, fp64, got {precision!r}"):
        make(precision=precision)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
def test_precisions_that_the_cpu_has_not(precision: str) -> None:
    with pytest.raises(DeviceError, match=f"precision on the CPU must be 'fp32' or 'fp64', got '{precision}'"):
        make(device="cpu", precision=precision)
    with pytest.raises(DeviceError, match=f"precision '{precision}' must run on a GPU, and none can be used: "):
        make(precision=precision)


def test_device_and_precision_are_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for options in ({"device": "cuda"}, {"precision": "fp8"}):
        with pytest.raises(DeviceError):
            swincupy.load("/nowhere.safetensors", **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- threads


def test_calls_from_several_threads() -> None:
    """Different sizes at the same time, plans being made and dropped, against one thread."""
    model, jobs = make(), []
    for i, size in enumerate(((32, 32), (57, 80), (20, 100), (90, 61))):
        x = pixels(1 + i, 3, *size, seed=i)
        jobs.append((x, make()(x)))
    together = threading.Barrier(4)

    def work(i: int) -> None:
        together.wait()
        for k in range(12):
            x, want = jobs[(i + k) % 4]
            near(model(x), want)
            model.embed(pixels(1, 3, 8 + i, 8 + k))

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(work, i) for i in range(4)]:
            job.result(timeout=60)


# ---------------------------------------------------------------- files and memory


def test_save_and_load(tmp_path: Path) -> None:
    config = CONFIG.replace(version=2, pretrained_window_sizes=3, norm_eps=1e-3).with_conventions("timm")
    model, x = make(config, labels=LABELS), pixels(2, 3, 36, 44)
    model.save(tmp_path / "model.safetensors")
    again = swincupy.load(tmp_path / "model.safetensors")
    assert again.config == config and again.labels == LABELS and again.preprocess == model.preprocess
    assert again.num_parameters == model.num_parameters == sum(math.prod(s) for s in parameter_shapes(config).values())
    near(again(x), model(x), 0)
    again.save(tmp_path / "model.safetensors")  # over the file that it is mapped from
    near(again(x), model(x), 0)
    near(swincupy.load(tmp_path / "model.safetensors")(x), model(x), 0)


def weights_of(model: SwinTransformer) -> list[Array]:
    stages = model._engine.weights["stages"]
    parts = [part for stage in stages for block in stage["blocks"] for part in (block["attn"], block["mlp"])]
    return [v for part in parts for v in part.values() if isinstance(v, np.ndarray)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_are_in_memory_once(tmp_path: Path, dtype: Any) -> None:
    """float32 files are used where they are mapped; of float16 files the mapping and the float32 weights remain."""
    from swincupy.checkpoint import save_checkpoint

    params = {k: v.astype(dtype) for k, v in recipe.state_dict(parameter_shapes(CONFIG), seed=5).items()}
    save_checkpoint(tmp_path / "m.safetensors", params, CONFIG)
    model = swincupy.load(tmp_path / "m.safetensors")
    assert all(not v.flags.writeable and not v.flags.owndata for v in model._params.values())  # views of the file
    shared = [any(np.shares_memory(w, p) for p in model._params.values()) for w in weights_of(model)]
    assert all(shared) if dtype is np.float32 else not any(shared)
    assert all(w.dtype == np.float32 for w in weights_of(model))


def test_repr(model: SwinTransformer) -> None:
    assert repr(model) == (
        "SwinTransformer(version=1, img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_classes=7, "
        f"parameters={model.num_parameters:,}, device='cpu', precision='fp32')"
    )
