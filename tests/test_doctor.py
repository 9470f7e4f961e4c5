"""doctor: what it says of a machine without a GPU, with a broken one, and with one that works or computes nonsense."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swincupy import cli, devices, doctor
from swincupy.ops import cublaslt, fused
from tests.host import device, emulator


def ask(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["doctor"])
    return code, *capsys.readouterr()


# ------------------------------------------------------------------ no GPU, for one reason or another

OLD = devices.Device("Tesla V100", "7.0", 16 << 30)
BROKEN = devices.Found(reason="the NVIDIA driver is too old", broken=True)


@pytest.mark.parametrize(
    "found, line",
    [
        (devices.Found(reason="CuPy is not installed"), "none, models run on the CPU: CuPy is not installed"),
        (devices.Found("14.2", "CUDA 13.0", (OLD,), reason="old"), "not used, models run on the CPU: old"),
        (BROKEN, "none, models run on the CPU: the NVIDIA driver is too old"),
    ],
)
def test_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: devices.Found, line: str
) -> None:
    """A fault of the installation is one of doctor's; that there is no GPU is none."""
    monkeypatch.setattr(devices, "find", lambda: found)
    code, out, err = ask(capsys)
    assert f"GPU         {line}" in out and "self-check  ok" in out and "used        device cpu, precision fp32" in out
    assert ("GPU         Tesla V100, compute capability 7.0, 16 GiB, driver CUDA 13.0" in out) == bool(found.devices)
    assert (code, err) == ((1, f"swincupy: GPU cannot be used: {found.reason}\n") if found.broken else (0, ""))


# ------------------------------------------------------------------ a GPU, of host memory


@pytest.fixture
def gpu(gpus_are_looked_for: None) -> Iterator[None]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    with emulator.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cublaslt, "bindings", lambda: types.SimpleNamespace(get_version=lambda: 130100))
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
    assert "used        device cuda:0, precision fp32" in out and "models run on the CPU" not in out
    (line,) = (line for line in err.splitlines() if "GPU check failed" in line)
    assert "gelu in fp32: results are wrong: 1.0e-02 from float64's" in line


def test_what_fails_at_once_is_said_once(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CuPy failed to load libnvrtc.so.13")

    monkeypatch.setattr("swincupy.jit.kernel", missing)
    (check,) = doctor._gpu_check()["checks"]
    assert not check["ok"] and "the compiler NVRTC is missing" in check["reason"]


def test_full_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_precisions_here", lambda: ["fp32"])
    device.default_pool.free_all_blocks()
    monkeypatch.setattr(device.card, "total", device.card.used)
    (check,) = doctor._gpu_check()["checks"]
    assert "the GPU's memory is full" in check["reason"]


def test_json(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"ok": False, "precisions": [], "checks": [], "seconds": 0.1}
    monkeypatch.setattr(doctor, "_gpu_check", lambda index: failed)
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"]["devices"][0]["compute"] == "9.0" and found["gpu_check"]["ok"] is False
    assert found["gpu"]["usable"] == [0] and found["used"] == {"device": "cuda:0", "precision": "fp32"}
