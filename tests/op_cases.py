"""Cases of the GPU's operations, their results in float64, and how far off a plain composition is.

Shared by the tests on a GPU and by those that run the kernels on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from swincupy import precision as precisions
from swincupy.ops import reference
from swincupy.precision import Precision

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)


@dataclass(frozen=True)
class Case:
    op: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    pixels: str = ""  # dtype of patch_embed's input where it is not the storage dtype

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shapes["x"])), self.pixels]
        words += [f"{k}={v}" for k, v in self.options.items()]
        words += [k for k in self.shapes if k in ("mask", "position_embedding", "norm_weight", "bias")]
        return "-".join(str(w).replace(" ", "") for w in words if w)


def norm(C: int, prefix: str = "norm_") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}weight": (C,), f"{prefix}bias": (C,)}


def rows(op: str, *sizes: tuple[int, ...]) -> list[Case]:
    return [Case(op, {"x": s, **({"y": s} if "residual" in op else {}), **norm(s[-1], "")}) for s in sizes]


def embed(
    x: tuple[int, ...], weight: tuple[int, ...], pixels: str = "float32", *, normed: bool = True, biased: bool = True,
    position: tuple[int, int] | None = None, **options: Any,
) -> Case:  # fmt: skip
    C = weight[0]
    shapes = {"x": x, "weight": weight}
    shapes |= {"bias": (C,)} if biased else {}
    shapes |= norm(C) if normed else {}
    shapes |= {"position_embedding": (1, *position, C)} if position else {}
    return Case("patch_embed", shapes, options, pixels)


def merge(x: tuple[int, ...], post_norm: bool) -> Case:
    C = x[-1]
    shapes = {"x": x, **norm(2 * C if post_norm else 4 * C), "reduction_weight": (2 * C, 4 * C)}
    return Case("patch_merge", shapes, {"post_norm": post_norm})


def mlp(x: tuple[int, ...], hidden: int, post_norm: bool | None = None) -> Case:
    C = x[-1]
    shapes = {"x": x, "fc1_weight": (hidden, C), "fc1_bias": (hidden,), "fc2_weight": (C, hidden), "fc2_bias": (C,)}
    if post_norm is None:
        return Case("mlp", shapes)
    return Case("mlp_block", shapes | norm(C), {"post_norm": post_norm})


def attention(
    x: tuple[int, ...], num_heads: int, *, cosine: bool = False, biased: bool = True, masked: int = 0, **options: Any
) -> Case:
    C, blocks = x[-1], len(x) == 4
    N = options["window"][0] * options["window"][1] if blocks else x[1]
    shapes: dict[str, tuple[int, ...]] = {"x": x, "qkv_weight": (3 * C, C), "proj_weight": (C, C), "proj_bias": (C,)}
    shapes |= {"position_bias": (num_heads, N, N)}
    shapes |= {"qkv_bias": (3 * C,)} if biased else {}
    shapes |= {"logit_scale": (num_heads,)} if cosine else {}
    shapes |= {"mask": (masked, N, N)} if masked else {}
    shapes |= norm(C) if blocks else {}
    op = ("cosine_" if cosine else "") + ("attention_block" if blocks else "window_attention")
    return Case(op, shapes, {"num_heads": num_heads, **options})


# Odd sizes, rows of part of a warp, a warp and several; H != W; one image; every branch of a launcher
CASES = [
    *rows("layer_norm", (2, 7, 5, 96), (1, 768), (3, 45), (2, 6144), (9, 1), (130, 192), (3, 1030), (2, 5, 24)),
    *rows("layer_norm_residual", (2, 7, 5, 96), (5, 1536), (3, 45), (1, 384), (2, 3075)),
    Case("gelu", {"x": (3, 5, 96)}),
    Case("gelu", {"x": (1237,)}),
    merge((2, 5, 8, 96), False), merge((1, 4, 7, 15), False), merge((1, 1, 1, 8), False), merge((1, 3, 2, 384), False),
    merge((2, 5, 8, 12), True), merge((1, 2, 3, 96), True),
    Case("global_pool", {"x": (2, 7, 7, 768), **norm(768, "")}),
    Case("global_pool", {"x": (3, 5, 9, 45), **norm(45, "")}),
    Case("global_pool", {"x": (1, 41, 53, 96), **norm(96, "")}),
    Case("global_pool", {"x": (1, 23, 9, 1536)}),
    Case("global_pool", {"x": (2, 1, 1, 2050), **norm(2050, "")}),
    embed((2, 3, 36, 60), (96, 3, 4, 4)),
    embed((2, 3, 34, 57), (96, 3, 4, 4), "", position=(9, 15)),
    embed((3, 3, 34, 57), (96, 3, 4, 4), patch_pad="crop"),
    embed((1, 3, 4, 4), (192, 3, 4, 4), "float64"),
    embed((1, 1, 7, 11), (30, 1, 2, 3), "", normed=False, biased=False),
    embed((1, 4, 33, 48), (128, 4, 16, 16)),
    embed((2, 4, 8, 12), (1030, 4, 4, 4), position=(2, 3)),
    embed((2, 36, 60, 3), (96, 3, 4, 4), "uint8"),
    embed((1, 35, 61, 3), (96, 3, 4, 4), "uint8", position=(9, 16)),
    embed((2, 35, 62, 3), (260, 3, 4, 4), "uint8", patch_pad="crop", normed=False),
    embed((2, 9, 13, 1), (45, 1, 2, 3), "uint8", biased=False),
    embed((1, 17, 32, 4), (96, 4, 16, 16), "uint8"),
    embed((3, 3, 52, 60), (32, 3, 4, 4)), embed((3, 52, 60, 3), (32, 3, 4, 4), "uint8"),  # tiles in turn
    embed((1, 3, 11, 18), (36, 3, 5, 6)), embed((1, 11, 18, 3), (200, 3, 5, 6), "uint8"),
    Case("linear", {"x": (2, 5, 24), "weight": (10, 24), "bias": (10,)}),
    Case("linear", {"x": (3, 32), "weight": (40, 32)}),
    mlp((2, 9, 24), 96), mlp((2, 3, 5, 32), 100, False), mlp((1, 3, 5, 24), 96, True),
    attention((2, 9, 16, 48), 3, window=(7, 7), shift=(3, 3)),
    attention((1, 8, 8, 32), 1, window=(4, 4)),
    attention((2, 5, 10, 24), 2, window=(3, 4), shift=(1, 0), pad_mode="roll_pad", biased=False),
    attention((1, 9, 10, 48), 2, window=(8, 8), shift=(4, 4), cosine=True),
    attention((2, 5, 6, 32), 4, window=(4, 4), shift=(2, 2), cosine=True, pad_mode="roll_pad", biased=False),
    attention((6, 49, 32), 2), attention((6, 15, 24), 3, masked=3),
    attention((4, 16, 32), 2, cosine=True, masked=2), attention((3, 6, 48), 3, cosine=True),
]  # fmt: skip


def draw(case: Case, precision: Precision, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Arguments in the storage of the precision, pixels in their dtype, what is float32 anyway in float32."""
    arrays = {}
    for name, shape in case.shapes.items():
        x = rng.standard_normal(shape)
        if name == "x" and case.pixels == "uint8":
            arrays[name] = rng.integers(0, 256, shape, np.uint8)
            continue
        if name == "mask":
            arrays[name] = np.where(x > 0.5, reference.MASKED, 0).astype(np.float32)
            continue
        if name == "logit_scale":
            arrays[name] = np.exp(np.minimum(2.3 + x, np.log(100))).astype(np.float32)
            continue
        if name in ("position_bias",):
            arrays[name] = x.astype(np.float32)
            continue
        if name in ("weight", "norm_weight") and len(shape) == 1:
            x = 1 + 0.2 * x
        elif name.endswith("weight"):
            x = x / np.sqrt(np.prod(shape[1:]))
        elif name == "x" and case.op.startswith(("layer_norm", "global_pool")):
            x = 5 + x * rng.uniform(0.5, 3, (*shape[:-1], 1))  # the mean is not small beside the deviation
        elif name == "x" and case.op == "gelu":
            x = 4 * x
        kept = name == "x" and case.pixels
        arrays[name] = x.astype(case.pixels) if kept else precisions.encode(x, precision)
    return arrays


