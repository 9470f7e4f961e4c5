"""Tensor maps: how the copy engine of SM 9.0 finds boxes of matrices."""

from __future__ import annotations

import functools

import numpy as np

from swincupy import precision as precisions
from swincupy.errors import DeviceError

SLAB = 128  # bytes of K that a box holds of each row


def rows(address: int, M: int, K: int, precision: str, box: int) -> np.ndarray:
    """Tensor map of [M, K], a box of it ``box`` rows of 128 bytes."""
    pitch = K * precisions.of(precision).storage.itemsize
    return _tensor_map(address, (K, M), (pitch,), (box,), precision)


def permuted_rows(address: int, N: int, K: int, precision: str, box: int) -> np.ndarray:
    """Tensor map of [N, K] as ``[N / (4 n), j, i, e, K]``: of each 4 n rows, n i + 2 j + e comes at 8 j + 2 i + e.

    n elements are 16 bytes: those that a thread of a product has side by side.
    """
    itemsize = precisions.of(precision).storage.itemsize
    pitch, n = K * itemsize, 16 // itemsize
    strides = (pitch, n * pitch, 2 * pitch, 4 * n * pitch)
    return _tensor_map(address, (K, 2, 4, n // 2, N // (4 * n)), strides, (2, 4, n // 2, box // (4 * n)), precision)


def pairs_of_rows(address: int, M: int, width: int, K: int, precision: str, box: int) -> np.ndarray:
    """Tensor map of [M / width, 2, width, K / 2]: a map of 2 width columns of K / 4 channels, rows in pairs.

    A box of it is the upper or the lower rows of ``box`` pairs.
    """
    row = width * K // 2 * precisions.of(precision).storage.itemsize
    return _tensor_map(
        address, (K // 2, width, 2, M // width), (row // width, row, 2 * row), (width, 1, box), precision
    )


@functools.lru_cache(1024)
def _tensor_map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], precision: str
) -> np.ndarray:
    """``CUtensorMap`` of an array, its innermost dimension first; zeros where a box leaves it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            f"gemm: cuda-bindings must be installed, got {error}; "
            'pip install "swincupy[cuda12]" or "swincupy[cuda13]", whichever the driver supports'
        ) from error
    types = driver.CUtensorMapDataType
    itemsize = precisions.of(precision).storage.itemsize
    status, made = driver.cuTensorMapEncodeTiled(
        # float32 is rounded to tf32 on its way, 16 bits are left as they are
        types.CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 if itemsize == 4 else types.CU_TENSOR_MAP_DATA_TYPE_UINT16,
        driver.cuuint32_t(len(sizes)), address,
        [driver.cuuint64_t(n) for n in sizes], [driver.cuuint64_t(n) for n in strides],
        [driver.cuuint32_t(n) for n in (SLAB // itemsize, *box)], [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"gemm: an array must have a tensor map, got {status!r} for sizes {sizes}, strides {strides}")
    # one element of 128 bytes: CuPy passes arrays of one element by value
    return np.array([int(word) for word in made.opaque], np.uint64).view("V128")
