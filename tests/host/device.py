"""A GPU made of host memory, as much of CuPy as `swincupy` uses: pools, streams, events, graphs, running out of memory.

Work is done when it is queued, except in a capture, where it is noted for the graph's launches. Noted
work knows addresses alone, and memory that was given back is filled with NaN: a graph that does not
keep what it reads gives NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ALIGNMENT = 512
GRAVEYARD: list[Any] = []  # memory that was given back; kept so that a stale address is readable
LOST: list[Any] = []  # memory that outlived its pool


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"CUDA error {status}")
        self.status = status


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


class Card:
    """The device: how much memory it has and has given out, and how often anyone waited for it."""

    def __init__(self) -> None:
        self.total, self.used, self.waits, self.mallocs = 1 << 30, 0, 0, 0
        self.lock = threading.RLock()
        self.thread = threading.local()


card = Card()


class Memory:
    def __init__(self, size: int) -> None:
        if size >= 1 << 20:  # as CUDA does
            size = -(-size // (1 << 21)) * (1 << 21)
        with card.lock:
            if card.used + size > card.total:
                raise CUDARuntimeError(2)
            card.used += size
            card.mallocs += 1
        self.size, self._buffer = size, np.full(size + ALIGNMENT, 0xFF, np.uint8)
        self.ptr = -(-self._buffer.ctypes.data // ALIGNMENT) * ALIGNMENT
        weakref.finalize(self, _give_back, size, self._buffer).atexit = False


def _give_back(size: int, buffer: np.ndarray) -> None:
    buffer.fill(0xFF)
    GRAVEYARD.append(buffer)
    with card.lock:
        card.used -= size


class MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def memset_async(self, value: int, size: int, stream: Any) -> None:
        ctypes.memset(self.ptr, value, size)


class _Pooled:
    """A chunk of a pool as long as anyone points to it."""

    def __init__(self, chunk: MemoryPointer) -> None:
        self.size, self.ptr = chunk.mem.size, chunk.ptr


class MemoryPool:
    """Chunks as they were allocated, handed out again by best fit."""

    def __init__(self, allocator: Callable[[int], MemoryPointer] = lambda size: MemoryPointer(Memory(size), 0)) -> None:
        self._allocator, self._free, self._total, self._used = allocator, list[MemoryPointer](), 0, 0

    def malloc(self, size: int) -> MemoryPointer:
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        with card.lock:
            fitting = sorted((c.mem.size, i) for i, c in enumerate(self._free) if c.mem.size >= size)
            chunk = self._free.pop(fitting[0][1]) if fitting else self._grow(size)
            self._used += chunk.mem.size
        pooled = _Pooled(chunk)
        weakref.finalize(pooled, _back_to_pool, weakref.ref(self), chunk).atexit = False
        return MemoryPointer(pooled, 0)

    def _grow(self, size: int) -> MemoryPointer:
        for _ in range(2):
            try:
                chunk = self._allocator(size)
                self._total += size
                return chunk
            except CUDARuntimeError as error:
                if error.status != 2:
                    raise
                self.free_all_blocks()
        raise OutOfMemoryError(size, self._total)

    def free_all_blocks(self) -> None:
        with card.lock:
            self._total -= sum(c.mem.size for c in self._free)
            self._free.clear()

    def total_bytes(self) -> int:
        return self._total

    def used_bytes(self) -> int:
        return self._used


def _back_to_pool(pool: Any, chunk: MemoryPointer) -> None:
    with card.lock:
        if (alive := pool()) is not None:
            alive._used -= chunk.mem.size
            alive._free.append(chunk)
        else:
            LOST.append(chunk)  # as CuPy's, where a chunk was split, and its parts know each other


class _Owner:
    """What an array's memory hangs on, however many views there are."""

    def __init__(self, pointer: MemoryPointer, shape: Any, dtype: np.dtype[Any]) -> None:
        self.pointer = pointer
        self.__array_interface__ = {
            "data": (pointer.ptr, False), "shape": shape, "typestr": dtype.str, "version": 3,
        }  # fmt: skip


