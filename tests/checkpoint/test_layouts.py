"""Every layout comes out canonical, bit by bit, with its configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from swincupy.checkpoint import read_checkpoint
from swincupy.config import SwinConfig
from swincupy.errors import CheckpointError
from tests.checkpoint import writers
from tests.checkpoint.writers import V1, V2, Params, random_params

WRITERS = {
    "microsoft": writers.microsoft,
    "timm": writers.timm,
    "huggingface": writers.huggingface,
    "torchvision": writers.torchvision,
    "openmmlab": writers.openmmlab,
}


def assert_same(found: Params, expected: Params) -> None:
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
def test_layout_becomes_canonical(layout: str, config: SwinConfig, bias: bool) -> None:
    config = config.replace(qkv_bias=bias or layout == "torchvision")  # torchvision always has them
    params = random_params(config)
    found = read_checkpoint(WRITERS[layout](params, config), config=config)
    assert found.layout == layout
    assert_same(found.params, params)
    key = "huggingface-v2" if (layout, config.version) == ("huggingface", 2) else layout
    assert found.config == conventional(config, key)


def conventional(config: SwinConfig, key: str) -> SwinConfig:
    """With a layout's conventions; OpenMMLab's classifiers clamp windows, unlike its detection backbones."""
    return (config.replace(window_clamp="min") if key == "openmmlab" else config).with_conventions(key)


@pytest.mark.parametrize("layout", WRITERS)
def test_v1_needs_no_config(layout: str) -> None:
    config = V1.replace(window_size=(7, 5, 3), mlp_ratio=2.5, patch_size=(2, 4), in_chans=2, qkv_bias=True)
    found = read_checkpoint(WRITERS[layout](random_params(config), config.replace(img_size=None)))
    assert found.config == conventional(config.replace(img_size=None), layout)


@pytest.mark.parametrize("names", ["v4", "v5"])
@pytest.mark.parametrize("prefix", ["swin.", "", "module.swin."])
def test_hugging_face_names(names: str, prefix: str) -> None:
    params = random_params(V1)
    arrays = writers.huggingface(params, V1, names, prefix)
    if prefix.startswith("module."):
        arrays = {k if k.startswith("module.") else f"module.{k}": v for k, v in arrays.items()}
    assert_same(read_checkpoint(arrays).params, params)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone.", "model.", "encoder."])
def test_prefixes_go(prefix: str) -> None:
    params = random_params(V1)
    root = prefix[: prefix[:-1].rfind(".") + 1]
    for head in (prefix, root):
        arrays = {(head if k.startswith("head.") else prefix) + k: v for k, v in params.items()}
        assert_same(read_checkpoint(arrays).params, params)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "state_dict_ema"])
def test_wrappers_go(wrapper: str) -> None:
    params = random_params(V1)
    assert_same(read_checkpoint({wrapper: params, "epoch": 3, "optimizer": {"state": {}}}).params, params)


def test_averaged_weights_are_preferred() -> None:
    params = random_params(V1)
    both = {"state_dict": random_params(V1, seed=1), "state_dict_ema": params}
    assert_same(read_checkpoint(both).params, params)


def test_simmim_pretraining() -> None:
    config = V1.replace(num_classes=0)
    params = random_params(config)
    arrays = {f"encoder.{k}": v for k, v in writers.microsoft(params, config).items()}
    arrays["encoder.mask_token"] = np.zeros((1, 1, 8), np.float32)
    arrays |= {"decoder.0.weight": np.zeros((48, 32, 1, 1), np.float32), "decoder.0.bias": np.zeros(48, np.float32)}
    found = read_checkpoint({"model": arrays})
    assert found.config.num_classes == 0
    assert_same(found.params, params)


def test_early_v2_name_of_the_bias_network() -> None:
    params = random_params(V2)
    arrays = {k.replace("cpb_mlp", "rpe_mlp"): v for k, v in writers.microsoft(params, V2).items()}
    assert_same(read_checkpoint(arrays).params, params)


@pytest.mark.parametrize("layout", ["microsoft", "timm", "huggingface", "torchvision"])
def test_headless(layout: str) -> None:
    config = V1.replace(num_classes=0)
    params = random_params(config)
    found = read_checkpoint(WRITERS[layout](params, config))
    assert (found.layout, found.config.num_classes) == (layout, 0)
    assert_same(found.params, params)


@pytest.mark.parametrize("flat", [True, False])
def test_timm_features_only(flat: bool) -> None:
    """timm's ``features_only=True``: no head, no final norm, and stages called ``layers_0`` in its list form."""
    config = V1.replace(num_classes=0)
    params = {k: v for k, v in random_params(config).items() if not k.startswith("norm.")}
    arrays = writers.timm(params, config)
    arrays = {k.replace("layers.", "layers_") if flat else f"model.{k}": v for k, v in arrays.items()}
    found = read_checkpoint(arrays)
    assert (found.layout, found.config.num_classes) == ("timm", 0)
    assert_same(found.params, params)


