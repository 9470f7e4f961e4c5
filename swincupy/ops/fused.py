"""The array operations on the GPU: checks and launches of the kernels of ``cuda/`` and of matrix products.

`Fused` has the operations of `swincupy.ops.reference` under the same names with the same arguments,
for arrays in the storage of one precision.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.ops import attention, fused_attention, fused_mlp, kernels
from swincupy.ops.gemm import gemm, gives_moments, takes_gather, takes_norm
from swincupy.ops.reference import PadMode, Pair
from swincupy.ops.wgmma import Norm, neighbours
from swincupy.precision import Precision

Array = Any


class PositionBias(NamedTuple):
    """A position bias in the orders of the two kernels that read it."""

    windows: Array  # of `attention.window_attention`
    block: Array | None  # of `fused_attention.attention_block`, where that may take it


class FoldedNorm(NamedTuple):
    """A LayerNorm's affine part within the linear layer that follows it, see `Fused.fold_norm`."""

    weight: np.ndarray  # [N, K]
    bias: np.ndarray  # [N]
    sums: Array  # [N] float32 on the device: of the rows of weight as it is stored


class _Last(threading.local):
    """The result that an operation gave last, and the moments of its rows, which end with it."""

    result: Callable[[], Array] = staticmethod(lambda: None)
    moments: Sequence[Array] = ()


