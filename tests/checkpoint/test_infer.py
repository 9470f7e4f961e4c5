"""The configuration: what arrays, names, files beside them and config= say, and which of them wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swincupy.checkpoint import read_checkpoint
from swincupy.checkpoint.hints import name_fields
from swincupy.config import SwinConfig
from swincupy.errors import CheckpointError, ConfigError
from swincupy.parameters import parameter_shapes
from tests.checkpoint import writers
from tests.checkpoint.writers import V1, V2, random_params


def size(config: SwinConfig) -> int:
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


T, S = (2, 2, 6, 2), (2, 2, 18, 2)


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (SwinConfig(), 173, 28_288_354),
        (SwinConfig(depths=S), 329, 49_606_258),
        (SwinConfig(depths=S, embed_dim=128, num_heads=(4, 8, 16, 32)), 329, 87_768_224),
        (SwinConfig(depths=S, embed_dim=128, num_heads=(4, 8, 16, 32), window_size=12), 329, 87_903_584),
        (SwinConfig(depths=S, embed_dim=192, num_heads=(6, 12, 24, 48)), 329, 196_532_476),
        (SwinConfig(num_heads=(4, 8, 16, 32), window_size=8), 173, 28_306_432),
        (SwinConfig(version=2, window_size=8), 221, 28_347_154),
        (SwinConfig(version=2, window_size=8, depths=S), 425, 49_728_418),
        (SwinConfig(version=2, window_size=16, depths=S, embed_dim=192, num_heads=(6, 12, 24, 48)), 425, 196_739_932),
        (SwinConfig(num_classes=21841), 173, 44_315_083),
    ],
)
def test_published_counts(config: SwinConfig, tensors: int, parameters: int) -> None:
    assert len(parameter_shapes(config)) == tensors
    assert size(config) == parameters


# --- names


@pytest.mark.parametrize(
    ("name", "img_size", "window", "pretrained"),
    [
        ("swin_tiny_patch4_window7_224", 224, 7, 0),
        ("swin_base_patch4_window12_384_22kto1k", 384, 12, 0),
        ("swin_base_patch4_window7_224.ms_in22k_ft_in1k", 224, 7, 0),
        ("swin_tiny_c24_patch4_window8_256", 256, 8, 0),
        ("swin-tiny-patch4-window7-224", 224, 7, 0),
        ("swinv2-tiny-patch4-window8-256", 256, 8, 0),
        ("swinv2_tiny_patch4_window16_256", 256, 16, 0),
        ("swinv2_base_window12_192.ms_in22k", 192, 12, 0),
        ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft", 256, 16, (12, 12, 12, 6)),
        ("swinv2_large_window12to24_192to384.ms_in22k_ft_in1k", 384, 24, (12, 12, 12, 6)),
        ("swinv2-base-patch4-window12to16-192to256-22kto1k-ft", 256, 16, (12, 12, 12, 6)),
        ("upernet_swin_small_patch4_window7_512x512", 512, 7, 0),
        ("mask_rcnn_swin_tiny_patch4_window7", None, 7, 0),
        ("swin_s3_tiny_224.ms_in1k", 224, None, None),
        ("simmim_finetune__swin_base__img224_window7__800ep", 224, 7, 0),
        ("swin_v2_t-b137f0e2", 256, 8, 0),
        ("swin_t-704ceda3", 224, 7, None),
        ("model", None, None, None),
        ("vit_window9_384", None, None, None),
    ],
)
def test_names(name: str, img_size: Any, window: Any, pretrained: Any) -> None:
    fields = name_fields(name)
    assert fields.get("img_size") == img_size
    assert fields.get("window_size") == window
    assert fields.get("pretrained_window_sizes") == pretrained


def v2_file(path: Path, buffers: bool = False) -> Path:
    config = V2
    arrays = writers.microsoft(random_params(config), config, buffers)
    return writers.save_torch(path, {"model": arrays})


def test_v2_takes_the_windows_from_the_files_name(tmp_path: Path) -> None:
    config = read_checkpoint(v2_file(tmp_path / "swinv2_x_patch4_window12to24_192to384_ft.pth")).config
    assert (config.window_size, config.pretrained_window_sizes, config.img_size) == (24, (12, 12, 12), 384)


def test_v2_takes_the_windows_from_the_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "swinv2-tiny-patch4-window8-256"
    folder.mkdir()
    config = read_checkpoint(v2_file(folder / "pytorch_model.bin").parent).config
    assert (config.window_size, config.pretrained_window_sizes, config.img_size) == (8, 0, 256)
    assert read_checkpoint(folder / "pytorch_model.bin").config == config


def test_v2_takes_the_windows_from_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--microsoft--swinv2-tiny-patch4-window16-256" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    assert read_checkpoint(v2_file(folder / "pytorch_model.bin")).config.window_size == 16


def test_v2_of_unknown_windows_asks_for_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"window size .* pass config=SwinConfig\(version=2, window_size="):
        read_checkpoint(v2_file(tmp_path / "model.pth"))


# --- buffers


@pytest.mark.parametrize("layout", ["microsoft", "torchvision", "openmmlab"])
@pytest.mark.parametrize("windows", [4, (8, (4, 2), 2)])
def test_v2_buffers_tell_the_windows(layout: str, windows: Any) -> None:
    config = V2.replace(window_size=windows, img_size=None)
    found = read_checkpoint(getattr(writers, layout)(random_params(config), config)).config
    assert (found.window_size, found.pretrained_windows) == (windows, ((0, 0),) * 3)


@pytest.mark.parametrize("trained", [6, (12, 12, 6), (7, 6, 3)])
def test_v2_coordinates_tell_the_pretraining_window(trained: Any) -> None:
    config = V2.replace(window_size=12, pretrained_window_sizes=trained, img_size=384)
    found = read_checkpoint(writers.microsoft(random_params(config), config)).config
    effective = [0 if p == (12, 12) else p[0] for p in config.pretrained_windows]
    assert [p[0] for p in found.pretrained_windows] == effective
    assert found.img_size == 384  # from the masks


def test_masks_tell_windows_and_size() -> None:
    """As in the hub's timm V2 files: attention masks and nothing else."""
    config = V2.replace(window_size=4, img_size=64, depths=(2, 2, 2))  # grids of 16, 8, 4: the last is not shifted
    arrays = {
        k: v
        for k, v in writers.microsoft(random_params(config), config).items()
        if not k.endswith(("relative_position_index", "relative_coords_table"))
    }
    with pytest.raises(CheckpointError, match="window of its pretraining"):
        read_checkpoint(arrays)
    found = read_checkpoint(arrays, config=config).config
    assert found.window_size == 4


