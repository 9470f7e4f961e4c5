"""Where a model computes: how arrays get there, which operations run there, how results come back."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from array_api_compat import array_namespace

from swincupy import precision as precisions
from swincupy.config import SwinConfig
from swincupy.engine import Eager
from swincupy.errors import DeviceError
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
    """

    @property
    def device(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def xp(self) -> Any: ...

    def engine(self, params: Mapping[str, np.ndarray], config: SwinConfig) -> Eager:
        """The forward pass over these parameters."""

    def pixels(self, x: Array) -> Array:
        """Float pixels [B, C, H, W] of any library, for the engine."""

    def answer(self, asked: Any, y: Array) -> Array:
        """A result of the engine in the library of the array that was asked with, NumPy for anything else."""

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """What the engine's calls run in."""


def backend(device: str | int | None, precision: str, *, graphs: bool = True) -> Backend:
    """The backend of ``device`` ("cpu", "cuda", "cuda:N", N; None is "cpu") and ``precision``.

    Raises
    ------
    DeviceError
        The device or precision cannot be had here.
    """
    name = "cpu" if device is None else f"cuda:{device}" if isinstance(device, int) else str(device)
    p = precisions.of(precision)
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

    def __init__(self, precision: precisions.Precision) -> None:
        if precision.name not in ("fp32", "fp64"):
            raise DeviceError(f"load: precision on the CPU must be 'fp32' or 'fp64', got {precision.name!r}")
        self.precision, self._dtype = precision.name, precision.storage

    def engine(self, params: Mapping[str, np.ndarray], config: SwinConfig) -> Eager:
        return Eager(params, config, tiled, self.pixels)

    def pixels(self, x: Array) -> Array:
        return np.asarray(host(x), self._dtype)

    def answer(self, asked: Any, y: Array) -> Array:
        if isinstance(asked, np.ndarray) or not is_float_array(asked):
            return y
        return array_namespace(asked).asarray(y, device=asked.device)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class Gpu:
    """A CUDA device: the kernels of ``cuda/`` and cuBLASLt through CuPy, replayed as CUDA graphs."""

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
        self._device = cupy.cuda.Device(index)
        precisions.of(precision, sm=int(self._device.compute_capability))
        self.device, self.precision, self.xp = f"cuda:{index}", precision.name, cupy
        self._precision, self._graphs = precision, graphs

    def engine(self, params: Mapping[str, np.ndarray], config: SwinConfig) -> Eager | Graphs:
        from swincupy.engine import Graphs
        from swincupy.ops.fused import Fused

        with self._device:
            ops = Fused(self._precision)
            options: dict[str, Any] = {
                "exact": lambda a: self.xp.asarray(a, np.float32),
                "prepare_bias": ops.position_bias,
                "masks": False,  # the attention kernel has them
            }
            if self._graphs:
                return Graphs(params, config, ops, self._parameter, export=self._export, **options)
            return Eager(params, config, ops, self._parameter, export=self._export, **options)

    def _parameter(self, a: Array) -> Array:
        return precisions.encode(self.xp.asarray(a), self._precision)

    def _export(self, y: Array) -> Array:
        return precisions.decode(y, self._precision)

    def pixels(self, x: Array) -> Array:
        """Device arrays of other libraries are taken without a copy; those on the host a graph copies itself."""
        if hasattr(x, "detach"):  # PyTorch
            x = x.detach()
            x = x.float() if "bfloat16" in str(x.dtype) else x
        if isinstance(x, self.xp.ndarray) or hasattr(x, "__cuda_array_interface__"):
            return self.xp.asarray(x).astype(np.float32, copy=False)
        if not isinstance(x, np.ndarray) and hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] == 2:
            return self.xp.from_dlpack(x).astype(np.float32, copy=False)
        x = np.asarray(x, np.float32)
        return x if self._graphs else self.xp.asarray(x)  # a graph copies it into its own buffer

    def answer(self, asked: Any, y: Array) -> Array:
        if isinstance(asked, self.xp.ndarray):
            return y
        if isinstance(asked, np.ndarray) or not is_float_array(asked):
            return y.get()
        if hasattr(asked, "copy_to_host"):  # numba
            from numba import cuda

            return cuda.as_cuda_array(y)
        xp = array_namespace(asked)
        if asked.__dlpack_device__()[0] == 2:  # kDLCUDA
            return xp.from_dlpack(y)
        return xp.asarray(y.get(), device=asked.device)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        return self._device  # type: ignore[no-any-return]


def is_float_array(x: Any) -> bool:
    """Whether x is an array of any library that holds floats (uint8 arrays are images)."""
    dtype = getattr(x, "dtype", None)
    # NumPy's names say the type whatever the byte order
    return dtype is not None and hasattr(x, "shape") and "float" in str(getattr(dtype, "name", dtype))


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