class Fused:
    """The array operations of `swincupy.ops.reference` on the GPU, in one precision.

    Parameters
    ----------
    precision : str or Precision
        "fp32", "tf32", "fp16" or "bf16".
    constant_weights : bool
        No kernel under way writes weights: those of matrix products may be read before it is done.

    Raises
    ------
    DeviceError
        CuPy's current device does not have the precision.

    Notes
    -----
    Arrays are CuPy arrays with the precision's storage dtype, bfloat16 as uint16 (or as arrays whose
    dtype is ``ml_dtypes.bfloat16``); where they are not C-contiguous they are copied. Results are
    C-contiguous and in the storage dtype. Work is queued on CuPy's current stream.

    V1's norms, without their affine part (`fold_norm`), need no pass of their own: the product that ends
    an operation gives the moments of its rows, and where the next operation is called with that very
    result, the product that begins it takes them. Nobody may write to the result in between.
    """

    def __init__(self, precision: str | Precision, *, constant_weights: bool = False) -> None:
        self.precision = precisions.of(precision, sm=jit.compute_capability())
        self._constant_weights = constant_weights
        self._last = _Last()

    # ------------------------------------------------------------ weights, once

    def pack_mlp(self, weights: Mapping[str, np.ndarray], *, post_norm: bool) -> Any:
        """What `mlp_block` takes as ``packed``: float32 weights as its one kernel reads them, or None without one."""
        import cupy

        hidden, C = weights["fc1_weight"].shape
        if not fused_mlp.takes(C, hidden, self.precision):
            return None
        packed = fused_mlp.pack(**weights, precision=self.precision, post_norm=post_norm)
        return fused_mlp.Packed(*map(cupy.asarray, packed))

    def pack_attention(
        self, weights: Mapping[str, np.ndarray | None], *, num_heads: int, logit_scale: np.ndarray | None
    ) -> Any:
        """What the blocks take as ``packed``: float32 weights as their one kernel reads them, or None without one."""
        import cupy

        C = len(weights["norm_weight"])  # type: ignore[arg-type]
        if not any(fused_attention.takes(C, num_heads, w, w, self.precision) for w in fused_attention.WINDOWS):
            return None
        packed = fused_attention.pack(
            **weights,  # type: ignore[arg-type]
            num_heads=num_heads, logit_scale=logit_scale, precision=self.precision,
        )  # fmt: skip
        return fused_attention.Packed(*map(cupy.asarray, packed))

    def fold_norm(
        self, weight: np.ndarray, bias: np.ndarray | None, norm_weight: np.ndarray, norm_bias: np.ndarray
    ) -> FoldedNorm | None:
        """``W (n gamma + beta) + b = (W gamma) n + (W beta + b)``, where products can take norms; else None.

        Parameters
        ----------
        weight, bias : [N, K], [N] float32
        norm_weight, norm_bias : [K] float32
        """
        import cupy

        N, K = weight.shape
        if not takes_norm(N, K, self.precision):
            return None
        folded = weight.astype(np.float32) * norm_weight.astype(np.float32)
        with_beta = weight.astype(np.float64) @ norm_bias + (0 if bias is None else bias)
        stored = precisions.decode(precisions.encode(folded, self.precision), self.precision)
        sums = cupy.asarray(stored.sum(axis=1, dtype=np.float64).astype(np.float32))
        return FoldedNorm(folded, with_beta.astype(np.float32), sums)

    # ------------------------------------------------------------ elementwise and row by row

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """See `swincupy.ops.reference.linear`."""
        x, weight, bias = self._take("linear", x=x, weight=weight, bias=bias)
        _need(weight.ndim == 2, "linear: weight must be [N, K]", weight)
        return self._product("linear", x, weight, bias)

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float = 1e-5) -> Array:
        """See `swincupy.ops.reference.layer_norm`."""
        x, weight, bias = self._take("layer_norm", x=x, weight=weight, bias=bias)
        _need_norm("layer_norm", x.shape[-1], weight, bias)
        return kernels.layer_norm(x, weight, bias, eps=eps, precision=self.precision)

    def layer_norm_residual(self, x: Array, y: Array, weight: Array, bias: Array, *, eps: float = 1e-5) -> Array:
        """``x + LN(y)``: what ends both halves of a V2 block.

        Parameters
        ----------
        x, y : [..., C]
        weight, bias : [C]

        Returns
        -------
        [..., C]
        """
        x, y, weight, bias = self._take("layer_norm_residual", x=x, y=y, weight=weight, bias=bias)
        _need(y.shape == x.shape, f"layer_norm_residual: y must be {x.shape}, as x is", y)
        _need_norm("layer_norm_residual", x.shape[-1], weight, bias)
        return kernels.layer_norm_residual(x, y, weight, bias, eps=eps, precision=self.precision)

    def gelu(self, x: Array) -> Array:
        """See `swincupy.ops.reference.gelu`."""
        (x,) = self._take("gelu", x=x)
        return kernels.gelu(x, precision=self.precision)

    def mlp(self, x: Array, fc1_weight: Array, fc1_bias: Array, fc2_weight: Array, fc2_bias: Array) -> Array:
        """See `swincupy.ops.reference.mlp`."""
        x, *weights = self._take(
            "mlp", x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias
        )
        return self._mlp("mlp", x, *weights)

    def mlp_block(
        self,
        x: Array,
        norm_weight: Array,
        norm_bias: Array,
        fc1_weight: Array,
        fc1_bias: Array,
        fc2_weight: Array,
        fc2_bias: Array,
        *,
        post_norm: bool = False,
        eps: float = 1e-5,
        packed: fused_mlp.Packed | None = None,
        fc1_sums: Array | None = None,
        merge_follows: bool = False,
    ) -> Array:
        """See `swincupy.ops.reference.mlp_block`.

        With `pack_mlp`'s ``packed``, one kernel does it all where it can. ``fc1_sums`` are those of
        `fold_norm`, of a norm whose weight is one and bias zero. With ``merge_follows``, the norm of a patch merging
        may need no pass of its own either.
        """
        import cupy

        moments = self._moments_of(x)
        x, norm_weight, norm_bias, *weights = self._take(
            "mlp_block",
            x=x,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            fc1_weight=fc1_weight,
            fc1_bias=fc1_bias,
            fc2_weight=fc2_weight,
            fc2_bias=fc2_bias,
        )
        _need_norm("mlp_block", x.shape[-1], norm_weight, norm_bias)
        options: dict[str, Any] = {"eps": eps, "precision": self.precision}
        if packed is not None and fused_mlp.takes(x.shape[-1], len(weights[0]), self.precision, x.size // x.shape[-1]):
            given = None
            if merge_follows and self._gathers(x, 2 * x.shape[-1]):
                given = cupy.empty((x.size // x.shape[-1], 1, 2), np.float32)
            return self._remember(fused_mlp.mlp_block(x, packed, moments=given, **options), given)
        if fc1_sums is not None and moments is not None:
            return self._mlp("mlp_block", x, *weights, residual=x, norm=Norm(moments, fc1_sums, eps), moments=True)
        if post_norm:
            y = self._mlp("mlp_block", x, *weights)
            _need(y.shape == x.shape, f"mlp_block: fc2_weight must have {x.shape[-1]} rows", weights[2])
            return kernels.layer_norm_residual(x, y, norm_weight, norm_bias, **options, out=y)
        y = kernels.layer_norm(x, norm_weight, norm_bias, **options)
        return self._mlp("mlp_block", y, *weights, residual=x, moments=fc1_sums is not None)

    # ------------------------------------------------------------ attention

    def attention_block(
        self,
        x: Array,
        norm_weight: Array,
        norm_bias: Array,
        qkv_weight: Array,
        qkv_bias: Array | None,
        proj_weight: Array,
        proj_bias: Array | None,
        position_bias: Array,
        mask: Array | None = None,
        *,
        num_heads: int,
        window: Pair,
        shift: Pair = (0, 0),
        pad_mode: PadMode = "pad_roll",
        eps: float = 1e-5,
        packed: fused_attention.Packed | None = None,
        qkv_sums: Array | None = None,
        pad_bias: Array | None = None,
    ) -> Array:
        """See `swincupy.ops.reference.attention_block`.

        ``position_bias`` is [nH, N, N], or what `position_bias` made of it, which saves work in every
        call. ``mask`` is not read: the kernels have the mask of ``shift``, whatever is given here.
        With `pack_attention`'s ``packed``, one kernel does it all where it can. ``qkv_sums`` are those of
        `fold_norm`, of a norm whose weight is one and bias zero; tokens of padding, zero after the norm that
        was folded, then have ``pad_bias``, the layer's own, for their q, k and v.
        """
        weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
        windows: dict[str, Any] = {"num_heads": num_heads, "window": window, "shift": shift, "pad_mode": pad_mode}
        folded = None if qkv_sums is None else (qkv_sums, pad_bias)
        return self._attention_block("attention_block", x, weights, None, position_bias, eps, packed, folded, **windows)

    def cosine_attention_block(
        self,
        x: Array,
        norm_weight: Array,
        norm_bias: Array,
        qkv_weight: Array,
        qkv_bias: Array | None,
        proj_weight: Array,
        proj_bias: Array | None,
        logit_scale: Array,
        position_bias: Array,
        mask: Array | None = None,
        *,
        num_heads: int,
        window: Pair,
        shift: Pair = (0, 0),
        pad_mode: PadMode = "pad_roll",
        eps: float = 1e-5,
        packed: fused_attention.Packed | None = None,
    ) -> Array:
        """See `swincupy.ops.reference.cosine_attention_block`; ``logit_scale`` best is float32.

        For ``position_bias``, ``mask`` and ``packed`` see `attention_block`.
        """
        weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
        windows: dict[str, Any] = {"num_heads": num_heads, "window": window, "shift": shift, "pad_mode": pad_mode}
        scale = self._float32(logit_scale)
        return self._attention_block("cosine_attention_block", x, weights, scale, position_bias, eps, packed, **windows)

    def window_attention(
        self,
        x: Array,
        qkv_weight: Array,
        qkv_bias: Array | None,
        proj_weight: Array,
        proj_bias: Array | None,
        position_bias: Array,
        mask: Array | None = None,
        *,
        num_heads: int,
    ) -> Array:
        """See `swincupy.ops.reference.window_attention`.

        A mask is read here, unlike in `attention_block`: with one, the windows of each of its nW
        kinds are attended to in a launch of their own.
        """
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return self._window_attention("window_attention", x, weights, None, position_bias, mask, num_heads)

    def cosine_window_attention(
        self,
        x: Array,
        qkv_weight: Array,
        qkv_bias: Array | None,
        proj_weight: Array,
        proj_bias: Array | None,
        logit_scale: Array,
        position_bias: Array,
        mask: Array | None = None,
        *,
        num_heads: int,
    ) -> Array:
        """See `swincupy.ops.reference.cosine_window_attention`; for a mask see `window_attention`."""
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        scale = self._float32(logit_scale)
        return self._window_attention("cosine_window_attention", x, weights, scale, position_bias, mask, num_heads)

    def position_bias(self, bias: Array | PositionBias) -> PositionBias:
        """A bias [nH, N, N] as the attention kernels read it, on the device; what is so already is returned.

        Takes a float array of NumPy or CuPy, or one in the storage of the precision. From float64 or
        float32 it is as exact as the kernel's own format is, which a bfloat16 one is not.
        """
        import cupy

        if isinstance(bias, PositionBias):
            return bias
        nH, N, _ = bias.shape
        bias, C, block = self._float32(bias), 32 * nH, None
        for window in fused_attention.WINDOWS:
            if window[0] * window[1] == N and fused_attention.takes(C, nH, window, window, self.precision):
                block = cupy.asarray(fused_attention.prepare_position_bias(bias, self.precision))
        return PositionBias(cupy.asarray(attention.prepare_position_bias(bias, self.precision)), block)

    # ------------------------------------------------------------ between stages

    def patch_embed(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        norm_weight: Array | None = None,
        norm_bias: Array | None = None,
        position_embedding: Array | None = None,
        *,
        patch_pad: Literal["pad", "crop"] = "pad",
        eps: float = 1e-5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        out: Array | None = None,
    ) -> Array:
        """See `swincupy.ops.reference.patch_embed`; takes pixels as they come, too.

        Parameters
        ----------
        x : [B, Cin, Hpx, Wpx] of the storage dtype, float32 or float64, or [B, Hpx, Wpx, Cin] of uint8
            uint8 pixels are normalised here: ``(x / 255 - mean) / std``. Padding is zero after that.
        mean, std : Cin numbers
            For uint8 pixels, and for them only.
        out : [B, H, W, C], optional
            Where the result is written, C-contiguous and of the storage dtype.

        The others are those of the reference.
        """
        import cupy

        what = "patch_embed"
        if math.prod(x.shape[1:]) >= 2**31:
            raise InputError(f"patch_embed: images must hold less than 2^31 numbers each, got {x.shape}; cut them up")
        pixels = x.dtype == np.uint8
        if not pixels and x.dtype in (np.float32, np.float64):
            x = cupy.ascontiguousarray(x, np.float32)
        elif not pixels:
            (x,) = self._take(what, x=x)
        x = cupy.ascontiguousarray(x)
        weight, bias, norm_weight, norm_bias, position_embedding = self._take(
            what,
            weight=weight,
            bias=bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            position_embedding=position_embedding,
        )
        _need(weight.ndim == 4, "patch_embed: weight must be [C, Cin, Ph, Pw]", weight)
        C, channels, *patch = weight.shape
        layout = f"[B, H, W, {channels}] of uint8" if pixels else f"[B, {channels}, H, W]"
        _need(x.ndim == 4 and x.shape[3 if pixels else 1] == channels, f"patch_embed: x must be {layout}", x)
        if pixels != (mean is not None and std is not None):
            raise InputError(
                f"patch_embed: mean and std must be given for uint8 pixels and for them only, got {mean}, {std} "
                f"for {x.dtype}"
            )
        size = x.shape[1:3] if pixels else x.shape[2:]
        H, W = (n // p if patch_pad == "crop" else -(-n // p) for n, p in zip(size, patch, strict=True))
        if min(H, W) == 0:
            raise InputError(
                f"patch_embed: x must hold at least one {patch[0]} x {patch[1]} patch, got {size[0]} x {size[1]} pixels"
            )
        _need(bias is None or bias.shape == (C,), f"patch_embed: bias must be [{C}]", bias)
        if norm_weight is not None:
            _need_norm(what, C, norm_weight, norm_bias)
        fits = position_embedding is None or position_embedding.shape == (1, H, W, C)
        _need(fits, f"patch_embed: position_embedding must be [1, {H}, {W}, {C}]", position_embedding)
        affine = None
        if mean is not None and std is not None:
            affine = pixel_affine(tuple(map(float, mean)), tuple(map(float, std)), channels, x.data.device_id)
        return kernels.patch_embed(
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            position_embedding,
            affine,
            grid=(H, W),
            eps=eps,
            precision=self.precision,
            out=out,
        )

    def patch_merge(
        self,
        x: Array,
        norm_weight: Array,
        norm_bias: Array,
        reduction_weight: Array,
        *,
        post_norm: bool = False,
        eps: float = 1e-5,
        moments: bool = False,
        in_place: bool = False,
        reduction_bias: Array | None = None,
        reduction_sums: Array | None = None,
    ) -> Array:
        """See `swincupy.ops.reference.patch_merge`.

        With ``moments``, a folded norm may follow. ``reduction_bias`` and ``reduction_sums`` are those of `fold_norm`,
        of a norm whose weight is one and bias zero. With ``in_place``, weights are for 2 x 2 neighbours in the order in
        which they lie in memory, row by row: the product itself then gathers them where it can.
        """
        what, given = "patch_merge", self._moments_of(x)
        x, norm_weight, norm_bias, reduction_weight, reduction_bias = self._take(
            what, x=x, norm_weight=norm_weight, norm_bias=norm_bias, reduction_weight=reduction_weight,
            reduction_bias=reduction_bias,
        )  # fmt: skip
        _need(x.ndim == 4, "patch_merge: x must be [B, H, W, C]", x)
        C = x.shape[3]
        fits = reduction_weight.ndim == 2 and reduction_weight.shape[1] == 4 * C
        _need(fits, f"patch_merge: reduction_weight must be [N, {4 * C}]", reduction_weight)
        _need_norm(what, reduction_weight.shape[0] if post_norm else 4 * C, norm_weight, norm_bias)
        options: dict[str, Any] = {"eps": eps, "precision": self.precision}
        product: dict[str, Any] = {"moments": moments and not post_norm}
        folded = reduction_sums is not None and given is not None
        if in_place and (post_norm or folded) and self._gathers(x, len(reduction_weight)):
            B, H, W = x.shape[:3]
            y = x.reshape(B, H // 2, W // 2, 4 * C)
            product |= {"norm": None if post_norm else Norm(given, reduction_sums, eps), "gather": W // 2}
        else:
            first = (None, None) if post_norm else (norm_weight, norm_bias)
            y = kernels.patch_merge(x, *first, **options, in_place=in_place, overlap=self._constant_weights)
        y = self._product(what, y, reduction_weight, reduction_bias, **product)
        return kernels.layer_norm(y, norm_weight, norm_bias, **options) if post_norm else y

    def _gathers(self, x: Array, N: int) -> bool:
        """Whether a product gathers the 2 x 2 neighbours of a map by itself."""
        H, W, C = x.shape[-3:]
        return H % 2 == W % 2 == 0 and takes_gather(N, 4 * C, W // 2, self.precision)

    def global_pool(
        self, x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5
    ) -> Array:
        """See `swincupy.ops.reference.global_pool`."""
        x, weight, bias = self._take("global_pool", x=x, weight=weight, bias=bias)
        _need(x.ndim == 4, "global_pool: x must be [B, H, W, C]", x)
        _need(x.shape[1] * x.shape[2] > 0, "global_pool: x must hold tokens", x)
        if weight is not None:
            _need_norm("global_pool", x.shape[-1], weight, bias)
        return kernels.global_pool(x, weight, bias, eps=eps, precision=self.precision)

    # ------------------------------------------------------------ shared by them

    def _take(self, what: str, **arrays: Array | None) -> list[Any]:
        """The arrays, contiguous, aligned, and in the storage of the precision; refuses other dtypes."""
        import cupy

        taken = []
        for name, x in arrays.items():
            if x is not None:
                if not isinstance(x, cupy.ndarray):
                    raise InputError(f"{what}: {name} must be a CuPy array, got {type(x).__name__}; use cupy.asarray")
                if x.dtype.name == "bfloat16" and self.precision.name == "bf16":
                    x = x.view(np.uint16)
                if x.dtype != self.precision.storage:
                    raise InputError(
                        f"{what}: {name} must hold {self.precision.storage} for {self.precision.name}, got {x.dtype}; "
                        "convert it, or use another precision"
                    )
                x = cupy.ascontiguousarray(x)
                if x.data.ptr % 16 and x.size:  # kernels read 16 bytes at a time
                    x = x.copy()
            taken.append(x)
        return taken

    def _float32(self, x: Array) -> Array:
        """An array of floats, or in the storage of the precision, as float32."""
        if x.dtype.name == "bfloat16":
            x = x.view(np.uint16)
        if x.dtype == np.uint16:
            return precisions.decode(x, self.precision)
        return x.astype(np.float32, copy=False)

    def _moments_of(self, x: Array) -> Array | None:
        """Those of an operation's result, where x is the last one's."""
        return self._last.moments[0] if x is not None and self._last.result() is x else None

    def _product(
        self,
        what: str,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        gelu: bool = False,
        residual: Array | None = None,
        norm: Norm | None = None,
        moments: bool = False,
        gather: int = 0,
    ) -> Array:
        """``x W^T + bias`` over the last axis, through gelu, plus residual.

        With ``norm``, of LN(x). With ``moments``, the result has them for a norm that follows, where that can be. For
        ``gather`` see `gemm`.
        """
        N, K = weight.shape
        _need(x.shape[-1] == K, f"{what}: x must have {K} channels on its last axis", x)
        _need(bias is None or bias.shape == (N,), f"{what}: bias must be [{N}]", bias)
        if residual is not None:
            _need(residual.shape[-1] == N, f"{what}: weight must have {residual.shape[-1]} rows", weight)
            residual = residual.reshape(-1, N)
        given = self._moments(x.size // K, N, K) if moments else None
        y = gemm(
            x.reshape(-1, K),
            weight,
            bias,
            gelu=gelu,
            residual=residual,
            norm=norm,
            moments=given,
            gather=gather,
            precision=self.precision,
            overlap=self._constant_weights,
        ).reshape(*x.shape[:-1], N)
        return self._remember(y, given)

    def _moments(self, M: int, N: int, K: int, groups: int | None = None) -> Array | None:
        """Where a product's may be written, or those of so many groups in a row; None where it does not give them."""
        import cupy

        if not gives_moments(M, N, K, self.precision):
            return None
        return cupy.empty((M, groups or N // neighbours(M, N), 2), np.float32)

    def _remember(self, y: Array, moments: Array | None) -> Array:
        """The result, which has these moments."""
        if moments is not None:
            kept = [moments]  # a graph's memory must not be held on to: its pool loses what outlives it
            self._last.result, self._last.moments = weakref.ref(y, lambda _: kept.clear()), kept
        return y

    def _mlp(
        self,
        what: str,
        x: Array,
        fc1_weight: Array,
        fc1_bias: Array,
        fc2_weight: Array,
        fc2_bias: Array,
        *,
        residual: Array | None = None,
        norm: Norm | None = None,
        moments: bool = False,
    ) -> Array:
        hidden = self._product(what, x, fc1_weight, fc1_bias, gelu=True, norm=norm)
        return self._product(what, hidden, fc2_weight, fc2_bias, residual=residual, moments=moments)

    def _check_attention(
        self, what: str, x: Array, qkv_weight: Array, proj_weight: Array, num_heads: int, ndim: int
    ) -> tuple[int, ...]:
        _need(x.ndim == ndim, f"{what}: x must be {'[B, H, W, C]' if ndim == 4 else '[B * nW, N, C]'}", x)
        C = x.shape[-1]
        if num_heads < 1 or C % num_heads:
            raise InputError(f"{what}: num_heads must divide the {C} channels of x, got {num_heads}")
        _need(qkv_weight.shape == (3 * C, C), f"{what}: qkv_weight must be [{3 * C}, {C}]", qkv_weight)
        _need(proj_weight.shape == (C, C), f"{what}: proj_weight must be [{C}, {C}]", proj_weight)
        return tuple(x.shape)

    def _attention_block(
        self,
        what: str,
        x: Array,
        weights: tuple[Array | None, ...],
        logit_scale: Array | None,
        position_bias: Array | PositionBias,
        eps: float,
        packed: fused_attention.Packed | None,
        folded: tuple[Array, Array | None] | None = None,
        *,
        num_heads: int,
        window: Pair,
        shift: Pair,
        pad_mode: PadMode,
    ) -> Array:
        """V1: ``x + attention(LN(x))``; V2, where there is a ``logit_scale``: ``x + LN(attention(x))``."""
        moments = self._moments_of(x)
        names = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = self._take(
            what, x=x, **dict(zip(names, weights, strict=True))
        )
        B, H, W, C = self._check_attention(what, x, qkv_weight, proj_weight, num_heads, ndim=4)
        _need_norm(what, C, norm_weight, norm_bias)
        bias = self.position_bias(position_bias)
        norm: dict[str, Any] = {"eps": eps, "precision": self.precision}
        if packed is not None and fused_attention.takes(C, num_heads, window, (H, W), self.precision, B):
            given, M = None, B * H * W
            alone = not fused_mlp.takes(C, 4 * C, self.precision, M)  # the norm that follows is not part of one kernel
            if folded is not None and alone and fused_attention.gives_moments(C):
                given = self._moments(M, C, C, num_heads)
            where: dict[str, Any] = {"window": window, "shift": shift, "moments": given}
            return self._remember(fused_attention.attention_block(x, packed, bias.block, **where, **norm), given)
        y, normed = x, None
        if folded is not None and moments is not None:
            normed = Norm(moments, folded[0], eps)
        elif logit_scale is None:
            y = kernels.layer_norm(x, norm_weight, norm_bias, **norm)
        y = attention.window_attention(
            self._product(what, y, qkv_weight, qkv_bias, norm=normed).reshape(B * H * W, -1),
            qkv_bias if folded is None else folded[1],
            bias.windows,
            batch=B,
            grid=(H, W),
            window=window,
            shift=shift,
            pad_mode=pad_mode,
            num_heads=num_heads,
            logit_scale=logit_scale,
            precision=self.precision,
        )
        if logit_scale is None:
            options = {"residual": x, "moments": folded is not None}
            return self._product(what, y.reshape(x.shape), proj_weight, proj_bias, **options)
        y = self._product(what, y, proj_weight, proj_bias).reshape(x.shape)
        return kernels.layer_norm_residual(x, y, norm_weight, norm_bias, **norm, out=y)

    def _window_attention(
        self,
        what: str,
        x: Array,
        weights: tuple[Array | None, ...],
        logit_scale: Array | None,
        position_bias: Array,
        mask: Array | None,
        num_heads: int,
    ) -> Array:
        names = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
        x, qkv_weight, qkv_bias, proj_weight, proj_bias = self._take(
            what, x=x, **dict(zip(names, weights, strict=True))
        )
        n, N, C = self._check_attention(what, x, qkv_weight, proj_weight, num_heads, ndim=3)
        qkv = self._product(what, x, qkv_weight, qkv_bias)
        side = math.isqrt(N)
        window = (side, side) if side * side == N else (1, N)  # which tokens are neighbours is the bias's business

        def attend(qkv: Array, bias: Array) -> Array:
            return attention.window_attention(
                qkv.reshape(-1, 3 * C),
                None,
                self.position_bias(bias).windows,
                batch=len(qkv),
                grid=window,
                window=window,
                num_heads=num_heads,
                logit_scale=logit_scale,
                precision=self.precision,
            ).reshape(-1, N, C)

        if mask is None:
            y = attend(qkv, position_bias)
        else:
            import cupy

            fits = mask.ndim == 3 and mask.shape[1:] == (N, N) and n % len(mask) == 0
            _need(fits, f"{what}: mask must be [nW, {N}, {N}] with nW a divisor of {n}", mask)
            bias, mask = self._float32(position_bias), self._float32(mask)
            y = cupy.empty(x.shape, self.precision.storage)
            for i, of_kind in enumerate(mask):
                y[i :: len(mask)] = attend(cupy.ascontiguousarray(qkv[i :: len(mask)]), bias + of_kind)
        return self._product(what, y, proj_weight, proj_bias)


@functools.lru_cache(maxsize=64)
def pixel_affine(mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: int) -> Array:
    """[2, Cin] float32 on the device: normalisation of bytes as ``x * affine[0] + affine[1]``."""
    import cupy

    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise InputError(f"patch_embed: mean and std must be {channels} numbers, std above 0, got {mean} and {std}")
    with cupy.cuda.Device(device):
        return cupy.asarray(
            np.array([[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]], np.float32)
        )


def _need(fits: bool, rule: str, x: Array | None) -> None:
    if not fits:
        raise InputError(f"{rule}, got shape {None if x is None else tuple(x.shape)}")


def _need_norm(what: str, C: int, weight: Array, bias: Array | None) -> None:
    _need(weight.shape == (C,), f"{what}: the norm's weight must be [{C}]", weight)
    _need(bias is not None and bias.shape == (C,), f"{what}: the norm's bias must be [{C}]", bias)
