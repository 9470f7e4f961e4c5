"""inspect_checkpoint: everything about a file but its numbers, unless asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from swincupy.checkpoint import inspect_checkpoint, save_checkpoint
from swincupy.config import SwinConfig
from swincupy.errors import CheckpointError
from tests.checkpoint import writers
from tests.checkpoint.writers import V1, V2, random_params, save_torch


def test_a_whole_model(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.safetensors", random_params(V1), V1, labels=list("abcde"))
    report = inspect_checkpoint(tmp_path / "m.safetensors")
    assert json.dumps(report)
    assert (report["layout"], report["format"], report["problem"], report["labels"]) == (
        "swincupy",
        "safetensors",
        None,
        5,
    )
    assert SwinConfig.from_dict(report["config"]) == V1.with_conventions("microsoft")
    assert report["parameters"] == sum(x.size for x in random_params(V1).values())
    assert {"name": "norm.weight", "dtype": "float32", "shape": [32]} in report["tensors"]
    assert report["ignored"] == []


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    arrays = {f"backbone.{k}": v for k, v in writers.microsoft(random_params(V1), V1).items()}
    arrays["neck.conv.weight"] = np.zeros(3, np.float32)
    report = inspect_checkpoint(save_torch(tmp_path / "m.pth", {"state_dict": arrays, "optimizer": {}, "epoch": 3}))
    for name in ("optimizer (dict)", "epoch (int)", "neck.conv.weight", "backbone.layers.0.blocks.1.attn_mask"):
        assert name in report["ignored"], name
    assert report["parameters"] == sum(x.size for x in random_params(V1).values())


def test_v2_of_unknown_windows(tmp_path: Path) -> None:
    report = inspect_checkpoint(save_torch(tmp_path / "m.pth", random_params(V2)))
    assert (report["layout"], report["config"]) == ("microsoft", None)
    assert "pass config=" in report["problem"]


def test_another_network() -> None:
    report = inspect_checkpoint({"fc.weight": np.zeros((2, 3), np.float32), "n": np.zeros(1, np.int64)})
    assert (report["layout"], report["config"], report["parameters"]) == (None, None, 6)
    assert "not a Swin Transformer" in report["problem"]


def test_incomplete_model_is_a_problem() -> None:
    params = random_params(V1)
    del params["layers.0.blocks.1.mlp.fc2.bias"]
    report = inspect_checkpoint(params)
    assert "1 missing: layers.0.blocks.1.mlp.fc2.bias" in report["problem"]
    assert report["config"] is not None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_and_infinity_are_found(tmp_path: Path, dtype: str) -> None:
    params = random_params(V1, dtype=dtype)
    params["norm.weight"][[1, 5]] = np.nan
    params["layers.0.blocks.0.mlp.fc1.weight"][3, 2] = -np.inf
    params["head.bias"][0] = np.inf
    path = save_torch(tmp_path / "m.pth", {"model": params})
    report = inspect_checkpoint(path, check_values=True)
    assert sorted(report["non_finite"]) == ["head.bias", "layers.0.blocks.0.mlp.fc1.weight", "norm.weight"]
    found = {t["name"]: (t["nan"], t["inf"]) for t in report["tensors"]}
    assert found["norm.weight"] == (2, 0)
    assert found["layers.0.blocks.0.mlp.fc1.weight"] == (0, 1)
    assert found["norm.bias"] == (0, 0)
    assert "non_finite" not in inspect_checkpoint(path)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="JSON"):
        inspect_checkpoint(tmp_path / "x.safetensors")
