"""`read_checkpoint`: open, translate, configure, check, and only then read."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from swincupy.checkpoint import hints, processors
from swincupy.checkpoint.infer import infer_config
from swincupy.checkpoint.layouts import Translation, to_canonical
from swincupy.checkpoint.source import Source, open_source
from swincupy.checkpoint.tensors import FLOATS, Array, Shape
from swincupy.config import SwinConfig
from swincupy.errors import CheckpointError
from swincupy.parameters import parameter_shapes

_LISTED = 20  # names of one kind in a message


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in canonical form.

    Attributes
    ----------
    params : dict of str to array
        Names, shapes and orders of `swincupy.parameters.parameter_shapes` (microsoft's), dtypes as
        stored (bfloat16 widened to float32); read-only views of the mapped file where it allows that.
        ``norm{i}.weight`` and ``norm{i}.bias`` (norm of stage i's feature map) where the file has
        them; ``norm.*`` may then be missing.
    config : SwinConfig
        Complete: conventions are those of the layout.
    layout : str
        "microsoft", "timm", "huggingface", "torchvision", "openmmlab" or "swincupy".
    labels : tuple of str or None
    preprocess : dict or None
        Fields of `swincupy.preprocess.Preprocess`, where our own metadata, a preprocessor_config.json
        or timm's config.json states them.
    metadata : dict
        Metadata of a safetensors file.
    """

    params: dict[str, Array]
    config: SwinConfig
    layout: str
    labels: tuple[str, ...] | None
    preprocess: dict[str, Any] | None
    metadata: dict[str, str]


def read_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], *, config: SwinConfig | None = None
) -> Checkpoint:
    """Read a Swin Transformer or Swin Transformer V2 of any known layout.

    Parameters
    ----------
    source : path or mapping
        A .safetensors, .pth, .pt or .bin file; a directory with one, a config.json beside it or
        shards with their index; or a dictionary of arrays of any library, as ``state_dict()`` gives.
    config : SwinConfig, optional
        Decides what neither the arrays nor the files beside them tell. Its open conventions are those
        of the layout.

    Raises
    ------
    CheckpointError
        The file is damaged or of another kind; keys are missing, left over, misshaped or of a wrong
        dtype (one message lists them all); or the windows of a V2 cannot be known without ``config``.
    ConfigError
        A configuration, given or found, contradicts the arrays.
    """
    opened = open_source(source)
    found = to_canonical(opened.tensors, opened.title)
    complete = config_of(opened, found, config)
    if opened.metadata.get("format") == "swincupy":
        found = dataclasses.replace(found, layout="swincupy")
    check_parameters(found, complete, opened.title)
    return Checkpoint(
        params={name: tensor.read() for name, tensor in found.tensors.items()},
        config=complete,
        layout=found.layout,
        labels=labels_of(opened, complete.num_classes),
        preprocess=_preprocess(opened),
        metadata=opened.metadata,
    )


def config_of(opened: Source, found: Translation, given: SwinConfig | None) -> SwinConfig:
    """The complete configuration, from the best source there is."""
    stated = hints.json_fields(opened.beside.get("config", {}), opened.title)
    guessed: hints.Fields = {}
    for name in reversed(opened.names):
        guessed |= hints.name_fields(name)
    own = hints.own_config(opened.metadata, opened.title)
    return infer_config(found, opened.title, given=given or own, stated=stated, guessed=guessed)


def labels_of(opened: Source, num_classes: int) -> tuple[str, ...] | None:
    own = hints.own_json(opened.metadata, "labels", opened.title)
    if isinstance(own, list) and len(own) == num_classes and all(isinstance(label, str) for label in own):
        return tuple(own)
    return hints.labels_of(opened.beside.get("config", {}), num_classes)


def check_parameters(found: Translation, config: SwinConfig, title: str) -> None:
    """One error that lists everything by which the tensors differ from those that the configuration needs."""
    required, optional = _expected(found, config)
    there = found.tensors
    missing = [found.faults.get(name, name) for name in required if name not in there]
    extra = [_named(name, t.name) for name, t in there.items() if name not in required and name not in optional]
    misshaped = [
        f"{_named(name, there[name].name)} is {list(there[name].shape)}, must be {_shown(shape)}"
        for name, shape in (required | optional).items()
        if name in there and not _fits(there[name].shape, shape)
    ]
    wrong = [f"{_named(name, t.name)} is {t.dtype}" for name, t in there.items() if t.dtype not in FLOATS]
    faults = [
        f"{len(listed)} {kind}: {', '.join(listed[:_LISTED])}{' ...' if len(listed) > _LISTED else ''}"
        for kind, listed in (
            ("missing", missing),
            ("unexpected", extra),
            ("misshaped", misshaped),
            (f"not of {', '.join(FLOATS)}", wrong),
        )
        if listed
    ]
    if faults:
        raise CheckpointError(
            f"{title}: not a complete Swin Transformer{' V2' if config.version == 2 else ''} in the "
            f"{found.layout} layout: {'; '.join(faults)}"
        )


def _expected(found: Translation, config: SwinConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    required = parameter_shapes(config)
    optional: dict[str, Shape] = {}
    for i, dim in enumerate(config.dims):
        optional[f"norm{i}.weight"] = optional[f"norm{i}.bias"] = (dim,)
    levels = {m[1] for name in found.tensors if (m := re.fullmatch(r"norm(\d+)\.(?:weight|bias)", name))}
    for level in levels & {str(i) for i in range(config.num_stages)}:
        for kind in ("weight", "bias"):
            required[f"norm{level}.{kind}"] = optional[f"norm{level}.{kind}"]
    # backbones: a norm for each feature map instead of the final one, or (Hugging Face's V2, timm's) neither
    without = (
        bool(levels) or found.layout in ("timm", "swincupy") or (found.layout, found.version) == ("huggingface", 2)
    )
    if without and config.num_classes == 0 and not {"norm.weight", "norm.bias"} & set(found.tensors):
        del required["norm.weight"], required["norm.bias"]
    return required, optional


def _fits(shape: Shape, expected: Shape) -> bool:
    return len(shape) == len(expected) and all(e in (s, -1) for s, e in zip(shape, expected, strict=True))


def _shown(shape: Shape) -> str:
    return str(list(shape)).replace("-1", "L")


def _named(name: str, original: str) -> str:
    return name if original.endswith(name) else f"{original} (canonically {name})"


def _preprocess(opened: Source) -> dict[str, Any] | None:
    """Fields of `Preprocess`: what we wrote ourselves, or what the file beside the weights states."""
    own = hints.own_json(opened.metadata, "preprocess", opened.title)
    if isinstance(own, dict):
        return own
    if "preprocessor_config" in opened.beside:
        return processors.from_huggingface(opened.beside["preprocessor_config"])
    timm = opened.beside.get("config", {}).get("pretrained_cfg")
    return processors.from_timm(timm) if isinstance(timm, dict) else None
