"""Names and orders of every known source, and their way to the canonical ones (microsoft's).

Canonical are the names and orders of microsoft's files: ``layers.{i}.blocks.{j}...``, the
downsampling at the end of a stage, q, k and v in one ``qkv``, patches merged in the order
(r0c0, r1c0, r0c1, r1c1). `to_canonical` finds out which source a dictionary comes from and
rewrites it; tensors are not read, only described anew.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from swincupy.checkpoint.tensors import Array, StoredTensor
from swincupy.errors import CheckpointError

_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "k_bias")

# Keys that only this layout has; what comes before the match is the prefix.
_SIGNS = {
    "huggingface": r"embeddings\.patch_embeddings\.projection\.|"
    r"encoder\.layers\.\d+\.blocks\.\d+\.(?:attention|layernorm_before|layernorm_after|intermediate|output|mlp)\.",
    "torchvision": r"features\.(?:0\.0\.|\d+\.\d+\.(?:attn|mlp|norm1|norm2)\.)",
    "openmmlab": r"patch_embed\.projection\.|stages\.\d+\.blocks\.\d+\.(?:attn\.w_msa|ffn|norm1|norm2)\.",
    "microsoft": r"patch_embed\.proj\.|layers[._]\d+\.blocks\.\d+\.(?:attn|mlp|norm1|norm2)\.",
}

_Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# Applied in order: "attention.output.dense" must be gone before "output.dense" is renamed.
_RENAMES: dict[str, _Rules] = {
    "microsoft": (
        (r"\.attn\.rpe_mlp\.", ".attn.cpb_mlp."),  # early V2 files
        (r"^head\.fc\.", "head."),
    ),
    "timm": (
        (r"^layers_(\d+)\.", r"layers.\1."),  # features_only=True
        (r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"^head\.fc\.", "head."),
    ),
    "huggingface": (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
        (r"^encoder\.layers\.", "layers."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.(?:self\.query|q_proj)\.", ".attn.query."),
        (r"\.attention\.(?:self\.key|k_proj)\.", ".attn.key."),
        (r"\.attention\.(?:self\.value|v_proj)\.", ".attn.value."),
        (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
        (r"\.attention\.(?:self|relative_position_bias)\.", ".attn."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^(?:swin\.)?layernorm\.", "norm."),  # SwinBackbone of transformers 5 keeps the prefix on this one
        (r"^classifier\.", "head."),
        (r"^hidden_states_norms\.stage(\d+)\.", lambda m: f"norm{int(m[1]) - 1}."),
    ),
    "torchvision": (
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.(\d*[13579])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks."),
        (r"^features\.(\d*[02468])\.(?=norm\.|reduction\.)", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    ),
    "openmmlab": (
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^stages\.", "layers."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"^head\.fc\.", "head."),
    ),
}

# Beside a prefixed backbone only these belong to the model; the rest is another network's.
_OUTSIDE = re.compile(r"(?:head|head\.fc|classifier)\.(?:weight|bias)|hidden_states_norms\.stage\d+\.(?:weight|bias)")

_DROPPED = re.compile(r"(?:embeddings\.)?mask_token|hidden_states_norms\.stem\.(?:weight|bias)")

_OTHER_NETWORKS = {
    ".attn.meta_mlp.": "Swin Transformer V2-CR (timm's swinv2_cr_*)",
    ".attn.tau": "Swin Transformer V2-CR (timm's swinv2_cr_*)",
    ".spatial_mlp.": "Swin-MLP",
    "._moe_layer.": "Swin-MoE",
}


@dataclasses.dataclass(frozen=True)
class Translation:
    """A checkpoint under canonical names.

    ``buffers`` are the constants that some files store beside the weights; they tell about windows
    and sizes. ``ignored`` are original names that were left out on purpose; ``faults`` says why a
    canonical tensor could not be put together.
    """

    layout: str
    version: int
    tensors: dict[str, StoredTensor]
    buffers: dict[str, StoredTensor]
    ignored: list[str]
    faults: dict[str, str]
    position_grid: tuple[int, int] | None = None


def to_canonical(tensors: Mapping[str, StoredTensor], title: str) -> Translation:
    """Detect the layout and rename, split, join and reorder accordingly."""
    layout, prefix = _detect(tensors, title)
    inside, ignored = _inside(tensors, prefix)
    version = 2 if any(key.endswith(".logit_scale") or ".continuous_position" in key for key in inside) else 1
    if layout == "microsoft" and _timm_placement(inside):
        layout = "timm"

    found: dict[str, StoredTensor] = {}
    buffers: dict[str, StoredTensor] = {}
    for key, tensor in inside.items():
        name = _rename(key, layout)
        if key.endswith(_BUFFERS):
            buffers[name] = tensor
            ignored.append(tensor.name)
        elif _DROPPED.fullmatch(key):
            ignored.append(tensor.name)
        elif name in found:
            raise CheckpointError(
                f"{title}: {found[name].name!r} and {tensor.name!r} are both {name!r} ({layout} layout)"
            )
        else:
            found[name] = tensor

    faults: dict[str, str] = {}
    if layout == "huggingface":
        faults = _join_qkv(found, version)
    elif layout == "torchvision" and version == 2:
        _split_qkv_bias(found, ignored)
    elif layout == "openmmlab":
        _downsample_at_end(found)
        _from_unfold_order(found, version)
        _last_level_norm(found)
    grid = _flatten_position_embedding(found)
    return Translation(layout, version, found, buffers, ignored, faults, grid)


def _detect(tensors: Mapping[str, StoredTensor], title: str) -> tuple[str, str]:
    for key in tensors:
        for sign, network in _OTHER_NETWORKS.items():
            if sign in key + ".":
                raise CheckpointError(f"{title}: this is {network}, a different network, which swincupy does not run")
    signs = {layout: re.compile(f"(.*?)(?:{sign})") for layout, sign in _SIGNS.items()}
    votes: Counter[tuple[str, str]] = Counter()
    for key in tensors:
        for layout, pattern in signs.items():
            if (match := pattern.match(key)) and (not match[1] or match[1].endswith(".")):
                votes[layout, match[1]] += 1
    if not votes:
        shown = ", ".join(key[:80] for key in list(tensors)[:5])
        raise CheckpointError(
            f"{title}: not a Swin Transformer: no name has the form of a known layout ({', '.join(_SIGNS)}, timm); "
            f"the first are {shown or 'none at all'}"
        )
    (layout, prefix), most = votes.most_common(1)[0]
    rivals = sorted(p for (other, p), n in votes.items() if other == layout and p != prefix and 2 * n >= most)
    if rivals:
        raise CheckpointError(
            f"{title}: holds several Swin Transformers, under {prefix!r} and {rivals[0][:80]!r}; "
            "pass a dictionary with the keys of one"
        )
    return layout, prefix


def _inside(tensors: Mapping[str, StoredTensor], prefix: str) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors of the model by name without prefix; names of those that belong to something else."""
    root = prefix[: prefix[:-1].rfind(".") + 1]  # "module.backbone." -> "module.", "backbone." -> ""
    inside = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    ignored = []
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            continue
        name = key[len(root) :] if key.startswith(root) else ""
        head_is_linear = not name.endswith(".weight") or len(tensor.shape) == 2 or name.startswith("hidden")
        if _OUTSIDE.fullmatch(name) and head_is_linear and name not in inside:
            inside[name] = tensor
        else:
            ignored.append(key)
    return inside, ignored