class DeviceArray(np.ndarray):
    """A NumPy array that says where it lies as CuPy's do."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(
            ptr=self.ctypes.data, device_id=0, memset_async=lambda v, n, s: ctypes.memset(self.ctypes.data, v, n)
        )

    @property
    def device(self) -> Any:  # type: ignore[override]
        return Device(0)

    def copy(self, order: Any = "C") -> DeviceArray:
        y = empty(self.shape, self.dtype)
        y[...] = self
        return y

    def astype(self, dtype: Any, *args: Any, copy: bool = True, **options: Any) -> Any:
        if not copy and self.dtype == dtype:
            return self
        y = empty(self.shape, dtype)
        y[...] = np.asarray(self).astype(dtype)
        return y

    def get(self) -> np.ndarray:
        if get_current_stream().is_capturing():
            raise CUDARuntimeError(900)  # cudaErrorStreamCaptureUnsupported
        return np.array(self)

    def set(self, x: np.ndarray, stream: Any = None) -> None:
        assert type(x) is np.ndarray and x.dtype == self.dtype and x.shape == self.shape and self.flags.c_contiguous
        self[...] = x


def empty(shape: Any, dtype: Any = np.float64) -> DeviceArray:
    shape, dtype = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape), np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    pointer = _state().allocators[-1](nbytes)
    ctypes.memset(pointer.ptr, 0xFF, nbytes)  # NaN: what no kernel writes is found
    return np.asarray(_Owner(pointer, shape, dtype)).view(DeviceArray)


def zeros(shape: Any, dtype: Any = np.float64) -> DeviceArray:
    x = empty(shape, dtype)
    x.fill(0)
    return x


def asarray(x: Any, dtype: Any = None) -> DeviceArray:
    if isinstance(x, DeviceArray) and dtype in (None, x.dtype):
        return x
    x = np.asarray(x, dtype)
    y = empty(x.shape, x.dtype)
    y[...] = x
    return y


# ---------------------------------------------------------------- what a thread has current


def _state() -> Any:
    state = card.thread
    if not hasattr(state, "streams"):
        state.streams, state.allocators = [null], [default_pool.malloc]
    return state


class Stream:
    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr = id(self)
        self._noted: list[Callable[[], None]] | None = None

    def __enter__(self) -> Stream:
        _state().streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _state().streams.pop()

    def synchronize(self) -> None:
        if self._noted is not None:
            raise CUDARuntimeError(900)
        card.waits += 1

    def begin_capture(self, mode: int | None = None) -> None:
        assert mode in (None, runtime.streamCaptureModeRelaxed), "a pool may have to grow in a capture"
        self._noted = []

    def end_capture(self) -> Graph:
        noted, self._noted = self._noted, None
        if noted is None:
            raise CUDARuntimeError(901)
        return Graph(noted)

    def is_capturing(self) -> bool:
        return self._noted is not None

    def wait_event(self, event: Event) -> None:
        pass

    def queue(self, work: Callable[[], None]) -> None:
        if self._noted is not None:
            self._noted.append(work)
        else:
            with card.lock:
                work()


null = Stream()


def get_current_stream() -> Stream:
    found: Stream = _state().streams[-1]
    return found


class Event:
    def __init__(self, **_: Any) -> None:
        self.recorded = 0

    def record(self, stream: Any = None) -> None:
        self.recorded += 1


def get_elapsed_time(start: Event, stop: Event) -> float:
    assert start.recorded and stop.recorded
    return 0.5


class Graph:
    def __init__(self, noted: list[Callable[[], None]]) -> None:
        self.noted = noted

    def launch(self, stream: Any = None) -> None:
        with card.lock:
            for work in self.noted:
                work()


class Device:
    compute_capability = "90"

    def __init__(self, index: int = 0) -> None:
        self.id = index

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        card.waits += 1


@contextlib.contextmanager
def using_allocator(malloc: Any) -> Iterator[None]:
    _state().allocators.append(malloc)
    try:
        yield
    finally:
        _state().allocators.pop()


def get_allocator() -> Any:
    return _state().allocators[-1]


def unowned(x: np.ndarray) -> np.ndarray:
    """The same numbers by their address alone."""
    assert x.flags.c_contiguous
    raw = (ctypes.c_uint8 * x.nbytes).from_address(x.ctypes.data)
    return np.frombuffer(raw, np.uint8).view(x.dtype).reshape(x.shape)


default_pool = MemoryPool()
runtime = types.SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    streamCaptureModeRelaxed=2,
    getDeviceCount=lambda: 1,
    getDeviceProperties=lambda index: {"name": b"Host memory", "major": 9, "minor": 0, "totalGlobalMem": card.total},
    driverGetVersion=lambda: 13000,
    memGetInfo=lambda: (card.total - card.used, card.total),
)


def module() -> types.ModuleType:
    """``cupy``."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.asarray, cupy.empty, cupy.zeros = DeviceArray, asarray, empty, zeros  # type: ignore[attr-defined]
    cupy.ascontiguousarray = lambda x, dtype=None: np.ascontiguousarray(x, dtype).view(DeviceArray)  # type: ignore[attr-defined]
    for name in ("sqrt", "sum", "maximum", "moveaxis", "array_equal"):
        setattr(cupy, name, getattr(np, name))
    cupy.__version__ = "14"
    cupy.get_default_memory_pool = lambda: default_pool  # type: ignore[attr-defined]
    cupy.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        Device=Device, Stream=Stream, Event=Event, Memory=Memory, MemoryPointer=MemoryPointer, MemoryPool=MemoryPool,
        get_current_stream=get_current_stream, get_elapsed_time=get_elapsed_time,
        using_allocator=using_allocator, get_allocator=get_allocator, runtime=runtime,
        device=types.SimpleNamespace(get_device_id=lambda: 0),
        memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
    )  # fmt: skip
    return cupy
