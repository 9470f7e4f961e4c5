"""The configuration of a checkpoint: what its arrays decide, and what they leave to hints."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from swincupy.checkpoint.hints import MAX_STAGES, Fields, build_config
from swincupy.checkpoint.layouts import Translation
from swincupy.checkpoint.tensors import FLOATS, Shape, StoredTensor
from swincupy.config import Pair, SwinConfig, pair, stage_geometry
from swincupy.errors import CheckpointError, ConfigError

_BLOCK = re.compile(r"layers\.(\d{1,4})\.blocks\.(\d{1,4})\.(.+)")
_MAX_BUFFER = 2**24  # elements; the largest of a published model has 24**4


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What the arrays say about the configuration.

    ``decided`` are fields of `SwinConfig`. ``hidden`` and ``table_rows`` are those of each stage's
    MLPs and (V1) bias tables. ``windows``, ``pretrained`` and ``img_size`` come from buffers and are
    None where there are none; ``masks`` are window sides that attention masks show.
    """

    decided: Fields
    hidden: tuple[int, ...]
    table_rows: tuple[int, ...]
    windows: tuple[Pair | None, ...]
    masks: tuple[int | None, ...]
    pretrained: tuple[Pair | None, ...]
    img_size: int | Pair | None
    tokens: int | None


def infer_config(
    found: Translation, title: str, *, given: SwinConfig | None, stated: Fields, guessed: Fields
) -> SwinConfig:
    """The complete configuration of a translated checkpoint.

    Parameters
    ----------
    given : SwinConfig, optional
        A whole configuration (the user's, or that in the file's metadata): it decides what the
        arrays leave open.
    stated, guessed : dict
        Fields from a config.json, and from the file's name.

    Raises
    ------
    ConfigError
        ``given`` or ``stated`` contradicts the arrays (all contradictions in one message).
    CheckpointError
        Arrays without which there is no configuration are missing, or the windows are unknown.
    """
    try:
        arrays = observe(found, title)
    except CheckpointError:
        if given is None or sum(given.depths) > len(found.tensors):
            raise
        return _with_conventions(given, found)  # what is missing will be listed whole
    if given is not None:
        said = dataclasses.asdict(given)
        faults = contradictions(said, arrays)
        windows = _table_windows(arrays, [given], faults) if arrays.decided["version"] == 1 else None
        _refuse(faults, "config", found.layout, title)
        config = given if windows is None else given.replace(window_size=collapse(windows))
        return _with_conventions(config.replace(num_classes=arrays.decided["num_classes"]), found)

    faults = contradictions({k: v for k, v in stated.items() if k != "window_size"}, arrays)
    fields = {k: v for k, v in stated.items() if k in ("norm_eps", "window_clamp")} | arrays.decided
    if _name_contradicts(guessed, arrays):
        guessed = {}
    teller = "config.json" if stated else "its name" if guessed else "a square window"
    fields["img_size"] = _image(arrays, stated, guessed)
    if arrays.decided["version"] == 1:
        tried = [_tentative(fields, source) for source in (stated, guessed)]
        windows = _table_windows(arrays, [c for c in tried if c is not None], faults)
        _refuse(faults, teller, found.layout, title)
        fields["window_size"] = collapse(windows)
    else:
        _refuse(faults, teller, found.layout, title)
        fields["window_size"] = _continuous_windows(arrays, fields, stated, guessed, found.layout, title)
        fields["pretrained_window_sizes"] = _pretrained_windows(arrays, stated, guessed, found, title)
    return _with_conventions(build_config(fields, f"{title}: the configuration found"), found)


def observe(found: Translation, title: str) -> Arrays:
    """Read the configuration off names and shapes (and the small buffers)."""
    tensors = found.tensors

    def fail(why: str) -> CheckpointError:
        return CheckpointError(f"{title}: not a complete Swin Transformer in the {found.layout} layout: {why}")

    def shape(name: str, dims: int) -> Shape:
        if name not in tensors:
            raise fail(f"{found.faults.get(name, name)} is missing")
        if len(tensors[name].shape) != dims or 0 in tensors[name].shape:
            raise fail(f"{name} must have {dims} non-empty dimensions, got shape {list(tensors[name].shape)}")
        return tensors[name].shape

    embed_dim, in_chans, *patch = shape("patch_embed.proj.weight", 4)
    blocks = [m for name in tensors if (m := _BLOCK.fullmatch(name))]
    stages = 1 + max((int(m[1]) for m in blocks), default=-1)
    if not 0 < stages <= MAX_STAGES:
        raise fail(f"it must have 1 to {MAX_STAGES} stages of blocks, got {stages}")
    depths = tuple(1 + max((int(m[2]) for m in blocks if int(m[1]) == i), default=-1) for i in range(stages))
    if 0 in depths:
        raise fail(f"stage {depths.index(0)} has no blocks")

    per_head = "attn.relative_position_bias_table" if found.version == 1 else "attn.logit_scale"

    def first(i: int, part: str) -> str:
        """Name of a part of stage i in the first block that has it, so that one missing key hides nothing."""
        names = (f"layers.{i}.blocks.{j}.{part}" for j in range(depths[i]))
        return next((name for name in names if name in tensors), f"layers.{i}.blocks.0.{part}")

    heads, rows, hidden = [], [], []
    for i in range(stages):
        if found.version == 1:
            table = shape(first(i, per_head), 2)
            rows.append(table[0])
            heads.append(table[1])
        else:
            heads.append(shape(first(i, per_head), 3)[0])
        hidden.append(shape(first(i, "mlp.fc1.weight"), 2)[0])
    dims = [embed_dim * 2**i for i in range(stages)]
    biases = ("attn.qkv.bias",) if found.version == 1 else ("attn.q_bias", "attn.v_bias")
    ape = tensors.get("absolute_pos_embed")
    decided: Fields = {
        "version": found.version,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "in_chans": in_chans,
        "num_classes": _classes(tensors),
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": tuple(heads),
        "mlp_ratio": _mlp_ratio(dims, hidden),
        "qkv_bias": any(m[3] in biases for m in blocks) or any(name.endswith(".qkv.bias") for name in found.faults),
        "ape": ape is not None,
        "patch_norm": "patch_embed.norm.weight" in tensors or "patch_embed.norm.bias" in tensors,
    }
    windows, masks, pretrained, image = _from_buffers(found.buffers, stages, (patch[0], patch[1]))
    tokens = ape.shape[1] if ape is not None and len(ape.shape) == 3 else None
    if found.position_grid is not None:
        image = _one((found.position_grid[0] * patch[0], found.position_grid[1] * patch[1]))
    return Arrays(decided, tuple(hidden), tuple(rows), windows, masks, pretrained, image, tokens)


