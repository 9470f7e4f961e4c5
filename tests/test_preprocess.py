"""Decoding, resizing, cropping and normalising; comparison with the libraries is in tests/parity."""

from __future__ import annotations

import io
import json
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swincupy.config import SwinConfig
from swincupy.errors import ConfigError, InputError
from swincupy.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, for_checkpoint, load_image, preset, stream
from swincupy.registry import named_config


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


GRAY = SwinConfig(img_size=32, in_chans=1, window_size=4)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "img_size", "variant", "resize", "resize_size"),
    [
        ("timm", 192, None, "shorter", 213),
        ("timm", 224, None, "shorter", 248),
        ("timm", 256, None, "shorter", 284),
        ("timm", 384, None, "shorter", 384),
        ("timm", (200, 320), None, "shorter", (222, 355)),
        ("ms", 192, None, "shorter", 219),
        ("ms", 224, None, "shorter", 256),
        ("ms", 256, None, "shorter", 292),
        ("ms", 384, None, "squash", (384, 384)),
        ("hf", 256, None, "squash", (256, 256)),
        ("torchvision", 224, "swin_t", "shorter", 232),
        ("torchvision", 224, "swin_s", "shorter", 246),
        ("torchvision", 224, "swin_b", "shorter", 238),
        ("torchvision", 256, "swin_v2_t", "shorter", 260),
        ("torchvision", 256, "swin_v2_s", "shorter", 260),
        ("torchvision", 256, "swin_v2_b", "shorter", 272),
        ("torchvision", 224, None, "shorter", 256),
    ],
)
def test_preset_table(name, img_size, variant, resize, resize_size):
    p = preset(name, img_size, named_config(variant) if variant else None)
    assert (p.resize, p.resize_size, p.interpolation) == (resize, resize_size, "bicubic")
    assert (p.mean, p.std, p.mode) == (IMAGENET_MEAN, IMAGENET_STD, "RGB")


def test_preset_unknown():
    with pytest.raises(InputError, match="'timm', 'ms', 'hf' or 'torchvision', got 'tim'"):
        preset("tim", 224)


@pytest.mark.parametrize("layout", ["microsoft", "timm", "huggingface", "torchvision", "openmmlab", "swincupy"])
def test_every_layout_has_a_preset(layout):
    origin = {"timm": "timm", "huggingface": "hf", "torchvision": "torchvision"}.get(layout, "ms")
    config = named_config("swin_s")
    assert for_checkpoint(None, layout, config) == preset(origin, 224, config)
    assert for_checkpoint(None, layout, config, preset="hf") == preset("hf", 224, config)


def test_stored_preprocessing_goes_before_the_layout_but_not_before_a_request():
    stored = Preprocess((32, 32), "squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    config = SwinConfig(img_size=32, window_size=4)
    assert for_checkpoint(json.loads(json.dumps(stored.to_dict())), "timm", config) == stored
    assert for_checkpoint(stored.to_dict(), "timm", config, preset="timm") == preset("timm", 32, config)
    assert for_checkpoint(None, "timm", config.replace(img_size=None)).size == (224, 224)


def test_pixels_are_those_of_pillow():
    image = Image.fromarray(noise(333, 517))
    got = preset("timm", 224)(image)
    width = int(248 * 517 / 333)
    left, top = round((width - 224) / 2), 12
    cropped = image.resize((width, 248), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    want = (np.asarray(cropped, np.float32) / 255 - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    assert got.dtype == np.float32 and got.shape == (1, 3, 224, 224) and got.flags.c_contiguous
    np.testing.assert_array_equal(got[0], want.transpose(2, 0, 1))


@pytest.mark.parametrize("p", [preset("timm", 32), preset("hf", (24, 40)), preset("ms", 32, GRAY)])
def test_crops_and_normalise_are_the_two_halves(p):
    images = [noise(61, 44), noise(33, 90, 1), noise(9, 8, 2)]
    crops = p.crops(images)
    assert crops.dtype == np.uint8 and crops.shape == (3, *p.size, p.channels)
    np.testing.assert_array_equal(p.normalise(crops), p(images))
    np.testing.assert_array_equal(p.normalise(crops[:, ::-1, ::-1])[..., ::-1, ::-1], p(images))
    np.testing.assert_array_equal(np.concatenate(list(stream(images, p, 2, normalise=False))), crops)
    assert p.normalise(noise(5, 7)[None, ..., : p.channels]).shape == (1, p.channels, 5, 7)
    with pytest.raises(InputError, match=rf"crops must be uint8 \[B, H, W, {p.channels}\], got shape \(5, 7, 2\)"):
        p.normalise(np.zeros((5, 7, 2), np.uint8))
    for call in (p.crops, p.normalise):
        with pytest.raises(InputError, match="at least one image, got none"):
            call(crops[:0])


@pytest.mark.parametrize(
    ("p", "size", "kept"),
    [
        (preset("timm", 224), (224, 224), False),  # goes to 248 first
        (preset("timm", 384), (384, 384), True),
        (preset("timm", 384), (384, 385), False),
        (preset("hf", (24, 40)), (24, 40), True),
        (preset("hf", (24, 40)), (40, 24), False),
        (Preprocess((8, 9), "none"), (8, 9), True),
        (Preprocess((8, 9), "none"), (9, 9), False),
        (Preprocess((20, 30), "shorter", (20, 30)), (20, 30), True),
        (Preprocess((20, 30), "shorter", (22, 33)), (22, 33), False),
    ],
)
def test_sizes_that_are_kept(p, size, kept):
    assert p.keeps(*size) is kept
    image = noise(*size)
    assert np.array_equal(p.crops(image)[0], image) is kept


def test_tall_and_non_square():
    p = preset("timm", (96, 160))
    assert p(noise(301, 90)).shape == (1, 3, 96, 160)
    # a gradient down the image stays one: height and width are not exchanged
    rows = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8)[:, None, None], (200, 300, 3))
    out = p(rows)[0, 0]
    assert np.all(np.diff(out[:, 80]) > 0) and np.ptp(out[48]) == 0


def test_smaller_images_are_padded_with_black_all_around():
    p = Preprocess((8, 9), "none", mean=(0.0,) * 3, std=(1.0,) * 3)
    out = p(np.full((5, 4, 3), 255, np.uint8))[0, 0]
    want = np.zeros((8, 9), np.float32)
    want[1:6, 2:6] = 1
    np.testing.assert_array_equal(out, want)


def test_one_channel():
    p = preset("timm", 32, SwinConfig(img_size=32, in_chans=1, window_size=4))
    assert p.mode == "L" and p.mean == (0.449,) and p.std == (0.226,)
    assert p([noise(40, 50), np.zeros((9, 8), np.uint8), np.zeros((9, 8, 1), np.uint8)]).shape == (3, 1, 32, 32)


@pytest.mark.parametrize("p", [preset("torchvision", 224), Preprocess((5, 7), "none", mode="L", mean=(0,), std=(1,))])
def test_dictionary_round_trip(p):
    assert Preprocess.from_dict(json.loads(json.dumps(p.to_dict()))) == p


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(size=(0, 4)), "size must be a pair"),
        (dict(size=224), "size must be a pair"),
        (dict(size=(4, 4), resize="fit"), "resize must be"),
        (dict(size=(4, 4), resize_size=-1), "resize_size must be"),
        (dict(size=(4, 4), interpolation="cubic"), "interpolation must be"),
        (dict(size=(4, 4), mode="CMYK"), "mode must be"),
        (dict(size=(4, 4), mean=(0.5,)), "mean must be a tuple of 3"),
        (dict(size=(4, 4), mean=(0.5, float("nan"), 0)), "mean must be a tuple of 3"),
        (dict(size=(4, 4), std=(1, 0, 1)), "std must be above 0"),
        (dict(size=(4, 4), crop=1), "unknown field crop"),
        (dict(), "size must be given"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_dict(fields)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    pixels = noise(31, 44)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    p = preset("ms", 32)
    want = p(pixels)
    data = path.read_bytes()
    sources = [path, str(path), Image.open(path), data, bytearray(data), memoryview(data), io.BytesIO(data)]
    for source in sources:
        np.testing.assert_array_equal(p(source), want)
    np.testing.assert_array_equal(p([path, pixels, Image.fromarray(pixels)]), np.concatenate([want] * 3))
    with open(path, "rb") as file:
        np.testing.assert_array_equal(p(file), want)


def test_array_batches_need_not_be_contiguous():
    p = preset("hf", 16)
    batch = np.stack([noise(20, 24, i) for i in range(3)])
    want = np.concatenate([p(image) for image in batch])
    np.testing.assert_array_equal(p(batch), want)
    np.testing.assert_array_equal(p(np.asfortranarray(batch)), want)
    np.testing.assert_array_equal(p(np.repeat(batch, 2, axis=2)[:, :, ::2]), want)
    np.testing.assert_array_equal(p(batch[:, ::-1][:, ::-1]), want)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_modes(mode):
    if mode in ("I;16", "I"):  # 204 of 255 in 16 bits
        image = Image.fromarray(np.full((6, 5), 204 * 257, np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.new("RGB", (5, 6), (204, 204, 204)).convert(mode)
    assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = load_image(image)
    assert out.mode == "RGB" and out.size == (5, 6)
    assert np.all(np.asarray(out) == 204)


def test_bilevel_image_becomes_black_and_white():
    assert load_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_png_is_scaled_not_cut(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path, "L")), [[0, 1, 128, 255]])


def test_float_image_is_refused():
    with pytest.raises(InputError, match="must hold integers"):
        load_image(Image.fromarray(np.ones((3, 3), np.float32)))


def test_transparent_palette_without_a_warning():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = b"\x00\x80"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(image).getpixel((0, 0)) == (10, 20, 30)


def test_exif_orientation_is_left_as_stored():
    image = Image.fromarray(noise(8, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert load_image(file.getvalue()).size == (12, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", "must be an image"),
        (b"", "must be an image"),
        (encoded(Image.fromarray(noise(90, 80)))[:2000], "cannot be read"),
        (encoded(Image.fromarray(noise(90, 80)), "JPEG")[:900], "cannot be read"),
        (encoded(Image.fromarray(noise(9, 8)))[:20], "cannot be read|must be an image"),
    ],
)
def test_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "holiday.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"holiday\.png ({message})"):
        preset("timm", 32)(path)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.png must be an existing file"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="got a folder"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="image 1 must be a path"):
        preset("timm", 32)([noise(4, 4), 17])


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (600, 500)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png cannot be read.*decompression bomb"):
        load_image(path)


def test_a_line_does_not_become_a_wall():
    with pytest.raises(InputError, match=r"image must not become larger.*crop it first"):
        preset("timm", 224)(Image.new("L", (60000, 1)))
    assert preset("hf", 224)(Image.new("L", (60000, 1))).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "must be uint8 with values 0..255, got float32"),
        (np.zeros((2, 4, 4, 3), np.int64), "must be uint8 with values 0..255, got int64"),
        (np.zeros((4, 4, 5), np.uint8), r"got shape \(4, 4, 5\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"image 0 must be uint8 \[H, W\].*got shape \(3, 4, 4\)"),
        (np.zeros((2, 4, 4, 3, 1), np.uint8), "an array must be"),
        (np.zeros((0, 4, 4, 3), np.uint8), "at least one image, got none"),
        ([], "at least one image, got none"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((1, 4, 0, 3), np.uint8), "at least one pixel"),
        (5, "must be an image or an iterable"),
    ],
)
def test_bad_arrays(images, message):
    with pytest.raises(InputError, match=message):
        preset("timm", 32)(images)