def options(case: Case) -> dict[str, Any]:
    """The keyword arguments of an operation; the mean and deviation of bytes with them."""
    if case.pixels != "uint8":
        return case.options
    channels = case.shapes["x"][-1]
    return {**case.options, "mean": MEAN[:channels], "std": STD[:channels]}


def required(case: Case) -> dict[str, None]:
    """The arguments that have no default and are None here."""
    return {"qkv_bias": None} if "qkv_weight" in case.shapes and "qkv_bias" not in case.shapes else {}


def expected(case: Case, arrays: dict[str, np.ndarray], precision: Precision, *, plain: bool = False) -> np.ndarray:
    """The result in float64, from arguments as they are stored; ``plain`` rounds it after each step."""

    def exact(name: str, x: np.ndarray) -> np.ndarray:
        if x.dtype == np.uint8:
            C = x.shape[-1]
            x = np.moveaxis((x / 255 - np.array(MEAN[:C])) / np.array(STD[:C]), -1, 1)
        elif x.dtype == precision.storage:
            x = precisions.decode(x, precision).astype(np.float64)
        x = x.astype(np.float64)
        return rounded(x, precision) if plain and name == "x" else x

    args: dict[str, Any] = {k: exact(k, x) for k, x in arrays.items()} | required(case) | case.options
    if "window" in args and any(args.get("shift", (0, 0))):
        padded = [n + -n % m for n, m in zip(args["x"].shape[1:3], args["window"], strict=True)]
        args["mask"] = reference.shift_mask(*padded, args["window"], args["shift"]).astype(np.float64)
    with steps_rounded(precision) if plain else contextlib.nullcontext():
        if case.op == "layer_norm_residual":
            y = args["x"] + reference.layer_norm(args["y"], args["weight"], args["bias"])
        else:
            y = getattr(reference, case.op)(**args)
        return rounded(y, precision) if plain else y


