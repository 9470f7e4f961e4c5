"""Checkpoints of every layout, written the long way round: nothing here is shared with the reader.

All start from canonical parameters (microsoft's names and orders) and return a flat dictionary as
the source would save it, buffers included.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from swincupy.config import SwinConfig
from swincupy.parameters import parameter_shapes

Params = dict[str, np.ndarray]

V1 = SwinConfig(img_size=56, embed_dim=8, depths=(2, 1, 2), num_heads=(1, 2, 4), window_size=7, num_classes=5)
V2 = SwinConfig(
    version=2, img_size=32, embed_dim=8, depths=(2, 1, 2), num_heads=(1, 2, 4), window_size=4, num_classes=5
)


def random_params(config: SwinConfig, seed: int = 0, dtype: Any = np.float32) -> Params:
    r = np.random.default_rng(seed)
    return {name: r.standard_normal(shape).astype(dtype) for name, shape in parameter_shapes(config).items()}


def position_index(h: int, w: int) -> np.ndarray:
    cells = [(i, j) for i in range(h) for j in range(w)]
    return np.array([[(a - c + h - 1) * (2 * w - 1) + b - d + w - 1 for c, d in cells] for a, b in cells])


def coords_table(h: int, w: int, trained: tuple[int, int] = (0, 0)) -> np.ndarray:
    table = np.empty((1, 2 * h - 1, 2 * w - 1, 2), np.float32)
    for axis, (side, p) in enumerate(zip((h, w), trained)):
        t = 8 * np.arange(1 - side, side) / max((p or side) - 1, 1)
        t = np.sign(t) * np.log2(np.abs(t) + 1) / 3
        table[0, ..., axis] = t[:, None] if axis == 0 else t[None, :]
    return table


def microsoft(params: Params, config: SwinConfig, buffers: bool = True) -> Params:
    out = dict(params)
    for i, ((h, w), trained) in enumerate(zip(config.windows, config.pretrained_windows)):
        for j in range(config.depths[i] if buffers else 0):
            attn = f"layers.{i}.blocks.{j}.attn"
            out[f"{attn}.relative_position_index"] = position_index(h, w)
            if config.version == 2:
                out[f"{attn}.relative_coords_table"] = coords_table(h, w, trained)
            grid = config.image[0] // config.patch[0] // 2**i if config.image else 0
            if j % 2 and grid > h:
                out[f"layers.{i}.blocks.{j}.attn_mask"] = np.zeros(((grid // h) ** 2, h * w, h * w), np.float32)
    return out


def timm(params: Params, config: SwinConfig) -> Params:
    out = {}
    for name, x in params.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) + 1)
        if parts[0] == "head":
            parts = ["head", "fc", parts[1]]
        out[".".join(parts)] = x
    return out


def huggingface(params: Params, config: SwinConfig, names: str = "v4", prefix: str | None = None) -> Params:
    prefix = ("swin." if config.version == 1 else "swinv2.") if prefix is None else prefix
    new = names == "v5"
    out: Params = {}
    for name, x in params.items():
        if name.startswith("head."):
            out["classifier." + name[5:]] = x
            continue
        in_block = re.match(r"layers\.\d+\.blocks\.\d+\.", name)
        block = in_block[0] if in_block else ""
        rest = name[len(block) :]
        at = f"{prefix}encoder.{block}" if block else prefix
        if rest.startswith("attn.qkv."):
            for part, rows in zip(("query", "key", "value"), np.split(x, 3)):
                stem = f"attention.{part[0]}_proj" if new else f"attention.self.{part}"
                out[f"{at}{stem}.{rest[9:]}"] = rows
            continue
        if rest in ("attn.q_bias", "attn.v_bias"):
            out[f"{at}attention.self.{'query' if rest[5] == 'q' else 'value'}.bias"] = x
            continue
        table = {
            "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
            "patch_embed.norm.": "embeddings.norm.",
            "absolute_pos_embed": "embeddings.position_embeddings",
            "layers.": "encoder.layers.",
            "norm1.": "layernorm_before.",
            "norm2.": "layernorm_after.",
            "norm.": "layernorm.",
            "attn.proj.": "attention.o_proj." if new else "attention.output.dense.",
            "attn.cpb_mlp.": "attention.self.continuous_position_bias_mlp.",
            "attn.relative": "attention.relative_position_bias.relative" if new else "attention.self.relative",
            "attn.": "attention.self.",
            "mlp.fc1.": "mlp.fc1." if new else "intermediate.dense.",
            "mlp.fc2.": "mlp.fc2." if new else "output.dense.",
        }
        start = next(k for k in table if rest.startswith(k))
        out[at + table[start] + rest[len(start) :]] = x
    if config.version == 1 and not new:
        for i, (h, w) in enumerate(config.windows):
            for j in range(config.depths[i]):
                at = f"{prefix}encoder.layers.{i}.blocks.{j}.attention.self.relative_position_index"
                out[at] = position_index(h, w)
    return out


def torchvision(params: Params, config: SwinConfig) -> Params:
    out: Params = {}
    for name, x in params.items():
        p = name.split(".")
        if p[0] == "patch_embed":
            out[f"features.0.{0 if p[1] == 'proj' else 2}.{p[2]}"] = x
        elif p[2:3] == ["blocks"]:
            at = f"features.{2 * int(p[1]) + 1}.{p[3]}"
            rest = ".".join(p[4:]).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
            if rest == "attn.q_bias":
                q, v = x, params[name.replace("q_bias", "v_bias")]
                out[f"{at}.attn.qkv.bias"] = np.concatenate([q, np.full_like(q, 99), v])
            elif rest != "attn.v_bias":
                out[f"{at}.{rest}"] = x
        elif p[2:3] == ["downsample"]:
            out[f"features.{2 * int(p[1]) + 2}." + ".".join(p[3:])] = x
        else:
            out[name] = x
    for i, (h, w) in enumerate(config.windows):
        for j in range(config.depths[i]):
            out[f"features.{2 * i + 1}.{j}.attn.relative_position_index"] = position_index(h, w).reshape(-1)
            if config.version == 2:
                out[f"features.{2 * i + 1}.{j}.attn.relative_coords_table"] = coords_table(h, w)
    return out


def openmmlab(params: Params, config: SwinConfig, prefix: str = "backbone.") -> Params:
    out: Params = {}
    for name, x in params.items():
        if name.startswith("head."):
            out["head.fc." + name[5:]] = x
            continue
        if re.search(r"downsample\.(reduction|norm)", name) and (config.version == 1 or "reduction" in name):
            # channel of Unfold: c * 4 + 2 * row + column; canonical: (row + 2 * column) * C + c
            C = x.shape[-1] // 4
            order = [(row + 2 * column) * C + c for c in range(C) for row in (0, 1) for column in (0, 1)]
            x = x[..., order]
        name = name.replace("layers.", "stages.").replace("patch_embed.proj", "patch_embed.projection")
        name = name.replace(".attn.", ".attn.w_msa.")
        name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        out[prefix + re.sub(r"^norm\.", f"norm{config.num_stages - 1}.", name)] = x
    for i, (h, w) in enumerate(config.windows):
        for j in range(config.depths[i]):
            out[f"{prefix}stages.{i}.blocks.{j}.attn.w_msa.relative_position_index"] = position_index(h, w)
            if config.version == 2:
                at = f"{prefix}stages.{i}.blocks.{j}.attn.w_msa.relative_coords_table"
                out[at] = coords_table(h, w, config.pretrained_windows[i])
    return out


# --- files of torch.save without torch: a pickle of protocol 2, emitted opcode by opcode


class Name:
    """A global in a pickle; ``Call`` applies it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    def __init__(self, function: Name, *arguments: Any, opcode: bytes = b"R", state: Any = None) -> None:
        self.function, self.arguments, self.opcode, self.state = function, arguments, opcode, state