def test_stream_keeps_the_order_and_the_batch_size():
    p = Preprocess((8, 8), "none")
    images = [noise(8, 8, i) for i in range(11)]
    parts = list(stream(iter(images), p, 4))
    assert [len(part) for part in parts] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(parts), p(images))
    np.testing.assert_array_equal(np.concatenate(list(stream(np.stack(images), p, 5))), p(images))
    np.testing.assert_array_equal(next(stream(images[0], p, 5)), p(images[0]))
    assert list(stream([], p, 4)) == []
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        next(stream(images, p, 0))


def test_stream_reads_no_further_ahead_than_a_batch_and_its_threads():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield noise(8, 8, taken)

    batches = stream(endless(), Preprocess((8, 8), "none"), 3)
    for _ in range(4):
        next(batches)
    assert taken <= 4 * 3 + 3 + 4
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("swincupy-decode")]


def test_stream_leaves_out_bad_images_when_asked(tmp_path: Path):
    p, bad = Preprocess((8, 8), "none"), tmp_path / "bad.png"
    bad.write_bytes(b"?")
    images = [noise(8, 8, 0), bad, noise(8, 8, 1), bad, noise(8, 8, 2)]
    errors = {}
    parts = list(stream(images, p, 2, on_error=errors.__setitem__))
    assert sorted(errors) == [1, 3] and all("bad.png" in str(e) for e in errors.values())
    np.testing.assert_array_equal(np.concatenate(parts), p([images[0], images[2], images[4]]))
    with pytest.raises(InputError, match=r"bad\.png"):
        list(stream(images, p, 2))
