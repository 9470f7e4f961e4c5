"""What is installed, what will be used, and whether it works: the demo model, and each operation on a GPU."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from swincupy import precision as precisions
from swincupy.errors import OutOfMemoryError
from swincupy.ops import reference


def report() -> dict[str, Any]:
    """Versions, BLAS and threads, GPU or the reason for none, what a model uses by default, and self-checks."""
    import swincupy

    packages = ("numpy", "array-api-compat", "safetensors", "pillow", "threadpoolctl", "tqdm", "huggingface_hub")
    return {
        "swincupy": swincupy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "blas": _blas(),
        "cpus": os.cpu_count(),
        "gpu": (gpu := _gpu()),
        "used": _used(),
        "self_check": _self_check(),
        "gpu_check": _gpu_check() if gpu["devices"] else None,
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


def _gpu() -> dict[str, Any]:
    """The devices, or why there are none; ``broken`` says that there should be one."""
    found: dict[str, Any] = {"cupy": None, "driver": None, "devices": [], "broken": False, "reason": None}
    if importlib.util.find_spec("cupy") is None:
        return found | {"reason": f"CuPy is not installed; {_INSTALL}"}
    try:
        import cupy
    except Exception as error:  # a CUDA library that is missing or of another version fails in any way
        return found | {"broken": True, "reason": f"CuPy cannot be imported: {explain(error)}"}
    runtime = cupy.cuda.runtime
    found["cupy"] = cupy.__version__
    try:
        driver = runtime.driverGetVersion()
        found["driver"] = f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else None
        devices = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    except Exception as error:
        if not found["driver"]:
            return found | {"reason": "no NVIDIA driver is installed"}
        # a driver without a GPU is no fault; one that is too old for this CuPy is
        return found | {"broken": getattr(error, "status", 0) != _NO_DEVICE, "reason": explain(error)}
    found["devices"] = [
        {"name": d["name"].decode(), "compute": f"{d['major']}.{d['minor']}", "memory": d["totalGlobalMem"]}
        for d in devices
    ]
    return found | {"reason": None if devices else "CUDA lists no device"}


def _used() -> dict[str, str] | None:
    """Device and precision of a model loaded without options."""
    import swincupy

    try:
        model = swincupy.load("demo")
    except swincupy.SwincupyError:
        return None  # the self-check says why
    return {"device": model.device, "precision": model.precision}


def _self_check() -> dict[str, Any]:
    """Load the demo model and classify a picture of noise: scores must be probabilities."""
    import swincupy

    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    try:
        model = swincupy.load("demo")
        start = time.perf_counter()
        scores = [p.score for p in model.classify(picture, topk=model.config.num_classes)[0]]
        took = time.perf_counter() - start
    except swincupy.SwincupyError as error:
        return {"ok": False, "reason": str(error)}
    if not np.isfinite(scores).all() or abs(sum(scores) - 1) > 1e-4:
        return {"ok": False, "reason": f"the demo model's scores must be probabilities, got {scores}"}
    return {"ok": True, "reason": None, "milliseconds": round(1000 * took, 1)}


# ---------------------------------------------------------------- a GPU


_INSTALL = 'pip install "swincupy[cuda13]", or "swincupy[cuda12]" for a driver of CUDA 12'
_NO_DEVICE, _OLD_DRIVER, _MEMORY_ALLOCATION = 100, 35, 2  # cudaError_t

#: Parts of what CuPy, NVRTC, nvmath and the driver say, and what it means for the user.
_MEANINGS = (
    (("common.cuh",), "the folder cuda/ of swincupy is incomplete; install swincupy again"),
    (("cannot open source file", "could not open source file", "CUDA headers"),
     f"CUDA's headers are missing; {_INSTALL}"),
    (("NVRTC_ERROR_INVALID_OPTION", "--gpu-architecture", "no kernel image"),
     "CuPy's CUDA is too old for this GPU; install a newer CuPy"),
    (("libnvrtc", "nvrtc64", "nvrtc unavailable"), f"the compiler NVRTC is missing; {_INSTALL}"),
    (("libcuda.", "nvcuda"), "the NVIDIA driver's library cannot be loaded; install the driver again"),
    (("libcu", "CUDA_PATH"), f"a CUDA library is missing; {_INSTALL}"),
)  # fmt: skip


def explain(error: BaseException) -> str:
    """An error of CUDA, CuPy or nvmath in words that a user can act on, and the error itself."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= 400 else f"{said[:200]} ... {said[-190:]}"
    status = getattr(error, "status", None)
    if status == _OLD_DRIVER:
        return f"the NVIDIA driver is too old for this CuPy's CUDA; update it, or {_INSTALL} ({said})"
    if status == _NO_DEVICE:
        return f"the driver shows no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES ({said})"
    if isinstance(error, (MemoryError, OutOfMemoryError)) or status == _MEMORY_ALLOCATION:
        return f"the GPU's memory is full; look at nvidia-smi for who uses it ({said})"
    for parts, meaning in _MEANINGS:
        if any(part.lower() in said.lower() for part in parts):
            return f"{meaning} ({said})"
    return said


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


def _gpu_check() -> dict[str, Any]:
    """Each operation on the first GPU against float64 on the CPU, and the demo model, in every precision it has."""
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
        got = swincupy.load("demo", device="cuda:0", precision=name)(x)
        return _distance(got, want), 5 * precisions.of(name).tolerance

    tried = []
    for name in _precisions_here():
        tried.append(name)
        for op, run in _operations(name):
            check(f"{op} in {name}", run)
            if len(checks) == 1 and not checks[0]["ok"]:  # nothing compiles or nothing runs: once is enough
                return {"ok": False, "precisions": tried, "checks": checks, "seconds": _since(start)}
        check(f"the demo model in {name}", functools.partial(demo, name))
    if not tried:
        lowest = min(p.min_sm for p in precisions.PRECISIONS.values() if p.ctype) / 10
        reason = f'the GPU must have compute capability {lowest} or newer; use device="cpu"'
        checks.append({"name": "compute capability", "ok": False, "reason": reason})
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
