"""Finds, builds, remembers and launches the kernels of ``cuda/``: the only caller of RawModule.

A kernel is ``cuda/<name>.cu`` behind a typed prelude, which holds its compile-time constants. It is
built by NVRTC when first asked for, and kept on disk by CuPy (``CUPY_CACHE_DIR``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swincupy.errors import DeviceError
from swincupy.resources import resource_dir

Array = Any
Constant = str | int | float | bool  # a str is a type: scalar_t="__half" becomes `using scalar_t = __half;`

_SCALARS = {
    "int": np.int32, "unsigned": np.uint32, "unsigned int": np.uint32, "long long": np.int64,
    "float": np.float32, "double": np.float64, "bool": np.bool_,
}  # fmt: skip
_ELEMENTS = {
    "float": np.dtype(np.float32), "__half": np.dtype(np.float16), "__nv_bfloat16": np.dtype(np.uint16),
    "unsigned char": np.dtype(np.uint8), "int": np.dtype(np.int32), "unsigned int": np.dtype(np.uint32),
    "signed char": np.dtype(np.int8), "float2": np.dtype(np.float32),
}  # fmt: skip
_SHARED_DEFAULT = 48 * 1024  # more dynamic shared memory has to be asked for

HOPPER = "sm_90a"  # what kernels that include hopper.cuh are built for
HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a block may have there
_PORTABLE_CLUSTER = 8  # blocks; more have to be asked for
_NON_PORTABLE_CLUSTER = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


class Variant(NamedTuple):
    """A kernel with one set of its constants, and the lowest compute capability that runs it."""

    name: str
    constants: dict[str, Constant]
    min_sm: int = 75
    arch: str | None = None


class Parameter(NamedTuple):
    """One parameter of a kernel: its C type without const and __restrict__, and whether it is a pointer."""

    name: str
    ctype: str
    pointer: bool


class Kernel:
    """A kernel on one device, ready to launch.

    Attributes
    ----------
    name : str
    parameters : tuple of Parameter
    device : int
    raw : cupy.RawKernel
        For what a launch does not need: ``num_regs``, ``local_size_bytes``, ...
    """

    def __init__(self, name: str, raw: Any, parameters: tuple[Parameter, ...], device: int, early: bool) -> None:
        self.name, self.raw, self.parameters, self.device, self._early = name, raw, parameters, device, early
        self._shared = _SHARED_DEFAULT

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *args: Any,
        shared: int = 0,
        overlap: bool = True,
    ) -> None:
        """Launch on CuPy's current stream.

        Parameters
        ----------
        grid, block : int or tuple of up to three
        *args
            As the kernel declares them. A pointer takes a C-contiguous array of its element type on
            this device, or None; a number is cast to the declared type.
        shared : int
            Bytes of dynamic shared memory.
        overlap : bool
            The kernel may start before those ahead of it are done, for which it waits by itself; not where
            what it reads before that wait may be their work. SM 9.0 and newer, with cuda-bindings; else it
            starts after them in any case.

        Raises
        ------
        DeviceError
            More shared memory than the GPU has.
        TypeError, ValueError
            The arguments are not those that the kernel declares (a fault of the caller's code).
        """
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}: takes {len(self.parameters)} arguments, got {len(args)}")
        cast = tuple([self._cast(p, a) for p, a in zip(self.parameters, args, strict=True)])
        if shared > self._shared:
            self._allow(shared)
        if overlap and self._early:
            self._launch_early(_triple(grid), _triple(block), cast, shared)
        else:
            self.raw(_triple(grid), _triple(block), cast, shared_mem=shared)
        if _recording.launches is not None:
            _recording.launches.append(Launch(self.raw, _triple(grid), _triple(block), cast, shared))

    def _launch_early(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared: int) -> None:
        """Programmatic dependent launch, which CuPy does not offer."""
        import cupy

        driver = _driver()
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared
        config.hStream = cupy.cuda.get_current_stream().ptr
        config.attrs, config.numAttrs = [early], 1
        values = [np.array([a if isinstance(a, np.generic | np.ndarray) else np.uint64(a.data.ptr)]) for a in args]
        addresses = np.array([v.ctypes.data for v in values], np.uint64)
        (status,) = driver.cuLaunchKernelEx(config, self.raw.kernel.ptr, addresses.ctypes.data, 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise cupy.cuda.driver.CUDADriverError(int(status))

    def _cast(self, p: Parameter, value: Any) -> Any:
        if not p.pointer:
            scalar = _SCALARS.get(p.ctype)
            return value if scalar is None else scalar(value)  # a struct by value is passed as it comes
        if value is None:
            return np.uint64(0)
        element = _ELEMENTS.get(p.ctype)  # None for void*
        if element is not None and value.dtype != element:
            raise TypeError(f"{self.name}: {p.name} must hold {p.ctype} ({element}), got {value.dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"{self.name}: {p.name} must be C-contiguous, got strides {value.strides}")
        if value.data.device_id != self.device and value.size:
            raise ValueError(f"{self.name}: {p.name} must be on device {self.device}, is on {value.data.device_id}")
        return value

    def _allow(self, shared: int) -> None:
        try:
            self.raw.max_dynamic_shared_size_bytes = shared
        except Exception as error:
            raise DeviceError(
                f"{self.name}: shared memory must fit the GPU, got {shared} bytes a block ({error}); "
                'use device="cpu" or a GPU with more'
            ) from error
        self._shared = shared


_GAP = object()


class Launch(NamedTuple):
    """A launch as it was made, to be made again without the checks and choices that led to it."""

    raw: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple[Any, ...]
    shared: int

    def without(self, x: Array) -> Launch | None:
        """The launch with a gap where the array x is; None where it does not take x."""
        args = tuple([_GAP if a is x else a for a in self.args])
        return self._replace(args=args) if any(a is _GAP for a in args) else None

    def again(self, x: Array) -> None:
        """On CuPy's current stream, with an array like the one that is missing: its type, shape, alignment, device."""
        args = tuple([x if a is _GAP else a for a in self.args])
        self.raw(self.grid, self.block, args, shared_mem=self.shared)


class _Recording(threading.local):
    launches: list[Launch] | None = None


_recording = _Recording()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that this thread makes within it."""
    launches: list[Launch] = []
    _recording.launches = launches
    try:
        yield launches
    finally:
        _recording.launches = None


@functools.cache
def _driver() -> Any:
    """``cuda.bindings.driver``, or None where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def kernel(name: str, *, arch: Any = None, **constants: Constant) -> Kernel:
    """The kernel ``cuda/<name>.cu`` for these constants on CuPy's current device, built where it is new.

    Parameters
    ----------
    name : str
    arch : str, optional
        Architecture to build for where the GPU's own is not enough: "sm_90a".
    **constants
        The prelude: str is a type, bool, int and float are values.

    Raises
    ------
    DeviceError
        The kernel does not compile for this GPU.
    """
    import cupy

    key = (name, prelude(constants), arch, cupy.cuda.device.get_device_id())
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = _build(name, constants, arch)
    return found


_kernels: dict[tuple[str, str, str | None, int], Kernel] = {}
_lock = threading.Lock()


def _build(name: str, constants: dict[str, Constant], arch: str | None) -> Kernel:
    import cupy

    options = _OPTIONS if arch is None else (*_OPTIONS, f"-arch={arch}")
    module = cupy.RawModule(code=source(name, constants), options=(*options, *_include(name)))
    try:
        raw = module.get_function(name)
        raw.compile()
    except cupy.cuda.compiler.CompileException as error:
        sm = cupy.cuda.Device().compute_capability
        raise DeviceError(f"{name}: kernel must compile for SM {sm} with {constants}, got {error}") from error
    early = "wait_for_kernels_ahead();" in _read(f"{name}.cu") and compute_capability() >= 90 and _driver() is not None
    return Kernel(name, raw, parameters(name, constants), cupy.cuda.device.get_device_id(), early)


def allow_clusters(kernel: Kernel, blocks: int) -> None:
    """Before its launch: the kernel's clusters have so many blocks, up to 16."""
    if blocks > _PORTABLE_CLUSTER:
        _allow_large_clusters(kernel)


@functools.cache
def _allow_large_clusters(kernel: Kernel) -> None:
    from cupy.cuda import driver

    driver.funcSetAttribute(kernel.raw.kernel.ptr, _NON_PORTABLE_CLUSTER, 1)


def compute_capability() -> int:
    """10 * major + minor of CuPy's current device."""
    import cupy

    return int(cupy.cuda.Device().compute_capability)


@functools.cache
def multiprocessors(device: int) -> int:
    """Number of multiprocessors of a device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@functools.cache
def shared_per_multiprocessor(device: int) -> int:
    """Bytes of shared memory of a multiprocessor of a device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerMultiprocessor"])


# ---------------------------------------------------------------- source

_OPTIONS = ("-std=c++17", "-DNDEBUG")


def _include(name: str) -> tuple[str, ...]:
    folders = (resource_dir("cuda"), *([cutlass()[0]] if _needs_cutlass(name) else []))
    return tuple(f"-I{folder}" for folder in folders)


def _needs_cutlass(name: str) -> bool:
    return "#include <cutlass/" in _read(f"{name}.cu")


@functools.cache
def cutlass() -> tuple[Path, str]:
    """Where the headers of CUTLASS are, and their version.

    Raises
    ------
    DeviceError
        They are not installed.
    """
    try:
        wheel = importlib.metadata.distribution("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        folder = None
    else:
        folder = Path(str(wheel.locate_file("cutlass_library/source/include")))
    if folder is None or not (folder / "cutlass" / "cutlass.h").is_file():
        raise DeviceError('jit: the headers of CUTLASS must be installed, found none; pip install "swincupy[cutlass]"')
    return folder, wheel.version


def prelude(constants: dict[str, Constant]) -> str:
    """The constants in C++: ``scalar_t="__half", C=96`` -> ``using scalar_t = __half; constexpr int C = 96;``."""
    return "".join(f"{_declare(k, v)}\n" for k, v in sorted(constants.items()))


def _declare(name: str, value: Constant) -> str:
    if isinstance(value, str):
        return f"using {name} = {value};"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    return f"constexpr float {name} = {float(value)!r}f;"


@functools.cache
def _read(file: str) -> str:
    return (resource_dir("cuda") / file).read_text(encoding="utf-8")


@functools.cache
def include_hash(file: str) -> str:
    """Hash of a file of ``cuda/`` and of all that it includes from there; CuPy's disk cache does not see headers."""
    seen: list[str] = []
    todo = [file]
    while todo:
        seen.append(todo.pop())
        todo += [f for f in re.findall(r'#include "([^"]+)"', _read(seen[-1])) if f not in seen and f not in todo]
    digest = hashlib.sha256()
    for f in sorted(seen):
        digest.update(f"{f}\n{_read(f)}".encode())
    return digest.hexdigest()


def source(name: str, constants: dict[str, Constant]) -> str:
    """What is compiled: the types, the prelude, the kernel."""
    file = f"{name}.cu"
    headers = f" CUTLASS {cutlass()[1]}" if _needs_cutlass(name) else ""
    head = f'// {include_hash(file)}{headers}\n#include "common.cuh"\n{prelude(constants)}'
    return f'{head}#line 1 "{file}"\n{_read(file)}'


def parameters(name: str, constants: dict[str, Constant]) -> tuple[Parameter, ...]:
    """Parameters of the kernel, read from its ``extern "C" __global__`` line."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", _read(f"{name}.cu"), flags=re.S)
    found = re.search(
        rf'extern\s+"C"\s+__global__\s+void\s+(?:__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*{name}\s*\(([^)]*)\)',
        text,
    )
    if found is None:
        raise ValueError(f'{name}: cuda/{name}.cu must hold extern "C" __global__ void {name}(...)')
    aliases = {k: v for k, v in constants.items() if isinstance(v, str)}
    return tuple(_parameter(p, aliases) for p in found[1].split(",") if p.strip())


def _parameter(text: str, aliases: dict[str, str]) -> Parameter:
    words = re.sub(r"\b(const|__restrict__|__grid_constant__)\b", " ", text).replace("*", " * ").split()
    ctype = " ".join(w for w in words[:-1] if w != "*")
    return Parameter(words[-1], aliases.get(ctype, ctype), "*" in words)


def compile_to_cubin(variant: Variant, sm: int) -> bytes:
    """Compile a kernel for a compute capability, or to PTX where its arch is "compute_.."; needs NVRTC but no GPU.

    Raises
    ------
    DeviceError
        It does not compile; the compiler's log is in the message.
    """
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc

    arch = variant.arch or f"sm_{sm}"
    options = assemble_cupy_compiler_options((*_OPTIONS, *_include(variant.name)))
    options += ("-ftz=true", f"-arch={arch}", "--device-as-default-execution-space")  # as RawModule has them
    program = nvrtc.createProgram(source(variant.name, variant.constants), f"{variant.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getPTX(program) if arch.startswith("compute_") else nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise DeviceError(
            f"{variant.name}: kernel must compile for {arch} with {variant.constants}, got {log}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)


def _triple(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else size
    return (*size, 1, 1, 1)[:3]  # type: ignore[return-value]
