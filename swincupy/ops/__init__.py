"""Array operations of Swin Transformers, usable by themselves on NumPy and CuPy arrays.

The result lives where the input lives: same library, dtype and device.
"""

from swincupy.ops.reference import (
    attention_block,
    continuous_position_bias,
    cosine_attention_block,
    cosine_window_attention,
    gelu,
    global_pool,
    layer_norm,
    linear,
    mlp,
    mlp_block,
    patch_embed,
    patch_merge,
    relative_position_bias,
    relative_position_index,
    shift_mask,
    shifted_windows,
    softmax,
    unshifted_windows,
    window_attention,
    window_partition,
    window_reverse,
)

__all__ = [
    "attention_block",
    "continuous_position_bias",
    "cosine_attention_block",
    "cosine_window_attention",
    "gelu",
    "global_pool",
    "layer_norm",
    "linear",
    "mlp",
    "mlp_block",
    "patch_embed",
    "patch_merge",
    "relative_position_bias",
    "relative_position_index",
    "shift_mask",
    "shifted_windows",
    "softmax",
    "unshifted_windows",
    "window_attention",
    "window_partition",
    "window_reverse",
]
