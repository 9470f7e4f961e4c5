"""The forward pass of Swin Transformer and Swin Transformer V2, over plain arrays.

Pure functions of embedded patches, the nested weights of `parameters.fold`, the input size's plan of
`parameters.plan`, and the array operations to use (`swincupy.ops.reference` or faster ones with
the same names). No dtype, device or library is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Array = Any


def block_v1(z: Array, w: dict[str, Any], grid: dict[str, Any], ops: Any) -> Array:  # z [B, H, W, C]
    z = ops.attention_block(z, **w["attn"], **grid)  # z + Proj(softmax(Q K^T / sqrt(d) + B + mask) V), of LN(z)
    return ops.mlp_block(z, **w["mlp"])  # z + W2 gelu(W1 LN(z))


def block_v2(z: Array, w: dict[str, Any], grid: dict[str, Any], ops: Any) -> Array:  # z [B, H, W, C]
    z = ops.cosine_attention_block(z, **w["attn"], **grid)  # z + LN(Proj(softmax(s cos(Q, K) + B + mask) V))
    return ops.mlp_block(z, **w["mlp"], post_norm=True)  # z + LN(W2 gelu(W1 z))


BLOCK = {1: block_v1, 2: block_v2}


def patches(x: Array, w: dict[str, Any], plan: dict[str, Any], ops: Any, **options: Any) -> Array:
    """Embedded patches [B, H, W, C], what all else begins with.

    x [B, Cin, Hpx, Wpx], or bytes [B, Hpx, Wpx, Cin], whose mean and std are then the plan's ``normalise``.
    """
    pixels = {"position_embedding": plan["position_embedding"], **plan.get("normalise", {})}
    return ops.patch_embed(x, **w["patch_embed"], **pixels, **options)


def stages(z: Array, w: dict[str, Any], plan: dict[str, Any], block: Any, ops: Any) -> Iterator[Array]:
    """Feature map of each stage, [B, H_i, W_i, C_i], before its patch merging; z are the `patches`."""
    for stage, grids in zip(w["stages"], plan["stages"], strict=True):
        for weights, grid in zip(stage["blocks"], grids, strict=True):
            z = block(z, weights, grid, ops)
        yield z
        if stage["merge"] is not None:
            z = ops.patch_merge(z, **stage["merge"])  # [B, H / 2, W / 2, 2 C]


def features(
    z: Array, w: dict[str, Any], plan: dict[str, Any], block: Any, ops: Any, *, wanted: tuple[int, ...], norm: bool
) -> list[Array]:
    """Feature maps of the wanted stages, [B, H_i, W_i, C_i], through their own LayerNorms where asked."""
    maps = {}
    for i, y in enumerate(stages(z, w, plan, block, ops)):
        level = w["level_norms"].get(i) if norm else None
        if i in wanted:
            maps[i] = y if level is None else ops.layer_norm(y, **level)
        if i == max(wanted):
            break
    return [maps[i] for i in wanted]


def embed(z: Array, w: dict[str, Any], plan: dict[str, Any], block: Any, ops: Any) -> Array:
    """Mean of the normalised tokens of the last stage: [B, 8 C]."""
    for y in stages(z, w, plan, block, ops):
        last = y
    return ops.global_pool(last, **w["norm"])


def logits(z: Array, w: dict[str, Any], plan: dict[str, Any], block: Any, ops: Any) -> Array:
    """Class scores before the softmax: [B, K]."""
    return ops.linear(embed(z, w, plan, block, ops), **w["head"])