def test_masks_overrule_a_wrong_name(tmp_path: Path) -> None:
    config = V2.replace(img_size=64, depths=(2, 2, 2))
    arrays = writers.microsoft(random_params(config), config)
    path = writers.save_torch(tmp_path / "swinv2_tiny_patch4_window16_256.pth", {"model": arrays})
    found = read_checkpoint(path).config
    assert (found.window_size, found.img_size) == (4, 64)


def test_index_tells_a_window_that_is_not_square() -> None:
    config = V1.replace(window_size=((7, 7), (7, 4), (2, 4)), img_size=None)
    arrays = writers.microsoft(random_params(config), config)
    assert read_checkpoint(arrays).config.windows == config.windows
    del arrays["layers.2.blocks.0.attn.relative_position_index"]
    del arrays["layers.2.blocks.1.attn.relative_position_index"]
    with pytest.raises(ConfigError, match="stage 2 .*21 rows"):
        read_checkpoint(arrays)


# --- tables clamped when the source was built


@pytest.mark.parametrize(
    ("img_size", "windows"),
    [(64, (7, 7, 4)), ((64, 112), (7, (7, 7), (4, 7))), ((48, 112), (7, (6, 7), (3, 7))), (224, 7)],
)
def test_v1_window_is_that_of_the_table(img_size: Any, windows: Any) -> None:
    given = V1.replace(img_size=img_size, window_size=7)
    built = given.replace(window_size=windows if isinstance(windows, int) else tuple(windows))
    params = random_params(built)
    assert read_checkpoint(params, config=given).config.windows == built.windows
    if all(h == w for h, w in built.windows):
        assert read_checkpoint(params).config.windows == built.windows


