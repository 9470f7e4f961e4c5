"""What stands beside the arrays about a model: its config.json, its own metadata, its name.

Everything here returns plain dictionaries of `SwinConfig` fields; `infer` weighs them against the
arrays. The fields of a config.json are statements (a contradiction is an error), those of a name
are guesses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from swincupy.config import SwinConfig
from swincupy.errors import CheckpointError

FORMAT_VERSION = 1
MAX_STAGES = 16  # stage i has C * 2**i channels; the papers' models have 4

Fields = dict[str, Any]


def own_config(metadata: Mapping[str, str], title: str) -> SwinConfig | None:
    """Configuration in the metadata of a file that `save_checkpoint` wrote, if it is one."""
    if metadata.get("format") != "swincupy":
        return None
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{title}: format_version must be {FORMAT_VERSION}, got {version[:20]!r}; upgrade swincupy"
        )
    fields = own_json(metadata, "config", title)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{title}: the metadata must have a config, a JSON object; the file is damaged")
    return build_config(fields, f"{title}: the config in the metadata")


def own_json(metadata: Mapping[str, str], key: str, title: str) -> Any:
    """One JSON value of our own metadata; None where it is absent."""
    if metadata.get("format") != "swincupy" or key not in metadata:
        return None
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{title}: {key} in the metadata is not valid JSON ({str(error)[:120]})") from None


def build_config(fields: Mapping[str, Any], what: str) -> SwinConfig:
    """`SwinConfig` from values of any type, as they come out of a file; faults are `CheckpointError`."""
    depths = fields.get("depths")
    if isinstance(depths, (list, tuple)) and len(depths) > MAX_STAGES:
        raise CheckpointError(f"{what}: depths must have at most {MAX_STAGES} stages, got {len(depths)}")
    try:
        return SwinConfig.from_dict(fields)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{what} is not valid: {str(error)[:300]}") from None


def json_fields(config: Mapping[str, Any], title: str) -> Fields:
    """Fields that a config.json of Hugging Face (Swin, Swinv2) or of timm's hub states."""
    if config.get("model_type") in ("swin", "swinv2"):
        return _huggingface_fields(config, title)
    if isinstance(config.get("architecture"), str):
        return _timm_fields(config, title)
    return {}


def _huggingface_fields(config: Mapping[str, Any], title: str) -> Fields:
    _need_gelu(config.get("hidden_act", "gelu"), "hidden_act", title)
    names = {
        "image_size": "img_size", "patch_size": "patch_size", "num_channels": "in_chans", "embed_dim": "embed_dim",
        "depths": "depths", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio", "qkv_bias": "qkv_bias",
        "use_absolute_embeddings": "ape",
    }  # fmt: skip
    fields = {new: frozen(config[old]) for old, new in names.items() if config.get(old) is not None}
    fields["version"] = 2 if config["model_type"] == "swinv2" else 1
    fields.setdefault("img_size", 224)
    fields["window_size"] = frozen(config.get("window_size", 7))
    fields["norm_eps"] = config.get("layer_norm_eps", 1e-5)
    if fields["version"] == 2:
        fields["pretrained_window_sizes"] = frozen(config.get("pretrained_window_sizes", 0))
    return fields


def _timm_fields(config: Mapping[str, Any], title: str) -> Fields:
    fields = name_fields(str(config["architecture"]))
    cfg, args = config.get("pretrained_cfg"), config.get("model_args")
    size = cfg.get("input_size") if isinstance(cfg, dict) else None
    if isinstance(size, list) and len(size) == 3:
        fields["img_size"] = _collapsed(frozen(size[1:]))
    if isinstance(args, dict):
        _need_gelu(args.get("act_layer") or "gelu", "act_layer", title)
        known = ("img_size", "patch_size", "in_chans", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio",
                 "qkv_bias", "pretrained_window_sizes")  # fmt: skip
        fields |= {name: frozen(args[name]) for name in known if args.get(name) is not None}
        if isinstance(fields.get("window_size"), tuple) and "depths" not in args and len(fields["window_size"]) == 2:
            fields["window_size"] = (fields["window_size"],) * 4  # timm: a pair is (height, width) of all four stages
        if args.get("always_partition"):
            fields["window_clamp"] = "never"
    if "v2" in str(config["architecture"]):
        fields.setdefault("pretrained_window_sizes", 0)
    return fields


def name_fields(name: str) -> Fields:
    """Sizes that a published name says, e.g. ``swinv2_base_patch4_window12to16_192to256_22kto1k_ft``."""
    name = name.lower()
    if not re.search(r"swin", name):
        return {}
    fields: Fields = {}
    size = re.search(r"window(\d{1,3})(?:to(\d{1,3}))?(?:[-_](\d{2,4})(?:to(\d{2,4})|x(\d{2,4}))?(?!\d))?", name)
    if size:
        before, window, first, to, width = size.groups()
        fields["window_size"] = int(window or before)
        if first:
            fields["img_size"] = _collapsed((int(first), int(width))) if width else int(to or first)
        if window and first:
            # the window that a stage was trained with was clamped to its feature map
            side = int(first) // (int(m[1]) if (m := re.search(r"patch(\d{1,2})", name)) and int(m[1]) else 4)
            fields["pretrained_window_sizes"] = tuple(min(int(before), max(side // 2**i, 1)) for i in range(4))
        else:
            fields["pretrained_window_sizes"] = 0
    elif re.search(r"swin_v2_[tsb](?![a-z0-9])", name):  # torchvision
        fields |= {"window_size": 8, "img_size": 256, "pretrained_window_sizes": 0}
    elif re.search(r"swin_[tsb](?![a-z0-9])", name):
        fields |= {"window_size": 7, "img_size": 224}
    elif size := re.search(r"swin.*[-_](?:img)?(\d{3})(?!\d)", name):  # swin_s3_tiny_224, simmim's ..._img192_...
        fields["img_size"] = int(size[1])
    if size := re.search(r"img(\d{2,4})", name):
        fields["img_size"] = int(size[1])
    return {key: value for key, value in fields.items() if key == "pretrained_window_sizes" or value}


def labels_of(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """Class names in a config.json, if there is one for each class."""
    by_id, names = config.get("id2label"), config.get("label_names")
    if isinstance(by_id, dict) and len(by_id) == num_classes:
        listed = [by_id.get(str(i)) for i in range(num_classes)]
    elif isinstance(names, list) and len(names) == num_classes:
        described = config.get("label_descriptions")
        described = described if isinstance(described, dict) else {}
        listed = [described.get(name, name) if isinstance(name, str) else None for name in names]
    else:
        return None
    return tuple(str(label) for label in listed) if num_classes and None not in listed else None


def frozen(value: Any) -> Any:
    return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _collapsed(pair: Any) -> Any:
    return pair[0] if pair[0] == pair[1] else pair


def _need_gelu(found: Any, field: str, title: str) -> None:
    if found != "gelu":
        raise CheckpointError(f"{title}: config.json: {field} must be 'gelu' (erf), got {str(found)[:40]!r}")
