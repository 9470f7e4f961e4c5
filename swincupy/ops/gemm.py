"""Matrix products with epilogues on the GPU: which backend computes a product, with which algorithm.

Five backends: cuBLASLt, and the kernels ``cuda/gemm.cu``, for a few rows ``cuda/gemv.cu``, on SM 9.0
``cuda/wgmma_gemm.cu``, and with CUTLASS ``cuda/cutlass_gemm.cu``, whose epilogues have the exact GELU.
(cuBLASLt's is the tanh approximation: for inputs around -1 with a deviation of 1 or less its error,
simulated, is 2 to 4 times that of float16 arithmetic, so it is not used.) Norms before and moments after a
product are ``wgmma_gemm``'s alone. What a product runs on is decided at its first use: `swincupy.tune`'s
cache if it has it, else the fastest of a short search, or inside of a stream capture, where nothing can be
timed, the first guess. CUTLASS takes seconds to compile, so that only `swincupy.tune` tries it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from swincupy import jit, tune
from swincupy import precision as precisions
from swincupy.errors import DeviceError, InputError
from swincupy.ops import cutlass, gemv, kernels, wgmma
from swincupy.ops.cublaslt import Product, bindings
from swincupy.precision import Precision

Array = Any
Run = Callable[..., None]  # of a, w, bias, residual, out; and overlap=


class Tile(NamedTuple):
    """How ``cuda/gemm.cu`` cuts the result: tiles of blocks and of warps, and slabs of K in shared memory."""

    bm: int
    bn: int
    wm: int
    wn: int
    stages: int

    @property
    def kernel(self) -> str:
        """The kernel that has such tiles."""
        return "gemm"


#: First the two that a short search tries. 96 divides the widths of the models whose C is 96 or 192.
TILES = (
    Tile(128, 128, 64, 32, 3), Tile(64, 64, 32, 32, 3), Tile(128, 96, 64, 32, 3), Tile(64, 96, 32, 32, 3),
    Tile(128, 64, 64, 32, 3), Tile(64, 128, 32, 64, 3), Tile(128, 128, 64, 64, 3), Tile(256, 128, 64, 64, 3),
)  # fmt: skip


class Problem(NamedTuple):
    """A product: everything that its backend and algorithm may depend on."""

    M: int
    N: int
    K: int
    precision: str
    bias: bool
    gelu: bool
    residual: bool
    alignment: int = 256  # bytes of which all pointers are multiples, a power of two, at most 256
    norm: bool = False
    moments: bool = False
    gather: int = 0

    @property
    def epilogue(self) -> str:
        """``"none"``, or what goes with the product: ``"bias+residual"``, ``"gather28+norm+bias"``, ..."""
        before = [f"gather{self.gather}"] if self.gather else []
        parts = [k for k in ("norm", "bias", "gelu", "residual", "moments") if getattr(self, k)]
        return "+".join(before + parts) or "none"


Tiles = Tile | gemv.Tile | wgmma.Tile | cutlass.Tile
Choice = bytes | Tiles  # a cuBLASLt algorithm, or a tile of a kernel


def gemm(
    a: Array,
    w: Array,
    bias: Array | None = None,
    *,
    gelu: bool = False,
    residual: Array | None = None,
    out: Array | None = None,
    norm: wgmma.Norm | None = None,
    moments: Array | None = None,
    gather: int = 0,
    precision: str | Precision,
    overlap: bool = False,
) -> Array:
    """``act(a @ w.T + bias) + residual``, act the exact (erf) GELU or nothing; sums in float32.

    With ``norm`` ``act(LN(a) @ w.T + bias)``, the LayerNorm without an affine part.

    Enqueued on CuPy's current stream and allowed inside of a capture. The first use of a shape
    outside of a capture times a few algorithms.

    Parameters
    ----------
    a : [M, K]
    w : [N, K]
    bias : [N], optional
    gelu : bool
    residual : [M, N], optional
        Not together with ``gelu``.
    out : [M, N], optional
        Where the result is written; may be ``residual``.
    norm : wgmma.Norm, optional
        The moments of a's rows, and the sums of w's. Where `takes_norm` only, and without ``residual``.
    moments : [M, N / wgmma.neighbours(M, N), 2] float32, optional
        Where those of the result are written. Where `gives_moments` only.
    gather : int
        Not 0: a is a map of ``2 gather`` columns and K / 4 channels, in that shape; the product is of its 2 x 2
        neighbours: all channels of the upper two, then of the lower two. Where `takes_gather` only.
    overlap : bool
        No kernel that is under way writes w: it may be read before they are done.
    precision : str or Precision
        All arrays are C-contiguous, on the current device, and of its storage type.

    Returns
    -------
    [M, N]

    Raises
    ------
    InputError
        Shapes, types or layouts that do not fit.
    DeviceError
        cuBLASLt is not installed, or has no algorithm for this.
    """
    import cupy

    p = precisions.of(precision)
    M, N, K = _check(a, w, bias, gelu, residual, out, p)
    if out is None:
        out = cupy.empty((M, N), p.storage)
    if not M:
        return out
    bits = 256
    for x in (a, w, bias, residual, out):
        bits |= 0 if x is None else x.data.ptr
    problem = Problem(
        M, N, K, p.name, bias is not None, gelu, residual is not None, bits & -bits, norm is not None,
        moments is not None, gather,
    )  # fmt: skip
    arrays = (a, w, bias, residual, out, norm, moments)
    plan(problem, arrays)(*arrays, overlap=overlap)
    return out


def gives_moments(M: int, N: int, K: int, precision: Precision) -> bool:
    """Whether a product comes with the moments of its rows, on CuPy's current device, and is better for it."""
    return wgmma.better_with_moments(M, N, K) and wgmma.takes(N, K, precision)


