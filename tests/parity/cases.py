"""What is compared: one table of small models, each with the source it comes from and an input's shape."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from swincupy import SwinConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    ``config`` is what the source's model is built from and what `swincupy.load` is told; the
    conventions it leaves open are for the loader to find. ``options`` are arguments of the source
    alone. ``stored`` cases are kept as goldens.
    """

    name: str
    source: str
    config: SwinConfig
    shape: tuple[int, int, int, int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stored: bool = False
    seed: int = 0


def _case(name: str, config: dict[str, Any], shape: tuple[int, int, int, int], **more: Any) -> Case:
    source = name.split("-v")[0]
    fields = dict(embed_dim=16, num_classes=10, in_chans=shape[1]) | config
    if source in ("huggingface-backbone", "detection") or (source == "openmmlab" and not more.get("options")):
        fields["num_classes"] = 0
    return Case(name, source, SwinConfig(**fields), shape, **more)


def _v1(depths: tuple[int, ...] = (2, 2, 2), heads: tuple[int, ...] | None = None, **more: Any) -> dict[str, Any]:
    return dict(version=1, depths=depths, num_heads=heads or (1, 2, 4, 8)[: len(depths)], **more)


def _v2(depths: tuple[int, ...] = (2, 2, 2), heads: tuple[int, ...] | None = None, **more: Any) -> dict[str, Any]:
    return _v1(depths, heads, **more) | dict(version=2)


MICROSOFT = [
    _case("microsoft-v1-window7", _v1(img_size=112, window_size=7), (1, 3, 112, 112), stored=True),
    _case("microsoft-v1-window7-224", _v1((2, 2, 4, 2), img_size=224, window_size=7), (1, 3, 224, 224)),
    _case(
        "microsoft-v1-window12-head24",  # stages of 24, 12 and 6 tokens: shifted, one window, clamped
        _v1(img_size=96, window_size=12, embed_dim=24),
        (1, 3, 96, 96),
        stored=True,
    ),
    _case(
        "microsoft-v1-everything-else",
        _v1(
            (1, 3, 2), (2, 4, 4), img_size=(64, 128), window_size=4, ape=True, qkv_bias=False, mlp_ratio=3.0,
            patch_norm=False, num_classes=7,
        ),
        (2, 3, 64, 128),
        stored=True,
    ),
    _case("microsoft-v1-patch2x4-gray", _v1(img_size=(32, 64), patch_size=(2, 4), window_size=4), (3, 1, 32, 64)),
    _case("microsoft-v1-one-stage", _v1((3,), (2,), img_size=32, window_size=4), (1, 3, 32, 32)),
    _case("microsoft-v1-even-window", _v1((2, 2), img_size=48, window_size=6), (2, 3, 48, 48)),
    _case(
        "microsoft-v1-five-stages",
        _v1((1, 1, 1, 2, 2), (1, 1, 2, 2, 4), img_size=128, window_size=4),
        (1, 3, 128, 128),
    ),
    _case("microsoft-v1-window1", _v1((2, 2), img_size=16, window_size=1), (1, 3, 16, 16)),
    _case("microsoft-v1-ratio2.5", _v1((2, 2), img_size=32, window_size=4, mlp_ratio=2.5), (1, 3, 32, 32)),
    _case("microsoft-v2-window8", _v2((2, 2, 2, 2), img_size=128, window_size=8), (1, 3, 128, 128), stored=True),
    _case("microsoft-v2-window16", _v2(img_size=128, window_size=16), (1, 3, 128, 128), stored=True),
    _case(
        "microsoft-v2-pretrained",
        _v2((2, 2, 2, 2), img_size=128, window_size=8, pretrained_window_sizes=(6, 6, 6, 3)),
        (1, 3, 128, 128),
        stored=True,
    ),
    _case(
        "microsoft-v2-everything-else",
        _v2(
            (1, 3, 2), (2, 4, 4), img_size=(64, 128), window_size=4, ape=True, qkv_bias=False, mlp_ratio=3.0,
            patch_norm=False,
        ),
        (2, 3, 64, 128),
        stored=True,
    ),
]  # fmt: skip

TIMM = [
    _case("timm-v1-square", _v1((2, 2, 2, 2), img_size=96, window_size=7), (1, 3, 96, 96), stored=True),
    _case("timm-v1-rectangle", _v1((2, 2, 2, 2), img_size=(100, 140), window_size=7), (1, 3, 100, 140), stored=True),
    _case(
        "timm-v1-tall",  # the last stages are narrower than the window on one axis only
        _v1(img_size=(132, 44), window_size=5),
        (2, 3, 132, 44),
    ),
    _case(
        "timm-v1-dynamic",
        _v1(img_size=64, window_size=4),
        (1, 3, 92, 124),
        options=dict(strict_img_size=False),
        stored=True,
    ),
    _case(
        "timm-v1-dynamic-small",
        _v1(img_size=64, window_size=4),
        (1, 3, 36, 20),
        options=dict(strict_img_size=False),
    ),
    _case("timm-v1-s3", _v1((2, 2, 2, 2), img_size=224, window_size=(7, 7, 14, 7)), (1, 3, 224, 224)),
    _case("timm-v1-s3-small", _v1((2, 2, 2), img_size=96, window_size=(4, 6, 3)), (1, 3, 96, 96), stored=True),
    _case(
        "timm-v1-always-partition",
        _v1(img_size=(60, 44), window_size=5, window_clamp="never"),
        (1, 3, 60, 44),
        options=dict(always_partition=True),
    ),
    _case(
        "timm-v1-rectangular-windows",
        _v1(img_size=(64, 72), window_size=((4, 6), (4, 5), (2, 3))),
        (1, 3, 64, 72),
    ),
    _case(
        "timm-v1-head24-nobias",
        _v1((2, 2), (2, 2), img_size=48, window_size=6, embed_dim=48, qkv_bias=False),
        (1, 3, 48, 48),
    ),
    _case("timm-v2-square", _v2((2, 2, 2, 2), img_size=128, window_size=8), (1, 3, 128, 128)),
    _case("timm-v2-rectangle", _v2((2, 2, 2, 2), img_size=(100, 140), window_size=7), (1, 3, 100, 140), stored=True),
    _case(
        "timm-v2-pretrained-dynamic",
        _v2(img_size=96, window_size=8, pretrained_window_sizes=(6, 6, 3)),
        (2, 3, 84, 120),
        options=dict(strict_img_size=False),
        stored=True,
    ),
    _case("timm-v2-stage-windows", _v2(img_size=64, window_size=(4, 6, 3), qkv_bias=False), (1, 3, 64, 64)),
    _case(
        "timm-v2-always-partition",
        _v2(img_size=(60, 44), window_size=5, window_clamp="never"),
        (1, 3, 60, 44),
        options=dict(always_partition=True),
    ),
]  # fmt: skip

HUGGINGFACE = [
    _case("huggingface-v1-square", _v1(img_size=64, window_size=4), (1, 3, 64, 64)),
    _case("huggingface-v1-odd", _v1(img_size=48, window_size=3), (1, 3, 45, 61), stored=True),
    _case("huggingface-v1-batch", _v1(img_size=64, window_size=5, qkv_bias=False, mlp_ratio=2.0), (3, 3, 83, 107)),
    _case("huggingface-v1-wide", _v1((2, 2), img_size=64, window_size=7), (1, 3, 53, 190), stored=True),
    _case("huggingface-v1-ape", _v1(img_size=64, window_size=4, ape=True), (1, 3, 64, 64)),
    _case("huggingface-v1-eps", _v1((2, 2), img_size=32, window_size=4, norm_eps=1e-2), (1, 3, 32, 32)),
    _case("huggingface-v2-square", _v2(img_size=64, window_size=4), (1, 3, 64, 64)),
    _case("huggingface-v2-odd", _v2(img_size=64, window_size=5), (1, 3, 45, 61), stored=True),
    _case("huggingface-v2-build-rounds-down", _v2(img_size=60, window_size=7), (1, 3, 71, 53), stored=True),
    _case(
        "huggingface-v2-pretrained",
        _v2(img_size=96, window_size=8, pretrained_window_sizes=(6, 6, 3), qkv_bias=False, norm_eps=1e-2),
        (2, 3, 83, 107),
    ),
    _case("huggingface-v2-built-tall", _v2(img_size=(96, 44), window_size=7), (1, 3, 90, 61)),
    _case("huggingface-v2-built-wide", _v2(img_size=(44, 96), window_size=7), (1, 3, 90, 61)),
    _case("huggingface-backbone-v1-norms", _v1(img_size=64, window_size=4), (1, 3, 45, 61), stored=True),
    _case("huggingface-backbone-v1-small", _v1(img_size=64, window_size=7), (2, 3, 47, 30)),
    _case("huggingface-backbone-v2", _v2(img_size=64, window_size=5), (1, 3, 45, 61)),
]

TORCHVISION = [
    _case("torchvision-v1-even", _v1(img_size=None, window_size=7), (1, 3, 112, 112)),
    _case("torchvision-v1-odd", _v1((2, 2, 2, 2), img_size=None, window_size=7), (1, 3, 97, 139), stored=True),
    _case("torchvision-v1-small", _v1(img_size=None, window_size=7), (2, 3, 31, 90)),
    _case("torchvision-v1-rectangular-window", _v1(img_size=None, window_size=((4, 6),) * 3), (1, 3, 75, 110)),
    _case("torchvision-v2-even", _v2(img_size=None, window_size=8), (1, 3, 128, 128)),
    _case("torchvision-v2-odd", _v2((2, 2, 2, 2), img_size=None, window_size=8), (1, 3, 97, 139), stored=True),
    _case("torchvision-v2-small", _v2(img_size=None, window_size=8), (2, 3, 31, 90)),
]

OPENMMLAB = [
    _case("openmmlab-v1-detection", _v1(img_size=64, window_size=4), (1, 3, 45, 61), stored=True),
    _case("openmmlab-v1-small", _v1(img_size=64, window_size=7), (1, 3, 47, 30)),
    _case("openmmlab-v1-classification", _v1(img_size=64, window_size=4), (1, 3, 64, 64), options=dict(head=True)),
]

DETECTION = [_case("detection-v1-small", _v1(img_size=64, window_size=7), (1, 3, 47, 30))]

CASES = MICROSOFT + TIMM + HUGGINGFACE + TORCHVISION + OPENMMLAB + DETECTION


def drawn(source: str, version: int, seed: int) -> Case:
    """A case drawn at random within what the source supports, the same for the same arguments."""
    r = random.Random(f"{source}-{version}-{seed}")
    stages = r.choice((1, 2, 3, 4))
    heads = tuple(r.choice((1, 2, 4)) for _ in range(stages))
    config = dict(
        version=version,
        depths=tuple(r.choice((1, 2, 3)) for _ in range(stages)),
        num_heads=heads,
        embed_dim=r.choice((12, 16, 24)),
        mlp_ratio=r.choice((1.0, 2.5, 4.0)),
        num_classes=r.choice((5, 33)),
    )
    if source == "microsoft":  # sides that windows and merging divide
        window, n = r.choice((2, 3, 4, 5)), 2 ** (stages - 1)
        sides = (window * n * r.choice((1, 2)), window * n * r.choice((2, 3)))
        if r.random() < 0.3:
            sides = (sides[0], sides[0])
        shape = (r.choice((1, 2)), r.choice((1, 3, 4)), 4 * sides[0], 4 * sides[1])
        config |= dict(window_size=window, img_size=shape[2:], qkv_bias=r.random() < 0.7, ape=r.random() < 0.5)
        config |= dict(patch_norm=r.random() < 0.7)
        if version == 2:
            config |= dict(pretrained_window_sizes=r.choice((0, tuple(r.choice((0, 2, 6)) for _ in range(stages)))))
    elif source == "timm":
        built = (4 * r.randint(5, 30), 4 * r.randint(5, 30))
        strict = r.random() < 0.5
        shape = (
            r.choice((1, 2)),
            r.choice((1, 3)),
            *(built if strict else (4 * r.randint(5, 30), 4 * r.randint(5, 30))),
        )
        config |= dict(img_size=built, window_size=tuple(r.randint(2, 9) for _ in range(stages)))
        config |= dict(qkv_bias=r.random() < 0.7)
        if version == 2:
            config |= dict(pretrained_window_sizes=tuple(r.choice((0, 2, 6)) for _ in range(stages)))
        return _case(f"timm-v{version}-drawn{seed}", config, shape, options=dict(strict_img_size=strict), seed=seed)
    elif source == "torchvision":
        shape = (r.choice((1, 2)), 3, r.randint(20, 130), r.randint(20, 130))
        config |= dict(img_size=None, window_size=((r.randint(2, 8), r.randint(2, 8)),) * stages)
        config |= dict(depths=tuple(d + (stages == 1) for d in config["depths"]))  # it divides by blocks - 1
    else:
        window = r.randint(2, 7)
        least = window * 4 * 2 ** (stages - 1) if version == 1 else 20  # Hugging Face's V1 fails below a window
        shape = (r.choice((1, 2)), r.choice((1, 3)), r.randint(least, least + 70), r.randint(least, least + 70))
        config |= dict(window_size=window, img_size=4 * r.randint(8, 24), qkv_bias=r.random() < 0.7)
        config |= dict(embed_dim=16 if source == "openmmlab" else config["embed_dim"])
    return _case(f"{source}-v{version}-drawn{seed}", config, shape, seed=seed)