def test_v1_window_that_is_clamped_on_both_sides() -> None:
    given = V1.replace(img_size=(48, 112), window_size=7)
    built = given.replace(window_size=(7, 6, 3))  # the rule by which the shorter side decides
    assert read_checkpoint(random_params(built), config=given).config.windows == built.windows


# --- config=


def test_every_contradiction_in_one_error() -> None:
    wrong = V1.replace(
        num_classes=9, depths=(2, 2, 2), num_heads=(2, 2, 4), window_size=8, mlp_ratio=3.0, patch_norm=False
    )
    with pytest.raises(ConfigError, match="contradicts the arrays") as error:
        read_checkpoint(random_params(V1), config=wrong)
    for name in ("num_classes is 9", "depths", "num_heads", "window_size of stage 0 is 8", "mlp_ratio", "patch_norm"):
        assert name in str(error.value), name


def test_contradicting_version() -> None:
    with pytest.raises(ConfigError, match="version is 2, the arrays have 1"):
        read_checkpoint(random_params(V1), config=V2)


def test_a_head_that_was_taken_off_contradicts_nothing() -> None:
    assert read_checkpoint(random_params(V1.replace(num_classes=0)), config=V1).config.num_classes == 0


def test_config_decides_what_is_open() -> None:
    given = V2.replace(window_size=2, pretrained_window_sizes=4, norm_eps=1e-6, pad_mode="roll_pad")
    found = read_checkpoint(random_params(V2), config=given).config
    assert found == given.with_conventions("microsoft")
    assert found.pad_mode == "roll_pad"


def test_position_embedding_must_fit_the_image() -> None:
    config = V1.replace(ape=True)
    with pytest.raises(ConfigError, match="absolute_pos_embed has 196 positions"):
        read_checkpoint(random_params(config), config=config.replace(img_size=112))
    assert read_checkpoint(random_params(config)).config.img_size == 56


@pytest.mark.parametrize("ratio", [4.0, 2.7, 1 / 3, 8 / 3])
def test_mlp_ratio_gives_the_hidden_channels_back(ratio: float) -> None:
    config = V1.replace(embed_dim=24, mlp_ratio=ratio)
    found = read_checkpoint(random_params(config)).config
    assert [found.hidden_dim(i) for i in range(3)] == [config.hidden_dim(i) for i in range(3)]


# --- config.json


def folder(path: Path, arrays: dict[str, np.ndarray], **files: Any) -> Path:
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


HF = dict(
    model_type="swinv2", image_size=[32, 64], patch_size=4, num_channels=3, embed_dim=8, depths=[2, 1, 2],
    num_heads=[1, 2, 4], window_size=4, pretrained_window_sizes=[3, 3, 2, 0], mlp_ratio=4.0, qkv_bias=True,
    hidden_act="gelu", use_absolute_embeddings=False, layer_norm_eps=1e-6,
    id2label={str(i): f"class {i}" for i in range(5)},
)  # fmt: skip


