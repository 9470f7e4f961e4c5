"""What is installed, what will be used, and whether the demo model runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from typing import Any

import numpy as np


def report() -> dict[str, Any]:
    """Versions, BLAS and threads, GPU or the reason for none, what a model uses by default, and a self-check."""
    import swincupy

    packages = ("numpy", "array-api-compat", "safetensors", "pillow", "threadpoolctl", "tqdm", "huggingface_hub")
    return {
        "swincupy": swincupy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "blas": _blas(),
        "cpus": os.cpu_count(),
        "gpu": _gpu(),
        "used": _used(),
        "self_check": _self_check(),
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
    """The devices, or why there are none."""
    if importlib.util.find_spec("cupy") is None:
        advice = 'pip install "swincupy[cuda12]" or "swincupy[cuda13]"'
        return {"cupy": None, "devices": [], "reason": f"CuPy is not installed; {advice}"}
    version = None
    try:
        import cupy

        version, runtime = cupy.__version__, cupy.cuda.runtime
        devices = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    except Exception as error:  # a broken CUDA installation fails in any way at import or at the first call
        reason = f"CuPy {version or 'cannot be imported'}: {' '.join(str(error).split())}"
        return {"cupy": version, "devices": [], "reason": reason}
    described = [
        {"name": d["name"].decode(), "compute": f"{d['major']}.{d['minor']}", "memory": d["totalGlobalMem"]}
        for d in devices
    ]
    return {
        "cupy": version,
        "devices": described,
        "reason": None if described else "CUDA lists no device",
    }


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