def rounded(x: np.ndarray, precision: Precision) -> np.ndarray:
    return precisions.decode(precisions.encode(x, precision), precision).astype(np.float64)


@contextlib.contextmanager
def steps_rounded(precision: Precision) -> Iterator[None]:
    """The reference with every product, norm, activation and softmax rounded to storage: a library's calls in a row.

    In tf32 what linear layers multiply is rounded, too, to the 10 bits that tensor cores take.
    """
    names = ("linear", "layer_norm", "gelu", "softmax")
    kept = {name: getattr(reference, name) for name in names}

    def step(f: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda *args, **kwargs: rounded(f(*args, **kwargs), precision)

    def product(x: np.ndarray, weight: np.ndarray, *rest: Any, **options: Any) -> np.ndarray:
        if precision.name == "tf32":
            x, weight = ten_bits(x), ten_bits(weight)
        return kept["linear"](x, weight, *rest, **options)

    try:
        for name in names:
            setattr(reference, name, step(product if name == "linear" else kept[name]))
        yield
    finally:
        for name in names:
            setattr(reference, name, kept[name])


def ten_bits(x: Any) -> Any:
    """x with 10 bits of mantissa, rounded to nearest; of NumPy or CuPy."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(np.float32).astype(np.float64)


def distance(x: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 distance; NaN counts as infinitely far."""
    d = float(np.linalg.norm((x - want).ravel()) / np.linalg.norm(want.ravel()))
    return d if d == d else float("inf")


def check(case: Case, name: str, ops: Any, upload: Callable[[np.ndarray], Any]) -> None:
    """One operation on fresh numbers: at most twice as far from float64 as a plain composition."""
    precision = precisions.of(name)
    seed = int(np.random.SeedSequence().entropy % 2**32)
    arrays = draw(case, precision, np.random.default_rng(seed))
    y = getattr(ops, case.op)(**{k: upload(x) for k, x in arrays.items()}, **required(case), **options(case))
    y = y.get()
    want = expected(case, arrays, precision)
    assert y.dtype == precision.storage and y.shape == want.shape
    error = distance(precisions.decode(np.asarray(y), precision), want)
    plain = distance(expected(case, arrays, precision, plain=True), want)
    floor = precision.tolerance if precision.ctype == "float" else 1e-7  # float's rounding is not where its error is
    assert error <= max(2 * plain, floor), f"seed {seed}: error {error:.2e}, of the plain composition {plain:.2e}"
