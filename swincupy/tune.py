"""Finds the fastest way to compute each matrix product of a model, and remembers it on disk.

The cache is one JSON file. Its entries belong to an environment, that is GPU, driver, cuBLASLt and the
sources of our kernels: in another one they are stale. Entries that cannot be used are ignored with a
warning. ``tuned.json`` beside this module is such a file, too: what published models compute on the GPUs that it was
measured on, for whoever has not tuned. What neither has `swincupy.ops.gemm` searches for itself, briefly.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from swincupy.config import Pair, SwinConfig, pair, stage_geometry
from swincupy.errors import ConfigError, DeviceError, InputError

if TYPE_CHECKING:
    from swincupy.ops.gemm import Choice, Problem, Tiles

_FORMAT = 1


class Shape(NamedTuple):
    """One matrix product of a model, ``[M, K] @ [N, K].T``, and how often a forward pass computes it."""

    name: str
    M: int
    N: int
    K: int
    epilogue: str  # as `ops.gemm.Problem` has it
    times: int


class Result(NamedTuple):
    """What a search found for one product."""

    shape: Shape
    choice: Choice
    microseconds: float
    guess: float  # microseconds of the library's first guess

    @property
    def tflops(self) -> float:
        return 2e-6 * self.shape.M * self.shape.N * self.shape.K / self.microseconds


# ---------------------------------------------------------------- which products a model has


def gemm_shapes(
    config: SwinConfig,
    batch: int,
    height: int,
    width: int,
    moments: Callable[[int, int, int], bool] = lambda M, N, K: False,
    merge: Callable[[int, int, int, int], str] = lambda M, N, K, width: "",
) -> list[Shape]:
    """The matrix products of a forward pass, in its order.

    The patch embedding is not among them: its kernel has its own products.

    Parameters
    ----------
    config : SwinConfig
    batch : int
    height, width : int
        Pixels.
    moments : callable
        Of M, N and K: whether that product gives the moments of its rows, and with them the next takes its norm, see
        `ops.gemm.gives_moments`.
    merge : callable
        Of M, N, K and half the columns of a map, 0 where its height or width is odd: what goes with the product of a
        patch merging, as `Problem.epilogue` has it.
    """
    shapes = []
    bias = "bias" if config.qkv_bias else "none"
    to_residual = "bias+residual" if config.version == 1 else "bias"  # V2 normalises before it adds
    geometry = stage_geometry(config, height, width)
    for i, (C, depth, g) in enumerate(zip(config.dims, config.depths, geometry, strict=True)):
        M, hidden = batch * g.grid[0] * g.grid[1], config.hidden_dim(i)
        of_proj, of_fc2 = (config.version == 1 and moments(M, C, K) for K in (C, hidden))
        shapes += [
            Shape(f"stage{i}.qkv", M, 3 * C, C, "norm+bias" if of_fc2 else bias, depth),
            Shape(f"stage{i}.proj", M, C, C, to_residual + "+moments" * of_proj, depth),
            Shape(f"stage{i}.fc1", M, hidden, C, "norm+" * of_proj + "bias+gelu", depth),
            Shape(f"stage{i}.fc2", M, C, hidden, to_residual + "+moments" * of_fc2, depth),
        ]
        if i + 1 < config.num_stages:
            h, w = geometry[i + 1].grid
            with_it = [merge(batch * h * w, 2 * C, 4 * C, w if 2 * h == g.grid[0] and 2 * w == g.grid[1] else 0)]
            with_it += ["moments"] * (config.version == 1 and moments(batch * h * w, 2 * C, 4 * C))
            shapes.append(
                Shape(f"stage{i}.merge", batch * h * w, 2 * C, 4 * C, "+".join(filter(None, with_it)) or "none", 1)
            )
    if config.num_classes:
        shapes.append(Shape("head", batch, config.num_classes, config.num_features, "bias", 1))
    return shapes


def positional(arguments: Sequence[str | int]) -> tuple[SwinConfig, int, str]:
    """``BATCH IMAGE WINDOW HEADS SIZE_PER_HEAD DTYPE INT8`` -> configuration, batch, precision.

    The arguments of FasterTransformer's ``swin_gemm``. HEADS are those of stage 0 and double with each
    of four stages, C is HEADS * SIZE_PER_HEAD; DTYPE is 0 (fp32), 1 (fp16) or 2 (bf16); INT8 must be 0.

    Raises
    ------
    ConfigError
        Not seven integers, or not in their ranges.
    """
    names = ("BATCH", "IMAGE", "WINDOW", "HEADS", "SIZE_PER_HEAD", "DTYPE", "INT8")
    try:
        batch, image, window, heads, size, dtype, int8 = numbers = [int(v) for v in arguments]
    except ValueError:
        raise ConfigError(
            f"tune: arguments must be the seven integers {' '.join(names)}, got {' '.join(map(str, arguments))!r}"
        ) from None
    for name, value in zip(names[:5], numbers, strict=False):
        if value < 1:
            raise ConfigError(f"tune: {name} must be a positive integer, got {value}")
    if dtype not in (0, 1, 2):
        raise ConfigError(f"tune: DTYPE must be 0 (fp32), 1 (fp16) or 2 (bf16), got {dtype}")
    if int8 not in (0, 1, 2):
        raise ConfigError(f"tune: INT8 must be 0, 1 or 2, got {int8}")
    if int8:
        raise ConfigError(f"tune: INT8 must be 0, got {int8}; there are no integer products to tune yet")
    config = SwinConfig(
        img_size=image, window_size=window, embed_dim=heads * size, num_heads=tuple(heads * 2**i for i in range(4))
    )
    return config, batch, ("fp32", "fp16", "bf16")[dtype]


# ---------------------------------------------------------------- the search


def tune(
    config: SwinConfig | str | Any,
    batch: int,
    precision: str = "fp16",
    img_size: int | Pair | None = None,
    progress: bool = True,
) -> Path:
    """Time every matrix product of a model in every way there is, and write the best ones to the cache.

    Parameters
    ----------
    config : SwinConfig, the name of one, or a model
    batch : int
        Rounded up as the engine rounds it.
    precision : {"fp32", "tf32", "fp16", "bf16"}
    img_size : int or (height, width), optional
        Pixels; the configuration's where None.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path of the cache, which models loaded from now on use.

    Raises
    ------
    ConfigError
        No such configuration, or one without an image size, and none is given.
    DeviceError
        No usable GPU.
    """
    return save(measure(config, batch, precision, img_size, progress), precision)


def measure(
    config: SwinConfig | str | Any,
    batch: int,
    precision: str = "fp16",
    img_size: int | Pair | None = None,
    progress: bool = True,
) -> list[Result]:
    """The measurements of `tune`, one for each product of the model; nothing is written."""
    from tqdm import tqdm

    from swincupy import engine
    from swincupy import precision as precisions
    from swincupy.ops import cutlass, fused_mlp, gemm, gemv, wgmma

    config = _config(config)
    if batch < 1:
        raise InputError(f"tune: batch must be a positive integer, got {batch}")
    size = config.image if img_size is None else pair(img_size, "img_size")
    if size is None:
        raise ConfigError("tune: img_size must be given, the configuration has none")
    _require_gpu(precision)
    import cupy

    p = precisions.of(precision)

    def merge(M: int, N: int, K: int, width: int) -> str:
        gather = f"gather{width}" if gemm.takes_gather(N, K, width, p) else ""
        if config.version == 2 or not gemm.takes_norm(N, K, p):
            return gather
        C, hidden = K // 4, int(config.mlp_ratio * (K // 4))
        given = fused_mlp.takes(C, hidden, p, 4 * M) or gemm.gives_moments(4 * M, C, hidden, p)
        return f"{gather}+norm+bias" if gather and given else "bias"

    shapes = gemm_shapes(config, engine.bucket(batch), *size, lambda M, N, K: gemm.gives_moments(M, N, K, p), merge)
    found: dict[Problem, tuple[Choice, float, float]] = {}
    results = []
    for shape in tqdm(shapes, desc="tune", unit="product", disable=not progress, file=sys.stderr):
        key = problem(shape, precision)
        if key not in found:
            found[key] = measured(key, gemm.TILES + gemv.TILES + wgmma.TILES + cutlass.TILES)
        results.append(Result(shape, *found[key]))
    cupy.get_default_memory_pool().free_all_blocks()
    return results


def _config(given: Any) -> SwinConfig:
    if isinstance(given, str):
        from swincupy import registry

        return registry.named_config(given)
    given = getattr(given, "config", given)
    if not isinstance(given, SwinConfig):
        raise ConfigError(f"tune: config must be a SwinConfig, a name or a model, got {type(given).__name__}")
    return given


def _require_gpu(precision: str) -> None:
    from swincupy import jit
    from swincupy import precision as precisions

    try:
        sm = jit.compute_capability()
    except Exception as error:  # CuPy is missing, or finds no driver or device, each with an error of its own
        raise DeviceError(
            f"tune: a GPU must be usable, got {' '.join(str(error).split())}; see swincupy doctor"
        ) from error
    precisions.of(precision, sm=sm)


def problem(shape: Shape, precision: str) -> Problem:
    """The product as `swincupy.ops.gemm` knows it."""
    from swincupy.ops.gemm import Problem

    parts: dict[str, Any] = {"bias": False, "gelu": False, "residual": False}
    for part in shape.epilogue.split("+"):
        if part.startswith("gather"):
            parts["gather"] = int(part.removeprefix("gather"))
        elif part != "none":
            parts[part] = True
    return Problem(shape.M, shape.N, shape.K, precision, **parts)


def measured(key: Problem, tiles: tuple[Tiles, ...]) -> tuple[Choice, float, float]:
    """Best choice among cuBLASLt's and these tiles, its microseconds, and those of the library's first guess."""
    import cupy
    import numpy as np

    from swincupy import precision as precisions
    from swincupy.ops import gemm, wgmma

    p = precisions.of(key.precision)
    rng = np.random.default_rng(0)
    draw = precisions.encode(rng.standard_normal(1 << 20, dtype=np.float32), p)  # repeated: the host is slow

    def array(wanted: bool, *shape: int) -> Any:
        return cupy.asarray(np.resize(draw, shape)) if wanted else None

    def moments(C: int) -> Any:
        return cupy.ones((key.M, C // wgmma.neighbours(key.M, C), 2), np.float32)

    of_a = cupy.ones((4 * key.M, 1, 2), np.float32) if key.gather else moments(key.K) if key.norm else None
    arrays = (
        array(True, key.M, key.K), array(True, key.N, key.K), array(key.bias, key.N),
        array(key.residual, key.M, key.N), array(True, key.M, key.N),
        wgmma.Norm(of_a, cupy.zeros(key.N, np.float32), 1e-5) if key.norm else None,
        moments(key.N) if key.moments else None,
    )  # fmt: skip
    choices = gemm.choices(key, 64, tiles)
    first = gemm.search(key, choices, arrays)
    if not first:
        raise DeviceError(f"tune: no algorithm runs {key}")
    best = gemm.search(key, [t.choice for t in first[:4]], arrays, budget=10e-3) or first
    guess = next((t.microseconds for t in first if t.choice == choices[0]), first[0].microseconds)
    return best[0].choice, best[0].microseconds, guess


# ---------------------------------------------------------------- the cache


def cache_path() -> Path:
    """The file: ``gemm.json`` in ``SWINCUPY_CACHE_DIR`` or in the platform's folder for caches."""
    if folder := os.environ.get("SWINCUPY_CACHE_DIR"):
        return Path(folder) / "gemm.json"
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "swincupy" / "gemm.json"