def _timm_placement(keys: Mapping[str, StoredTensor]) -> bool:
    """timm >= 0.9 downsamples at the start of stages 1, 2, ...; microsoft at the end of all but the last."""
    if any(key.startswith("layers.0.downsample.") for key in keys):
        return False
    return "head.fc.weight" in keys or any(re.match(r"layers(?:_|\.\d+\.downsample\.)", key) for key in keys)


def _rename(key: str, layout: str) -> str:
    for pattern, replacement in _RENAMES[layout]:
        key = re.sub(pattern, replacement, key)
    return key


def _joined(parts: list[StoredTensor]) -> StoredTensor:
    first = parts[0]
    shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
    name = " + ".join(p.name for p in parts)
    return StoredTensor(name, first.dtype, shape, lambda: np.concatenate([p.read() for p in parts]))


def _join_qkv(found: dict[str, StoredTensor], version: int) -> dict[str, str]:
    """Hugging Face's query, key and value to ``qkv`` (V2: biases to ``q_bias`` and ``v_bias``).

    Returns what stands in the way of those that cannot be joined, by canonical name.
    """
    faults: dict[str, str] = {}
    part_of = re.compile(r"(.*\.attn\.)(?:query|key|value)\.(?:weight|bias)")
    stems = dict.fromkeys(m[1] for name in found if (m := part_of.fullmatch(name)))
    for attn in stems:
        if version == 2:
            for old, new in (("query.bias", "q_bias"), ("value.bias", "v_bias")):
                if attn + old in found:
                    found[attn + new] = found.pop(attn + old)
        for kind in ("weight",) if version == 2 else ("weight", "bias"):
            parts = {part: found.pop(f"{attn}{part}.{kind}", None) for part in ("query", "key", "value")}
            there = [tensor for tensor in parts.values() if tensor is not None]
            if not there:
                continue
            if len(there) < 3:
                lacking = " and ".join(part for part, tensor in parts.items() if tensor is None)
                faults[f"{attn}qkv.{kind}"] = f"the {lacking} beside {there[0].name}"
            elif len({(t.dtype, t.shape) for t in there}) > 1 or not there[0].shape:
                faults[f"{attn}qkv.{kind}"] = f"query, key and value of one shape and dtype beside {there[0].name}"
            else:
                found[f"{attn}qkv.{kind}"] = _joined(there)
    return faults