def level_norms(params: Params, config: SwinConfig) -> Params:
    """Parameters of a detection backbone: a norm for each level and no final one."""
    out = {k: v for k, v in params.items() if not k.startswith(("norm.", "head."))}
    for i, dim in enumerate(config.dims):
        out |= {f"norm{i}.{kind}": np.full(dim, i + 0.5, np.float32) for kind in ("weight", "bias")}
    return out


@pytest.mark.parametrize("layout", ["microsoft", "openmmlab", "huggingface-v4", "huggingface-v5"])
def test_detection_backbone(layout: str) -> None:
    params = level_norms(random_params(V1), V1)
    other = {"neck.conv.weight": np.zeros((3, 3), np.float32), "bbox_head.fc.weight": np.zeros((2, 2), np.float32)}
    if layout == "microsoft":
        arrays = {f"backbone.{k}": v for k, v in params.items()} | other
    elif layout == "openmmlab":
        arrays = writers.openmmlab(params, V1) | other
    else:
        new = layout.endswith("v5")
        plain = {k: v for k, v in params.items() if not (k[:4] == "norm" and k[4].isdigit())}
        arrays = writers.huggingface(plain, V1, layout[-2:], "swin." if new else "")
        arrays |= {
            f"hidden_states_norms.stage{i + 1}.{k}": params[f"norm{i}.{k}"]
            for i in range(3)
            for k in ("weight", "bias")
        }
    found = read_checkpoint(arrays)
    assert_same(found.params, params)
    assert found.config.num_classes == 0
    assert found.config.window_clamp == "never"


def test_hugging_face_v2_backbone_has_no_norm_at_all() -> None:
    config = V2.replace(num_classes=0)
    params = {k: v for k, v in random_params(config).items() if not k.startswith("norm.")}
    assert_same(read_checkpoint(writers.huggingface(params, config, prefix=""), config=config).params, params)


def test_openmmlab_classifier_norm_and_head() -> None:
    params = random_params(V1)
    found = read_checkpoint(writers.openmmlab(params, V1))
    assert {"norm.weight", "head.weight"} <= set(found.params)
    assert_same(found.params, params)


def test_openmmlab_v2_downsampling_at_the_start() -> None:
    params = random_params(V2)
    arrays = {}
    for name, x in writers.openmmlab(params, V2).items():
        for i in (1, 0):
            name = name.replace(f"stages.{i}.downsample", f"stages.{i + 1}.downsample")
        arrays[name] = x
    assert_same(read_checkpoint(arrays).params, params)


def test_position_embedding_of_detection_code() -> None:
    config = V1.replace(img_size=(32, 64), ape=True)
    params = random_params(config)
    arrays = dict(params)
    arrays["absolute_pos_embed"] = params["absolute_pos_embed"].reshape(8, 16, 8).transpose(2, 0, 1)[None]
    found = read_checkpoint(arrays)
    assert found.config.img_size == (32, 64)
    assert_same(found.params, params)


class Torchlike:
    """The part of a tensor's interface that is used, on a device."""

    def __init__(self, x: np.ndarray, dtype: str) -> None:
        self.x, self.dtype, self.shape = x, f"torch.{dtype}", x.shape

    def detach(self) -> Torchlike:
        return self

    cpu = detach

    def float(self) -> np.ndarray:
        return self.x

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        if self.dtype == "torch.bfloat16":
            raise TypeError("NumPy has no bfloat16")
        return self.x


class Cupylike:
    __cuda_array_interface__: dict[str, Any] = {}

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.dtype, self.shape = x, x.dtype, x.shape

    def get(self) -> np.ndarray:
        return self.x


