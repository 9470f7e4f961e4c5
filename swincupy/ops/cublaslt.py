"""Matrix products of row-major arrays through cuBLASLt, with descriptors of our own: one library call a product."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from swincupy.errors import DeviceError
from swincupy.precision import Precision

Array = Any

WORKSPACE = 32 << 20  # bytes that an algorithm may ask for

_FLOAT32 = 0  # CUDA_R_32F, the type of alpha and beta
_FLOAT32_SUMS = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: parts of a sum are not rounded to the storage type
_HEURISTIC = np.dtype(
    [("algorithm", "<u8", 8), ("workspace", "<u8"), ("state", "<i4"), ("waves", "<f4"), ("", "<i4", 4)]
)  # cublasLtMatmulHeuristicResult_t


@functools.cache
def bindings() -> Any:
    """``nvmath.bindings.cublasLt``.

    Raises
    ------
    DeviceError
        It, or the library that it binds, is not installed.
    """
    advice = 'pip install "swincupy[cuda12]" or "swincupy[cuda13]", whichever the driver supports'
    try:
        from nvmath.bindings import cublasLt

        cublasLt.get_version()  # loads the library
    except Exception as error:  # ImportError, or the binding's own error where the library is not found
        reason = " ".join(str(error).split())
        raise DeviceError(f"gemm: nvmath-python and cuBLASLt must be installed, got {reason}; {advice}") from error
    return cublasLt


@functools.cache
def _handle(device: int) -> int:
    """The library's handle of a device, which must be the current one."""
    return int(bindings().create())


