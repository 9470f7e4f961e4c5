"""The forward pass: what it asks of the operations, and that any configuration runs on any size."""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swincupy import SwinConfig, SwinTransformer, forward
from swincupy.config import CONVENTIONS
from swincupy.ops import reference, tiled
from swincupy.parameters import fold, parameter_shapes, plan
from tests.parity import recipe

CONFIG = SwinConfig(
    img_size=32, embed_dim=8, depths=(2, 3, 1), num_heads=(1, 2, 4), window_size=2, num_classes=3
).with_conventions("microsoft")
BLOCKS = {1: ["attention_block", "mlp_block"], 2: ["cosine_attention_block", "mlp_block"]}


def recording(calls: list[str]) -> Any:
    """The reference operations, which write down their names."""

    def record(name: str) -> Any:
        def op(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(reference, name)(*args, **kwargs)

        return op

    return types.SimpleNamespace(**{name: record(name) for name in tiled.__all__})


def run(what: Any, config: SwinConfig, x: Any, ops: Any = reference, **options: Any) -> Any:
    weights = fold(recipe.state_dict(parameter_shapes(config), seed=1), config, lambda a: np.asarray(a, x.dtype))
    sized = plan(weights, config, *x.shape[2:], lambda a: np.asarray(a, x.dtype))
    z = forward.patches(x, weights, sized, ops)
    return what(z, weights, sized, forward.BLOCK[config.version], ops, **options)


@pytest.mark.parametrize("version", [1, 2])
def test_order_of_operations(version: int) -> None:
    calls: list[str] = []
    run(forward.logits, CONFIG.replace(version=version), recipe.images((1, 3, 32, 24), 1), recording(calls))
    block = BLOCKS[version]
    stages = [*block * 2, "patch_merge", *block * 3, "patch_merge", *block]
    assert [c for c in calls if c != "layer_norm"] == ["patch_embed", *stages, "global_pool", "linear"]


@pytest.mark.parametrize("version", [1, 2])
def test_features_stop_at_the_last_stage_asked_for(version: int) -> None:
    calls: list[str] = []
    x, config = recipe.images((1, 3, 32, 24), 1), CONFIG.replace(version=version)
    run(forward.features, config, x, recording(calls), wanted=(0,), norm=False)
    assert calls == ["patch_embed", *BLOCKS[version] * 2]


def test_features_in_the_order_asked_for() -> None:
    x = recipe.images((1, 3, 32, 24), 1)
    first, second, third = run(forward.features, CONFIG, x, wanted=(0, 1, 2), norm=False)
    assert [m.shape for m in (first, second, third)] == [(1, 8, 6, 8), (1, 4, 3, 16), (1, 2, 2, 32)]
    again = run(forward.features, CONFIG, x, wanted=(2, 0, 2), norm=False)
    assert all(np.array_equal(a, b) for a, b in zip(again, (third, first, third), strict=True))
    pooled = run(forward.features, CONFIG, x, wanted=(2,), norm=True)[0].mean(axis=(1, 2))
    np.testing.assert_allclose(run(forward.embed, CONFIG, x), pooled, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_every_parameter_counts(version: int) -> None:
    """Changing any array changes the logits: nothing is forgotten on the way."""
    config = CONFIG.replace(version=version, ape=True, depths=(2, 1), num_heads=(1, 2))
    params = recipe.state_dict(parameter_shapes(config), seed=1)
    x = recipe.images((1, 3, 32, 24), 1).astype(np.float64)

    def logits(changed: dict[str, Any]) -> Any:
        weights = fold(changed, config, lambda a: np.asarray(a, np.float64))
        sized = plan(weights, config, 32, 24, lambda a: np.asarray(a, np.float64))
        z = forward.patches(x, weights, sized, reference)
        return forward.logits(z, weights, sized, forward.BLOCK[version], reference)

    before = logits(params)
    for name, value in params.items():
        rough = np.random.default_rng(0).normal(size=value.shape)
        assert np.abs(logits({**params, name: value - np.abs(rough)}) - before).max() > 1e-9, name


# ---------------------------------------------------------------- any configuration, any size


@st.composite
def configs(draw: st.DrawFn) -> SwinConfig:
    stages = draw(st.integers(1, 3))
    heads = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=stages, max_size=stages))
    side = st.integers(1, 5)
    window = st.one_of(side, st.tuples(side, side))
    per_stage = st.lists(window, min_size=stages, max_size=stages).map(tuple)
    version = draw(st.sampled_from([1, 2]))
    config = SwinConfig(
        version=version,
        img_size=draw(st.one_of(st.none(), st.integers(1, 40), st.tuples(st.integers(8, 40), st.integers(8, 40)))),
        patch_size=draw(st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 5)))),
        in_chans=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(1, 7)),
        embed_dim=draw(st.sampled_from([4, 8, 12])),
        depths=tuple(draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages))),
        num_heads=tuple(heads),
        window_size=draw(st.one_of(side, per_stage)),
        mlp_ratio=draw(st.sampled_from([0.5, 1.0, 2.7, 4.0])),
        qkv_bias=draw(st.booleans()),
        ape=draw(st.booleans()),
        patch_norm=draw(st.booleans()),
        pretrained_window_sizes=draw(st.one_of(st.just(0), per_stage)) if version == 2 else 0,
    )
    if config.ape and (config.image is None or any(s < p for s, p in zip(config.image, config.patch, strict=True))):
        config = config.replace(img_size=(20, 20))  # the embedding needs positions
    config = config.with_conventions(draw(st.sampled_from(sorted(CONVENTIONS))))
    return config.replace(pad_mode=draw(st.sampled_from(["pad_roll", "roll_pad"])))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.integers(1, 3), st.tuples(st.integers(1, 45), st.integers(1, 45)))
def test_any_configuration_takes_any_size(config: SwinConfig, batch: int, size: tuple[int, int]) -> None:
    if config.patch_pad == "crop":  # less than one patch is refused, see test_model
        size = tuple(max(s, p) for s, p in zip(size, config.patch, strict=True))  # type: ignore[assignment]
    params = recipe.state_dict(parameter_shapes(config), seed=3)
    x = recipe.images((batch, config.in_chans, *size), seed=3)
    single, double = SwinTransformer(params, config), SwinTransformer(params, config, precision="fp64")

    def close(got: Any, want: Any) -> None:
        assert got.dtype == np.float32 and want.dtype == np.float64 and np.isfinite(got).all()
        # As a whole: a token of a few channels that hardly differ is blown up by its norm, V2's cosines by their scale.
        assert got.shape == want.shape and np.linalg.norm(got - want) <= 1e-3 * max(1.0, np.linalg.norm(want))

    logits = single(x)
    assert logits.shape == (batch, config.num_classes)
    close(logits, double(x))
    rounded = (lambda a, b: a // b) if config.patch_pad == "crop" else (lambda a, b: math.ceil(a / b))
    grid = [rounded(s, p) for s, p in zip(size, config.patch, strict=True)]
    maps = single.features(x)
    for i, (got, want) in enumerate(zip(maps, double.features(x), strict=True)):
        assert got.shape == (batch, config.dims[i], *(math.ceil(s / 2**i) for s in grid))
        close(got, want)
