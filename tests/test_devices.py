"""Which GPU is taken where none is asked for, and why none is: every way in which one may be unusable."""

from __future__ import annotations

import builtins
import pickle
import shutil
import sys
import types
from typing import Any

import pytest

import swincupy
from swincupy import bench, cli, devices
from swincupy.backend import backend
from swincupy.errors import DeviceError, OutOfMemoryError
from swincupy.ops import cublaslt
from tests.host import emulator

pytestmark = pytest.mark.usefixtures("gpus_are_looked_for")


def cuda_error(status: int, text: str) -> RuntimeError:
    error = RuntimeError(text)
    error.status = status  # type: ignore[attr-defined]
    return error


def fail(error: Exception | None, result: Any = None) -> Any:
    """A function that raises an error, or returns a result where there is none."""

    def call(*_: Any) -> Any:
        if error is not None:
            raise error
        return result

    return call


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *sms: int,
    driver: int = 13000,
    count: Exception | None = None,
    bindings: Exception | None = None,
    nvrtc: Exception | None = None,
) -> None:
    """A machine with CuPy and GPUs of these compute capabilities, where what has an error fails with it."""

    def properties(i: int) -> dict[str, Any]:
        return {"name": f"GPU {i}".encode(), "major": sms[i] // 10, "minor": sms[i] % 10, "totalGlobalMem": 80 << 30}

    class Device:
        def __init__(self, index: int) -> None:
            self.compute_capability = str(sms[index])

    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    runtime = types.SimpleNamespace(
        driverGetVersion=lambda: driver, getDeviceCount=fail(count, len(sms)), getDeviceProperties=properties,
        CUDARuntimeError=RuntimeError,
    )  # fmt: skip
    compiler = types.SimpleNamespace(getVersion=fail(nvrtc, (13, 0)))
    cupy.cuda = types.SimpleNamespace(runtime=runtime, nvrtc=compiler, Device=Device)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cublaslt, "bindings", fail(bindings))


# ------------------------------------------------------------------ what is found


def test_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 70, 90, 75, 120)
    found = devices.find()
    assert found.usable == (1, 2, 3) and not found.broken and found.reason is None
    assert (found.cupy, found.driver) == ("14.2.0", "CUDA 13.0")
    assert found.devices[1] == ("GPU 1", "9.0", 80 << 30) and found.devices[3].sm == 120


NO_NVMATH = DeviceError("gemm: nvmath-python and cuBLASLt must be installed, got x; pip install y")