class Product:
    """``out = a @ w.T + bias + residual`` for one shape, precision and alignment, on CuPy's current device.

    cuBLASLt is column-major and sees ``out.T = w.T.T @ a.T``: w is its A, transposed, and a is its B. Its
    bias, one number a row, is then one number a column of out.

    Parameters
    ----------
    M, N, K : int
        a [M, K], w [N, K], out and residual [M, N], C-contiguous.
    precision : Precision
    bias, residual : bool
        Whether there are any.
    alignment : int
        Bytes of which the pointers of all arrays are multiples.

    Notes
    -----
    An algorithm's workspace comes from CuPy's current allocator: in a stream's order, and in a CUDA
    graph the graph's own, so that no two products at a time share one.
    """

    def __init__(
        self, M: int, N: int, K: int, precision: Precision, *, bias: bool, residual: bool, alignment: int
    ) -> None:
        import cupy

        self._lt = lt = bindings()
        self._library = _handle(cupy.cuda.device.get_device_id())
        self._lock = threading.Lock()  # the bias is an attribute of the descriptor
        self._alignment = alignment
        self._scalars = np.array([1, 1 if residual else 0], np.float32)
        self._one, self._beta = (self._scalars[i:].ctypes.data for i in range(2))
        self._chosen = np.zeros(1, _HEURISTIC)
        self._algorithm, self._workspace = self._chosen.ctypes.data, 0

        attribute = lt.MatmulDescAttribute
        self._product = lt.matmul_desc_create(precision.compute_type, _FLOAT32)
        self._set(lt.matmul_desc_set_attribute, self._product, attribute.TRANSA, np.int32(1))
        if bias:
            self._set(lt.matmul_desc_set_attribute, self._product, attribute.EPILOGUE, np.int32(lt.Epilogue.BIAS))
        self._pointer = np.zeros(1, np.uint64) if bias else None
        self._pointer_at = self._pointer.ctypes.data if self._pointer is not None else 0
        self._w, self._a, self._out = (
            lt.matrix_layout_create(precision.cuda_type, rows, columns, rows)
            for rows, columns in ((K, N), (K, M), (N, M))
        )
        weakref.finalize(self, _destroy, lt, self._product, (self._w, self._a, self._out)).atexit = False

    def algorithms(self, count: int) -> list[bytes]:
        """Up to ``count`` algorithms, best first as the library guesses; none where it has none."""
        lt = self._lt
        preference = lt.matmul_preference_create()
        attribute = lt.MatmulPreferenceAttribute
        try:
            for name, value in (
                (attribute.MAX_WORKSPACE_BYTES, np.uint64(WORKSPACE)),
                (attribute.REDUCTION_SCHEME_MASK, np.uint32(_FLOAT32_SUMS)),
                (attribute.MIN_ALIGNMENT_A_BYTES, np.uint32(self._alignment)),
                (attribute.MIN_ALIGNMENT_B_BYTES, np.uint32(self._alignment)),
                (attribute.MIN_ALIGNMENT_C_BYTES, np.uint32(self._alignment)),
                (attribute.MIN_ALIGNMENT_D_BYTES, np.uint32(self._alignment)),
            ):
                self._set(lt.matmul_preference_set_attribute, preference, name, value)
            found, number = np.zeros(count, _HEURISTIC), np.zeros(1, np.int32)
            layouts = (self._w, self._a, self._out, self._out)
            with self._bias(16):  # some versions look whether there is one
                try:
                    lt.matmul_algo_get_heuristic(
                        self._library, self._product, *layouts, preference, count, found.ctypes.data, number.ctypes.data
                    )
                except lt.cuBLASLtError:  # NOT_SUPPORTED: this combination has no algorithm
                    return []
        finally:
            lt.matmul_preference_destroy(preference)
        return [f["algorithm"].tobytes() for f in found[: int(number[0])] if f["state"] == 0]

    def use(self, algorithm: bytes) -> None:
        """Choose the algorithm of the calls that follow.

        Raises
        ------
        DeviceError
            This library, GPU or shape does not have it.
        """
        lt = self._lt
        if len(algorithm) != 64:
            raise DeviceError(f"gemm: a cuBLASLt algorithm must be 64 bytes, got {len(algorithm)}")
        found = np.zeros(1, _HEURISTIC)
        wanted = np.frombuffer(algorithm, np.uint64).copy()
        layouts = (self._w, self._a, self._out, self._out)
        with self._bias(16):
            try:
                lt.matmul_algo_check(self._library, self._product, *layouts, wanted.ctypes.data, found.ctypes.data)
            except lt.cuBLASLtError as error:
                raise DeviceError(f"gemm: cuBLASLt does not take the algorithm {algorithm.hex()}: {error}") from error
        if found["state"][0] or int(found["workspace"][0]) > WORKSPACE:
            raise DeviceError(f"gemm: cuBLASLt does not take the algorithm {algorithm.hex()}")
        self._chosen["algorithm"] = wanted
        self._workspace = int(found["workspace"][0])

    def __call__(self, a: Array, w: Array, bias: Array | None, residual: Array | None, out: Array) -> None:
        """Enqueue the product on CuPy's current stream; ``residual`` may be ``out``."""
        import cupy

        workspace = cupy.cuda.alloc(self._workspace) if self._workspace else None
        to = out.data.ptr
        with self._bias(0 if bias is None else bias.data.ptr):
            self._lt.matmul(
                self._library, self._product,
                self._one, w.data.ptr, self._w, a.data.ptr, self._a,
                self._beta, to if residual is None else residual.data.ptr, self._out, to, self._out,
                self._algorithm, workspace.ptr if workspace else 0, self._workspace,
                cupy.cuda.get_current_stream().ptr,
            )  # fmt: skip

    @contextlib.contextmanager
    def _bias(self, pointer: int) -> Iterator[None]:
        """Hold the descriptor, with this bias."""
        with self._lock:
            if self._pointer is not None:
                self._pointer[0] = pointer
                lt = self._lt
                lt.matmul_desc_set_attribute(
                    self._product, lt.MatmulDescAttribute.BIAS_POINTER, self._pointer_at, self._pointer.nbytes
                )
            yield

    @staticmethod
    def _set(setter: Any, of: int, name: int, value: np.generic) -> None:
        held = np.array([value])
        setter(of, name, held.ctypes.data, held.nbytes)


def _destroy(lt: Any, product: int, layouts: tuple[int, ...]) -> None:
    lt.matmul_desc_destroy(product)
    for layout in layouts:
        lt.matrix_layout_destroy(layout)
