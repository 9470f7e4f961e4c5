"""Skips these tests where there is no GPU; where there is one, records what they said in tests/gpu_report.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = (
    "cuda/*.cu*", "swincupy/backend.py", "swincupy/jit.py", "swincupy/engine.py", "swincupy/precision.py",
    "swincupy/tune.py", "swincupy/ops/fused.py", "swincupy/ops/kernels.py", "swincupy/ops/attention.py",
    "swincupy/ops/gemm.py", "swincupy/ops/cublaslt.py", "swincupy/ops/cutlass.py",
)  # fmt: skip
COUNTS = {"passed": 0, "failed": 0, "skipped": 0}


def why_no_gpu() -> str | None:
    """Why CuPy has no GPU to work on, None where it has one."""
    try:
        import cupy

        return None if cupy.cuda.runtime.getDeviceCount() else "no GPU"
    except ImportError:
        return "needs CuPy"
    except Exception as error:  # no driver, or one too old
        return f"needs a GPU: {error}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(HERE)]
    if not mine:
        return
    reason = why_no_gpu()
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if Path(report.nodeid.split("::")[0]).parts[:2] != ("tests", "gpu"):
        return
    if report.when == "call" or (report.when == "setup" and not report.passed):
        COUNTS["failed" if report.failed else report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record of a whole run; a run of a few chosen tests leaves the record alone."""
    chosen = (
        session.config.option.keyword or session.config.option.markexpr or any("::" in a for a in session.config.args)
    )
    ran = COUNTS["passed"] + COUNTS["failed"]
    if not ran or chosen or session.config.option.collectonly or why_no_gpu():
        return
    (ROOT / "tests" / "gpu_report.json").write_text(json.dumps(record(), indent=2) + "\n")


def record() -> dict[str, Any]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    driver = cupy.cuda.runtime.driverGetVersion()
    versions = {}
    for name in ("cupy-cuda13x", "cupy-cuda12x", "nvmath-python", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}",
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "versions": versions,
        **COUNTS,
        "sources_sha256": sources_hash(),
    }


def sources_hash() -> str:
    """Hash of everything that decides what the GPU computes."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in SOURCES for p in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
