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
    "cuda/*.cu*", "swincupy/backend.py", "swincupy/engine.py", "swincupy/forward.py", "swincupy/jit.py",
    "swincupy/model.py", "swincupy/parameters.py", "swincupy/precision.py", "swincupy/tune.py", "swincupy/ops/*.py",
)  # fmt: skip
#: A whole run, or one of the two parts that make one: tests that share a GPU, over processes (-n), and the others.
PARTS = {"": "all", "not alone": "shared", "alone": "alone"}
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
    """Write the record of a whole run or of a part of one; a run of a few chosen tests leaves the record alone."""
    option = session.config.option
    chosen = option.keyword or any("::" in a or a.endswith(".py") for a in session.config.args)
    ran = COUNTS["passed"] + COUNTS["failed"]
    if hasattr(session.config, "workerinput") or not ran or chosen or option.markexpr not in PARTS:
        return
    if option.collectonly or why_no_gpu() or session.exitstatus not in (0, 1):
        return
    path, new = ROOT / "tests" / "gpu_report.json", record()
    kept = json.loads(path.read_text()) if path.exists() else {}
    same = all(kept.get(k) == v for k, v in new.items())
    parts = kept["parts"] if same and option.markexpr else {}
    new["parts"] = {k: v for k, v in parts.items() if k != "all"} | {PARTS[option.markexpr]: COUNTS}
    path.write_text(json.dumps(new, indent=2) + "\n")


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
        "sources_sha256": sources_hash(),
    }


def sources_hash() -> str:
    """Hash of everything that decides what the GPU computes."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in SOURCES for p in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