def takes_norm(N: int, K: int, precision: Precision) -> bool:
    """Whether products of these sizes take a norm of their rows on CuPy's current device."""
    return wgmma.takes(N, K, precision) and wgmma.takes_norm(K)


def takes_gather(N: int, K: int, gather: int, precision: Precision) -> bool:
    """Whether rows of products of these sizes may be 2 x 2 neighbours, and a norm of them be taken."""
    return takes_norm(N, K, precision) and wgmma.takes_gather(gather, K, precision)


_FEW_ROWS = 256  # of which most of the time goes to weights that no cache holds


def _check(
    a: Array, w: Array, bias: Array | None, gelu: bool, residual: Array | None, out: Array | None, p: Precision
) -> tuple[int, int, int]:
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1] or not w.size:
        raise InputError(f"gemm: a and w must be [M, K] and [N, K], got shapes {tuple(a.shape)} and {tuple(w.shape)}")
    if gelu and residual is not None:
        raise InputError("gemm: residual must be None where gelu is True; add it to the result")
    M, N = a.shape[0], w.shape[0]
    for name, x, shape in (
        ("a", a, a.shape), ("w", w, w.shape), ("bias", bias, (N,)), ("residual", residual, (M, N)), ("out", out, (M, N))
    ):  # fmt: skip
        if x is None:
            continue
        if x.shape != shape or x.dtype != p.storage or not x.flags.c_contiguous:
            raise InputError(
                f"gemm: {name} must be {list(shape)} of {p.storage}, C-contiguous, got {list(x.shape)} of {x.dtype} "
                f"with strides {x.strides}"
            )
    return M, N, a.shape[1]


# ---------------------------------------------------------------- what runs a product

_plans: dict[tuple[int, Problem], Run] = {}
_found: dict[tuple[str, Problem], Choice] = {}  # by searches: GPUs that are alike compute the same, to the last bit
_lock = threading.RLock()


def plan(problem: Problem, arrays: tuple[Array, ...]) -> Run:
    """What runs a product on CuPy's current device: made at the first call, the same one ever after.

    Parameters
    ----------
    problem : Problem
    arrays : (a, w, bias or None, residual or None, out, norm or None, moments or None)
        What a search may run it with; out and moments are overwritten.
    """
    import cupy

    key = (cupy.cuda.device.get_device_id(), problem)
    found = _plans.get(key)
    if found is None:
        with _lock:
            found = _plans.get(key)
            if found is None:
                found = _plans[key] = _decide(problem, arrays)
    return found


