"""Which GPUs there are, which of them a model can run on, and where none is, why: in words that a user can act on."""

from __future__ import annotations

from typing import NamedTuple

from swincupy import precision as precisions
from swincupy.errors import DeviceError, OutOfMemoryError

#: Lowest compute capability that has kernels, 10 * major + minor.
LOWEST_SM = min(p.min_sm for p in precisions.PRECISIONS.values() if p.ctype)


class Device(NamedTuple):
    """A CUDA device: its name, compute capability ("9.0") and bytes of memory."""

    name: str
    compute: str
    memory: int

    @property
    def sm(self) -> int:
        """10 * major + minor."""
        return int(self.compute.replace(".", ""))


class Found(NamedTuple):
    """What there is of GPUs.

    Attributes
    ----------
    cupy, driver : str or None
        Versions.
    devices : tuple of Device
    usable : tuple of int
        Indices of those on which models can run.
    reason : str or None
        Why there are none of these.
    broken : bool
        The reason is a fault of the installation: there should be some.
    """

    cupy: str | None = None
    driver: str | None = None
    devices: tuple[Device, ...] = ()
    usable: tuple[int, ...] = ()
    reason: str | None = None
    broken: bool = False


def find() -> Found:
    """The GPUs of this machine; never raises."""
    try:
        import cupy
    except Exception as error:  # a CUDA library that is missing or of another version fails in any way
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return Found(reason=f"CuPy is not installed; {_INSTALL}")
        return Found(reason=f"CuPy cannot be imported: {explain(error)}", broken=True)
    found = Found(cupy=cupy.__version__)
    try:
        runtime = cupy.cuda.runtime
        if driver := runtime.driverGetVersion():
            found = found._replace(driver=f"CUDA {driver // 1000}.{driver % 1000 // 10}")
        properties = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    except Exception as error:
        if not found.driver:
            return found._replace(reason="no NVIDIA driver is installed")
        # a driver without a GPU is no fault; one that is too old for this CuPy is
        return found._replace(reason=explain(error), broken=getattr(error, "status", 0) != _NO_DEVICE)
    if not properties:
        return found._replace(reason="CUDA lists no device")
    found = found._replace(
        devices=tuple(Device(p["name"].decode(), f"{p['major']}.{p['minor']}", p["totalGlobalMem"]) for p in properties)
    )
    usable = tuple(i for i, device in enumerate(found.devices) if device.sm >= LOWEST_SM)
    if not usable:
        newest = max(device.sm for device in found.devices) / 10
        return found._replace(
            reason=f"a GPU must have compute capability {LOWEST_SM / 10} or newer, the newest here has {newest}"
        )
    try:
        from swincupy.ops import cublaslt

        cublaslt.bindings()
        cupy.cuda.nvrtc.getVersion()  # loads the compiler
    except Exception as error:
        return found._replace(reason=explain(error), broken=True)
    return found._replace(usable=usable)


def default(precision: precisions.Precision) -> str:
    """Where a model of a precision runs if no device was asked for: on a GPU if one can be used, else on the CPU.

    Of several GPUs that can be used it is the first one that has the precision. "fp64" is the CPU's.

    Raises
    ------
    DeviceError
        The precision needs a GPU, and none can be used.
    """
    if not precision.ctype:
        return "cpu"
    found = find()
    if found.usable:
        able = [i for i in found.usable if found.devices[i].sm >= precision.min_sm]
        return f"cuda:{(able or found.usable)[0]}"  # where none is able, the first one says what it lacks
    if precision.name == "fp32":
        return "cpu"
    raise DeviceError(
        f"load: precision {precision.name!r} must run on a GPU, and none can be used: {found.reason}; "
        'or use precision="fp32", which the CPU has; see swincupy doctor'
    )


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
