"""Preprocessing stated beside a checkpoint, in the fields of `swincupy.preprocess.Preprocess`.

Read are Hugging Face's preprocessor_config.json and the ``pretrained_cfg`` of timm's config.json.
What they say and `Preprocess` cannot do gives None: the preset of the layout is used instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


def from_huggingface(stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of a preprocessor_config.json."""
    resample = stated.get("resample", 3)
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    mean, std = _numbers(stated.get("image_mean")), _numbers(stated.get("image_std"))
    if any(stated.get(key, value) is not value for key, value in wanted.items()) or None in (mean, std):
        return None
    if type(resample) is not int or resample not in _RESAMPLE or not _near_255(stated.get("rescale_factor", 1 / 255)):
        return None
    size, crop = stated.get("size"), None
    if stated.get("do_center_crop") is True and (crop := _size(stated.get("crop_size"))) is None:
        return None
    fields = {"interpolation": _RESAMPLE[resample], "mean": mean, "std": std}
    if isinstance(size, dict) and _side(size.get("shortest_edge")):
        if crop is None:
            return None  # images of every aspect ratio: no batch
        return fields | {"size": crop, "resize": "shorter", "resize_size": size["shortest_edge"]}
    to = _size(size)
    return None if to is None else fields | {"size": crop or to, "resize": "squash", "resize_size": to}


def from_timm(stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of a ``pretrained_cfg``: the image is resized to size / crop_pct and its centre cut out."""
    size, crop_pct = stated.get("input_size"), stated.get("crop_pct", 0.9)
    mean, std = _numbers(stated.get("mean")), _numbers(stated.get("std"))
    interpolation, mode = stated.get("interpolation"), stated.get("crop_mode", "center")
    if not isinstance(size, list) or len(size) != 3 or not all(map(_side, size)) or None in (mean, std):
        return None
    if type(crop_pct) not in (int, float) or not 0.1 < crop_pct <= 1 or interpolation not in _RESAMPLE.values():
        return None
    if mode not in ("center", "squash"):
        return None
    to = [math.floor(side / crop_pct) for side in size[1:]]
    return {
        "size": size[1:],
        "resize": "squash" if mode == "squash" else "shorter",
        "resize_size": to if mode == "squash" or to[0] != to[1] else to[0],
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
        "mode": "L" if size[0] == 1 else "RGB",
    }


def _side(value: object) -> bool:
    return type(value) is int and 0 < value < 2**15


def _size(value: Any) -> list[int] | None:
    if _side(value):
        return [value, value]
    if isinstance(value, dict) and _side(value.get("height")) and _side(value.get("width")):
        return [value["height"], value["width"]]
    return None


def _numbers(value: Any) -> list[float] | None:
    ok = isinstance(value, list) and len(value) in (1, 3) and all(type(v) in (int, float) for v in value)
    return list(value) if ok else None


def _near_255(value: object) -> bool:
    return isinstance(value, float) and abs(value * 255 - 1) < 1e-6