def test_hugging_face_folder(tmp_path: Path) -> None:
    arrays = writers.huggingface(random_params(V2), V2)
    processor = {"size": 256, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_resize": True}
    found = read_checkpoint(folder(tmp_path, arrays, config=HF, preprocessor_config=processor))
    assert found.config == V2.replace(
        img_size=(32, 64), pretrained_window_sizes=(3, 3, 2), norm_eps=1e-6
    ).with_conventions("huggingface-v2")
    assert found.labels == tuple(f"class {i}" for i in range(5))
    assert found.preprocess == dict(
        size=[256, 256],
        resize="squash",
        resize_size=[256, 256],
        interpolation="bilinear",
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"depths": [2, 2, 2]}, ConfigError, r"depths is \(2, 2, 2\), the arrays have \(2, 1, 2\)"),
        ({"hidden_act": "gelu_new"}, CheckpointError, "hidden_act must be 'gelu'"),
        ({"window_size": "four"}, CheckpointError, "window_size must be"),
        ({"layer_norm_eps": [1]}, CheckpointError, "norm_eps"),
        ({"model_type": "swin"}, ConfigError, "version is 1, the arrays have 2"),
    ],
)
def test_config_json_that_is_wrong(tmp_path: Path, change: Any, error: type[Exception], says: str) -> None:
    arrays = writers.huggingface(random_params(V2), V2)
    with pytest.raises(error, match=says):
        read_checkpoint(folder(tmp_path, arrays, config=HF | change))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00"])
def test_config_json_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(folder(tmp_path, random_params(V1), config=text))


def test_timm_folder(tmp_path: Path) -> None:
    cfg = dict(input_size=[3, 384, 384], crop_pct=1.0, interpolation="bicubic", mean=[0.485] * 3, std=[0.229] * 3)
    config = dict(architecture="swinv2_base_window12to24_192to384", num_classes=5, pretrained_cfg=cfg)
    config |= dict(label_names=["a", "b", "c", "d", "e"], label_descriptions={"b": "a bee"})
    found = read_checkpoint(folder(tmp_path, writers.timm(random_params(V2), V2), config=config))
    c = found.config
    assert (found.layout, c.window_size, c.pretrained_window_sizes, c.img_size) == ("timm", 24, (12, 12, 12), 384)
    assert found.labels == ("a", "a bee", "c", "d", "e")
    assert found.preprocess is not None
    assert (found.preprocess["size"], found.preprocess["resize_size"]) == ([384, 384], 384)


def test_timm_model_args_win_over_the_name(tmp_path: Path) -> None:
    args = dict(img_size=64, window_size=[4, 2], embed_dim=8, depths=[2, 1, 2], always_partition=True)
    config = dict(architecture="swinv2_tiny_window8_256", model_args=args | {"window_size": [4, 4, 2]})
    found = read_checkpoint(folder(tmp_path, writers.timm(random_params(V2), V2), config=config)).config
    assert (found.window_size, found.img_size, found.window_clamp) == ((4, 4, 2), 64, "never")


def test_config_json_of_another_kind_is_no_statement(tmp_path: Path) -> None:
    found = read_checkpoint(folder(tmp_path, random_params(V1), config={"model_type": "maskformer", "depths": 3}))
    assert found.config.depths == (2, 1, 2)


# --- folders


def test_sharded_folder(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    params = random_params(V1)
    names = sorted(params)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({k: params[k] for k in part}, tmp_path / file)
    index = {"weight_map": {k: file for file, part in shards.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_checkpoint(tmp_path)
    assert all(np.array_equal(found.params[k], v) for k, v in params.items())

    index["weight_map"]["norm.bias"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="beside the index"):
        read_checkpoint(tmp_path)
    index["weight_map"] = {**{k: f for f, p in shards.items() for k in p}, "more": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks 'more'"):
        read_checkpoint(tmp_path)


def test_folder_of_one_file_or_several(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_checkpoint(tmp_path)
    writers.save_torch(tmp_path / "one.pth", random_params(V1))
    assert read_checkpoint(tmp_path).config.num_classes == 5
    writers.save_torch(tmp_path / "two.pth", random_params(V1))
    with pytest.raises(CheckpointError, match=r"several checkpoints: one\.pth, two\.pth"):
        read_checkpoint(tmp_path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