def forget() -> None:
    """Decide anew at the next use of each product (captured graphs keep what they have)."""
    with _lock:
        _plans.clear()
        _found.clear()


def _decide(problem: Problem, arrays: tuple[Array, ...]) -> Run:
    import cupy

    cached = tune.lookup(problem)
    if cached is not None:
        try:
            return runner(problem, cached)
        except DeviceError as error:
            tune.warn(f"the entry for {problem} cannot be used: {error}")
    here = tune.environment(cupy.cuda.device.get_device_id()), problem
    if here in _found:
        return runner(problem, _found[here])
    capturing = cupy.cuda.get_current_stream().is_capturing()
    if capturing:
        found = choices(problem, 1, likely(problem)[:1] if _is_ours(problem) else ())
    else:
        found = choices(problem, 6, likely(problem))
    if not found:
        return _Padded(problem)
    if len(found) > 1:
        timed = search(problem, found, arrays)
        found = [t.choice for t in timed] or found
    if len(found) > 1:  # the best are close to each other
        timed = search(problem, found[:4], arrays, budget=4e-3)
        found = [t.choice for t in timed] or found
    if not capturing:
        _found[here] = found[0]
    return runner(problem, found[0])


def _is_ours(problem: Problem) -> bool:
    """Whether ``cuda/wgmma_gemm.cu`` alone has such products."""
    return problem.norm or problem.moments or problem.gather > 0


def likely(problem: Problem) -> tuple[Tiles, ...]:
    """The tiles of our kernels that a short search tries."""
    import cupy

    p = problem
    if gemv.takes(p.M, p.K, gelu=p.gelu, residual=p.residual) and not _is_ours(p):
        return gemv.TILES
    if wgmma.takes(p.N, p.K, precisions.of(p.precision)):
        return wgmma.likely(p.M, p.N, p.K, jit.multiprocessors(cupy.cuda.device.get_device_id()))
    return TILES[:2] if p.gelu else ()


def choices(problem: Problem, algorithms: int, tiles: tuple[Tiles, ...]) -> list[Choice]:
    """What may run a product: up to so many of cuBLASLt's algorithms, best guess first, and of these tiles what can."""
    p, precision = problem, precisions.of(problem.precision)
    if _is_ours(p):
        fit = [t for t in tiles if isinstance(t, wgmma.Tile) and wgmma.takes(p.N, p.K, precision, t)]
        fit = [t for t in fit if not p.moments or wgmma.gives_moments(p.M, p.N, t)]
        fit = [t for t in fit if not p.gather or wgmma.takes_gather(p.gather, p.K, precision)]
        return [t for t in fit if not p.norm or wgmma.takes_norm(p.K, t)]
    found: list[Choice] = [*_product(problem).algorithms(algorithms)]
    unit = 16 // precision.storage.itemsize
    if p.alignment % 16 or p.K % unit or p.N % 8:
        return found

    def fits(tile: Tiles) -> bool:
        if isinstance(tile, gemv.Tile):
            return gemv.takes(p.M, p.K, gelu=p.gelu, residual=p.residual)
        if isinstance(tile, wgmma.Tile):
            return wgmma.takes(p.N, p.K, precision, tile)
        return isinstance(tile, Tile) or cutlass.takes(p.N, precision)

    return found + [tile for tile in tiles if fits(tile)]


def runner(problem: Problem, choice: Choice) -> Run:
    """What runs a product this way.

    Raises
    ------
    DeviceError
        The library does not have the algorithm, or the kernel does not compile.
    """
    p, precision = problem, precisions.of(problem.precision)
    if isinstance(choice, wgmma.Tile):
        return wgmma.Product(
            p.M, p.N, p.K, precision, gelu=p.gelu, norm=p.norm, moments=p.moments, gather=p.gather, tile=choice
        )  # fmt: skip
    if isinstance(choice, gemv.Tile):
        return gemv.Product(p.M, p.N, p.K, precision, tile=choice)
    alone = _alone(problem, choice)

    def run(*arrays: Any, overlap: bool = False) -> None:
        alone(*arrays[:5])

    return run


