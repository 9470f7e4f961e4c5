"""From a checkpoint's flat arrays to what the forward pass takes.

`parameter_shapes` says which arrays a configuration has, under microsoft's names. `fold` nests
them, one dictionary for each operation, and computes once whatever depends on weights alone.
`plan` adds what depends on the input's size: windows, shifts, masks, position biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from swincupy.config import Pair, SwinConfig, stage_geometry
from swincupy.errors import ConfigError
from swincupy.ops import reference

Array = Any
Weights = dict[str, Any]


def parameter_shapes(config: SwinConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model, in microsoft's names and order.

    The positions of ``absolute_pos_embed`` are -1 where ``img_size`` is None. V1's bias tables are
    those of ``config.windows``.
    """
    c, shapes = config, dict[str, tuple[int, ...]]()

    def layer_norm(name: str, dim: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    shapes["patch_embed.proj.weight"] = (c.embed_dim, c.in_chans, *c.patch)
    shapes["patch_embed.proj.bias"] = (c.embed_dim,)
    if c.patch_norm:
        layer_norm("patch_embed.norm", c.embed_dim)
    if c.ape:
        tokens = -1 if c.image is None else math.prod(_built_grid(c.image, c.patch))
        shapes["absolute_pos_embed"] = (1, tokens, c.embed_dim)
    for i, (dim, depth, heads, (mh, mw)) in enumerate(zip(c.dims, c.depths, c.num_heads, c.windows, strict=True)):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            layer_norm(f"{block}.norm1", dim)
            if c.version == 1:
                shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * mh - 1) * (2 * mw - 1), heads)
                linear(f"{block}.attn.qkv", 3 * dim, dim, bias=c.qkv_bias)
            else:
                shapes[f"{block}.attn.logit_scale"] = (heads, 1, 1)
                linear(f"{block}.attn.cpb_mlp.0", 512, 2)
                linear(f"{block}.attn.cpb_mlp.2", heads, 512, bias=False)
                linear(f"{block}.attn.qkv", 3 * dim, dim, bias=False)
                if c.qkv_bias:
                    shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (dim,)
            linear(f"{block}.attn.proj", dim, dim)
            layer_norm(f"{block}.norm2", dim)
            linear(f"{block}.mlp.fc1", c.hidden_dim(i), dim)
            linear(f"{block}.mlp.fc2", dim, c.hidden_dim(i))
        if i + 1 < c.num_stages:
            linear(f"layers.{i}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
            layer_norm(f"layers.{i}.downsample.norm", 4 * dim if c.version == 1 else 2 * dim)
    layer_norm("norm", c.num_features)
    if c.num_classes:
        linear("head", c.num_classes, c.num_features)
    return shapes


def fold(
    params: Mapping[str, Array],
    config: SwinConfig,
    convert: Callable[[Array], Array],
    exact: Callable[[Array], Array] | None = None,
    pack_attention: Callable[..., Any] = lambda weights, **options: None,
    pack_mlp: Callable[..., Any] = lambda weights, **options: None,
    fold_norm: Callable[..., Any] = lambda *arrays: None,
    merge_in_place: bool = False,
) -> Weights:
    """Nest flat parameters into one dictionary of arguments for each operation of the forward pass.

    Parameters
    ----------
    params : mapping
        Arrays under the names of `parameter_shapes`; ``norm.*`` may be missing, ``norm{i}.*`` (the
        norm of stage i's feature map) may be there.
    convert : callable
        Takes a parameter to the dtype and device of the model.
    exact : callable, optional
        The same for the few numbers that shall not be rounded to 16 bits, V2's logit scales.
    pack_attention, pack_mlp : callable
        Take a block's weights on the host to what its operations accept as ``packed`` besides them, or to None.
    fold_norm : callable
        Takes the weight and bias of a linear layer and of V1's norm before it to a layer's weight, bias and sums
        with which its operation wants a norm without an affine part, or to None.
    merge_in_place : bool
        Patch merging wants its weights for 2 x 2 neighbours row by row, as they lie in memory.

    Returns
    -------
    dict
        ``patch_embed``, ``stages`` (each ``blocks`` and ``merge``), ``norm`` and ``head`` (or None),
        ``level_norms`` by stage (the last falls back to ``norm``), ``position_embedding`` (or None).
        What `plan` works on, bias tables and the absolute position embedding, is not converted.
    """
    c = config

    def get(name: str) -> Array:
        return convert(params[name]) if name in params else None

    def layer_norm(name: str, prefix: str = "", eps: float = c.norm_eps) -> Weights:
        return {f"{prefix}weight": get(f"{name}.weight"), f"{prefix}bias": get(f"{name}.bias"), "eps": eps}

    def given(names: Mapping[str, str]) -> dict[str, np.ndarray | None]:
        return {k: np.asarray(params[name]) if name in params else None for k, name in names.items()}

    def packed(made: Any) -> Weights:
        return {} if made is None else {"packed": made}

    def folded(raw: dict[str, Any], layer: str) -> Weights:
        names = (f"{layer}_weight", f"{layer}_bias", "norm_weight", "norm_bias")
        made = fold_norm(*(raw[name] for name in names)) if c.version == 1 else None
        if made is None:
            return {k: None if v is None else convert(v) for k, v in raw.items()}
        weight, bias, sums = made
        gamma, beta = np.ones_like(raw["norm_weight"]), np.zeros_like(raw["norm_bias"])
        new = dict(zip(names, (weight, bias, gamma, beta), strict=True))
        return {k: None if v is None else convert(v) for k, v in (raw | new).items()} | {f"{layer}_sums": sums}

    def block(i: int, j: int) -> Weights:
        name = f"layers.{i}.blocks.{j}"
        raw = given(
            {
                "norm_weight": f"{name}.norm1.weight", "norm_bias": f"{name}.norm1.bias",
                "qkv_weight": f"{name}.attn.qkv.weight", "qkv_bias": f"{name}.attn.qkv.bias",
                "proj_weight": f"{name}.attn.proj.weight", "proj_bias": f"{name}.attn.proj.bias",
            }
        )  # fmt: skip
        if c.version == 2 and c.qkv_bias:
            q, v = (np.asarray(params[f"{name}.attn.{part}_bias"]) for part in "qv")
            raw["qkv_bias"] = np.concatenate([q, np.zeros_like(q), v])  # V2's keys have no bias
        attn = folded(raw, "qkv")
        if "qkv_sums" in attn and raw["qkv_bias"] is not None:
            attn["pad_bias"] = convert(raw["qkv_bias"])
        attn |= {"eps": c.norm_eps, "num_heads": c.num_heads[i]}
        scale = None
        if c.version == 1:
            position = {"table": params[f"{name}.attn.relative_position_bias_table"]}
        else:
            stored = np.asarray(params[f"{name}.attn.logit_scale"], dtype=np.float64).reshape(-1)
            scale = np.exp(np.minimum(stored, math.log(100.0)))
            attn["logit_scale"] = (exact or convert)(scale)
            position = {
                "fc1_weight": params[f"{name}.attn.cpb_mlp.0.weight"],
                "fc1_bias": params[f"{name}.attn.cpb_mlp.0.bias"],
                "fc2_weight": params[f"{name}.attn.cpb_mlp.2.weight"],
            }
        attn |= packed(pack_attention(raw, num_heads=c.num_heads[i], logit_scale=scale))
        raw = given(
            {
                "norm_weight": f"{name}.norm2.weight", "norm_bias": f"{name}.norm2.bias",
                "fc1_weight": f"{name}.mlp.fc1.weight", "fc1_bias": f"{name}.mlp.fc1.bias",
                "fc2_weight": f"{name}.mlp.fc2.weight", "fc2_bias": f"{name}.mlp.fc2.bias",
            }
        )  # fmt: skip
        mlp = folded(raw, "fc1")
        if c.version == 1 and merge_in_place and i + 1 < c.num_stages and j + 1 == c.depths[i]:
            mlp["merge_follows"] = True
        mlp |= {"eps": c.norm_eps} | packed(pack_mlp(raw, post_norm=c.version == 2))
        return {"attn": attn, "mlp": mlp, "position": position}

    def merge(i: int) -> Weights | None:
        name = f"layers.{i}.downsample"
        if i + 1 == c.num_stages:
            return None
        raw = given(
            {
                "norm_weight": f"{name}.norm.weight", "norm_bias": f"{name}.norm.bias",
                "reduction_weight": f"{name}.reduction.weight",
            }
        )  # fmt: skip
        options: Weights = {"eps": 1e-5, "post_norm": c.version == 2}
        if not merge_in_place:
            return {k: convert(v) for k, v in raw.items()} | options
        for k, v in raw.items():
            if v is not None and v.shape[-1] == 4 * c.dims[i]:  # the upper right one comes second, not third
                raw[k] = np.concatenate([np.split(v, 4, axis=-1)[part] for part in (0, 2, 1, 3)], axis=-1)
        made = {k: v for k, v in folded(raw | {"reduction_bias": None}, "reduction").items() if v is not None}
        return made | options | {"in_place": True, "moments": "qkv_sums" in blocks[i + 1][0]["attn"]}

    blocks = [[block(i, j) for j in range(depth)] for i, depth in enumerate(c.depths)]
    last = f"norm{c.num_stages - 1}"
    if f"{last}.weight" not in params:
        last = "norm"
    return {
        "patch_embed": layer_norm("patch_embed.norm", "norm_", eps=1e-5)
        | {
            "weight": get("patch_embed.proj.weight"),
            "bias": get("patch_embed.proj.bias"),
            "patch_pad": c.patch_pad or "pad",
        },
        "position_embedding": params.get("absolute_pos_embed"),
        "stages": [{"blocks": of_stage, "merge": merge(i)} for i, of_stage in enumerate(blocks)],
        "norm": layer_norm("norm") if "norm.weight" in params else None,
        "level_norms": {
            i: layer_norm(name, eps=c.norm_eps if name == "norm" else 1e-5)
            for i, name in enumerate([*(f"norm{i}" for i in range(c.num_stages - 1)), last])
            if f"{name}.weight" in params
        },
        "head": {"weight": get("head.weight"), "bias": get("head.bias")} if c.num_classes else None,
    }


def plan(
    weights: Weights,
    config: SwinConfig,
    height: int,
    width: int,
    convert: Callable[[np.ndarray], Array],
    prepare_bias: Callable[[np.ndarray], Array] | None = None,
    masks: bool = True,
) -> Weights:
    """Everything that depends on weights and on the size of the input, but not on its values.

    Parameters
    ----------
    weights : dict
        Of `fold`.
    height, width : int
        Pixels.
    convert : callable
        Takes an array to the dtype and device of the model.
    prepare_bias : callable, optional
        The same for position biases, where the operations want them in a form of their own.
    masks : bool
        False where the operations make the mask of a shift themselves.

    Returns
    -------
    dict
        ``position_embedding`` [1, H, W, C] or None, and ``stages``: for each block the window, shift,
        pad_mode, position_bias [nH, N, N] and mask [nW, N, N] (or None) of its attention.
    """
    geometry = stage_geometry(config, height, width)
    stages = []
    for i, (stage, g) in enumerate(zip(weights["stages"], geometry, strict=True)):
        H, W = (size + -size % m for size, m in zip(g.grid, g.window, strict=True))  # padded
        mask = convert(reference.shift_mask(H, W, g.window, g.shift)) if masks and any(g.shift) else None
        stages.append(
            [
                {
                    "position_bias": position_bias(block["position"], config, i, g.window, prepare_bias or convert),
                    "mask": mask if j % 2 else None,
                    "window": g.window,
                    "shift": g.shift if j % 2 else (0, 0),
                    "pad_mode": config.pad_mode or "pad_roll",
                }
                for j, block in enumerate(stage["blocks"])
            ]
        )
    embedding = weights["position_embedding"]
    if embedding is not None:
        embedding = convert(resize_position_embedding(embedding, config, geometry[0].grid))
    return {"position_embedding": embedding, "stages": stages}


def position_bias(
    position: Weights, config: SwinConfig, stage: int, window: Pair, convert: Callable[[np.ndarray], Array]
) -> Array:
    """Bias [nH, N, N] of a block for a window; that of the configured window is computed once and kept.

    V1 windows smaller than the table's take the part of the table that belongs to their offsets.
    """
    if window == config.windows[stage] and "kept" in position:
        return position["kept"]
    weights = {k: np.asarray(v, np.float64) for k, v in position.items() if k != "kept"}
    if config.version == 1:
        bias = reference.relative_position_bias(crop_table(weights["table"], config.windows[stage], window), window)
    else:
        bias = reference.continuous_position_bias(
            **weights, window=window, pretrained_window=config.pretrained_windows[stage]
        )
    bias = convert(bias)
    if window == config.windows[stage]:
        position["kept"] = bias
    return bias


def crop_table(table: np.ndarray, built: Pair, window: Pair) -> np.ndarray:
    """Rows of a bias table that a smaller window's offsets use: the centre of the [2 Mh - 1, 2 Mw - 1] grid."""
    if window == built:
        return table
    rows, columns = (slice(b - m, b + m - 1) for b, m in zip(built, window, strict=True))
    grid = table.reshape(2 * built[0] - 1, 2 * built[1] - 1, -1)
    return grid[rows, columns].reshape(-1, table.shape[-1])


def resize_position_embedding(ape: np.ndarray, config: SwinConfig, grid: Pair) -> np.ndarray:
    """Absolute position embedding [1, L, C] as [1, H, W, C], resized bicubically where the grid differs.

    The filter is that of PyTorch's ``interpolate(mode="bicubic", align_corners=False)``: a = -0.75,
    no antialiasing, edges repeated.
    """
    L, C = ape.shape[1:]
    built = (math.isqrt(L),) * 2 if config.image is None else _built_grid(config.image, config.patch)
    if math.prod(built) != L:
        raise ConfigError(
            f"SwinConfig: img_size must be the one that the {L} positions of absolute_pos_embed were built for, "
            f"got {config.img_size}"
        )
    ape = np.asarray(ape, np.float64).reshape(1, *built, C)
    for axis, (old, new) in enumerate(zip(built, grid, strict=True), start=1):
        if old != new:
            matrix = _bicubic(old, new)
            ape = reference.linear(ape.swapaxes(axis, -1), matrix).swapaxes(axis, -1)
    return ape


def _built_grid(image: Pair, patch: Pair) -> Pair:
    """Rows and columns of the absolute position embedding: whole patches only, in every implementation."""
    return image[0] // patch[0], image[1] // patch[1]


def _bicubic(old: int, new: int) -> np.ndarray:
    """[new, old] matrix of bicubic interpolation along one axis."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centre - (first + tap))
        near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix
