"""The kernels on a machine without a GPU: g++ builds them, one fiber a CUDA thread, NumPy stands in for CuPy.

Within `installed`, `swincupy.ops.fused.Fused` runs on the CPU, checks and launchers included; matrix
products alone are NumPy's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swincupy import jit
from swincupy.resources import resource_dir
from tests.host import device
from tests.host.device import DeviceArray, asarray

__all__ = ["DeviceArray", "asarray", "gemm", "installed", "kernel"]

SHARED = 1 << 18
_COMPILE = ("g++", "-O1", "-std=c++17", "-w", "-fPIC")
_CTYPES = {"int": ctypes.c_int, "unsigned": ctypes.c_uint, "long long": ctypes.c_longlong, "float": ctypes.c_float}


@functools.cache
def _folder() -> Path:
    """Where kernels are built: the kernels, and the stand-ins for their common header."""
    folder = Path(tempfile.mkdtemp(prefix="swincupy-host-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in (*resource_dir("cuda").glob("*.cu*"), *Path(__file__).parent.glob("*.cuh")):
        shutil.copy(file, folder)
    subprocess.run([*_COMPILE, "-x", "c++-header", "more.cuh"], cwd=folder, check=True)  # read once, not by each kernel
    return folder


@functools.cache
def _build(name: str, prelude: str) -> Any:
    folder = _folder()
    text = (folder / f"{name}.cu").read_text()
    text = re.sub(
        r"extern __shared__ __align__\(\d+\) ([\w ]+) (\w+)\[\];",
        r"\1* const \2 = reinterpret_cast<\1*>(host::shared(host::rank()));",
        text,
    )
    parameters = jit.parameters(name, {})
    fields = "".join(f"{p.ctype}{'*' * p.pointer} {p.name};\n" for p in parameters)
    taken = ", ".join(f"{p.ctype if p.ctype in _CTYPES and not p.pointer else 'void*'} {p.name}" for p in parameters)
    given = ", ".join(
        f"({p.ctype}*){p.name}" if p.pointer else p.name if p.ctype in _CTYPES else f"*({p.ctype}*){p.name}"
        for p in parameters
    )
    passed = ", ".join(f"args.{p.name}" for p in parameters)
    found = re.search(r"__cluster_dims__\((\w+), 1, 1\)", text)
    cluster = found[1] if found else "1"
    entry = f"""
static struct {{ {fields} }} args;
extern "C" void run(unsigned grid_x, unsigned grid_y, unsigned grid_z, int threads, {taken}) {{
    gridDim = {{grid_x, grid_y, grid_z}};
    args = {{{given}}};
    host::launch(gridDim, threads, [] {{ {name}({passed}); }}, {cluster});
}}
"""
    stem = f"{name}-{abs(hash(prelude))}"
    (folder / f"{stem}.cpp").write_text(f'#include "more.cuh"\n{prelude}{text}{entry}')
    subprocess.run([*_COMPILE, "-shared", f"{stem}.cpp", "-o", f"{stem}.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / f"{stem}.so")).run


def kernel(name: str, *, arch: Any = None, **constants: jit.Constant) -> Callable[..., None]:
    """Stands in for `jit.kernel`."""
    types_ = {k: "_Float16" if v == "__half" else v for k, v in constants.items()}
    run = _build(name, jit.prelude(types_))
    parameters = jit.parameters(name, constants)

    def launch(grid: Any, block: Any, *args: Any, shared: int = 0, overlap: bool = True) -> None:
        assert len(args) == len(parameters) and shared <= SHARED
        cast = []
        for p, a in zip(parameters, args, strict=True):
            if not p.pointer and p.ctype in _CTYPES:
                cast.append(_CTYPES[p.ctype](a))
            elif not p.pointer:  # a struct, by its address
                cast.append(ctypes.c_void_p(a.ctypes.data))
            elif a is None:
                cast.append(ctypes.c_void_p())
            else:
                assert a.dtype == jit._ELEMENTS[p.ctype] and a.flags.c_contiguous, (name, p, a.dtype)
                cast.append(ctypes.c_void_p(a.ctypes.data))
        blocks, threads = jit._triple(grid), int(np.prod(block))
        device.get_current_stream().queue(lambda: run(*blocks, threads, *cast))
        if jit._recording.launches is not None:
            jit._recording.launches.append(jit.Launch(raw, blocks, (threads,), args, 0))

    def raw(grid: Any, block: Any, args: tuple[Any, ...], *, shared_mem: int) -> None:
        launch(grid, block, *args, shared=shared_mem)

    return launch


def gemm(
    a: Any,
    w: Any,
    bias: Any = None,
    *,
    gelu: bool = False,
    residual: Any = None,
    out: Any = None,
    norm: Any = None,
    moments: Any = None,
    gather: int = 0,
    precision: Any,
    overlap: bool = False,
) -> DeviceArray:
    """Stands in for `ops.gemm.gemm`: float64, rounded once."""
    from swincupy import precision as precisions
    from swincupy.ops import reference

    out = device.empty((a.shape[0], w.shape[0]), precision.storage) if out is None else out
    given = (a, w, bias, residual, out, moments, *(norm[:2] if norm else ()))
    arrays = [None if x is None else device.unowned(x) for x in given]

    def work() -> None:
        x, weight, b, r = (
            None if v is None else precisions.decode(v, precision).astype(np.float64) for v in arrays[:4]
        )
        if gather:  # a map's rows, in pairs, to 2 x 2 neighbours
            x = np.moveaxis(x.reshape(-1, 2, gather, x.shape[1] // 2), 1, 2).reshape(x.shape)
        y = x @ weight.T
        if norm:
            of_a = arrays[6].astype(np.float64)
            if gather:
                of_a = np.moveaxis(of_a.reshape(-1, 2, gather, 2 * of_a.shape[1], 2), 1, 2).reshape(len(x), -1, 2)
            mean, deviations = np.moveaxis(of_a, 2, 0)
            total, each = mean.mean(axis=1, keepdims=True), x.shape[1] / mean.shape[1]  # neighbours of a mean
            variance = (deviations + each * (mean - total) ** 2).sum(axis=1, keepdims=True) / x.shape[1]
            y = (y - total * arrays[7]) / np.sqrt(variance + norm.eps)
        y = y if b is None else y + b
        y = reference.gelu(y) if gelu else y
        y = y if r is None else y + r
        arrays[4][...] = precisions.encode(y, precision)
        if moments is not None:
            parts = y.reshape(len(y), arrays[5].shape[1], -1)
            arrays[5][...] = np.stack([parts.mean(axis=2), parts.var(axis=2) * parts.shape[2]], axis=2)

    device.get_current_stream().queue(work)
    return out


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within it the GPU's modules find the CPU where they look for a GPU."""
    from swincupy.ops import fused

    changed: list[tuple[Any, str, Any]] = [
        (jit, "kernel", kernel),
        (jit, "allow_clusters", lambda kernel, blocks: None),
        (jit, "compute_capability", lambda: 86),  # whose kernels can be run here
        (jit, "multiprocessors", lambda device: 2),
        (jit, "shared_per_multiprocessor", lambda device: 100_000),
        (fused, "gemm", gemm),
    ]
    kept = [(where, name, getattr(where, name)) for where, name, _ in changed]
    found = sys.modules.get("cupy")
    try:
        sys.modules["cupy"] = device.module()
        for where, name, value in changed:
            setattr(where, name, value)
        yield
    finally:
        for where, name, value in kept:
            setattr(where, name, value)
        sys.modules.pop("cupy")
        if found is not None:
            sys.modules["cupy"] = found
