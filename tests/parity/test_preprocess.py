"""The presets against the transforms of timm, torchvision and transformers, pixel for pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with libraries of torch")

from PIL import Image

from swincupy.preprocess import IMAGENET_MEAN, IMAGENET_STD, preset
from swincupy.registry import named_config
from tests.parity import references

pytestmark = pytest.mark.parity

SHAPES = [(333, 517), (517, 333), (224, 224), (100, 90), (90, 301), (401, 401), (1, 7), (20, 900)]


def library(name: str) -> Any:
    try:
        return references._library(name)
    except references.Missing as missing:
        pytest.skip(str(missing))


def compare(reference: Callable[[Image.Image], np.ndarray], ours: Callable[[Image.Image], np.ndarray]) -> None:
    for seed, (height, width) in enumerate(SHAPES):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        np.testing.assert_allclose(ours(image)[0], reference(image), rtol=0, atol=1e-6, err_msg=f"{height} x {width}")


@pytest.mark.parametrize("size", [160, 192, 224, 256, 384, (200, 320)], ids=str)
def test_timm(size: Any) -> None:
    library("timm")
    from timm.data.transforms_factory import transforms_imagenet_eval

    crop_pct = 1.0 if size == 384 else 0.9
    transform = transforms_imagenet_eval(size, crop_pct, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    compare(lambda image: transform(image).numpy(), preset("timm", size))


@pytest.mark.parametrize("size", [192, 224, 256, 384])
def test_microsoft(size: int) -> None:
    library("torchvision")
    from torchvision import transforms as t

    bicubic = t.InterpolationMode.BICUBIC
    if size == 384:
        steps = [t.Resize((size, size), interpolation=bicubic)]
    else:
        steps = [t.Resize(int((256 / 224) * size), interpolation=bicubic), t.CenterCrop(size)]
    transform = t.Compose([*steps, t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    compare(lambda image: transform(image).numpy(), preset("ms", size))


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"])
def test_torchvision(name: str) -> None:
    models = library("torchvision").models
    transform = models.get_model_weights(name).DEFAULT.transforms()
    config = named_config(name)
    compare(lambda image: transform(image).numpy(), preset("torchvision", config.image, config))


@pytest.mark.parametrize("size", [224, 256])
def test_huggingface(size: int) -> None:
    transformers = library("transformers")
    # newer releases call the processor that works on Pillow images so; the other one resizes tensors
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    processor = kind(size={"height": size, "width": size}, resample=3, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    compare(lambda image: processor(image, return_tensors="np")["pixel_values"][0], preset("hf", size))