def _alone(problem: Problem, choice: Choice) -> Run:
    """What runs a product by the backends that always start after the kernels ahead."""
    p, precision = problem, precisions.of(problem.precision)
    if isinstance(choice, Tile):
        return _Kernel(p, choice)
    if isinstance(choice, cutlass.Tile):
        return cutlass.Product(p.M, p.N, p.K, precision, gelu=p.gelu, tile=choice)
    assert isinstance(choice, bytes)
    product = _product(p)
    product.use(choice)
    if not p.gelu:
        return product

    def product_then_gelu(a: Array, w: Array, bias: Array | None, residual: Array | None, out: Array) -> None:
        product(a, w, bias, residual, out)
        kernels.gelu(out, precision=precision, out=out)

    return product_then_gelu


def _product(problem: Problem) -> Product:
    p = problem
    return Product(p.M, p.N, p.K, precisions.of(p.precision), bias=p.bias, residual=p.residual, alignment=p.alignment)


class _Kernel:
    """``cuda/gemm.cu`` with one tile."""

    def __init__(self, problem: Problem, tile: Tile) -> None:
        self._kernel = jit.kernel("gemm", **constants(tile, precisions.of(problem.precision), gelu=problem.gelu))
        self._blocks = blocks(tile, problem.M, problem.N)
        self._threads = tile.bm // tile.wm * (tile.bn // tile.wn) * 32
        self._shared = tile.stages * (tile.bm + tile.bn) * 128
        self._sizes = problem.M, problem.N, problem.K

    def __call__(self, a: Array, w: Array, bias: Array | None, residual: Array | None, out: Array) -> None:
        self._kernel(self._blocks, self._threads, a, w, bias, residual, out, *self._sizes, shared=self._shared)


def constants(tile: Tile, precision: Precision, *, gelu: bool) -> dict[str, jit.Constant]:
    """The kernel's compile-time constants."""
    return {
        "scalar_t": precision.ctype, "EXACT": precision.name == "fp32", "GELU": gelu,
        "BM": tile.bm, "BN": tile.bn, "WM": tile.wm, "WN": tile.wn, "STAGES": tile.stages,
    }  # fmt: skip


