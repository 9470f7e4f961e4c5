"""The one table of precisions: how numbers are stored, what computes with them, and how exact that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from swincupy.errors import DeviceError

Array = Any


@dataclass(frozen=True)
class Precision:
    """One way of storing and multiplying numbers. Sums, softmax and norms are float32 in all but "fp64".

    Attributes
    ----------
    name : str
        What users write: "fp32", "tf32", "fp16", "bf16", or "fp64".
    storage : numpy.dtype
        dtype of the arrays that hold it. NumPy has no bfloat16: its bytes are carried as uint16.
    ctype : str
        The C++ type of an element, ``scalar_t`` of the kernels. Empty where there are no kernels.
    cuda_type : int
        cudaDataType of a matrix: CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF or CUDA_R_64F.
    compute_type : int
        cublasComputeType: CUBLAS_COMPUTE_32F, _32F_FAST_TF32 or _64F.
    min_sm : int
        Lowest compute capability, 10 * major + minor.
    tolerance : float
        Relative L2 distance from float64 within which one operation lands.
    """

    name: str
    storage: np.dtype[Any]
    ctype: str
    cuda_type: int
    compute_type: int
    min_sm: int
    tolerance: float


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", np.dtype(np.float32), "float", 0, 68, 75, 2e-6),
        Precision("tf32", np.dtype(np.float32), "float", 0, 77, 80, 1e-3),
        Precision("fp16", np.dtype(np.float16), "__half", 2, 68, 75, 1e-3),
        Precision("bf16", np.dtype(np.uint16), "__nv_bfloat16", 14, 68, 80, 8e-3),
        Precision("fp64", np.dtype(np.float64), "", 1, 70, 0, 1e-13),  # the CPU's, for reference results
    )
}


def of(name: str | Precision, *, sm: int | None = None) -> Precision:
    """The precision of a name.

    Parameters
    ----------
    name : str or Precision
    sm : int, optional
        Compute capability of the GPU that is to run it.

    Raises
    ------
    DeviceError
        No such precision, or the GPU does not have it.
    """
    p = name if isinstance(name, Precision) else PRECISIONS.get(name)
    if p is None:
        raise DeviceError(f"load: precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if sm is not None and not p.ctype:
        gpu = ", ".join(q.name for q in PRECISIONS.values() if q.ctype)
        raise DeviceError(f"precision: {p.name} must run on the CPU; on a GPU use one of {gpu}")
    if sm is not None and sm < p.min_sm:
        raise DeviceError(
            f"precision: {p.name} needs compute capability {p.min_sm / 10} or newer, this GPU is {sm / 10}; "
            'use precision="fp16" or "fp32"'
        )
    return p


def encode(x: Array, precision: Precision) -> Array:
    """A float array of NumPy or CuPy in the precision's storage, rounded to nearest even."""
    if precision.name != "bf16":
        return x.astype(precision.storage)
    bits = x.astype(np.float32).view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    rounded[nan] = 0x7FC0  # rounding could carry a NaN over into an infinity
    return rounded.astype(np.uint16)


def decode(x: Array, precision: Precision) -> Array:
    """The inverse of `encode`: float32, exactly (float64 for "fp64")."""
    if precision.name != "bf16":
        return x.astype(np.float64 if precision.name == "fp64" else np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)
