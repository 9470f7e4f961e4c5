"""What is installed, what will be used, and whether it works: the demo model, and each operation on a GPU."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from swincupy import devices
from swincupy import precision as precisions
from swincupy.devices import explain
from swincupy.ops import reference


def report() -> dict[str, Any]:
    """Versions, BLAS and threads, GPU or the reason for none, what a model uses by default, and self-checks."""
    import swincupy

    gpu = devices.find()
    packages = ("numpy", "array-api-compat", "safetensors", "pillow", "threadpoolctl", "tqdm", "huggingface_hub")
    return {
        "swincupy": swincupy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "blas": _blas(),
        "cpus": os.cpu_count(),
        "gpu": gpu._asdict() | {"devices": [d._asdict() for d in gpu.devices]},
        "used": _used(),
        "self_check": _self_check(),
        "gpu_check": _gpu_check(gpu.usable[0]) if gpu.usable else None,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _blas() -> list[dict[str, Any]]:
    from threadpoolctl import threadpool_info

    np.ones((2, 2), np.float32) @ np.ones((2, 2), np.float32)  # some libraries are loaded by their first use
    wanted = ("internal_api", "version", "num_threads", "architecture")
    return [{k: p.get(k) for k in wanted} for p in threadpool_info() if p["user_api"] == "blas"]


def _used() -> dict[str, str]:
    """Device and precision of a model loaded without options."""
    from swincupy.backend import backend

    chosen = backend(None, None)
    return {"device": chosen.device, "precision": chosen.precision}


def _self_check() -> dict[str, Any]:
    """Load the demo model and classify a picture of noise on the CPU: scores must be probabilities."""
    import swincupy

    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    try:
        model = swincupy.load("demo", device="cpu")
        start = time.perf_counter()
        scores = [p.score for p in model.classify(picture, topk=model.config.num_classes)[0]]
        took = time.perf_counter() - start
    except swincupy.SwincupyError as error:
        return {"ok": False, "reason": str(error)}
    if not np.isfinite(scores).all() or abs(sum(scores) - 1) > 1e-4:
        return {"ok": False, "reason": f"the demo model's scores must be probabilities, got {scores}"}
    return {"ok": True, "reason": None, "milliseconds": round(1000 * took, 1)}


# ---------------------------------------------------------------- a GPU


class _Case(NamedTuple):
    """An operation, the shapes of its arguments, and its options."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    options: dict[str, Any]


def _cases() -> list[_Case]:
    """Each operation of the forward pass once, small, on sizes that need padding and a shift."""
    C, window = 32, (4, 4)
    norm = {"norm_weight": (C,), "norm_bias": (C,)}
    block = norm | {"qkv_weight": (3 * C, C), "qkv_bias": (3 * C,), "proj_weight": (C, C), "proj_bias": (C,)}
    bias, shifted = {"position_bias": (2, 16, 16)}, {"num_heads": 2, "window": window, "shift": (2, 2)}
    mlp = {"fc1_weight": (4 * C, C), "fc1_bias": (4 * C,), "fc2_weight": (C, 4 * C), "fc2_bias": (C,)}
    x, merged = {"x": (2, 6, 9, C)}, {"norm_weight": (4 * C,), "norm_bias": (4 * C,)}
    return [
        _Case("patch_embed", {"x": (2, 3, 22, 34), "weight": (C, 3, 4, 4), "bias": (C,), **norm}, {}),
        _Case("layer_norm", {**x, "weight": (C,), "bias": (C,)}, {}),
        _Case("linear", {**x, "weight": (3 * C, C), "bias": (3 * C,)}, {}),
        _Case("gelu", x, {}),
        _Case("mlp_block", x | norm | mlp, {}),
        _Case("mlp_block", x | norm | mlp, {"post_norm": True}),
        _Case("attention_block", x | block | bias, shifted),
        _Case("cosine_attention_block", x | block | {"logit_scale": (2,)} | bias, shifted),
        _Case("patch_merge", x | merged | {"reduction_weight": (2 * C, 4 * C)}, {}),
        _Case("global_pool", {**x, "weight": (C,), "bias": (C,)}, {}),
    ]  # fmt: skip


def _gpu_check(index: int = 0) -> dict[str, Any]:
    """Each operation on a GPU against float64 on the CPU, and the demo model, in every precision it has."""
    import cupy

    with cupy.cuda.Device(index):
        return _checks(index)


def _checks(index: int) -> dict[str, Any]:
    import swincupy

    start = time.perf_counter()
    checks: list[dict[str, Any]] = []

    def check(name: str, run: Callable[[], tuple[float, float]]) -> bool:
        """``run`` gives the distance from the right result, and what it may be."""
        try:
            error, limit = run()
            ok = error <= limit
            reason = None if ok else f"results are wrong: {error:.1e} from float64's, where {limit:.0e} is allowed"
        except Exception as problem:  # whatever a broken installation raises
            ok, reason = False, explain(problem)
        checks.append({"name": name, "ok": ok, "reason": reason})
        return ok

    def demo(name: str) -> tuple[float, float]:
        x = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
        want = swincupy.load("demo", device="cpu", precision="fp64")(x)
        got = swincupy.load("demo", device=index, precision=name)(x)
        return _distance(got, want), 5 * precisions.of(name).tolerance

    tried = []
    for name in _precisions_here():
        tried.append(name)
        for op, run in _operations(name):
            check(f"{op} in {name}", run)
            if len(checks) == 1 and not checks[0]["ok"]:  # nothing compiles or nothing runs: once is enough
                return {"ok": False, "precisions": tried, "checks": checks, "seconds": _since(start)}
        check(f"the demo model in {name}", functools.partial(demo, name))
    ok = all(c["ok"] for c in checks)
    return {"ok": ok, "precisions": tried, "checks": checks, "seconds": _since(start)}


def _precisions_here() -> list[str]:
    from swincupy import jit

    sm = jit.compute_capability()
    return [p.name for p in precisions.PRECISIONS.values() if p.ctype and sm >= p.min_sm]


def _operations(name: str) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    for case in _cases():
        yield case.op, functools.partial(_operation, case, precisions.of(name))


def _operation(case: _Case, p: precisions.Precision) -> tuple[float, float]:
    """Distance of an operation from float64, and what is allowed."""
    import cupy

    from swincupy.ops.fused import Fused

    rng = np.random.default_rng(0)
    stored, exact = {}, {}
    for key, shape in case.shapes.items():
        a = rng.standard_normal(shape)
        if key.endswith("weight"):
            a = 1 + 0.2 * a if len(shape) == 1 else a / np.sqrt(np.prod(shape[1:]))
        if key in ("position_bias", "logit_scale"):
            a = a.astype(np.float32) if key == "position_bias" else np.exp(2 + 0.2 * a).astype(np.float32)
            stored[key], exact[key] = a, a.astype(np.float64)
        else:
            stored[key] = precisions.encode(a, p)
            exact[key] = precisions.decode(stored[key], p).astype(np.float64)
    got = getattr(Fused(p), case.op)(**{k: cupy.asarray(a) for k, a in stored.items()}, **case.options)
    want = getattr(reference, case.op)(**exact, **case.options)
    return _distance(precisions.decode(got.get(), p), want), 5 * p.tolerance


def _distance(x: np.ndarray, want: np.ndarray) -> float:
    d = float(np.linalg.norm(x - want) / np.linalg.norm(want))
    return d if d == d else float("inf")


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)
