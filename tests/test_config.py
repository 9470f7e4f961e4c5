"""SwinConfig refuses what no model has, and stage_geometry follows each source's rules."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from swincupy.config import CONVENTIONS, SwinConfig, flops, stage_geometry
from swincupy.errors import ConfigError, SwincupyError
from swincupy.registry import named_config

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"version": 3}, "version must be 1 or 2, got 3"),
    ({"version": True}, "version must be 1 or 2, got True"),
    ({"version": "1"}, "version must be 1 or 2, got '1'"),
    ({"depths": ()}, "depths must be a non-empty tuple of positive integers, one for each stage, got ()"),
    ({"depths": (2, 0, 2, 2)}, "depths must be a non-empty tuple of positive integers"),
    ({"depths": 2}, "depths must be a non-empty tuple of positive integers, one for each stage, got 2"),
    ({"depths": (2, 2.0, 2, 2)}, "depths must be"),
    ({"num_heads": (3, 6, -12, 24)}, "num_heads must be a non-empty tuple of positive integers"),
    ({"num_heads": (3, 6)}, "num_heads must be as long as depths (4 stages), got (3, 6)"),
    ({"num_heads": (3, 7, 12, 24)}, "num_heads must be a divisor of the 192 channels in stage 1, got (3, 7, 12, 24)"),
    ({"embed_dim": 0}, "embed_dim must be a positive integer, got 0"),
    ({"embed_dim": 96.0}, "embed_dim must be a positive integer, got 96.0"),
    ({"in_chans": -3}, "in_chans must be a positive integer, got -3"),
    ({"num_classes": -1}, "num_classes must be an integer >= 0 (0: no head), got -1"),
    ({"num_classes": None}, "num_classes must be an integer >= 0"),
    ({"mlp_ratio": 0}, "mlp_ratio must be a positive number, got 0"),
    ({"mlp_ratio": float("nan")}, "mlp_ratio must be a positive number, got nan"),
    ({"mlp_ratio": float("inf")}, "mlp_ratio must be a positive number, got inf"),
    ({"mlp_ratio": "4"}, "mlp_ratio must be a positive number, got '4'"),
    ({"mlp_ratio": 0.01}, "mlp_ratio must be large enough for one hidden channel, got 0.01"),
    ({"norm_eps": -1e-5}, "norm_eps must be a number in [0, 1), got -1e-05"),
    ({"norm_eps": 1}, "norm_eps must be a number in [0, 1), got 1"),
    ({"norm_eps": float("nan")}, "norm_eps must be a number in [0, 1), got nan"),
    ({"qkv_bias": 1}, "qkv_bias must be True or False, got 1"),
    ({"ape": None}, "ape must be True or False, got None"),
    ({"patch_norm": "yes"}, "patch_norm must be True or False, got 'yes'"),
    ({"patch_size": 0}, "patch_size must be positive, got 0"),
    ({"patch_size": (4, -4)}, "patch_size must be positive, got (4, -4)"),
    ({"patch_size": 4.0}, "patch_size must be an integer or a pair (height, width) of integers, got 4.0"),
    ({"patch_size": (4, 4, 4)}, "patch_size must be an integer or a pair"),
    ({"patch_size": None}, "patch_size must be an integer or a pair"),
    ({"img_size": 0}, "img_size must be positive, or None, got 0"),
    ({"img_size": (224,)}, "img_size must be an integer or a pair"),
    ({"img_size": True}, "img_size must be an integer or a pair"),
    ({"window_size": 0}, "window_size must be positive, got 0"),
    ({"window_size": (7, 7)}, "window_size must be one integer, or one integer or pair for each of the 4 stages, got"),
    ({"window_size": (7, 7, 7, (7, 0))}, "window_size must be positive"),
    ({"window_size": (7, 7, 7, "7")}, "window_size must be an integer or a pair"),
    ({"window_size": 7.5}, "window_size must be one integer"),
    ({"pretrained_window_sizes": -1}, "pretrained_window_sizes must be >= 0 (0: the window itself), got -1"),
    ({"pretrained_window_sizes": (12, 12, 6)}, "pretrained_window_sizes must be one integer, or one integer or pair"),
    ({"window_clamp": "max"}, "window_clamp must be 'min' or 'axis' or 'height' or 'padded' or 'never' (None: the"),
    ({"clamp_at": "load"}, "clamp_at must be 'input' or 'build' or 'build_floor' (None: the source's own), got 'load'"),
    ({"pad_mode": "roll"}, "pad_mode must be 'pad_roll' or 'roll_pad' (None: the source's own), got 'roll'"),
    ({"patch_pad": True}, "patch_pad must be 'pad' or 'crop' (None: the source's own), got True"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_refuses(fields: dict[str, Any], message: str) -> None:
    for make in (lambda: SwinConfig(**fields), lambda: SwinConfig().replace(**fields)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value).startswith("SwinConfig: ")
        assert message in str(caught.value)
        assert isinstance(caught.value, SwincupyError) and isinstance(caught.value, ValueError)


def test_every_field_is_checked() -> None:
    assert {name for fields, _ in WRONG for name in fields} == {f.name for f in dataclasses.fields(SwinConfig)}


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown field drop_path_rate, qk_scale; the fields are ape, "):
        SwinConfig.from_dict({"qk_scale": None, "drop_path_rate": 0.1})
    with pytest.raises(ConfigError, match="no field named window; the fields are "):
        SwinConfig().replace(window=7)
    with pytest.raises(ConfigError, match="source must be one of microsoft, timm, .*, got 'keras'"):
        SwinConfig().with_conventions("keras")


CONFIGS = [
    SwinConfig(),
    SwinConfig(version=2, img_size=None, window_size=16, pretrained_window_sizes=(12, 12, 12, 6), num_classes=0),
    SwinConfig(img_size=(192, 256), patch_size=(2, 4), window_size=(7, (7, 14), (14, 7), 7), mlp_ratio=2.5, ape=True),
    SwinConfig(depths=(1,), num_heads=(8,), window_size=((4, 6),), pretrained_window_sizes=((8, 12),), version=2),
    SwinConfig().with_conventions("timm"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config: SwinConfig) -> None:
    again = SwinConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SwinConfig().version = 2  # type: ignore[misc]


def test_properties() -> None:
    config = SwinConfig(
        embed_dim=24, depths=[1, 2, 3], num_heads=[2, 4, 8], img_size=[64, 96], patch_size=2, mlp_ratio=2.6,
        window_size=[7, [3, 5], (2, 4)], pretrained_window_sizes=[0, 12, [6, 0]],
    )  # fmt: skip
    assert config.num_stages == 3 and config.dims == (24, 48, 96) and config.num_features == 96
    assert config.windows == ((7, 7), (3, 5), (2, 4))
    assert config.pretrained_windows == ((0, 0), (12, 12), (6, 0))
    assert config.patch == (2, 2) and config.image == (64, 96)
    assert [config.hidden_dim(i) for i in range(3)] == [62, 124, 249]  # int(C * 2.6)
    assert config.replace(img_size=None).image is None


@pytest.mark.parametrize("source", CONVENTIONS)
def test_conventions_fill_what_is_open_only(source: str) -> None:
    filled = SwinConfig(pad_mode="roll_pad", patch_pad="crop").with_conventions(source)
    assert (filled.pad_mode, filled.patch_pad) == ("roll_pad", "crop")
    assert (filled.window_clamp, filled.clamp_at) == (
        CONVENTIONS[source]["window_clamp"],
        CONVENTIONS[source]["clamp_at"],
    )
    assert filled.with_conventions("torchvision") == filled


# ---------------------------------------------------------------- grids, windows, shifts

# Of a model of windows 7 for 224 pixels: (grid, window, shift) of each stage.
FULL = [((56, 56), (7, 7), (3, 3)), ((28, 28), (7, 7), (3, 3)), ((14, 14), (7, 7), (3, 3))]
GEOMETRY: list[tuple[dict[str, Any], tuple[int, int], list[Any]]] = [
    ({"window_clamp": "min"}, (224, 224), [*FULL, ((7, 7), (7, 7), (0, 0))]),
    ({"window_clamp": "axis"}, (224, 224), [*FULL, ((7, 7), (7, 7), (0, 0))]),
    ({"window_clamp": "height"}, (224, 224), [*FULL, ((7, 7), (7, 7), (0, 0))]),
    ({"window_clamp": "padded"}, (224, 224), [*FULL, ((7, 7), (7, 7), (0, 0))]),
    ({"window_clamp": "never"}, (224, 224), [*FULL, ((7, 7), (7, 7), (3, 3))]),
    # 37 x 100 pixels: 10 x 25, 5 x 13, 3 x 7, 2 x 4 tokens
    ({"window_clamp": "min"}, (37, 100), [
        ((10, 25), (7, 7), (3, 3)), ((5, 13), (5, 5), (0, 0)), ((3, 7), (3, 3), (0, 0)), ((2, 4), (2, 2), (0, 0)),
    ]),
    ({"window_clamp": "min"}, (100, 37), [
        ((25, 10), (7, 7), (3, 3)), ((13, 5), (5, 5), (0, 0)), ((7, 3), (3, 3), (0, 0)), ((4, 2), (2, 2), (0, 0)),
    ]),
    ({"window_clamp": "axis", "clamp_at": "input"}, (37, 100), [
        ((10, 25), (7, 7), (3, 3)), ((5, 13), (5, 7), (0, 3)), ((3, 7), (3, 7), (0, 0)), ((2, 4), (2, 4), (0, 0)),
    ]),
    ({"window_clamp": "height", "clamp_at": "input"}, (37, 100), [
        ((10, 25), (7, 7), (3, 3)), ((5, 13), (5, 5), (0, 0)), ((3, 7), (3, 3), (0, 0)), ((2, 4), (2, 2), (0, 0)),
    ]),
    ({"window_clamp": "height", "clamp_at": "input"}, (100, 37), [
        ((25, 10), (7, 7), (3, 3)), ((13, 5), (7, 7), (3, 3)), ((7, 3), (7, 7), (0, 0)), ((4, 2), (4, 4), (0, 0)),
    ]),
    ({"window_clamp": "padded"}, (37, 100), [
        ((10, 25), (7, 7), (3, 3)), ((5, 13), (7, 7), (0, 3)), ((3, 7), (7, 7), (0, 0)), ((2, 4), (7, 7), (0, 0)),
    ]),
    ({"window_clamp": "never"}, (37, 100), [
        ((10, 25), (7, 7), (3, 3)), ((5, 13), (7, 7), (3, 3)), ((3, 7), (7, 7), (3, 3)), ((2, 4), (7, 7), (3, 3)),
    ]),
    # judged by the size the model was built for: 37 x 100 tells 5 x 13 for the second stage, 4 x 12 rounding down
    ({"window_clamp": "axis", "clamp_at": "build", "img_size": (37, 100)}, (224, 224), [
        ((56, 56), (7, 7), (3, 3)), ((28, 28), (5, 7), (0, 3)), ((14, 14), (3, 7), (0, 0)), ((7, 7), (2, 4), (0, 0)),
    ]),
    ({"window_clamp": "height", "clamp_at": "build_floor", "img_size": (37, 100)}, (224, 224), [
        ((56, 56), (7, 7), (3, 3)), ((28, 28), (4, 4), (0, 0)), ((14, 14), (2, 2), (0, 0)), ((7, 7), (1, 1), (0, 0)),
    ]),
    ({"window_clamp": "axis", "clamp_at": "build", "img_size": 224}, (37, 100), [
        ((10, 25), (7, 7), (3, 3)), ((5, 13), (7, 7), (3, 3)), ((3, 7), (7, 7), (3, 3)), ((2, 4), (7, 7), (0, 0)),
    ]),
    ({"window_clamp": "axis", "clamp_at": "build", "img_size": None}, (37, 100), [  # unknown: the input's
        ((10, 25), (7, 7), (3, 3)), ((5, 13), (5, 7), (0, 3)), ((3, 7), (3, 7), (0, 0)), ((2, 4), (2, 4), (0, 0)),
    ]),
    ({"patch_pad": "crop", "window_clamp": "padded"}, (39, 103), [  # 9 x 25 tokens
        ((9, 25), (7, 7), (3, 3)), ((5, 13), (7, 7), (0, 3)), ((3, 7), (7, 7), (0, 0)), ((2, 4), (7, 7), (0, 0)),
    ]),
    # even windows, one for each stage, not square
    ({"window_size": (8, (2, 6), (4, 1), (3, 3)), "window_clamp": "axis", "clamp_at": "input"}, (64, 48), [
        ((16, 12), (8, 8), (4, 4)), ((8, 6), (2, 6), (1, 0)), ((4, 3), (4, 1), (0, 0)), ((2, 2), (2, 2), (0, 0)),
    ]),
    ({"window_size": ((8, 3), 7, 7, 7), "window_clamp": "min"}, (64, 16), [
        ((16, 4), (8, 3), (4, 1)), ((8, 2), (2, 2), (0, 0)), ((4, 1), (1, 1), (0, 0)), ((2, 1), (1, 1), (0, 0)),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "size", "want"), GEOMETRY)
def test_stage_geometry(fields: dict[str, Any], size: tuple[int, int], want: list[Any]) -> None:
    geometry = stage_geometry(SwinConfig(**fields), *size)
    assert [(g.grid, g.window, g.shift) for g in geometry] == want


@pytest.mark.parametrize("source", CONVENTIONS)
@pytest.mark.parametrize("img_size", [None, 1, 3, 16, (224, 20)])
@pytest.mark.parametrize("size", [(1, 1), (3, 500), (20, 20)])
def test_there_is_always_a_window(source: str, img_size: Any, size: tuple[int, int]) -> None:
    """Also where rounding down leaves no token of the size that a model was built for."""
    for window in (7, (1, 4), (9, 2)):
        config = SwinConfig(img_size=img_size, window_size=(window,) * 4).with_conventions(source)
        for clamp in ("min", "axis", "height", "padded", "never"):
            for g in stage_geometry(config.replace(window_clamp=clamp), *size):
                assert min(*g.grid, *g.window) >= 1
                assert all(0 <= s < m for s, m in zip(g.shift, g.window, strict=True))


@pytest.mark.parametrize(
    "name, gmacs",
    [
        ("swin_tiny_patch4_window7_224", 4.5),  # published
        ("swin_small_patch4_window7_224", 8.7),
        ("swin_base_patch4_window7_224", 15.4),
        ("swin_large_patch4_window7_224", 34.5),
        ("swin_base_patch4_window12_384", 47.0),
        ("swin_large_patch4_window12_384", 103.9),
        ("swinv2_tiny_window8_256", 5.9),
        ("swinv2_base_window16_256", 21.8),
    ],
)
def test_flops(name: str, gmacs: float) -> None:
    config = named_config(name)
    assert flops(config, *config.image) / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_flops_of_a_model_by_hand() -> None:
    """One block on 2 x 3 tokens, windows of 2 x 2, without a head."""
    config = SwinConfig(
        img_size=(8, 12), embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2, num_classes=0, mlp_ratio=2.0
    )
    embed, merge = 6 * 8 * 3 * 16, 2 * 32 * 16
    first = 6 * (4 * 64 + 2 * 4 * 8 + 2 * 8 * 16)
    second = 2 * (4 * 256 + 2 * 1 * 16 + 2 * 16 * 32)  # 1 x 2 tokens: the window becomes 1 x 1
    assert flops(config, 8, 12) == 2 * (embed + merge + first + second)
    assert flops(config.replace(num_classes=5), 8, 12) - flops(config, 8, 12) == 2 * 16 * 5
