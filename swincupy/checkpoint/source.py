"""From a file, a directory or a dictionary to named tensors and what lies beside them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swincupy.checkpoint.safetensors_file import read_safetensors
from swincupy.checkpoint.tensors import Array, StoredTensor, map_file, read_small
from swincupy.checkpoint.torch_file import read_torch
from swincupy.errors import CheckpointError

#: Entries of a saved dictionary that hold a model's weights, those with averaged weights first.
WRAPPERS = ("state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict", "module")

_IN_DIRECTORY = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_MAX_JSON = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors by the names of the file, and what else was found.

    ``ignored`` names what is there but is no tensor of the model; ``beside`` holds the parsed
    config.json and preprocessor_config.json of the directory; ``names`` are the file's and
    directory's names, from which sizes may be read.
    """

    title: str
    format: str
    tensors: dict[str, StoredTensor]
    ignored: list[str]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()


def open_source(source: str | os.PathLike[str] | Mapping[str, Any]) -> Source:
    """Find the tensors of ``source``; none is read yet."""
    if isinstance(source, Mapping):
        tensors, ignored = state_dict(source, "checkpoint")
        return Source("checkpoint", "dictionary", tensors, ignored)
    if not isinstance(source, (str, os.PathLike)):
        advice = "; pass its state_dict()" if hasattr(source, "state_dict") else ""
        raise CheckpointError(
            f"checkpoint: source must be a path or a dictionary of arrays, got {type(source).__name__}{advice}"
        )
    path = Path(os.fspath(source))
    file = _main_file(path) if path.is_dir() else path
    tensors, ignored, metadata, kind = _read(file)
    beside = {
        name: _json(file.parent / f"{name}.json")
        for name in ("config", "preprocessor_config")
        if (file.parent / f"{name}.json").is_file()
    }
    return Source(path.name or str(path), kind, tensors, ignored, metadata, beside, _names(file))


def state_dict(tree: Any, title: str) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors of a saved dictionary, taken out of its wrappers, and what was left out."""
    ignored: list[str] = []
    for _ in range(4):
        if not isinstance(tree, Mapping):
            raise CheckpointError(f"{title}: must hold a dictionary of arrays, got {type(tree).__name__}")
        leaves = {key: _tensor(key, value) for key, value in tree.items()}
        if any(leaf is not None for leaf in leaves.values()):
            if strange := [key for key in tree if not isinstance(key, str)]:
                raise CheckpointError(f"{title}: names of arrays must be strings, got {str(strange[0])[:80]!r}")
            ignored += [f"{key} ({type(tree[key]).__name__})" for key, leaf in leaves.items() if leaf is None]
            return {key: leaf for key, leaf in leaves.items() if leaf is not None}, ignored
        wrapper = next((name for name in WRAPPERS if isinstance(tree.get(name), Mapping)), None)
        if wrapper is None:
            keys = ", ".join(str(key)[:80] for key in list(tree)[:8]) or "nothing"
            raise CheckpointError(
                f"{title}: no arrays found; it holds {keys}; pass the dictionary of the weights itself"
            )
        ignored += [f"{key} ({type(value).__name__})" for key, value in tree.items() if key != wrapper]
        tree = tree[wrapper]
    raise CheckpointError(f"{title}: no arrays found in dictionaries nested four deep")


def _tensor(name: Any, value: Any) -> StoredTensor | None:
    """An array of any library as a `StoredTensor`; None for anything else."""
    if isinstance(value, StoredTensor):
        return dataclasses.replace(value, name=str(name))
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape is None or (not hasattr(value, "__array__") and not hasattr(value, "get")):
        return None
    kind = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    return StoredTensor(str(name), kind, tuple(int(d) for d in shape), lambda: _host_array(value, kind))


def _host_array(value: Any, kind: str) -> Array:
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # torch
        value = value.detach().cpu()
        if kind == "bfloat16":
            value = value.float()
    elif hasattr(value, "__cuda_array_interface__") and hasattr(value, "get"):  # CuPy
        value = value.get()
    array = np.asarray(value)
    if kind == "bfloat16":
        array = array.astype(np.float32)  # the bfloat16 of ml_dtypes
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _read(file: Path) -> tuple[dict[str, StoredTensor], list[str], dict[str, str], str]:
    if file.name.endswith(".index.json"):
        return _sharded(file)
    head = map_file(file)[:10].tobytes()
    # by content, not by suffix: safetensors begins with the length of a JSON object
    if head[8:9] == b"{" or (file.suffix == ".safetensors" and head[:2] != b"PK"):
        tensors, metadata = read_safetensors(file)
        return tensors, [], metadata, "safetensors"
    tensors, ignored = state_dict(read_torch(file), file.name)
    if sum(t.nbytes for t in tensors.values()) > 2 * map_file(file).size:
        # views of one storage, many times over: nothing that a model has, and memory without bound
        raise CheckpointError(f"{file.name}: its tensors are larger than the file; it is damaged")
    return tensors, ignored, {}, "torch"


def _sharded(index: Path) -> tuple[dict[str, StoredTensor], list[str], dict[str, str], str]:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index.name}: weight_map must map tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    ignored: list[str] = []
    kind = ""
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(_SUFFIXES):
            raise CheckpointError(f"{index.name}: a shard must be a file beside the index, got {name[:80]!r}")
        shard, left, _, kind = _read(index.parent / name)
        if absent := sorted({key for key, file in weight_map.items() if file == name} - set(shard)):
            raise CheckpointError(f"{name}: lacks {absent[0][:80]!r}, which {index.name} says is there")
        if twice := sorted(set(tensors) & set(shard)):
            raise CheckpointError(f"{name}: tensor {twice[0][:80]!r} is in another shard of {index.name} as well")
        tensors |= shard
        ignored += left
    return tensors, ignored, {}, kind


def _main_file(directory: Path) -> Path:
    for name in _IN_DIRECTORY:
        if (directory / name).is_file():
            return directory / name
    found = sorted(p for p in directory.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    what = "several checkpoints: " + ", ".join(p.name for p in found[:8]) if found else "no checkpoint"
    raise CheckpointError(
        f"{directory}: must hold {_IN_DIRECTORY[0]} or one {'/'.join(_SUFFIXES)} file, it holds {what}"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(read_small(path, _MAX_JSON).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:120]})") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(parsed).__name__}")
    return parsed


def _names(file: Path) -> tuple[str, ...]:
    """The names that may say what the model is: the file's, its directory's, its repository's in the hub's cache."""
    whole = Path(os.path.abspath(file))  # not resolved: the hub's cache links to files named by their hash
    names = [whole.stem if whole.suffix in _SUFFIXES else whole.name, whole.parent.name]
    if len(whole.parents) > 2 and whole.parents[2].name.startswith("models--"):
        names.append(whole.parents[2].name.rpartition("--")[2])
    return tuple(names)