def blocks(tile: Tile, M: int, N: int) -> int:
    """Blocks of the kernel's grid."""
    return -(-M // tile.bm) * -(-N // tile.bn)


class _Padded:
    """A product whose sizes no algorithm takes, with N and K padded by zeros to multiples of 16 bytes."""

    def __init__(self, problem: Problem) -> None:
        self._precision = precisions.of(problem.precision)
        unit = 16 // self._precision.storage.itemsize
        N, K = (-(-size // unit) * unit for size in (problem.N, problem.K))
        self._padded = problem._replace(N=N, K=K, alignment=256)
        found = choices(self._padded, 1, ())
        if not found or self._padded == problem:
            raise DeviceError(f'gemm: cuBLASLt has no algorithm for {problem}; use precision="fp32"')
        self._run = runner(self._padded, found[0])

    def __call__(
        self,
        a: Array,
        w: Array,
        bias: Array | None,
        residual: Array | None,
        out: Array,
        *_: None,
        overlap: bool = False,
    ) -> None:
        import cupy

        p = self._padded
        padded = cupy.empty((p.M, p.N), self._precision.storage)
        self._run(
            self._pad(a, (p.M, p.K)), self._pad(w, (p.N, p.K)), self._pad(bias, (p.N,)),
            self._pad(residual, (p.M, p.N)), padded,
        )  # fmt: skip
        out[...] = padded[:, : out.shape[1]]

    def _pad(self, x: Array | None, shape: tuple[int, ...]) -> Array | None:
        import cupy

        if x is None:
            return None
        padded = cupy.zeros(shape, self._precision.storage)
        padded[tuple(slice(size) for size in x.shape)] = x
        return padded


# ---------------------------------------------------------------- search


class Timed(NamedTuple):
    """A choice and the microseconds that it takes."""

    microseconds: float
    choice: Choice


def search(problem: Problem, found: list[Choice], arrays: tuple[Array, ...], budget: float = 1e-3) -> list[Timed]:
    """Time choices on CuPy's current device, fastest first; without those that fail or compute something else.

    They run as they do in a forward pass: kernels start early, and of few rows the weights are those of many
    layers, which do not stay in the second level cache.

    Parameters
    ----------
    problem : Problem
    found : list of choices
        The first is what the others' results are compared with.
    arrays : (a, w, bias or None, residual or None, out, norm or None, moments or None)
        out is overwritten, and moments; where out is the residual too, an array of its shape is allocated.
    budget : float
        Seconds that each may take.
    """
    import cupy

    a, w, bias, residual, out, *rest = arrays
    current = cupy.cuda.get_current_stream()
    current.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True) if current.ptr in (0, 1, 2) else current  # one that can be captured
    timed, expected = list[Timed](), None
    scratch = cupy.cuda.MemoryPool()  # a graph is faster in a pool that holds what it needs and no more
    with stream, cupy.cuda.using_allocator(scratch.malloc):
        if residual is not None and residual.data.ptr == out.data.ptr:
            out = cupy.empty_like(out)
        weights, runs = _many(w) if problem.M <= _FEW_ROWS else [w], []
        for choice in found:
            try:
                run = runner(problem, choice)
                runs = [functools.partial(run, a, x, bias, residual, out, *rest, overlap=True) for x in weights]
                out.data.memset_async(0xFF, out.nbytes, stream)  # NaN, in every type
                runs[0]()
                got = _some_rows(out)
                expected = got if expected is None else expected
                if _agree(got, expected, precisions.of(problem.precision)):
                    timed.append(Timed(_microseconds(runs, stream, budget), choice))
            except (RuntimeError, MemoryError, bindings().cuBLASLtError):  # this choice does not run here
                continue
    stream.synchronize()
    del weights, runs, out
    scratch.free_all_blocks()
    return sorted(timed, key=lambda t: t.microseconds)


def _many(w: Array) -> list[Array]:
    """The array and copies of it, more than fit the second level cache, up to 96 of them."""
    import cupy

    device = cupy.cuda.device.get_device_id()
    cache = cupy.cuda.runtime.getDeviceProperties(device)["l2CacheSize"]
    try:
        return [w] + [w.copy() for _ in range(min(95, 3 * cache // (2 * w.nbytes)))]
    except cupy.cuda.memory.OutOfMemoryError:
        return [w]


def _microseconds(runs: Sequence[Callable[[], None]], stream: Any, budget: float) -> float:
    """Time of a run among several in a CUDA graph, as the engine runs it: the least of three replays."""
    from cupy.cuda import Event, get_elapsed_time, runtime

    start, stop = Event(), Event()

    def milliseconds(run: Callable[[], None]) -> float:
        start.record(stream)
        run()
        stop.record(stream)
        stop.synchronize()
        return float(get_elapsed_time(start, stop))

    count = max(min(max(int(1e3 * budget / 4 / milliseconds(runs[0])), 4), 24), len(runs))
    stream.begin_capture(runtime.streamCaptureModeThreadLocal)
    try:
        for i in range(count):
            runs[i % len(runs)]()
    finally:
        graph = stream.end_capture()
    graph.launch(stream)
    return min(milliseconds(lambda: graph.launch(stream)) for _ in range(3)) / count * 1e3


def _some_rows(out: Array) -> np.ndarray:
    """The first and the last rows, on the host."""
    return np.concatenate([out[:32].get(), out[-32:].get()])


def _agree(got: np.ndarray, expected: np.ndarray, precision: Precision) -> bool:
    """Whether two results differ by rounding; True where there is no telling, the arrays at hand not being finite."""
    x, y = (precisions.decode(z, precision).astype(np.float64) for z in (got, expected))
    if not np.isfinite(y).all():
        return True
    return bool(np.linalg.norm(x - y) <= 4 * precision.tolerance * np.linalg.norm(y))


# ---------------------------------------------------------------- for checks that they compile


def variants() -> Iterator[jit.Variant]:
    """The kernels that a search may try, for checks that they compile."""
    for name in ("fp32", "tf32", "fp16", "bf16"):
        precision = precisions.of(name)
        for tile in TILES if name == "fp16" else TILES[:2]:
            yield jit.Variant("gemm", constants(tile, precision, gelu=True), precision.min_sm)
        yield jit.Variant("gemm", constants(TILES[0], precision, gelu=False), precision.min_sm)
