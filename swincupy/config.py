"""What a Swin Transformer is made of: the configuration and the table of published variants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from swincupy.errors import ConfigError

Pair: TypeAlias = tuple[int, int]
Layout: TypeAlias = Literal["microsoft", "timm", "huggingface", "torchvision", "openmmlab"]

#: What each source does where sizes do not fit (see `SwinConfig` for the words).
CONVENTIONS: dict[str, dict[str, str]] = {
    "microsoft": dict(window_clamp="min", clamp_at="input", pad_mode="pad_roll", patch_pad="pad"),
    "timm": dict(window_clamp="axis", clamp_at="build", pad_mode="roll_pad", patch_pad="pad"),
    "huggingface": dict(window_clamp="min", clamp_at="input", pad_mode="pad_roll", patch_pad="pad"),
    "huggingface-v2": dict(window_clamp="height", clamp_at="build_floor", pad_mode="pad_roll", patch_pad="pad"),
    "torchvision": dict(window_clamp="padded", clamp_at="input", pad_mode="pad_roll", patch_pad="crop"),
    "openmmlab": dict(window_clamp="never", clamp_at="input", pad_mode="pad_roll", patch_pad="pad"),
}

_ALLOWED = {
    "window_clamp": ("min", "axis", "height", "padded", "never"),
    "clamp_at": ("input", "build", "build_floor"),
    "pad_mode": ("pad_roll", "roll_pad"),
    "patch_pad": ("pad", "crop"),
}


def pair(value: int | Sequence[int], name: str) -> Pair:
    """``7 -> (7, 7)``; ``(7, 14) -> (7, 14)``; anything else is a `ConfigError` that names ``name``."""
    if _is_int(value):
        return int(value), int(value)  # type: ignore[arg-type]
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_int(v) for v in value):
        return int(value[0]), int(value[1])
    raise ConfigError(f"SwinConfig: {name} must be an integer or a pair (height, width) of integers, got {value!r}")


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Configuration of one Swin Transformer, in microsoft's field names.

    Parameters
    ----------
    version : 1 or 2
        Swin Transformer (pre-norm, scaled attention, bias tables) or Swin Transformer V2
        (residual post-norm, cosine attention, continuous position bias).
    img_size : int, (int, int) or None
        Height and width in pixels that the weights were built for; None where that is unknown.
    patch_size : int or (int, int)
    in_chans : int
    num_classes : int
        0 for a model without a head.
    embed_dim : int
        C, the channels of stage 0; stage i has C * 2**i.
    depths, num_heads : tuple of int
        Blocks and attention heads of each stage.
    window_size : int, or one int or (int, int) for each stage
    mlp_ratio : float
        Hidden channels of the MLP over its input channels.
    qkv_bias : bool
    ape : bool
        An absolute position embedding is added after the patch embedding.
    patch_norm : bool
        LayerNorm after the patch embedding.
    pretrained_window_sizes : int, or one int or (int, int) for each stage
        V2: the window for which the position bias was trained; 0 means the window itself.
    norm_eps : float
        Epsilon of the LayerNorms of the blocks and of the final one.
    window_clamp : {"min", "axis", "height", "padded", "never"}, optional
        What happens to a window that a feature map does not exceed. "min": if the shorter side is
        not above the window, both sides of the window become that side and nothing is shifted
        (microsoft, Hugging Face v1, OpenMMLab's classifiers). "axis": the same for each axis by itself
        (timm). "height": the height decides for both axes (Hugging Face v2). "padded": the window
        stays, an axis that one window covers is not shifted (torchvision). "never": the window stays
        and is shifted (OpenMMLab's and Hugging Face v1's backbones, detection code with one norm a stage).
    clamp_at : {"input", "build", "build_floor"}, optional
        The feature maps that rule looks at: those of the input at hand, or those of ``img_size``,
        where odd sides are halved rounding up (timm) or down (Hugging Face v2). Where ``img_size``
        is unknown it is the input's.
    pad_mode : {"pad_roll", "roll_pad"}, optional
        Order of padding to a window multiple and cyclic shift: "pad_roll" as torchvision, Hugging
        Face and OpenMMLab, "roll_pad" as timm. The results differ on sizes that need padding.
    patch_pad : {"pad", "crop"}, optional
        Pixels that do not fill a patch: padded with zeros, or dropped (torchvision).

    Notes
    -----
    The last four are conventions of the code a checkpoint comes from. None, the default, takes
    those of the checkpoint's layout (`CONVENTIONS`), microsoft's where there is none.

    Raises
    ------
    ConfigError
        A field is out of its range, or fields contradict each other.
    """

    version: int = 1
    img_size: int | Pair | None = 224
    patch_size: int | Pair = 4
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int | Pair, ...] = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    ape: bool = False
    patch_norm: bool = True
    pretrained_window_sizes: int | tuple[int | Pair, ...] = 0
    norm_eps: float = 1e-5
    window_clamp: str | None = None
    clamp_at: str | None = None
    pad_mode: str | None = None
    patch_pad: str | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads", "window_size", "pretrained_window_sizes", "img_size", "patch_size"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        _check(self)

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage, C * 2**i."""
        return tuple(self.embed_dim * 2**i for i in range(self.num_stages))

    @property
    def num_features(self) -> int:
        """Channels of the last stage and of the embedding."""
        return self.dims[-1]

    @property
    def patch(self) -> Pair:
        return pair(self.patch_size, "patch_size")

    @property
    def image(self) -> Pair | None:
        return None if self.img_size is None else pair(self.img_size, "img_size")

    @property
    def windows(self) -> tuple[Pair, ...]:
        """(height, width) of the window of each stage, before any clamping."""
        return _per_stage(self.window_size, self.num_stages, "window_size")

    @property
    def pretrained_windows(self) -> tuple[Pair, ...]:
        return _per_stage(self.pretrained_window_sizes, self.num_stages, "pretrained_window_sizes")

    def hidden_dim(self, stage: int) -> int:
        """Hidden channels of the MLP of a stage."""
        return int(self.dims[stage] * self.mlp_ratio)

    def replace(self, **changes: Any) -> SwinConfig:
        """A copy with the given fields changed (and checked again)."""
        known = {f.name for f in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ConfigError(f"SwinConfig: no field named {', '.join(unknown)}; the fields are {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def with_conventions(self, source: str) -> SwinConfig:
        """A copy whose open conventions (None) are those of ``source``, a key of `CONVENTIONS`."""
        if source not in CONVENTIONS:
            raise ConfigError(f"SwinConfig: source must be one of {', '.join(CONVENTIONS)}, got {source!r}")
        return self.replace(**{k: v for k, v in CONVENTIONS[source].items() if getattr(self, k) is None})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SwinConfig:
        """The inverse of `to_dict`; unknown fields are refused."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(map(str, fields)) - known):
            raise ConfigError(
                f"SwinConfig: unknown field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}"
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class StageGeometry:
    """The grid, window and shift of one stage for one input size: rows and columns of tokens."""

    grid: Pair
    window: Pair
    shift: Pair


def stage_geometry(config: SwinConfig, height: int, width: int) -> tuple[StageGeometry, ...]:
    """Grid, window and shift of every stage for an input of ``height`` x ``width`` pixels.

    The grid of stage 0 is the input over the patch size, rounded up (``patch_pad="crop"``: down);
    each patch merging halves it, rounding up. The shift is half the window and is used by odd
    blocks. Which window a small grid gets is ``config.window_clamp``, see `SwinConfig`.
    """
    c = config.with_conventions("microsoft")
    grids = judged = _grids(c, height, width, floor=False)
    if c.clamp_at != "input" and c.image is not None:
        judged = _grids(c, *c.image, floor=c.clamp_at == "build_floor")
    return tuple(
        StageGeometry(grid, *_window_and_shift(c.window_clamp, window, seen))
        for grid, seen, window in zip(grids, judged, c.windows, strict=True)
    )


def flops(config: SwinConfig, height: int, width: int) -> int:
    """Floating-point operations of the matrix products of one image's classification, two for each multiply-add.

    Attention counts each token with the N tokens of its window; padding, norms and softmax count nothing.
    The published figures are multiply-adds, half of this.

    Parameters
    ----------
    config : SwinConfig
    height, width : int
        Pixels.
    """
    c, geometry = config, stage_geometry(config, height, width)
    macs = math.prod(geometry[0].grid) * c.embed_dim * c.in_chans * math.prod(c.patch)
    for i, (C, depth, g) in enumerate(zip(c.dims, c.depths, geometry, strict=True)):
        tokens, N = math.prod(g.grid), math.prod(g.window)
        macs += depth * tokens * (4 * C * C + 2 * N * C + 2 * C * c.hidden_dim(i))
        if i + 1 < c.num_stages:
            macs += math.prod(geometry[i + 1].grid) * 4 * C * 2 * C
    return 2 * (macs + c.num_features * c.num_classes)


def _grids(c: SwinConfig, height: int, width: int, *, floor: bool) -> list[Pair]:
    """Rows and columns of tokens in each stage; ``floor`` drops what does not fill a patch or a merge.

    At least 1, so that there is a window; an input of less than a patch is for `patch_embed` to refuse.
    """

    def over(size: int, divisor: int, down: bool) -> int:
        return max(1, size // divisor if down else -(-size // divisor))

    h, w = (over(size, p, floor or c.patch_pad == "crop") for size, p in zip((height, width), c.patch, strict=True))
    return [(over(h, 2**i, floor), over(w, 2**i, floor)) for i in range(c.num_stages)]


def _window_and_shift(rule: str | None, window: Pair, grid: Pair) -> tuple[Pair, Pair]:
    (wh, ww), (h, w) = window, grid
    shift = (wh // 2, ww // 2)
    if rule == "min":
        side = min(h, w)
        return ((side, side), (0, 0)) if side <= min(wh, ww) else (window, shift)
    if rule == "axis":
        return (min(wh, h), min(ww, w)), (0 if h <= wh else shift[0], 0 if w <= ww else shift[1])
    if rule == "height":
        wh, ww = clamped = min(wh, h), min(ww, h)
        return clamped, (0, 0) if h <= window[0] else (wh // 2, ww // 2)
    if rule == "padded":
        return window, (0 if h <= wh else shift[0], 0 if w <= ww else shift[1])
    return window, shift


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _per_stage(value: Any, stages: int, name: str) -> tuple[Pair, ...]:
    if _is_int(value):
        value = (value,) * stages
    if not isinstance(value, tuple) or len(value) != stages:
        raise ConfigError(
            f"SwinConfig: {name} must be one integer, or one integer or pair for each of the {stages} stages, "
            f"got {value!r}; for a non-square window write ((height, width),) * {stages}"
        )
    return tuple(pair(v, name) for v in value)


def _check(c: SwinConfig) -> None:
    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"SwinConfig: {name} must be {rule}, got {getattr(c, name)!r}")

    need(_is_int(c.version) and c.version in (1, 2), "version", "1 or 2")
    for name in ("depths", "num_heads"):
        value = getattr(c, name)
        ok = isinstance(value, tuple) and len(value) > 0 and all(_is_int(v) and v > 0 for v in value)
        need(ok, name, "a non-empty tuple of positive integers, one for each stage")
    need(len(c.num_heads) == len(c.depths), "num_heads", f"as long as depths ({len(c.depths)} stages)")
    for name in ("embed_dim", "in_chans"):
        need(_is_int(getattr(c, name)) and getattr(c, name) > 0, name, "a positive integer")
    need(_is_int(c.num_classes) and c.num_classes >= 0, "num_classes", "an integer >= 0 (0: no head)")
    for i, (dim, heads) in enumerate(zip(c.dims, c.num_heads, strict=True)):
        need(dim % heads == 0, "num_heads", f"a divisor of the {dim} channels in stage {i}")
    need(isinstance(c.mlp_ratio, (int, float)) and 0 < c.mlp_ratio < math.inf, "mlp_ratio", "a positive number")
    need(min(map(c.hidden_dim, range(c.num_stages))) > 0, "mlp_ratio", "large enough for one hidden channel")
    need(isinstance(c.norm_eps, (int, float)) and 0 <= c.norm_eps < 1, "norm_eps", "a number in [0, 1)")
    for name in ("qkv_bias", "ape", "patch_norm"):
        need(isinstance(getattr(c, name), bool), name, "True or False")
    need(min(c.patch) > 0, "patch_size", "positive")
    need(c.image is None or min(c.image) > 0, "img_size", "positive, or None")
    need(all(min(w) > 0 for w in c.windows), "window_size", "positive")
    need(all(min(w) >= 0 for w in c.pretrained_windows), "pretrained_window_sizes", ">= 0 (0: the window itself)")
    for name, allowed in _ALLOWED.items():
        value = getattr(c, name)
        need(value is None or value in allowed, name, " or ".join(map(repr, allowed)) + " (None: the source's own)")