def _split_qkv_bias(found: dict[str, StoredTensor], ignored: list[str]) -> None:
    """torchvision V2 stores [q | k | v] biases and zeroes k's on every call."""
    for name in [name for name in found if name.endswith(".attn.qkv.bias")]:
        bias = found[name]
        if len(bias.shape) != 1 or bias.shape[0] % 3:
            continue  # reported as misshaped
        attn, C = name.removesuffix("qkv.bias"), bias.shape[0] // 3
        found[f"{attn}q_bias"] = bias.then((C,), lambda b: b[: len(b) // 3])
        found[f"{attn}v_bias"] = bias.then((C,), lambda b: b[2 * len(b) // 3 :])
        ignored.append(f"{bias.name} (the third of k, which torchvision zeroes)")
        del found[name]


def _downsample_at_end(found: dict[str, StoredTensor]) -> None:
    """OpenMMLab's V2 downsamples at the start of a stage, its V1 at the end."""
    names = [name for name in found if re.match(r"layers\.\d+\.downsample\.", name)]
    if not names or any(name.startswith("layers.0.") for name in names):
        return
    moved = {name: found.pop(name) for name in names}
    for name, tensor in moved.items():
        found[_rename(name, "timm")] = tensor


def _from_unfold_order(found: dict[str, StoredTensor], version: int) -> None:
    """OpenMMLab merges patches with Unfold: channels outside, (r0c0, r0c1, r1c0, r1c1) inside."""
    for name, tensor in found.items():
        merged = re.fullmatch(r"layers\.\d+\.downsample\.(reduction\.weight|norm\.weight|norm\.bias)", name)
        if not merged or (version == 2 and "norm" in merged[1]):  # V2 normalises the 2C channels after the reduction
            continue
        if tensor.shape and tensor.shape[-1] % 4 == 0:
            found[name] = tensor.then(tensor.shape, merge_order)


def merge_order(x: Array) -> Array:
    """Last axis [C * 4] in Unfold's order to [4 * C] in the canonical order."""
    *lead, n = x.shape
    split = x.reshape(*lead, n // 4, 4)[..., [0, 2, 1, 3]]
    return split.swapaxes(-1, -2).reshape(*lead, n)


def _last_level_norm(found: dict[str, StoredTensor]) -> None:
    """mmpretrain's classifiers name the final norm after the last stage, ``norm3``."""
    levels = sorted({int(m[1]) for name in found if (m := re.fullmatch(r"norm(\d+)\.weight", name))})
    if "norm.weight" in found or not levels or ("head.weight" not in found and len(levels) > 1):
        return
    for kind in ("weight", "bias"):
        name = f"norm{levels[-1]}.{kind}"
        if name in found:
            found[f"norm.{kind}"] = found.pop(name) if len(levels) == 1 else found[name]


def _flatten_position_embedding(found: dict[str, StoredTensor]) -> tuple[int, int] | None:
    """Detection code keeps the absolute position embedding as [1, C, H, W]; canonical is [1, H*W, C]."""
    ape = found.get("absolute_pos_embed")
    if ape is not None and len(ape.shape) == 4 and ape.shape[0] == 1:
        _, C, H, W = ape.shape
        found["absolute_pos_embed"] = ape.then((1, H * W, C), lambda x: x.reshape(1, C, H * W).transpose(0, 2, 1))
        return H, W
    return None