def test_arrays_of_other_libraries() -> None:
    params = random_params(V1)
    wrap = [lambda x: Torchlike(x, "float32"), lambda x: Torchlike(x, "bfloat16"), Cupylike, np.asfortranarray]
    assert_same(read_checkpoint({k: wrap[i % 4](v) for i, (k, v) in enumerate(params.items())}).params, params)


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_float_types_are_kept(dtype: str) -> None:
    params = {k: v.astype(dtype) for k, v in random_params(V1).items()}
    native = {k: v.astype(v.dtype.newbyteorder("=")) for k, v in params.items()}
    assert_same(read_checkpoint(params).params, native)


# --- refusals


def test_one_error_lists_everything() -> None:
    arrays = writers.timm(random_params(V1), V1)
    del arrays["layers.0.blocks.1.norm1.weight"], arrays["layers.2.downsample.norm.bias"]
    arrays["layers.0.blocks.0.extra.weight"] = arrays["norm.weight"]
    arrays["layers.1.blocks.0.mlp.fc2.bias"] = np.zeros(3, np.float32)
    arrays["layers.2.blocks.1.attn.proj.bias"] = np.zeros(32, np.int8)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(arrays)
    message = str(error.value)
    for part in (
        "timm layout",
        "2 missing: layers.0.blocks.1.norm1.weight",
        "layers.1.downsample.norm.bias",
        "1 unexpected: layers.0.blocks.0.extra.weight",
        "layers.1.blocks.0.mlp.fc2.bias is [3], must be [16]",
        "layers.2.blocks.1.attn.proj.bias is int8",
    ):
        assert part in message, part


@pytest.mark.parametrize("layout", WRITERS)
def test_any_missing_key_is_named(layout: str) -> None:
    for config in (V1, V2):
        arrays = WRITERS[layout](random_params(config), config)
        buffers = ("relative_position_index", "relative_coords_table", "attn_mask")
        for key in [key for key in arrays if not key.endswith(buffers)]:
            less = {k: v for k, v in arrays.items() if k != key}
            with pytest.raises(CheckpointError, match=rf"{layout} layout.*(missing|beside)"):
                read_checkpoint(less, config=config)


def test_missing_part_of_hugging_faces_qkv() -> None:
    arrays = writers.huggingface(random_params(V1), V1)
    del arrays["swin.encoder.layers.0.blocks.0.attention.self.key.weight"]
    with pytest.raises(
        CheckpointError, match=r"1 missing: the key beside swin\S*layers\.0\.blocks\.0\S*query\.weight$"
    ):
        read_checkpoint(arrays)


def test_original_names_in_messages() -> None:
    arrays = writers.torchvision(random_params(V1), V1)
    arrays["features.1.0.mlp.0.bias"] = np.zeros(7, np.float32)
    with pytest.raises(
        CheckpointError, match=r"features\.1\.0\.mlp\.0\.bias \(canonically layers\.0\.blocks\.0\.mlp\.fc1"
    ):
        read_checkpoint(arrays)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"blocks.0.attn.qkv.weight": np.zeros((3, 1), "f4")}, "not a Swin Transformer"),
        ({"patch_embed.proj.weight": np.zeros((8, 3, 4, 4), "f4")}, "stages of blocks"),
        ({"layers.0.blocks.0.attn.meta_mlp.fc1.weight": np.zeros(2, "f4")}, "V2-CR"),
        ({"layers.0.blocks.0.spatial_mlp.weight": np.zeros(2, "f4")}, "Swin-MLP"),
        ({"epoch": 3, "model": {"a": 1}}, "no arrays found"),
        ({}, "no arrays found"),
        ({3: np.zeros(2)}, "must be strings"),
        ({"layers.9999.blocks.0.norm1.bias": np.zeros(2), "patch_embed.proj.weight": np.zeros((8, 3, 4, 4))}, "stages"),
    ],
)  # fmt: skip
def test_other_networks(arrays: dict[Any, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(arrays)


def test_two_models_in_one_dictionary() -> None:
    params = random_params(V1)
    arrays = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in params.items()}
    with pytest.raises(CheckpointError, match=r"several Swin Transformers.*student.*teacher|teacher.*student"):
        read_checkpoint(arrays)


def test_a_module_is_no_dictionary() -> None:
    class Module:
        def state_dict(self) -> None: ...

    with pytest.raises(CheckpointError, match=r"pass its state_dict\(\)"):
        read_checkpoint(Module())  # type: ignore[arg-type]
