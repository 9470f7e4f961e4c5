"""Array operations of Swin Transformers, usable by themselves.

The result lives where the input lives: same library, dtype and device. On CuPy arrays of float32,
float16 and bfloat16 (``ml_dtypes``) the operations that have kernels run them; on anything else,
NumPy arrays above all, they are the compositions of `swincupy.ops.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from array_api_compat import is_cupy_array

from swincupy.ops import reference
from swincupy.ops.reference import (
    continuous_position_bias,
    relative_position_bias,
    relative_position_index,
    shift_mask,
    shifted_windows,
    softmax,
    unshifted_windows,
    window_partition,
    window_reverse,
)

if TYPE_CHECKING:
    from swincupy.ops.fused import Fused

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _with_kernel(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """``op``, by the kernels where the first argument is a CuPy array that they take."""

    @functools.wraps(op)
    def dispatched(*args: _P.args, **options: _P.kwargs) -> _R:
        x: Any = args[0] if args else next(iter(options.values()), None)
        if is_cupy_array(x) and x.dtype.name in _PRECISIONS:
            with x.device:
                result: Any = getattr(_fused(_PRECISIONS[x.dtype.name], x.device.id), op.__name__)(*args, **options)
                return result if result.dtype == x.dtype else result.view(x.dtype)  # type: ignore[no-any-return]
        return op(*args, **options)

    return dispatched


@functools.cache
def _fused(precision: str, device: int) -> Fused:
    from swincupy.ops.fused import Fused

    return Fused(precision)


attention_block = _with_kernel(reference.attention_block)
cosine_attention_block = _with_kernel(reference.cosine_attention_block)
cosine_window_attention = _with_kernel(reference.cosine_window_attention)
gelu = _with_kernel(reference.gelu)
global_pool = _with_kernel(reference.global_pool)
layer_norm = _with_kernel(reference.layer_norm)
linear = _with_kernel(reference.linear)
mlp = _with_kernel(reference.mlp)
mlp_block = _with_kernel(reference.mlp_block)
patch_embed = _with_kernel(reference.patch_embed)
patch_merge = _with_kernel(reference.patch_merge)
window_attention = _with_kernel(reference.window_attention)

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
