"""Where a model computes: how arrays get there, which operations run there, how results come back."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from array_api_compat import array_namespace

from swincupy import devices
from swincupy import precision as precisions
from swincupy.config import SwinConfig
from swincupy.engine import Eager, is_out_of_memory
from swincupy.errors import DeviceError, OutOfMemoryError
from swincupy.ops import tiled

if TYPE_CHECKING:
    from swincupy.engine import Graphs

Array = Any


class Backend(Protocol):
    """What a model needs of the place where it computes.

    Attributes
    ----------
    device, precision : str
    xp : module
        Array namespace of pixels and results.
    takes_bytes : bool
        Whether the engine normalises uint8 pixels itself.
    """

    @property
    def device(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def xp(self) -> Any: ...

    @property
    def takes_bytes(self) -> bool: ...

    def engine(self, params: Mapping[str, np.ndarray], config: SwinConfig) -> Eager:
        """The forward pass over these parameters."""

    def pixels(self, x: Array) -> Array:
        """Pixels of any library for the engine: floats [B, C, H, W], or uint8 [B, H, W, C] where it takes them."""

    def answer(self, asked: Any, y: Array) -> Array:
        """A result of the engine in the library of the array that was asked with, NumPy for None."""

    def active(self, what: str = "model: x") -> contextlib.AbstractContextManager[Any]:
        """What calls of the engine, and work on its results, run in; errors say that it is about ``what``."""


def backend(device: str | int | None, precision: str | None, *, graphs: bool = True) -> Backend:
    """The backend of ``device`` ("cpu", "cuda", "cuda:N", N; None: see `devices.default`) and ``precision``.

    Raises
    ------
    DeviceError
        The device or precision cannot be had here.
    """
    p = precisions.of("fp32" if precision is None else precision)
    name = devices.default(p) if device is None else f"cuda:{device}" if isinstance(device, int) else str(device)
    if name == "cpu":
        return Host(p)
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise DeviceError(f'load: device must be "cpu", "cuda" or "cuda:N", got {device!r}')
    return Gpu(int(number or 0), p, graphs=graphs)


class Host:
    """The CPU: the reference operations, tiled, in float32 or float64."""

    device = "cpu"
    xp = np
    takes_bytes = False

    def __init__(self, precision: precisions.Precision) -> None:
        if precision.name not in ("fp32", "fp64"):
            raise DeviceError(f"load: precision on the CPU must be 'fp32' or 'fp64', got {precision.name!r}")
        self.precision, self._dtype = precision.name, precision.storage

    def engine(self, params: Mapping[str, np.ndarray], config: SwinConfig) -> Eager:
        return Eager(params, config, tiled, self.pixels)

    def pixels(self, x: Array) -> Array:
        return np.asarray(host(x), self._dtype)

    def answer(self, asked: Any, y: Array) -> Array:
        if asked is None or isinstance(asked, np.ndarray):
            return y
        return array_namespace(asked).asarray(y, device=asked.device)

    def active(self, what: str = "model: x") -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class Gpu:
    """A CUDA device: the kernels of ``cuda/`` and cuBLASLt through CuPy, replayed as CUDA graphs."""

    takes_bytes = True

    def __init__(self, index: int, precision: precisions.Precision, *, graphs: bool = True) -> None:
        try:
            import cupy
        except ImportError:
            raise DeviceError(f'load: device "cuda:{index}" needs CuPy; pip install "swincupy[cuda13]"') from None
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f'load: device "cuda:{index}" cannot be used: {error}; use device="cpu"') from None
        if index >= count:
            raise DeviceError(f"load: device must be one of the {count} CUDA devices, got {index}; they count from 0")
        precisions.of(precision, sm=int(cupy.cuda.Device(index).compute_capability))
        self.device, self.precision, self.xp = f"cuda:{index}", precision.name, cupy
        self._index, self._precision, self._graphs = index, precision, graphs

    def engine(self, params: Mapping[str, np.ndarray], config: SwinConfig) -> Eager | Graphs:
        scratch = self.xp.cuda.MemoryPool()
        what, advice = "load: the weights", 'use a smaller model, precision="fp16", or device="cpu"'
        try:
            with self._on_device(what, advice), self.xp.cuda.using_allocator(Slabs(self.xp.cuda.get_allocator())):
                return self._engine(params, config, scratch)
        finally:
            with self.xp.cuda.Device(self._index):  # a pool has a part for each device
                scratch.free_all_blocks()

    def _engine(self, params: Mapping[str, np.ndarray], config: SwinConfig, scratch: Any) -> Eager | Graphs:
        from swincupy.engine import Graphs
        from swincupy.ops import fused

        ops = fused.Fused(self._precision, constant_weights=True)

        def parameter(a: Array) -> Array:
            with self.xp.cuda.using_allocator(scratch.malloc):  # not between what is kept
                y = precisions.encode(self.xp.asarray(a), self._precision)
            return y.copy()

        def normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
            return fused.pixel_affine(mean, std, config.in_chans, self._index)

        return (Graphs if self._graphs else Eager)(
            params,
            config,
            ops,
            parameter,
            exact=lambda a: self.xp.asarray(a, np.float32),
            prepare_bias=ops.position_bias,
            masks=False,  # the attention kernel has them
            normaliser=normaliser,
            packers={
                "pack_attention": ops.pack_attention,
                "pack_mlp": ops.pack_mlp,
                "fold_norm": ops.fold_norm,
                "merge_in_place": True,
            },
            export=lambda y: precisions.decode(y, self._precision),
            settle=lambda: self.xp.cuda.get_current_stream().synchronize(),
        )

    def pixels(self, x: Array) -> Array:
        """Device arrays of other libraries are taken without a copy; those on the host a graph copies itself.

        DLPack comes first: it has our stream wait for theirs.
        """
        dtype = np.uint8 if is_byte_array(x) else np.float32
        if hasattr(x, "detach"):  # PyTorch
            x = x.detach()
        if "bfloat16" in str(x.dtype):  # not every library knows another's
            x = x.float() if hasattr(x, "float") else x.astype(np.float32)
        if not isinstance(x, (np.ndarray, self.xp.ndarray)):
            if hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] == _CUDA:
                x = self.xp.from_dlpack(x)
            elif hasattr(x, "__cuda_array_interface__"):
                x = self.xp.asarray(x)
        if isinstance(x, self.xp.ndarray):
            return self._here(x).astype(dtype, copy=False)
        x = np.asarray(x, dtype)
        return x if self._graphs else self.xp.asarray(x)  # a graph copies it into its own buffer

    def _here(self, x: Array) -> Array:
        """A CuPy array of any device on this one."""
        if x.data.device_id == self._index:
            return x
        with x.device:
            x = self.xp.ascontiguousarray(x)
            self.xp.cuda.get_current_stream().synchronize()  # streams of two devices do not wait for each other
        return x.copy()

    def answer(self, asked: Any, y: Array) -> Array:
        if isinstance(asked, self.xp.ndarray):
            return y
        with self.active():
            if asked is None or isinstance(asked, np.ndarray):
                return y.get()
            if hasattr(asked, "copy_to_host"):  # numba
                from numba import cuda

                return cuda.as_cuda_array(y)
            xp = array_namespace(asked)
            if asked.__dlpack_device__()[0] == _CUDA:
                return xp.from_dlpack(y)
            return xp.asarray(y.get(), device=asked.device)

    def active(self, what: str = "model: x") -> contextlib.AbstractContextManager[Any]:
        return self._on_device(what, "use a smaller batch")

    @contextlib.contextmanager
    def _on_device(self, what: str, advice: str) -> Iterator[None]:
        """Work on this device; its memory running out is an error that says so."""
        with self.xp.cuda.Device(self._index):
            try:
                yield
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what was allocated so far
                free, total = self.xp.cuda.runtime.memGetInfo()
                raise OutOfMemoryError(
                    f"{what} must fit into the memory of {self.device}, got: {error} "
                    f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB are free; {advice}"
                ) from None


class Slabs:
    """An allocator for arrays that last equally long: cuts them out of large pieces of memory.

    CUDA rounds each allocation of a mebibyte or more up to two, which would be a fourth of a model's weights.

    Parameters
    ----------
    allocate : callable
        Where the pieces come from: bytes -> `cupy.cuda.MemoryPointer`. A piece is given back with its last array.
    """

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self._allocate = allocate
        self._rests: list[tuple[Any, int]] = []  # of pieces: where the rest begins, and its bytes
        self._total = 0

    def __call__(self, size: int) -> Any:
        size = -(-max(size, 1) // 512) * 512  # CUDA's own alignment
        i = next((i for i, (_, left) in enumerate(self._rests) if left >= size), len(self._rests))
        if i == len(self._rests):
            piece = -(-max(size, min(self._total // 8, _LARGEST_PIECE)) // _UNIT) * _UNIT
            self._rests.append((self._allocate(piece), piece))
            self._total += piece
        pointer, left = self._rests[i]
        self._rests[i] = pointer + size, left - size
        return pointer


_UNIT, _LARGEST_PIECE = 1 << 21, 1 << 24  # bytes: of CUDA's allocations, and a last piece is half empty on average


_CUDA = 2  # kDLCUDA, the device type of DLPack


def is_float_array(x: Any) -> bool:
    """Whether x is an array of any library that holds floats (uint8 arrays are images)."""
    dtype = getattr(x, "dtype", None)
    # NumPy's names say the type whatever the byte order
    return dtype is not None and hasattr(x, "shape") and "float" in str(getattr(dtype, "name", dtype))


def is_byte_array(x: Any) -> bool:
    """Whether x is an array of any library that holds uint8."""
    return hasattr(x, "shape") and str(getattr(x, "dtype", "")).rpartition(".")[2] == "uint8"


def host(x: Any) -> np.ndarray:
    """Any library's array as a NumPy array."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "copy_to_host"):  # numba
        return np.asarray(x.copy_to_host())
    if hasattr(x, "get") and hasattr(x, "__cuda_array_interface__"):  # CuPy
        return np.asarray(x.get())
    if hasattr(x, "detach"):  # PyTorch
        x = x.detach().cpu()
        x = x.float() if "bfloat16" in str(x.dtype) else x  # NumPy has no bfloat16
    return np.asarray(x)