def shipped_path() -> Path:
    """The file of measurements that comes with the package."""
    return Path(__file__).with_name("tuned.json")


@functools.cache
def environment(device: int) -> str:
    """What a measurement holds for: GPU, driver, cuBLASLt, and the sources of our kernels. The GPU comes first."""
    import cupy

    from swincupy import jit
    from swincupy.ops.cublaslt import bindings

    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    driver, library = cupy.cuda.runtime.driverGetVersion(), bindings().get_version()
    kernels = " ".join(
        jit.include_hash(f"{kernel}.cu")[:12] for kernel in ("gemm", "gemv", "wgmma_gemm", "cutlass_gemm")
    )
    return f"{name} | driver {driver} | cuBLASLt {library} | kernels {kernels}"


def save(results: Iterable[Result], precision: str) -> Path:
    """Merge results into the cache; what is stale for this GPU is dropped, other GPUs' entries stay.

    Raises
    ------
    DeviceError
        The folder cannot be written.
    """
    from cupy.cuda.device import get_device_id

    from swincupy.ops import gemm

    path, here = cache_path(), environment(get_device_id())
    entries = {
        _key(problem(r.shape, precision)): {"choice": _encode(r.choice), "microseconds": round(r.microseconds, 3)}
        for r in results
    }
    try:
        known = read(path)
    except (OSError, ValueError):
        known = {}  # missing, or of no use
    kept = {k: v for k, v in known.items() if k == here or _gpu(k) != _gpu(here)}
    kept[here] = kept.get(here, {}) | entries
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, kept)
    except OSError as error:
        raise DeviceError(
            f"tune: the cache {path} must be writable, got {error}; set SWINCUPY_CACHE_DIR to another folder"
        ) from error
    _entries.cache_clear()
    gemm.forget()
    return path


