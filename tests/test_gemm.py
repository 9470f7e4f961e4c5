"""What `gemm` asks of cuBLASLt, on a stand-in for the library that computes what it is asked for with NumPy."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from swincupy import precision as precisions
from swincupy import tune
from swincupy.errors import DeviceError, InputError
from swincupy.ops import cublaslt, gemm, reference

TYPES = {0: np.float32, 2: np.float16}
A, B = b"\1" * 64, b"\2" * 64  # two algorithms


class Array(np.ndarray):
    """A NumPy array with the pointer of a CuPy array."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)


def array(x: np.ndarray) -> Array:
    return x.view(Array)


class Library:
    """The part of ``nvmath.bindings.cublasLt`` in use. Column-major, as the library is."""

    class cuBLASLtError(Exception):
        pass

    MatmulDescAttribute = types.SimpleNamespace(TRANSA=3, EPILOGUE=7, BIAS_POINTER=8)
    MatmulPreferenceAttribute = types.SimpleNamespace(
        MAX_WORKSPACE_BYTES=1, REDUCTION_SCHEME_MASK=3, MIN_ALIGNMENT_A_BYTES=5, MIN_ALIGNMENT_B_BYTES=6,
        MIN_ALIGNMENT_C_BYTES=7, MIN_ALIGNMENT_D_BYTES=8,
    )  # fmt: skip
    Epilogue = types.SimpleNamespace(BIAS=4)

    def __init__(self) -> None:
        self.objects: dict[int, dict[Any, Any]] = {}
        self.ids = itertools.count(1)
        self.algorithms = [A, B]
        self.multiple = 1  # of N and K, in elements, that the algorithms need
        self.calls: list[dict[str, Any]] = []
        self.asked: list[dict[Any, Any]] = []

    def _new(self, **values: Any) -> int:
        self.objects[i := next(self.ids)] = dict(values)
        return i

    def create(self) -> int:
        return 7

    def get_version(self) -> int:
        return 130100

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        return self._new(compute=compute, scale=scale)

    def matmul_preference_create(self) -> int:
        return self._new()

    def matrix_layout_create(self, dtype: int, rows: int, columns: int, ld: int) -> int:
        return self._new(dtype=dtype, rows=rows, columns=columns, ld=ld)

    def _set(self, of: int, name: int, pointer: int, size: int) -> None:
        self.objects[of][name] = int.from_bytes(ctypes.string_at(pointer, size), "little")

    matmul_desc_set_attribute = matmul_preference_set_attribute = _set

    def _destroy(self, of: int) -> None:
        del self.objects[of]

    matmul_desc_destroy = matrix_layout_destroy = matmul_preference_destroy = _destroy

    def _supported(self, w: int) -> bool:
        layout = self.objects[w]
        return not (layout["rows"] % self.multiple or layout["columns"] % self.multiple)

    def matmul_algo_get_heuristic(
        self, handle: int, desc: int, w: int, a: int, c: int, d: int, preference: int, count: int, to: int, number: int
    ) -> None:
        assert handle == 7
        self.asked.append(dict(self.objects[preference]))
        if not self._supported(w):
            raise self.cuBLASLtError("NOT_SUPPORTED")
        found = self.algorithms[:count]
        for i, algorithm in enumerate(found):
            ctypes.memmove(to + 96 * i, algorithm, 64)
        ctypes.memmove(number, len(found).to_bytes(4, "little"), 4)

    def matmul_algo_check(
        self, handle: int, desc: int, w: int, a: int, c: int, d: int, algorithm: int, result: int
    ) -> None:
        if ctypes.string_at(algorithm, 64) not in self.algorithms or not self._supported(w):
            raise self.cuBLASLtError("INVALID_VALUE")
        ctypes.memmove(result + 64, (4096).to_bytes(8, "little"), 8)

    def _matrix(self, pointer: int, of: int) -> np.ndarray:
        layout = self.objects[of]
        dtype = np.dtype(TYPES[layout["dtype"]])
        held = (ctypes.c_byte * (layout["ld"] * layout["columns"] * dtype.itemsize)).from_address(pointer)
        return np.frombuffer(held, dtype).reshape(layout["columns"], layout["ld"])[:, : layout["rows"]].T

    def matmul(
        self, handle: int, desc: int, alpha: int, w: int, wl: int, a: int, al: int, beta: int, c: int, cl: int,
        d: int, dl: int, algorithm: int, workspace: int, size: int, stream: int,
    ) -> None:  # fmt: skip
        asked = self.objects[desc]
        assert asked[3] == 1 and (handle, stream) == (7, 99)
        one, scale = (ctypes.c_float.from_address(p).value for p in (alpha, beta))
        y = one * (self._matrix(w, wl).astype(np.float64).T @ self._matrix(a, al).astype(np.float64))
        if scale:  # the library does not read c otherwise
            y = y + scale * self._matrix(c, cl)
        if asked.get(7) == 4:
            like = self.objects[dl] | {"columns": 1}
            self.objects[0] = like
            y = y + self._matrix(asked[8], 0)
        self._matrix(d, dl)[...] = y
        self.calls.append(dict(algorithm=ctypes.string_at(algorithm, 64), workspace=size, residual_is_out=c == d))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    library = Library()
    stream = types.SimpleNamespace(ptr=99, is_capturing=lambda: True)
    device = types.ModuleType("cupy.cuda.device")
    device.get_device_id = lambda: 0  # type: ignore[attr-defined]
    cuda = types.SimpleNamespace(
        device=device,
        get_current_stream=lambda: stream,
        alloc=lambda size: types.SimpleNamespace(ptr=1234, size=size),
    )
    cupy = types.ModuleType("cupy")
    cupy.cuda, cupy.empty = cuda, lambda *a: array(np.full(*a[:1], np.nan).astype(a[1]))  # type: ignore[attr-defined]
    cupy.zeros = lambda *a: array(np.zeros(*a))  # type: ignore[attr-defined]
    cupy.ndarray = type("ndarray", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.ModuleType("cupy.cuda"))
    monkeypatch.setitem(sys.modules, "cupy.cuda.device", device)
    cublaslt._handle.cache_clear()
    for module in (cublaslt, gemm):
        monkeypatch.setattr(module, "bindings", lambda: library)
    monkeypatch.setattr(tune, "lookup", lambda problem: None)
    monkeypatch.setattr(tune, "environment", lambda device: "two alike" if device < 2 else "another")
    monkeypatch.setattr(gemm.kernels, "gelu", fake_gelu)
    gemm.forget()
    yield library
    gemm.forget()
    cublaslt._handle.cache_clear()