class Persistent:
    def __init__(self, value: Any) -> None:
        self.value = value


class Tensor:
    """A tensor in a pickle: where it lies in its storage, freely chosen."""

    def __init__(self, kind: str, key: str, numel: int, size: tuple, stride: tuple, offset: int = 0) -> None:
        self.kind, self.key, self.numel = kind, key, numel
        self.size, self.stride, self.offset = size, stride, offset


KINDS = {
    "f4": "Float",
    "f8": "Double",
    "f2": "Half",
    "i8": "Long",
    "i4": "Int",
    "i1": "Char",
    "u1": "Byte",
    "b1": "Bool",
}


def pickled(tree: Any) -> bytes:
    return b"\x80\x02" + _emit(tree) + b"."


def _emit(x: Any) -> bytes:
    if x is None or isinstance(x, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[x]
    if isinstance(x, int):
        raw = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
        return b"J" + struct.pack("<i", x) if abs(x) < 2**31 else b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(x, float):
        return b"G" + struct.pack(">d", x)
    if isinstance(x, str):
        raw = x.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(x, dict):
        return b"}(" + b"".join(_emit(k) + _emit(v) for k, v in x.items()) + b"u"
    if isinstance(x, list):
        return b"](" + b"".join(map(_emit, x)) + b"e"
    if isinstance(x, tuple):
        return b"(" + b"".join(map(_emit, x)) + b"t"
    if isinstance(x, Name):
        return b"c" + f"{x.module}\n{x.name}\n".encode()
    if isinstance(x, Persistent):
        return _emit(x.value) + b"Q"
    if isinstance(x, Call):
        return _emit(x.function) + _emit(x.arguments) + x.opcode + (b"" if x.state is None else _emit(x.state) + b"b")
    assert isinstance(x, Tensor)
    storage = Persistent(("storage", Name("torch", f"{x.kind}Storage"), x.key, "cpu", x.numel))
    hooks = Call(Name("collections", "OrderedDict"))
    return _emit(Call(Name("torch._utils", "_rebuild_tensor_v2"), storage, x.offset, x.size, x.stride, False, hooks))


def save_torch(
    path: Path, tree: Any, *, records: dict[str, bytes] | None = None, byteorder: str = "little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:  # fmt: skip
    """Write ``tree`` as torch.save does; arrays become tensors, bfloat16 is ("bf16", float32 array)."""
    found: dict[str, bytes] = dict(records or {})

    def convert(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: convert(v) for k, v in x.items()}
        bf16 = isinstance(x, tuple) and len(x) == 2 and x[0] == "bf16"
        if bf16:
            x = (np.ascontiguousarray(x[1]).view(np.uint32) >> 16).astype(np.uint16)
        if isinstance(x, np.ndarray):
            key = str(len(found))
            kind = "BFloat16" if bf16 else KINDS[x.dtype.str[1:]]
            found[key] = x.astype(x.dtype.newbyteorder("<" if byteorder == "little" else ">")).tobytes()
            stride = tuple(s // x.itemsize for s in np.empty(x.shape, x.dtype).strides)
            return Tensor(kind, key, x.size, x.shape, stride)
        return x

    pickle = pickled(convert(tree))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", byteorder)
        for key, raw in found.items():
            record = zipfile.ZipInfo(f"archive/data/{key}")
            record.compress_type = compression
            pad = -(archive.fp.tell() + 34 + len(record.filename)) % 64  # type: ignore[union-attr]
            record.extra = (
                b"FB" + struct.pack("<H", pad) + bytes(pad)
            )  # data on multiples of 64 bytes, as torch has them
            archive.writestr(record, raw)
        archive.writestr("archive/version", "3\n")
    return path


def save_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path
