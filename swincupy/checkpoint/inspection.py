"""Looking at a checkpoint without loading it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from swincupy.checkpoint.layouts import to_canonical
from swincupy.checkpoint.reading import check_parameters, config_of, labels_of
from swincupy.checkpoint.source import open_source
from swincupy.checkpoint.tensors import FLOATS, StoredTensor
from swincupy.errors import SwincupyError

_CHUNK = 2**22  # elements checked at a time


def inspect_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], *, check_values: bool = False
) -> dict[str, Any]:
    """What a checkpoint holds, as plain JSON values; the tensors are not read.

    Parameters
    ----------
    source : path or mapping
        As for `read_checkpoint`.
    check_values : bool
        Read every tensor, one at a time, and count its NaN and infinite values.

    Returns
    -------
    dict
        ``format``, ``layout``, ``config`` (None if it could not be found), ``problem`` (why, or what
        is wrong with the tensors; None if nothing), ``parameters`` (how many numbers the model has),
        ``labels`` (how many), ``tensors`` (each ``name``, ``dtype``, ``shape``; with ``check_values``
        floating ones ``nan`` and ``inf`` too), ``ignored`` (names that are not the model's),
        ``metadata``; with ``check_values`` also ``non_finite`` (names of tensors with NaN or inf).

    Raises
    ------
    CheckpointError
        The file cannot be read at all.
    """
    opened = open_source(source)
    report: dict[str, Any] = {
        "format": opened.format,
        "layout": None,
        "config": None,
        "problem": None,
        "parameters": sum(t.size for t in opened.tensors.values() if t.dtype in FLOATS),
        "labels": None,
        "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in opened.tensors.values()],
        "ignored": list(opened.ignored),
        "metadata": dict(opened.metadata),
    }
    try:
        found = to_canonical(opened.tensors, opened.title)
        report["layout"] = "swincupy" if opened.metadata.get("format") == "swincupy" else found.layout
        report["ignored"] += found.ignored
        report["parameters"] = sum(t.size for t in found.tensors.values())
        config = config_of(opened, found, None)
        report["config"] = config.to_dict()
        labels = labels_of(opened, config.num_classes)
        report["labels"] = None if labels is None else len(labels)
        check_parameters(found, config, opened.title)
    except SwincupyError as error:
        report["problem"] = str(error)
    if check_values:
        for entry, tensor in zip(report["tensors"], opened.tensors.values(), strict=True):
            if tensor.dtype in FLOATS:
                entry["nan"], entry["inf"] = _non_finite(tensor)
        report["non_finite"] = [entry["name"] for entry in report["tensors"] if entry.get("nan") or entry.get("inf")]
    return report


def _non_finite(tensor: StoredTensor) -> tuple[int, int]:
    values = tensor.read()
    flat = values.reshape(-1)  # a view, unless the tensor is stored transposed
    nan = inf = 0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        nan += int(np.isnan(chunk).sum())
        inf += int(np.isinf(chunk).sum())
    return nan, inf