@pytest.mark.parametrize(
    "sms, faults, reason, broken",
    [
        ((), {"driver": 0, "count": cuda_error(35, "old")}, "no NVIDIA driver is installed", False),
        ((), {"driver": 11080, "count": cuda_error(35, "old")}, "the NVIDIA driver is too old for this CuPy's", True),
        ((), {"count": cuda_error(100, "cudaErrorNoDevice")}, "look at nvidia-smi and CUDA_VISIBLE_DEVICES", False),
        ((), {"count": cuda_error(999, "cudaErrorUnknown")}, "cudaErrorUnknown", True),
        ((), {}, "CUDA lists no device", False),
        ((70, 61), {}, "a GPU must have compute capability 7.5 or newer, the newest here has 7.0", False),
        ((90,), {"bindings": NO_NVMATH}, "nvmath-python and cuBLASLt must be installed", True),
        ((90,), {"nvrtc": RuntimeError("CuPy failed to load libnvrtc.so.13")}, "the compiler NVRTC is missing", True),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_reasons(
    monkeypatch: pytest.MonkeyPatch, sms: tuple[int, ...], faults: dict[str, Any], reason: str, broken: bool
) -> None:
    """A fault of the installation is told from a machine that has no GPU."""
    machine(monkeypatch, *sms, **faults)
    found = devices.find()
    assert found.usable == () and reason in str(found.reason) and found.broken is broken
    assert len(found.devices) == len(sms)
    chosen = backend(None, None)
    assert (chosen.device, chosen.precision) == ("cpu", "fp32")


@pytest.mark.parametrize(
    "error, reason, broken",
    [
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), 'CuPy is not installed; pip install "swin', False),
        (ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"), "CuPy cannot be imported: No mod", True),
        (ImportError("libcudart.so.13: cannot open shared object file"), "cannot be imported: a CUDA library is", True),
    ],
)
def test_cupy_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, broken: bool
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "cupy":
            raise error
        return original(name, *args, **options)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    found = devices.find()
    assert reason in str(found.reason) and found.broken is broken and found.cupy is None
    assert backend(None, "fp32").device == "cpu"


# ------------------------------------------------------------------ what is taken


@pytest.mark.parametrize(
    "sms, precision, device",
    [
        ((90,), None, "cuda:0"),
        ((90,), "fp32", "cuda:0"),
        ((90,), "fp64", "cpu"),
        ((70, 75, 80), "fp32", "cuda:1"),
        ((70, 75, 80), "fp16", "cuda:1"),
        ((70, 75, 80), "bf16", "cuda:2"),
        ((), "fp32", "cpu"),
        ((), "fp64", "cpu"),
    ],
)
def test_default(monkeypatch: pytest.MonkeyPatch, sms: tuple[int, ...], precision: str | None, device: str) -> None:
    machine(monkeypatch, *sms)
    chosen = backend(None, precision)
    assert (chosen.device, chosen.precision) == (device, precision or "fp32")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
def test_precisions_of_gpus_without_one(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The error says why there is none, and what to do; with the CPU asked for it is about the CPU."""
    machine(monkeypatch)
    with pytest.raises(
        DeviceError,
        match=f"load: precision '{precision}' must run on a GPU, and none can be used: CUDA lists no device; "
        'or use precision="fp32", which the CPU has; see swincupy doctor',
    ):
        swincupy.load("demo", precision=precision)
    with pytest.raises(DeviceError, match="precision on the CPU must be 'fp32' or 'fp64', got"):
        swincupy.load("demo", device="cpu", precision=precision)


def test_precisions_that_the_gpu_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 75)
    with pytest.raises(DeviceError, match="bf16 needs compute capability 8.0 or newer, this GPU is 7.5; use"):
        backend(None, "bf16")
    with pytest.raises(DeviceError, match="fp64 must run on the CPU"):
        backend("cuda", "fp64")


def test_what_is_asked_for_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find", lambda: pytest.fail("looked for GPUs"))
    assert backend("cpu", None).device == backend(None, "fp64").device == "cpu"


# ------------------------------------------------------------------ a GPU of host memory


@pytest.fixture
def gpu() -> Any:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    with emulator.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cublaslt, "bindings", lambda: types.SimpleNamespace(get_version=lambda: 130100))
        yield


def test_models_are_there_where_nothing_is_asked(gpu: None, digits: list[Any], capsys: Any) -> None:
    model, on_cpu = swincupy.load("demo"), swincupy.load("demo", device="cpu")
    assert (model.device, model.precision) == ("cuda:0", "fp32")
    want = on_cpu.classify(digits[:3], topk=1)
    assert [p[0].index for p in model.classify(digits[:3], topk=1)] == [p[0].index for p in want]
    assert swincupy.SwinTransformer(on_cpu._params, on_cpu.config).device == "cuda:0"
    assert cli.main(["classify", str(digits[0]), "--topk", "1"]) == 0
    assert want[0][0].label in capsys.readouterr().out


def test_a_model_in_another_process_is_where_that_can(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no device was asked for. One that was is still asked for."""
    stored = [pickle.dumps(swincupy.load("demo", device=d)) for d in (None, "cuda", "cpu")]
    assert [pickle.loads(s).device for s in stored] == ["cuda:0", "cuda:0", "cpu"]
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert pickle.loads(stored[0]).device == "cpu"
    with pytest.raises(DeviceError, match="needs CuPy"):
        pickle.loads(stored[1])


def test_bench_runs_there_in_fp16(gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench, "ceiling", lambda device, precision: 2.0)
    args = ["bench", "--model", "demo", "--batch", "1", "--repeats", "2"]
    assert cli.main(args) == 0
    assert "| 1 | fp16 |" in capsys.readouterr().out
    assert cli.main([*args, "--precision", "fp64"]) == 0
    assert "| 1 | fp64 |" in capsys.readouterr().out


def test_converting_needs_no_gpu(gpu: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find", lambda: pytest.fail("looked for GPUs"))
    assert cli.main(["convert", "demo", str(tmp_path / "m.safetensors")]) == 0
    assert swincupy.load(tmp_path / "m.safetensors", device="cpu").labels


# ------------------------------------------------------------------ errors in words


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
    said = devices.explain(error)
    assert words in said and "\n" not in said and str(error) in said


def test_long_errors_are_cut() -> None:
    said = devices.explain(RuntimeError("begins " + 1000 * "x " + " ends"))
    assert len(said) < 420 and said.startswith("begins") and said.endswith("ends")
