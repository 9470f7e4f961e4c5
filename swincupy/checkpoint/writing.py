"""`save_checkpoint`: canonical safetensors with all that is needed to load them again."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swincupy.checkpoint.hints import FORMAT_VERSION
from swincupy.checkpoint.layouts import Translation
from swincupy.checkpoint.reading import check_parameters
from swincupy.checkpoint.source import state_dict
from swincupy.config import SwinConfig
from swincupy.errors import CheckpointError


def save_checkpoint(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: SwinConfig,
    *,
    labels: Sequence[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as canonical safetensors, all or nothing.

    The file appears under its name complete, or not at all: it is written beside ``path`` under a
    temporary name, flushed to the disk, and renamed; a file that was there stays until then.

    Parameters
    ----------
    path : path
        Ends in .safetensors.
    params : mapping
        Arrays of any library under canonical names (`Checkpoint.params`).
    config : SwinConfig
    labels : sequence of str, optional
        One name for each class.
    preprocess : mapping, optional
        JSON values; comes back as `Checkpoint.preprocess`.

    Raises
    ------
    CheckpointError
        The arrays are not those of ``config``, or the file cannot be written.
    """
    from safetensors.numpy import save

    target = Path(os.fspath(path))
    if target.suffix != ".safetensors":
        raise CheckpointError(f"save_checkpoint: path must end in .safetensors, got {target.name!r}")
    if labels is not None and len(labels) != config.num_classes:
        raise CheckpointError(
            f"save_checkpoint: labels must name the {config.num_classes} classes, got {len(labels)} labels"
        )
    tensors, _ = state_dict(params, "save_checkpoint")
    check_parameters(Translation("swincupy", config.version, tensors, {}, [], {}), config, "save_checkpoint")
    config = config.with_conventions("microsoft")
    metadata = {
        "format": "swincupy",
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(config.to_dict()),
    }
    if labels is not None:
        metadata["labels"] = json.dumps(list(labels), ensure_ascii=False)
    if preprocess is not None:
        metadata["preprocess"] = _json(preprocess)
    arrays = {name: np.ascontiguousarray(tensor.read()) for name, tensor in tensors.items()}

    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(save(arrays, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_directory(target.parent)
    except OSError as error:
        raise CheckpointError(f"save_checkpoint: {target} cannot be written ({error})") from error


def _json(preprocess: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(preprocess))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"save_checkpoint: preprocess must consist of JSON values ({error})") from None


def _flush_directory(path: Path) -> None:
    """Make a rename last through a power cut, where the system can open directories."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