def contradictions(said: Mapping[str, Any], arrays: Arrays) -> list[str]:
    """Sentences about the fields of a configuration that the arrays do not have."""
    faults = []
    for name, decided in arrays.decided.items():
        if name not in said:
            continue
        value = said[name]
        if name == "num_classes" and decided == 0:
            continue  # the head was taken off
        if name == "mlp_ratio":
            dims = [arrays.decided["embed_dim"] * 2**i for i in range(len(arrays.hidden))]
            number = isinstance(value, (int, float)) and math.isfinite(value)
            agrees = number and tuple(int(dim * value) for dim in dims) == arrays.hidden
        elif name == "patch_size":
            agrees = _pair_or_none(value) == pair(decided, name)
        else:
            agrees = type(value) is type(decided) and value == decided
        if not agrees:
            faults.append(f"{name} is {str(value)[:80]}, the arrays have {decided}")
    image, patch = _pair_or_none(said.get("img_size")), pair(arrays.decided["patch_size"], "patch_size")
    if arrays.tokens is not None and image and (image[0] // patch[0]) * (image[1] // patch[1]) != arrays.tokens:
        faults.append(f"img_size is {said['img_size']}, absolute_pos_embed has {arrays.tokens} positions")
    return faults


def collapse(windows: Iterable[Pair]) -> int | tuple[int | Pair, ...]:
    """((7, 7), (7, 7)) -> 7; ((7, 7), (4, 7)) -> (7, (4, 7))."""
    listed = tuple(_one(w) for w in windows)
    return listed[0] if len(set(listed)) == 1 and isinstance(listed[0], int) else listed


def _with_conventions(config: SwinConfig, found: Translation) -> SwinConfig:
    if config.window_clamp is None and found.layout in ("microsoft", "openmmlab", "huggingface"):
        # a backbone with a norm for each stage always partitions and shifts, a classifier never where one window does
        levels = any(re.fullmatch(r"norm\d+\.weight", name) for name in found.tensors)
        if found.layout != "huggingface" or (levels and found.version == 1):
            config = config.replace(window_clamp="never" if levels else "min")
    if found.layout == "huggingface" and found.version == 2:
        return config.with_conventions("huggingface-v2")
    return config.with_conventions(found.layout)


def _refuse(faults: list[str], source: str, layout: str, title: str) -> None:
    if faults:
        raise ConfigError(f"{title}: {source} contradicts the arrays ({layout} layout): {'; '.join(faults)}")


def _classes(tensors: Mapping[str, StoredTensor]) -> int:
    for name in ("head.weight", "head.bias"):
        if name in tensors and tensors[name].shape:
            return tensors[name].shape[0]
    return 0


def _mlp_ratio(dims: list[int], hidden: list[int]) -> float:
    """The ratio r with int(dim * r) == hidden in every stage; for arrays of no ratio that of the first stage."""
    ratio = max(h / d for h, d in zip(hidden, dims, strict=True))
    for r in (ratio, math.nextafter(ratio, math.inf)):  # the quotient may round down to just below
        if all(int(d * r) == h for h, d in zip(hidden, dims, strict=True)):
            return r
    return hidden[0] / dims[0]


# --- windows of V1: the bias tables have (2 Mh - 1)(2 Mw - 1) rows


def _table_windows(arrays: Arrays, configs: list[SwinConfig], faults: list[str]) -> list[Pair]:
    """The window of each stage's table: one that the hints offer, or the square one."""
    offers = [_offered(c) for c in configs if c.num_stages == len(arrays.table_rows)]
    windows = []
    for i, rows in enumerate(arrays.table_rows):
        known = arrays.windows[i]
        candidates = [w for offer in offers for w in offer[i]] + ([known] if known else [])
        fitting = next((w for w in candidates if _rows(w) == rows), None)
        side = (math.isqrt(rows) + 1) // 2
        if fitting is None and _rows((side, side)) == rows:
            fitting = (side, side)
            if candidates:
                faults.append(f"window_size of stage {i} is {_one(candidates[0])}, its bias table is that of {side}")
        elif fitting is None:
            why = f"is {_one(candidates[0])}" if candidates else "is unknown; pass config=SwinConfig(window_size=...)"
            faults.append(f"window_size of stage {i} {why}, its bias table of {rows} rows is of no square window")
            fitting = (1, 1)
        windows.append(fitting)
    return windows


def _offered(config: SwinConfig) -> list[list[Pair]]:
    """For each stage the window, and what each clamp rule makes of it at ``img_size``."""
    offers = [[w] for w in config.windows]
    if config.image is not None:
        for floor in ("build", "build_floor"):
            for rule in ("min", "axis"):
                clamped = config.replace(window_clamp=rule, clamp_at=floor)
                for offer, g in zip(offers, stage_geometry(clamped, *config.image), strict=True):
                    if min(g.window) > 0:
                        offer.append(g.window)
    return offers


def _rows(window: Pair) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _tentative(fields: Fields, source: Fields) -> SwinConfig | None:
    """A configuration with the windows that a hint says; None where it says none or nonsense."""
    if "window_size" not in source:
        return None
    try:
        return build_config(fields | {"window_size": source["window_size"]}, "")
    except CheckpointError:
        return None


# --- windows of V2: not in the parameters; hints and buffers know them


def _continuous_windows(
    arrays: Arrays, fields: Fields, stated: Fields, guessed: Fields, layout: str, title: str
) -> Any:
    if "window_size" in stated:
        return stated["window_size"]
    if None not in arrays.windows:
        return collapse(w for w in arrays.windows if w is not None)
    if "window_size" in guessed:
        return guessed["window_size"]
    image = fields["img_size"]
    sides = [side for side in arrays.masks if side]
    if sides and isinstance(image, int):
        # a stage whose odd blocks have no mask is not shifted: one window covers its feature map
        patch = pair(fields["patch_size"], "patch_size")[0]
        grids = [max(image // patch // 2**i, 1) for i in range(len(arrays.masks))]
        return collapse((side or min(max(sides), grid),) * 2 for side, grid in zip(arrays.masks, grids, strict=True))
    raise _unknown("window size", layout, title)


def _pretrained_windows(arrays: Arrays, stated: Fields, guessed: Fields, found: Translation, title: str) -> Any:
    stages = len(arrays.windows)
    if "pretrained_window_sizes" in stated:
        value = stated["pretrained_window_sizes"]  # Hugging Face's default has four entries, however many stages
        return value[:stages] if isinstance(value, tuple) else value
    if None not in arrays.pretrained:
        return collapse(w for w in arrays.pretrained if w is not None)
    if found.layout == "torchvision":
        return 0  # torchvision has no such setting
    if "pretrained_window_sizes" in guessed:
        value = guessed["pretrained_window_sizes"]
        return value[:stages] if isinstance(value, tuple) else value
    raise _unknown("window of its pretraining", found.layout, title)


def _unknown(what: str, layout: str, title: str) -> CheckpointError:
    return CheckpointError(
        f"{title}: the {what} of a Swin Transformer V2 ({layout} layout) is not in its arrays, and no config.json, "
        "metadata or name says it; pass config=SwinConfig(version=2, window_size=..., pretrained_window_sizes=..., ...)"
    )


def _name_contradicts(guessed: Fields, arrays: Arrays) -> bool:
    """Whether buffers disprove what the file's name says: then it is just a name."""
    window = guessed.get("window_size")
    if window is None:
        return False
    if any(side and side != window for side in arrays.masks):
        return True
    if arrays.decided["version"] == 1:
        return not arrays.table_rows or arrays.table_rows[0] > _rows((window, window))
    return any(seen and max(seen) > window for seen in arrays.windows)


def _image(arrays: Arrays, stated: Fields, guessed: Fields) -> Any:
    patch = pair(arrays.decided["patch_size"], "patch_size")
    seen = arrays.img_size
    for value in (stated.get("img_size"), seen if arrays.tokens else None, guessed.get("img_size"), seen):
        image = _pair_or_none(value)
        if image and (arrays.tokens is None or (image[0] // patch[0]) * (image[1] // patch[1]) == arrays.tokens):
            return _one(image)
    if arrays.tokens is not None and math.isqrt(arrays.tokens) ** 2 == arrays.tokens > 0:
        side = math.isqrt(arrays.tokens)
        return _one((side * patch[0], side * patch[1]))
    return None


# --- buffers


def _from_buffers(
    buffers: Mapping[str, StoredTensor], stages: int, patch: Pair
) -> tuple[tuple[Pair | None, ...], tuple[int | None, ...], tuple[Pair | None, ...], int | Pair | None]:
    windows: list[Pair | None] = [None] * stages
    masks: list[int | None] = [None] * stages
    pretrained: list[Pair | None] = [None] * stages
    images = set()
    for name, tensor in buffers.items():
        block = _BLOCK.fullmatch(name)
        if not block or int(block[1]) >= stages or not 0 < tensor.size <= _MAX_BUFFER:
            continue
        i, part = int(block[1]), block[3]
        if part.endswith("relative_position_index") and windows[i] is None:
            windows[i] = _window_of_index(tensor)
        elif part.endswith("relative_coords_table") and pretrained[i] is None and _is_coords_table(tensor):
            windows[i] = ((tensor.shape[1] + 1) // 2, (tensor.shape[2] + 1) // 2)
            pretrained[i] = _pretrained_of_table(tensor, windows[i] or (1, 1))
        elif part.endswith("attn_mask") and len(tensor.shape) == 3:
            count, side = math.isqrt(tensor.shape[0]), math.isqrt(tensor.shape[1])
            if tensor.shape[1] == tensor.shape[2] == side**2:
                masks[i] = side
                if tensor.shape[0] == count**2 and patch[0] == patch[1]:
                    images.add(count * side * patch[0] * 2**i)
    return tuple(windows), tuple(masks), tuple(pretrained), images.pop() if len(images) == 1 else None


def _window_of_index(tensor: StoredTensor) -> Pair | None:
    """(Mh, Mw) from relative_position_index [N, N], also flattened.

    Its first row is index[0, j] = index[0, 0] - j within the first row of the window, and jumps
    where the second begins.
    """
    N = math.isqrt(tensor.size)
    if tensor.size != N * N or tensor.dtype not in ("int64", "int32"):
        return None
    row = tensor.read().reshape(N, N)[0].astype(np.int64)
    jumps = np.flatnonzero(row[0] - row != np.arange(N))
    mw = int(jumps[0]) if jumps.size else N
    return (N // mw, mw) if mw and N % mw == 0 else None


def _is_coords_table(tensor: StoredTensor) -> bool:
    s = tensor.shape
    return tensor.dtype in FLOATS and len(s) == 4 and s[0] == 1 and s[3] == 2 and s[1] % 2 == s[2] % 2 == 1


def _pretrained_of_table(tensor: StoredTensor, window: Pair) -> Pair | None:
    """The pretraining window P of each axis, 0 for the window itself.

    The table's largest value is t = log2(8 (M - 1) / (P - 1) + 1) / 3, so P = 1 + 8 (M - 1) / (8^t - 1).
    """
    table = tensor.read().astype(np.float64)
    found = []
    for axis, side in enumerate(window):
        with np.errstate(all="ignore"):
            p = 1 + 8 * (side - 1) / (np.exp2(3 * table[..., axis].max()) - 1)
        if side == 1:
            found.append(0)
        elif not np.isfinite(p) or not 1 < p < 10_000 or abs(p - round(float(p))) > 0.2:
            return None
        else:
            found.append(0 if round(float(p)) == side else round(float(p)))
    if 0 in found and found != [0, 0]:
        found = [p or side for p, side in zip(found, window, strict=True)]
    return found[0], found[1]


def _pair_or_none(value: Any) -> Pair | None:
    try:
        return None if value is None else pair(value, "")
    except ConfigError:
        return None


def _one(value: Pair) -> int | Pair:
    return value[0] if value[0] == value[1] else value
