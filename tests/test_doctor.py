"""doctor: what it says of a machine without a GPU, with a broken one, and with one that works or computes nonsense."""

from __future__ import annotations

import builtins
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

from swincupy import cli, doctor
from swincupy.errors import DeviceError, OutOfMemoryError
from swincupy.ops import fused
from tests.host import device, emulator


def cuda_error(status: int, text: str) -> RuntimeError:
    error = RuntimeError(text)
    error.status = status  # type: ignore[attr-defined]
    return error


def fake_cupy(monkeypatch: pytest.MonkeyPatch, *, driver: int = 13000, error: Exception | None = None) -> None:
    """A CuPy whose first question about devices fails."""

    def count() -> int:
        if error is not None:
            raise error
        return 0

    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"  # type: ignore[attr-defined]
    runtime = types.SimpleNamespace(driverGetVersion=lambda: driver, getDeviceCount=count)
    cupy.cuda = types.SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def ask(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["doctor"])
    return code, *capsys.readouterr()


# ------------------------------------------------------------------ no GPU


def test_no_cupy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = ask(capsys)
    assert (code, err) == (0, "")
    assert 'GPU         none, models run on the CPU: CuPy is not installed; pip install "swincupy[cuda13]"' in out


def test_no_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """CuPy's error is the same as for a driver that is too old."""
    fake_cupy(monkeypatch, driver=0, error=cuda_error(35, "cudaErrorInsufficientDriver"))
    code, out, err = ask(capsys)
    assert (code, err) == (0, "") and "models run on the CPU: no NVIDIA driver is installed" in out


@pytest.mark.parametrize("error", [None, cuda_error(100, "cudaErrorNoDevice")])
def test_no_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception | None
) -> None:
    fake_cupy(monkeypatch, error=error)
    code, out, err = ask(capsys)
    assert (code, err) == (0, "")
    assert ("CUDA lists no device" if error is None else "look at nvidia-smi and CUDA_VISIBLE_DEVICES") in out


# ------------------------------------------------------------------ one that should work and does not


def test_old_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_cupy(monkeypatch, driver=11080, error=cuda_error(35, "cudaErrorInsufficientDriver"))
    code, out, err = ask(capsys)
    assert code == 1 and "self-check  ok" in out
    assert "GPU cannot be used: the NVIDIA driver is too old for this CuPy's CUDA; update it, or pip install" in err


def test_cupy_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def broken(name: str, *args: Any, **options: Any) -> Any:
        if name == "cupy":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return original(name, *args, **options)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(builtins, "__import__", broken)
    code, _, err = ask(capsys)
    assert code == 1 and "CuPy cannot be imported: a CUDA library is missing; pip install" in err


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13"), "the compiler NVRTC is missing"),
        (DeviceError('cannot open source file "cuda_fp16.h"'), "CUDA's headers are missing"),
        (DeviceError('gelu: got common.cuh: cannot open source file "common.cuh"'), "cuda/ of swincupy is incomplete"),
        (RuntimeError("nvrtc: error: invalid value for --gpu-architecture (-arch)"), "too old for this GPU"),
        (DeviceError("gemm: nvmath-python and cuBLASLt must be installed, got x; pip install"), "nvmath-python and"),
        (OutOfMemoryError("Out of memory allocating 512 bytes"), "the GPU's memory is full; look at nvidia-smi"),
        (cuda_error(2, "cudaErrorMemoryAllocation"), "the GPU's memory is full"),
        (OSError("libcuda.so.1: cannot open"), "the NVIDIA driver's library cannot be loaded"),
        (ValueError("what nobody has seen"), "what nobody has seen"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_in_words(error: Exception, words: str) -> None:
    said = doctor.explain(error)
    assert words in said and "\n" not in said and str(error) in said


def test_long_errors_are_cut() -> None:
    said = doctor.explain(RuntimeError("begins " + 1000 * "x " + " ends"))
    assert len(said) < 420 and said.startswith("begins") and said.endswith("ends")


# ------------------------------------------------------------------ a GPU, of host memory


@pytest.fixture
def gpu() -> Iterator[None]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    with emulator.installed(), mock.patch.object(importlib.util, "find_spec", lambda name: object()):
        yield  # what a test changes is changed back before this is


def test_each_operation_and_the_demo_model_are_checked(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_precisions_here", lambda: ["fp16"])
    found = doctor._gpu_check()
    assert found["ok"], [c for c in found["checks"] if not c["ok"]]
    assert {c.op for c in doctor._cases()} == {c["name"].removesuffix(" in fp16") for c in found["checks"][:-1]}
    assert found["checks"][-1]["name"] == "the demo model in fp16"


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_operations_in_other_precisions(gpu: None, name: str) -> None:
    for op, run in doctor._operations(name):
        error, limit = run()
        assert error <= limit / 2, op


def test_wrong_results(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_precisions_here", lambda: ["fp32"])
    right = fused.Fused.gelu
    monkeypatch.setattr(fused.Fused, "gelu", lambda self, x: right(self, x) * np.float32(1.01))
    monkeypatch.setattr(doctor, "_self_check", lambda: {"ok": True, "reason": None, "milliseconds": 1.0})
    code, out, err = ask(capsys)
    assert code == 1 and "GPU         Host memory, compute capability 9.0" in out
    (line,) = (line for line in err.splitlines() if "GPU check failed" in line)
    assert "gelu in fp32: results are wrong: 1.0e-02 from float64's" in line


def test_what_fails_at_once_is_said_once(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CuPy failed to load libnvrtc.so.13")

    monkeypatch.setattr("swincupy.jit.kernel", missing)
    (check,) = doctor._gpu_check()["checks"]
    assert not check["ok"] and "the compiler NVRTC is missing" in check["reason"]


def test_old_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swincupy.jit.compute_capability", lambda: 70)
    (check,) = doctor._gpu_check()["checks"]
    assert check["reason"] == 'the GPU must have compute capability 7.5 or newer; use device="cpu"'


def test_full_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_precisions_here", lambda: ["fp32"])
    device.default_pool.free_all_blocks()
    monkeypatch.setattr(device.card, "total", device.card.used)
    (check,) = doctor._gpu_check()["checks"]
    assert "the GPU's memory is full" in check["reason"]


def test_json(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_gpu_check", lambda: {"ok": False, "precisions": [], "checks": [], "seconds": 0.1})
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"]["devices"][0]["compute"] == "9.0" and found["gpu_check"]["ok"] is False