def fake_gelu(x: Any, bias: Any = None, *, precision: Any, out: Any) -> Any:
    out[...] = reference.gelu(np.asarray(x, np.float64))
    return out


def draw(name: str, M: int, N: int, K: int, parts: tuple[str, ...]) -> dict[str, Array]:
    rng = np.random.default_rng()
    shapes = {"a": (M, K), "w": (N, K), "bias": (N,), "residual": (M, N)}
    storage = precisions.of(name).storage
    return {k: array(rng.standard_normal(shapes[k]).astype(storage)) for k in ("a", "w", *parts)}


def expected(x: dict[str, Array], gelu: bool = False) -> np.ndarray:
    x = {k: np.array(v, np.float64) for k, v in x.items()}
    y = reference.linear(x["a"], x["w"], x.get("bias"))
    return reference.gelu(y) if gelu else y + x.get("residual", 0.0)


def close(got: Any, want: np.ndarray, name: str) -> bool:
    return bool(np.linalg.norm(np.asarray(got) - want) <= precisions.of(name).tolerance * np.linalg.norm(want))


@pytest.mark.parametrize("size", [(5, 16, 8), (1, 10, 24), (7, 3, 5), (33, 40, 17)], ids=str)
@pytest.mark.parametrize("name", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("parts", [(), ("bias",), ("residual",), ("bias", "residual")], ids="+".join)
def test_gemm(library: Library, parts: tuple[str, ...], name: str, size: tuple[int, int, int]) -> None:
    x = draw(name, *size, parts)
    assert close(gemm.gemm(**x, precision=name), expected(x), name)


@pytest.mark.parametrize("parts", [(), ("bias",)], ids=str)
def test_gelu_is_exact(library: Library, parts: tuple[str, ...]) -> None:
    x = draw("fp32", 6, 8, 16, parts)
    assert close(gemm.gemm(**x, gelu=True, precision="fp32"), expected(x, gelu=True), "fp32")
    assert library.calls[0]["algorithm"] == A


def test_a_bias_is_that_of_the_call(library: Library) -> None:
    """Products of one shape share their descriptor, in which the bias is."""
    one, two = (draw("fp32", 4, 8, 8, ("bias",)) for _ in range(2))
    for x in (one, two, one):
        assert close(gemm.gemm(**x, precision="fp32"), expected(x), "fp32")


def test_in_place(library: Library) -> None:
    x = draw("fp16", 5, 8, 8, ("bias", "residual"))
    want = expected(x)
    out = gemm.gemm(**x, out=x["residual"], precision="fp16")
    assert out is x["residual"] and close(out, want, "fp16")
    assert library.calls[0]["residual_is_out"]


def test_a_repeated_call_is_one_library_call(library: Library) -> None:
    x = draw("fp32", 4, 8, 8, ("bias",))
    for _ in range(3):
        gemm.gemm(**x, precision="fp32")
    assert len(library.calls) == 3 and len(library.asked) == 1


def test_what_algorithms_may_do(library: Library) -> None:
    """No sums in the storage type; a bounded workspace; the alignment that the pointers have."""
    x = draw("fp16", 4, 8, 8, ())
    whole = array(np.zeros(64, np.float16))
    start = -whole.data.ptr % 64 // 2
    x["a"] = whole[start + 4 : start + 4 + 32].reshape(4, 8)  # 8 bytes beyond a multiple of 64
    gemm.gemm(**x, precision="fp16")
    asked = library.asked[0]
    assert asked[1] == 32 << 20 and asked[3] == 2
    assert {asked[i] for i in (5, 6, 7, 8)} <= {2, 4, 8}
    assert library.calls[0]["workspace"] == 4096


@pytest.mark.parametrize("parts", [(), ("bias", "residual")], ids=str)
def test_sizes_that_no_algorithm_takes_are_padded(library: Library, parts: tuple[str, ...]) -> None:
    library.multiple = 8
    x = draw("fp16", 5, 10, 21, parts)
    assert close(gemm.gemm(**x, precision="fp16"), expected(x), "fp16")


def test_no_algorithm_at_all(library: Library) -> None:
    library.algorithms = []
    with pytest.raises(DeviceError, match="no algorithm"):
        gemm.gemm(**draw("fp16", 5, 8, 8, ()), precision="fp16")


def test_an_empty_batch(library: Library) -> None:
    assert gemm.gemm(**draw("fp16", 0, 8, 8, ("bias",)), precision="fp16").shape == (0, 8)
    assert not library.calls


def test_the_cache_decides(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "lookup", lambda problem: B)
    gemm.gemm(**draw("fp32", 4, 8, 8, ()), precision="fp32")
    assert library.calls[0]["algorithm"] == B and not library.asked


def test_devices_that_are_alike_run_what_one_of_them_found(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, searches = sys.modules["cupy"].cuda, list[int]()
    monkeypatch.setattr(cuda, "get_current_stream", lambda: types.SimpleNamespace(ptr=99, is_capturing=lambda: False))

    def search(problem: Any, found: list[Any], arrays: Any) -> list[gemm.Timed]:
        searches.append(cuda.device.get_device_id())
        return [gemm.Timed(1.0, found[len(searches) % 2])]

    monkeypatch.setattr(gemm, "search", search)
    for device in range(3):
        monkeypatch.setattr(cuda.device, "get_device_id", functools.partial(int, device))
        gemm.gemm(**draw("fp32", 4, 8, 8, ()), precision="fp32")
    assert searches == [0, 2]
    first, alike, other = (call["algorithm"] for call in library.calls)
    assert first == alike != other
    gemm.forget()
    gemm.gemm(**draw("fp32", 4, 8, 8, ()), precision="fp32")
    assert searches == [0, 2, 2]


@pytest.mark.parametrize("stored", [b"\3" * 64, b"short"], ids=["unknown", "short"])
def test_a_useless_entry_of_the_cache_is_ignored(
    library: Library, monkeypatch: pytest.MonkeyPatch, stored: bytes
) -> None:
    monkeypatch.setattr(tune, "lookup", lambda problem: stored)
    x = draw("fp32", 4, 8, 8, ("bias",))
    with pytest.warns(RuntimeWarning, match="swincupy tune"):
        assert close(gemm.gemm(**x, precision="fp32"), expected(x), "fp32")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(a=np.zeros((4, 9), np.float32)), r"a and w must be"),
        (dict(a=np.zeros((4, 8), np.float16)), r"a must be \[4, 8\] of float32"),
        (dict(a=np.zeros((8, 4), np.float32).T), r"C-contiguous"),
        (dict(bias=np.zeros(7, np.float32)), r"bias must be \[6\]"),
        (dict(residual=np.zeros((4, 5), np.float32)), r"residual must be \[4, 6\]"),
        (dict(residual=np.zeros((4, 6), np.float32), gelu=True), r"residual must be None"),
        (dict(out=np.zeros((5, 6), np.float32)), r"out must be \[4, 6\]"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_refuses(library: Library, change: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = dict(draw("fp32", 4, 6, 8, ())) | {
        k: v.view(Array) if k != "gelu" else v for k, v in change.items()
    }
    with pytest.raises(InputError, match=match):
        gemm.gemm(**given, precision="fp32")


def test_descriptors_are_given_back(library: Library) -> None:
    gemm.gemm(**draw("fp32", 4, 8, 8, ("bias",)), precision="fp32")
    gemm.forget()
    library.objects.pop(0, None)
    assert not library.objects


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    cublaslt.bindings.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.callback(cublaslt.bindings.cache_clear)
        with pytest.raises(DeviceError, match=r"pip install"):
            cublaslt.bindings()


def test_tiles_are_only_for_whole_packs(library: Library) -> None:
    problem = gemm.Problem(64, 96, 96, "fp16", True, True, False)
    assert gemm.choices(problem, 1, gemm.TILES) == [A, *gemm.TILES]
    for change in (dict(N=100), dict(K=100), dict(alignment=8)):
        assert gemm.choices(problem._replace(**change), 1, gemm.TILES) == [A]
