"""save_checkpoint: what goes in comes out, and a file is there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swincupy.checkpoint import read_checkpoint, save_checkpoint
from swincupy.errors import CheckpointError, ConfigError
from tests.checkpoint.writers import V1, V2, random_params, save_safetensors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("config", [V1, V2.replace(pretrained_window_sizes=(3, 3, 2)), V1.replace(img_size=None)])
def test_round_trip(tmp_path: Path, config: Any, dtype: str) -> None:
    params = random_params(config, dtype=dtype)
    path = tmp_path / "model.safetensors"
    labels = ("null", "eins", "zwei", "drei", "fünf")
    save_checkpoint(path, params, config, labels=labels, preprocess={"size": [56, 56]})
    found = read_checkpoint(path)
    assert (found.layout, found.config) == ("swincupy", config.with_conventions("microsoft"))
    assert (found.labels, found.preprocess) == (labels, {"size": [56, 56]})
    assert set(found.params) == set(params)
    for name, x in params.items():
        assert found.params[name].dtype == x.dtype
        np.testing.assert_array_equal(found.params[name], x)


def test_other_readers_read_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    params = random_params(V1)
    save_checkpoint(tmp_path / "m.safetensors", {k: np.asfortranarray(v) for k, v in params.items()}, V1)
    assert all(np.array_equal(v, params[k]) for k, v in load_file(tmp_path / "m.safetensors").items())


def test_a_file_may_be_saved_over_the_one_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, random_params(V1), V1)
    found = read_checkpoint(path)
    save_checkpoint(path, found.params, found.config, labels=list("abcde"))
    assert read_checkpoint(path).labels == tuple("abcde")


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, random_params(V1), V1)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(path, random_params(V1, seed=1), V1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_the_file_has_the_usual_mode(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors", random_params(V1), V1)
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "model.safetensors", random_params(V1), V1)
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path: Path) -> None:
    params = random_params(V1)
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.bias"):
        save_checkpoint(tmp_path / "m.safetensors", {k: v for k, v in params.items() if k != "norm.bias"}, V1)
    with pytest.raises(CheckpointError, match="int8"):
        save_checkpoint(tmp_path / "m.safetensors", params | {"norm.bias": np.zeros(32, np.int8)}, V1)
    with pytest.raises(CheckpointError, match="5 classes, got 2 labels"):
        save_checkpoint(tmp_path / "m.safetensors", params, V1, labels=["a", "b"])
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(tmp_path / "m.safetensors", params, V1, preprocess={"size": {1}})
    with pytest.raises(CheckpointError, match="must end in .safetensors"):
        save_checkpoint(tmp_path / "m.pth", params, V1)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "absent" / "m.safetensors", params, V1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"format_version": "2"}, CheckpointError, "format_version must be 1, got '2'; upgrade"),
        ({"config": "{"}, CheckpointError, "config in the metadata is not valid JSON"),
        ({"config": "[]"}, CheckpointError, "a JSON object"),
        ({"config": '{"depht": 3}'}, CheckpointError, "unknown field depht"),
        ({"config": json.dumps({"depths": [1] * 99})}, CheckpointError, "at most 16 stages"),
        ({"config": json.dumps({"num_classes": 4})}, ConfigError, "num_classes is 4, the arrays have 5"),
        ({"labels": "{"}, CheckpointError, "labels in the metadata is not valid JSON"),
    ],
)
def test_damaged_metadata(tmp_path: Path, change: dict[str, str], error: type[Exception], says: str) -> None:
    from safetensors.numpy import save_file

    own = {"format": "swincupy", "format_version": "1", "config": json.dumps(V1.to_dict())}
    save_file(random_params(V1), tmp_path / "m.safetensors", own | change)
    with pytest.raises(error, match=says):
        read_checkpoint(tmp_path / "m.safetensors")


def test_metadata_of_others_is_kept(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}}
    with pytest.raises(CheckpointError, match="not a Swin Transformer"):
        read_checkpoint(save_safetensors(tmp_path / "m.safetensors", header))
