"""Names and shapes of parameters; what is computed from them once for a model, and once for an input size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from swincupy.config import SwinConfig
from swincupy.errors import ConfigError
from swincupy.ops import relative_position_bias
from swincupy.parameters import _bicubic, crop_table, fold, parameter_shapes, plan, resize_position_embedding
from tests.parity import recipe

SMALL = SwinConfig(
    img_size=32, embed_dim=12, depths=(2, 1), num_heads=(2, 3), window_size=4, num_classes=5
).with_conventions("microsoft")  # fmt: skip


def same(x: Any) -> Any:
    return x


def params(config: SwinConfig, **more: tuple[int, ...]) -> dict[str, np.ndarray]:
    return recipe.state_dict(parameter_shapes(config) | more, seed=1)


# Published numbers of parameters: microsoft's and timm's models.
PUBLISHED = [
    (dict(), 28_288_354, 173),
    (dict(num_classes=21841), 44_315_083, 173),
    (dict(depths=(2, 2, 18, 2)), 49_606_258, 329),
    (dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)), 87_768_224, 329),
    (dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12), 87_903_584, 329),
    (dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)), 196_532_476, 329),
    (dict(num_heads=(4, 8, 16, 32), window_size=8), 28_306_432, 173),
    (dict(version=2, window_size=8), 28_347_154, 221),
    (dict(version=2, depths=(2, 2, 18, 2), window_size=16), 49_728_418, 425),
    (dict(version=2, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=24), 196_739_932, 425),
]


@pytest.mark.parametrize(("fields", "count", "tensors"), PUBLISHED)
def test_published_sizes(fields: dict[str, Any], count: int, tensors: int) -> None:
    shapes = parameter_shapes(SwinConfig(**fields))
    assert sum(math.prod(s) for s in shapes.values()) == count
    assert len(shapes) == tensors


def test_optional_parameters() -> None:
    whole = set(parameter_shapes(SMALL))
    assert set(parameter_shapes(SMALL.replace(num_classes=0))) == whole - {"head.weight", "head.bias"}
    assert whole - set(parameter_shapes(SMALL.replace(patch_norm=False))) == {
        "patch_embed.norm.weight",
        "patch_embed.norm.bias",
    }
    assert len(whole) - len(parameter_shapes(SMALL.replace(qkv_bias=False))) == 3  # one a block
    v2 = SMALL.replace(version=2)
    assert len(parameter_shapes(v2)) - len(parameter_shapes(v2.replace(qkv_bias=False))) == 6  # q and v
    assert parameter_shapes(v2)["layers.0.downsample.norm.weight"] == (24,)
    assert parameter_shapes(SMALL)["layers.0.downsample.norm.weight"] == (48,)
    wide = SMALL.replace(window_size=((4, 6), 3), patch_size=(2, 4), in_chans=1)
    assert parameter_shapes(wide)["layers.0.blocks.1.attn.relative_position_bias_table"] == (7 * 11, 2)
    assert parameter_shapes(wide)["patch_embed.proj.weight"] == (12, 1, 2, 4)


def test_absolute_position_embedding_counts_whole_patches() -> None:
    assert parameter_shapes(SMALL.replace(ape=True, img_size=(33, 50)))["absolute_pos_embed"] == (1, 8 * 12, 12)
    assert parameter_shapes(SMALL.replace(ape=True, img_size=None))["absolute_pos_embed"] == (1, -1, 12)


# ---------------------------------------------------------------- fold


def test_fold_keeps_no_copies() -> None:
    """Weights that need no conversion are the stored arrays: Swin-L is in memory once."""
    stored = params(SMALL)
    folded = fold(stored, SMALL, lambda x: np.asarray(x, np.float32))
    arrays = [v for stage in folded["stages"] for b in stage["blocks"] for part in b.values() for v in part.values()]
    arrays += [v for stage in folded["stages"] for v in (stage["merge"] or {}).values()]
    arrays += [v for part in ("patch_embed", "norm", "head") for v in folded[part].values()]
    arrays = [v for v in arrays if isinstance(v, np.ndarray)]
    assert len(arrays) == len(stored)
    assert {id(v) for v in arrays} == {id(v) for v in stored.values()}


def test_fold_of_v2() -> None:
    """Keys have no bias; the logit scale is the factor itself, at most 100."""
    config = SMALL.replace(version=2)
    stored = params(config)
    stored["layers.0.blocks.0.attn.logit_scale"] = np.array([2.0, 50.0], np.float32).reshape(2, 1, 1)
    attn = fold(stored, config, lambda x: np.asarray(x, np.float32))["stages"][0]["blocks"][0]["attn"]
    assert (attn["qkv_bias"][:12] == stored["layers.0.blocks.0.attn.q_bias"]).all()
    assert (attn["qkv_bias"][12:24] == 0).all()
    assert (attn["qkv_bias"][24:] == stored["layers.0.blocks.0.attn.v_bias"]).all()
    np.testing.assert_allclose(attn["logit_scale"], [math.exp(2), 100], rtol=1e-6)
    assert (
        fold(params(config.replace(qkv_bias=False)), config.replace(qkv_bias=False), same)["stages"][0]["blocks"][0][
            "attn"
        ]["qkv_bias"]
        is None
    )


def test_norms_of_the_feature_maps() -> None:
    config = SMALL.replace(norm_eps=1e-3)
    both = params(config, **{"norm0.weight": (12,), "norm0.bias": (12,), "norm1.weight": (24,), "norm1.bias": (24,)})
    folded = fold(both, config, same)
    assert folded["level_norms"][1]["weight"] is both["norm1.weight"]
    assert folded["level_norms"][0]["eps"] == folded["level_norms"][1]["eps"] == 1e-5
    assert folded["norm"]["weight"] is both["norm.weight"] and folded["norm"]["eps"] == 1e-3
    without = {k: v for k, v in both.items() if not k.startswith(("norm.", "norm1."))}
    assert fold(without, config, same)["norm"] is None
    assert set(fold(without, config, same)["level_norms"]) == {0}
    plain = fold(params(config), config, same)
    assert plain["level_norms"] == {1: plain["norm"]}  # the final norm, with its own epsilon


# ---------------------------------------------------------------- plan


@pytest.mark.parametrize("built", [(7, 7), (4, 6)])
@pytest.mark.parametrize("window", [(7, 7), (4, 6), (4, 4), (1, 3), (1, 1)])
def test_crop_table_keeps_each_offset(built: tuple[int, int], window: tuple[int, int]) -> None:
    if any(m > b for m, b in zip(window, built, strict=True)):
        return
    table = np.random.default_rng(0).normal(size=((2 * built[0] - 1) * (2 * built[1] - 1), 3))
    whole = relative_position_bias(table, built).reshape(3, *built, *built)
    part = relative_position_bias(crop_table(table, built, window), window).reshape(3, *window, *window)
    mh, mw = window
    assert (part == whole[:, :mh, :mw, :mh, :mw]).all()


@pytest.mark.parametrize("version", [1, 2])
def test_plan(version: int) -> None:
    config = SMALL.replace(version=version, window_clamp="axis", clamp_at="input", pad_mode="roll_pad")
    weights = fold(params(config), config, lambda x: np.asarray(x, np.float32))
    kinds = []

    def convert(x: np.ndarray) -> np.ndarray:
        kinds.append(x.dtype)
        return np.asarray(x, np.float32)

    first = plan(weights, config, 36, 24, convert)  # 9 x 6, 5 x 3 tokens
    (even, odd), (last,) = first["stages"]
    assert even["mask"] is None and even["shift"] == (0, 0)
    assert odd["mask"].shape == (6, 16, 16) and odd["shift"] == (2, 2)
    assert last["window"] == (4, 3) and last["mask"] is None and last["position_bias"].shape == (3, 12, 12)
    assert {part["pad_mode"] for stage in first["stages"] for part in stage} == {"roll_pad"}
    assert np.dtype(np.float64) in kinds  # biases are computed in double precision and rounded once
    again = plan(weights, config, 100, 60, convert)
    assert again["stages"][0][0]["position_bias"] is even["position_bias"]  # computed once


def test_v2_position_bias_of_a_small_window_is_a_part_of_the_large() -> None:
    """With a pretrained window the bias is a function of the offset alone."""
    config = SMALL.replace(version=2, pretrained_window_sizes=6, window_clamp="axis", clamp_at="input")
    weights = fold(params(config), config, same)
    large = plan(weights, config, 32, 32, same)["stages"][0][0]["position_bias"].reshape(2, 4, 4, 4, 4)
    small = plan(weights, config, 12, 8, same)["stages"][0][0]["position_bias"].reshape(2, 3, 2, 3, 2)
    np.testing.assert_allclose(small, large[:, :3, :2, :3, :2], atol=1e-12)


# ---------------------------------------------------------------- absolute position embedding


def bicubic(values: list[float], new: int) -> list[float]:
    """One axis, literally: four taps around (i + 1/2) old / new - 1/2, a = -0.75, the edges repeated."""
    a, old, out = -0.75, len(values), []
    for i in range(new):
        x = (i + 0.5) * old / new - 0.5
        total = 0.0
        for tap in range(math.floor(x) - 1, math.floor(x) + 3):
            t = abs(x - tap)
            w = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            total += w * values[min(max(tap, 0), old - 1)]
        out.append(total)
    return out


@pytest.mark.parametrize(("old", "new"), [(8, 8), (8, 13), (8, 5), (3, 20), (1, 4), (5, 1)])
def test_bicubic(old: int, new: int) -> None:
    values = np.random.default_rng(0).normal(size=old)
    np.testing.assert_allclose(_bicubic(old, new) @ values, bicubic(values.tolist(), new), atol=1e-12)


@pytest.mark.parametrize("grid", [(8, 8), (5, 8), (8, 11), (13, 3)])
def test_resize_position_embedding(grid: tuple[int, int]) -> None:
    ape = np.random.default_rng(0).normal(size=(1, 64, 3)).astype(np.float32)
    got = resize_position_embedding(ape, SMALL.replace(ape=True), grid)
    assert got.shape == (1, *grid, 3)
    for c in range(3):
        rows = np.array([bicubic(row, grid[1]) for row in ape[0, :, c].astype(float).reshape(8, 8).tolist()])
        want = np.array([bicubic(column, grid[0]) for column in rows.T.tolist()]).T
        np.testing.assert_allclose(got[0, ..., c], want, atol=1e-12)


def test_position_embedding_of_an_image_that_is_no_multiple_of_the_patch() -> None:
    config = SMALL.replace(ape=True, img_size=(33, 50))
    ape = np.random.default_rng(0).normal(size=(1, 8 * 12, 12))
    assert (resize_position_embedding(ape, config, (8, 12)) == ape.reshape(1, 8, 12, 12)).all()
    assert resize_position_embedding(ape, config, (9, 13)).shape == (1, 9, 13, 12)


def test_position_embedding_of_an_unknown_image_is_square() -> None:
    config = SMALL.replace(ape=True, img_size=None)
    ape = np.random.default_rng(0).normal(size=(1, 64, 12))
    assert (resize_position_embedding(ape, config, (8, 8)) == ape.reshape(1, 8, 8, 12)).all()
    with pytest.raises(ConfigError, match="img_size must be the one that the 60 positions .* got None"):
        resize_position_embedding(ape[:, :60], config, (8, 8))