def write(path: Path, environments: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the cache in one step: a reader sees the old file or the new one."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            json.dump({"format": _FORMAT, "environments": environments}, file, indent=1, sort_keys=True)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of the cache by environment and product.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or is not what `write` writes.
    """
    try:
        content = json.loads(path.read_bytes())
    except (RecursionError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    environments = content.get("environments") if isinstance(content, dict) else None
    if not isinstance(environments, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"not a cache of format {_FORMAT}")
    if not all(isinstance(entries, dict) for entries in environments.values()):
        raise ValueError("entries are not a table")
    return environments


def lookup(key: Problem) -> Choice | None:
    """The cache's choice for a product on CuPy's current device, or what was shipped for it; None where there is none.

    Entries that cannot be used come with a warning.
    """
    from cupy.cuda.device import get_device_id

    with _lock:
        device = get_device_id()
        own, shipped = _entries(device), _shipped(device)
        entry = own.get(_key(key), shipped.get(_key(key)))
    if entry is None or key.alignment < 256:  # measured with arrays of their own
        return None
    try:
        return _decode(entry["choice"])
    except (KeyError, TypeError, ValueError) as error:
        warn(f"the entry for {_key(key)} is not one: {error!r}")
        return None


_lock = threading.Lock()  # one warning, not one a thread


@functools.cache
def _entries(device: int) -> dict[str, Any]:
    path = cache_path()
    try:
        known = read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn(f"{path} cannot be read: {error}")
        return {}
    here = environment(device)
    if here not in known and (stale := [k for k in known if _gpu(k) == _gpu(here)]):
        warn(f"{path} was measured with {stale[0]!r}, this is {here!r}")
    return known.get(here, {})


@functools.cache
def _shipped(device: int) -> dict[str, Any]:
    """What was measured on such a GPU; cuBLASLt's algorithms where it is the same one, our tiles as they are now."""
    name, _, library, _ = environment(device).split(" | ")
    found: dict[str, Any] = {}
    for where, entries in read(shipped_path()).items():
        gpu, _, of, _ = where.split(" | ")
        if gpu == name:
            found |= {k: e for k, e in entries.items() if of == library or not isinstance(e["choice"], str)}
    return {k: e for k, e in found.items() if _can_be_decoded(e["choice"])}


def _can_be_decoded(stored: Any) -> bool:
    try:
        return bool(_decode(stored))
    except ValueError:  # a tile that there was once
        return False


def warn(what: str) -> None:
    """Say that something of the cache is ignored."""
    warnings.warn(f"tune: the cache is ignored: {what}; run swincupy tune again", RuntimeWarning, stacklevel=2)


def _gpu(environment: str) -> str:
    return environment.split(" | ")[0]


def _key(p: Problem) -> str:
    return f"{p.M} x {p.N} x {p.K} {p.precision} {p.epilogue}"


def _encode(choice: Choice) -> str | list[Any]:
    return choice.hex() if isinstance(choice, bytes) else [choice.kernel, *choice]


def _decode(stored: Any) -> Choice:
    from swincupy.ops import cutlass, gemm, gemv, wgmma

    if isinstance(stored, str):
        return bytes.fromhex(stored)
    for tile in gemm.TILES + gemv.TILES + wgmma.TILES + cutlass.TILES:
        if [tile.kernel, *tile] == stored:
            return tile
    raise ValueError(f"no such tile: {stored}")


# ---------------------------------------------------------------- the table


def main(
    config: SwinConfig | str | Any,
    batch: int,
    precision: str = "fp16",
    img_size: int | Pair | None = None,
    progress: bool = True,
) -> Path:
    """`tune`, with the results printed as a table."""
    results = measure(config, batch, precision, img_size, progress)
    path = save(results, precision)
    print(table(results))
    print(f"written to {path}")
    return path


def table(results: Sequence[Result]) -> str:
    """The results as text: one product a line, and their sum over a forward pass."""
    lines = [f"{'product':<14}{'M x N x K':>22}  {'epilogue':<14}{'us':>9}{'TFLOP/s':>9}{'guess us':>10}  backend"]
    for r in results:
        s = r.shape
        backend = "cuBLASLt"
        if not isinstance(r.choice, bytes):
            backend = f"{r.choice.kernel} {'x'.join(map(str, r.choice))}"
        lines.append(
            f"{s.name:<14}{f'{s.M} x {s.N} x {s.K}':>22}  {s.epilogue:<14}{r.microseconds:>9.1f}{r.tflops:>9.0f}"
            f"{r.guess:>10.1f}  {backend}"
        )
    best, guess = (sum(r.shape.times * t for r, t in zip(results, column, strict=True)) for column in (
        [r.microseconds for r in results], [r.guess for r in results]
    ))  # fmt: skip
    lines.append(f"a forward pass: {best / 1e3:.3f} ms, {guess / 1e3:.3f} ms with the library's first guesses")
    return "\n".join(lines)
