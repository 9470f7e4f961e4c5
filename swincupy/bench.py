"""How fast models are here: models x sizes x precisions, checked, then timed, as a table.

Inputs are on the device; a time is the median of single calls, between CUDA events on a GPU. Weights are
random unless a checkpoint is given. The ceiling is what matrix products of 8192 x 8192 reach (2048 on
the CPU), measured first.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swincupy import precision as precisions
from swincupy.config import Pair, SwinConfig, flops
from swincupy.errors import ConfigError, DeviceError, SwincupyError
from swincupy.model import SwinTransformer
from swincupy.parameters import parameter_shapes

Array = Any

COPY_SIDE, GPU_SIDE, CPU_SIDE = 1 << 28, 8192, 2048


class Row(NamedTuple):
    """One line of the table: a model at a batch size in a precision."""

    model: str
    image: str
    batch: int
    precision: str
    ms: float
    images_s: float
    tflops: float
    percent_of_ceiling: float
    error: float | None  # relative L2 distance of the logits from the CPU's; None where it was not asked for


class KernelRow(NamedTuple):
    """One kind of call in a forward pass: how often, how long each takes, what it must move and compute."""

    call: str
    shape: str
    times: int
    us: float  # of one
    share: float  # per cent of the sum over the forward pass
    bytes: int  # arguments and result, once
    floor_us: float  # of the bytes at the bandwidth of a copy, or of the operations at the ceiling
    percent_of_bandwidth: float
    gflop: float
    percent_of_ceiling: float


def run(
    names: Sequence[str],
    batches: Sequence[int],
    names_of_precision: Sequence[str],
    device: str | int | None = None,
    img_size: Pair | None = None,
    *,
    check: bool = False,
    repeats: int = 50,
) -> Iterator[Row]:
    """Rows of the table, each as it is measured.

    Parameters
    ----------
    names : names of architectures, which get random weights, or checkpoint files
    batches : ints
    names_of_precision : see `swincupy.load`
    device : see `swincupy.load`
    img_size : (height, width), optional
        Pixels; each model's own where None.
    check : bool
        First compare the logits of every row with the CPU's.
    repeats : int
        Calls that are timed, fewer where they take long.

    Raises
    ------
    SwincupyError
        A model is not there, does not run, or, with ``check``, is wrong.
    """
    ceilings: dict[str, float] = {}
    for name in names:
        params, config = weights(name)
        size = img_size or config.image
        if size is None:
            raise ConfigError(f"bench: img_size must be given, {name} has none")
        wanted = None
        for p in names_of_precision:
            model = SwinTransformer(params, config, device=device, precision=p)
            if p not in ceilings:
                ceilings[p] = ceiling(model.device, p)
            for batch in batches:
                x = images(batch, config, size)
                error = None
                if check:
                    wanted = expected(params, config, x) if wanted is None else wanted
                    error = distance(answer(model, x)[: len(wanted)], wanted)
                    limit = tolerance(p)
                    if not error <= limit:
                        raise SwincupyError(
                            f"bench: logits of {name} in {p} at batch {batch} must be within {limit:.0e} of the CPU's, "
                            f"got {error:.1e}; nothing that is wrong is timed; see swincupy doctor"
                        )
                ms = milliseconds(model, x, repeats)
                rate = batch * flops(config, *size) / ms / 1e9
                yield Row(
                    Path(name).stem, f"{size[0]}x{size[1]}", batch, p, ms, 1e3 * batch / ms, rate,
                    100 * rate / ceilings[p], error,
                )  # fmt: skip
            del model


# ---------------------------------------------------------------- models and inputs


def weights(name: str) -> tuple[Mapping[str, np.ndarray], SwinConfig]:
    """A checkpoint's parameters and configuration, or random ones for a published architecture."""
    from swincupy import registry
    from swincupy.checkpoint import read_checkpoint

    if name == "demo" or os.path.exists(name):
        found = read_checkpoint(registry.fetch(name) if name == "demo" else name)
        return found.params, found.config.with_conventions("microsoft")
    config = registry.named_config(name).with_conventions("microsoft")
    return random_weights(config), config


def random_weights(config: SwinConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters at which activations stay near 1 and no term of the model is small."""
    rng = np.random.default_rng(seed)
    return {name: random_parameter(name, shape, rng) for name, shape in parameter_shapes(config).items()}


def random_parameter(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One of them, by its name in any layout and its rank."""
    r = rng.standard_normal(shape, np.float32)
    if name.endswith("logit_scale"):
        return np.float32(np.log(10)) + np.float32(0.5) * r
    if len(shape) == 1:
        return np.float32(0.1) * r + np.float32(name.endswith("weight"))
    if name.endswith("relative_position_bias_table"):
        return r
    return r / np.float32(np.sqrt(np.prod(shape[1:])))


def images(batch: int, config: SwinConfig, size: Pair) -> np.ndarray:
    """Normalised pixels; a larger batch begins with the images of a smaller one."""
    return np.random.default_rng(0).standard_normal((batch, config.in_chans, *size), np.float32)


def expected(params: Mapping[str, np.ndarray], config: SwinConfig, x: np.ndarray) -> np.ndarray:
    """The answer to the first image or two: the CPU's, in float64."""
    return np.asarray(answer(SwinTransformer(params, config, device="cpu", precision="fp64"), x[:2]))


def answer(model: SwinTransformer, x: Array) -> Array:
    """Logits, or the embeddings of a model without a head."""
    return model(x) if model.config.num_classes else model.embed(x, batch_size=len(x))


def tolerance(precision: str) -> float:
    """Relative L2 distance of a whole model's logits within which a precision is right."""
    return 5 * precisions.of(precision).tolerance


def distance(x: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 distance; infinite where there are NaNs, or shapes differ."""
    if x.shape != want.shape:
        return float("inf")
    d = float(np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want))
    return d if d == d else float("inf")


# ---------------------------------------------------------------- time


def milliseconds(model: SwinTransformer, x: np.ndarray, repeats: int) -> float:
    """Median of single calls, after three to warm up."""
    if model.device == "cpu":
        return _on_cpu(lambda: answer(model, x), repeats)
    import cupy

    with cupy.cuda.Device(int(model.device.partition(":")[2])):
        on_gpu = cupy.asarray(x)
        return on_events(lambda: answer(model, on_gpu), repeats)


def on_events(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds between events before and after a call, on CuPy's current stream.

    Of ``repeats`` calls that do not wait for each other, or, where these would take longer than a second, of as many
    as take one, ten at least.
    """
    import cupy

    stream = cupy.cuda.get_current_stream()

    def timed(calls: int) -> list[float]:
        pairs = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(calls)]
        stream.synchronize()
        for start, stop in pairs:
            start.record(stream)
            call()
            stop.record(stream)
        stream.synchronize()
        return [float(cupy.cuda.get_elapsed_time(start, stop)) for start, stop in pairs]

    for _ in range(2):
        call()
    (warm,) = timed(1)
    return statistics.median(timed(min(repeats, max(10, int(1e3 / max(warm, 1e-3))))))


def _on_cpu(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call, of as many as fit into ten seconds, three at least."""
    call()
    taken: list[float] = []
    while len(taken) < repeats and (len(taken) < 3 or sum(taken) < 10):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def ceiling(device: str, precision: str) -> float:
    """TFLOP/s of one large matrix product in a precision."""
    rng = np.random.default_rng(0)
    if device == "cpu":
        dtype = precisions.of(precision).storage
        a, b = (rng.standard_normal((CPU_SIDE, CPU_SIDE)).astype(dtype) for _ in range(2))
        return 2 * CPU_SIDE**3 / _on_cpu(lambda: a @ b, 5) / 1e9
    import cupy

    from swincupy.ops.gemm import gemm

    p = precisions.of(precision)
    with cupy.cuda.Device(int(device.partition(":")[2])):
        draw = precisions.encode(rng.standard_normal(1 << 20, dtype=np.float32), p)
        a, w = (cupy.resize(cupy.asarray(draw), (GPU_SIDE, GPU_SIDE)) for _ in range(2))
        out = cupy.empty((GPU_SIDE, GPU_SIDE), p.storage)
        return 2 * GPU_SIDE**3 / on_events(lambda: gemm(a, w, out=out, precision=p), 20) / 1e9


def bandwidth(device: str) -> float:
    """Bytes a second of a copy on a GPU, read and written."""
    import cupy

    with cupy.cuda.Device(int(device.partition(":")[2])):
        a, b = (cupy.zeros(COPY_SIDE, np.float32) for _ in range(2))
        return 2e3 * float(a.nbytes) / on_events(lambda: cupy.copyto(b, a), 20)


# ---------------------------------------------------------------- one forward pass, call by call


def kernels(
    name: str, batch: int, precision: str, device: str | int | None = None, img_size: Pair | None = None
) -> list[KernelRow]:
    """Each kind of call of a kernel or matrix product in one forward pass, in the order of first use.

    A call is timed by itself, with its own arguments, as replays of a CUDA graph that repeats it: what
    fits into the L2 cache is read from there.

    Raises
    ------
    DeviceError
        Not on a GPU.
    """
    params, config = weights(name)
    size = img_size or config.image
    if size is None:
        raise ConfigError(f"bench: img_size must be given, {name} has none")
    model = SwinTransformer(params, config, device=device, precision=precision, graphs=False)
    if model.device == "cpu":
        raise DeviceError('bench: kernels must be timed on a GPU, got device "cpu"; leave --kernels out')
    import cupy

    most, moved = ceiling(model.device, precision), bandwidth(model.device)
    found: dict[tuple[str, str], list[Any]] = {}

    def measure(call: str, shape: str, bytes_: int, operations: int, again: Callable[[], object]) -> None:
        entry = found.setdefault((call, shape), [0, bytes_, operations, None])
        entry[0] += 1
        if entry[3] is None:
            entry[3] = _replayed(again)

    with cupy.cuda.Device(int(model.device.partition(":")[2])), cupy.cuda.Stream(non_blocking=True):
        x = cupy.asarray(images(batch, config, size))
        answer(model, x)
        with _watched(measure):
            answer(model, x)
    total = sum(count * us for count, _, _, us in found.values())
    return [
        KernelRow(
            call, shape, count, us, 100 * count * us / total, bytes_,
            1e6 * max(bytes_ / moved, operations / most / 1e12), 1e8 * bytes_ / moved / us, operations / 1e9,
            operations / us / most / 1e4,
        )
        for (call, shape), (count, bytes_, operations, us) in found.items()
    ]  # fmt: skip


def _replayed(call: Callable[[], object], count: int = 20) -> float:
    """Microseconds of a call within a graph of many, on CuPy's current stream."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    call()
    stream.synchronize()
    stream.begin_capture()
    try:
        for _ in range(count):
            call()
    finally:
        graph = stream.end_capture()
    return 1e3 * on_events(lambda: graph.launch(stream), 10) / count


@contextlib.contextmanager
def _watched(measure: Callable[[str, str, int, int, Callable[[], object]], None]) -> Iterator[None]:
    """Within it, every launch that `swincupy.ops.fused` makes goes past ``measure``, too."""
    from swincupy.ops import attention, fused, fused_attention, fused_mlp
    from swincupy.ops import kernels as launchers

    def watch(name: str, launch: Callable[..., Array], operations: Callable[..., int]) -> Callable[..., Array]:
        def watched(*args: Any, **options: Any) -> Array:
            out = launch(*args, **options)
            arrays = [b for a in (*args, *options.values()) for b in (a if isinstance(a, tuple) else (a,))]
            read = {a.data.ptr: a.nbytes for a in arrays if hasattr(a, "nbytes")}
            shape = " ".join("x".join(map(str, a.shape)) for a in (args[0], out))
            detail = "+".join(
                k for k in ("gather", "norm", "gelu", "residual")
                if (v := options.get(k)) is not None and (not isinstance(v, int) or v)
            )  # fmt: skip
            measure(
                f"{name} {detail}".strip(), shape, sum(read.values()) + out.nbytes, operations(*args, out),
                functools.partial(launch, *args, **options),
            )  # fmt: skip
            return out

        return watched

    def none(*_: Array) -> int:
        return 0

    def product(a: Array, w: Array, *_: Array) -> int:
        return int(2 * a.shape[0] * w.shape[0] * w.shape[1])

    def embedding(x: Array, weight: Array, *rest: Array) -> int:
        return int(2 * rest[-1].size * (weight.size // weight.shape[0]))

    def scores(qkv: Array, qkv_bias: Array, position_bias: Array, out: Array) -> int:
        return int(4 * out.size * _tokens(position_bias))

    def whole_mlp(x: Array, packed: Any, out: Array) -> int:
        return int(2 * out.size // out.shape[-1] * packed.weights.size)

    def whole_attention(x: Array, packed: Any, position_bias: Array, out: Array) -> int:
        return int(2 * out.size // out.shape[-1] * packed.image.size + 4 * out.size * _tokens(position_bias))

    seams: list[tuple[Any, str, Callable[..., int]]] = [
        (fused, "gemm", product),
        (fused_mlp, "mlp_block", whole_mlp),
        (fused_attention, "attention_block", whole_attention),
        (attention, "window_attention", scores),
        (launchers, "patch_embed", embedding),
        *((launchers, name, none) for name in ("layer_norm", "layer_norm_residual", "patch_merge", "global_pool")),
    ]
    kept = [(where, name, getattr(where, name)) for where, name, _ in seams]
    try:
        for where, name, operations in seams:
            setattr(where, name, watch(name, getattr(where, name), operations))
        yield
    finally:
        for where, name, function in kept:
            setattr(where, name, function)


def _tokens(position_bias: Array) -> int:
    """Tokens of a window, rounded up to the 16 that the prepared bias has a row of pieces for."""
    return int(position_bias.shape[1] * (16 if position_bias.ndim == 5 else 1))


# ---------------------------------------------------------------- tables


def where(device: str) -> dict[str, str]:
    """What a measurement was made on and with: the device and the versions that matter."""
    import swincupy

    found = {"device": platform.processor() or platform.machine(), "swincupy": swincupy.__version__}
    if device == "cpu":
        return found | {"numpy": np.__version__, "cpus": str(os.cpu_count())}
    import cupy

    from swincupy.ops.cublaslt import bindings

    properties = cupy.cuda.runtime.getDeviceProperties(int(device.partition(":")[2]))
    driver = cupy.cuda.runtime.driverGetVersion()
    return found | {
        "device": properties["name"].decode(),
        "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}",
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "cublaslt": str(bindings().get_version()),
    }


def show(value: Any) -> str:
    """A value of a table as text: numbers to three or four digits."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def markdown(rows: Iterable[Any], made_on: Mapping[str, str]) -> str:
    """Rows as a Markdown table under a line that says where they were measured."""
    rows = list(rows)
    fields = rows[0]._fields
    lines = [", ".join(f"{k} {v}" for k, v in made_on.items()), ""]
    titles = (f.replace("images_s", "images/s").replace("percent", "%").replace("_", " ") for f in fields)
    lines.append("| " + " | ".join(titles) + " |")
    lines.append("|" + "|".join(" --- " if isinstance(v, str) else " ---: " for v in rows[0]) + "|")
    lines += ["| " + " | ".join(map(show, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: Iterable[Any], made_on: Mapping[str, str]) -> None:
    """Rows as CSV, where they were measured in each."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for row in rows:
            record = row._asdict() | dict(made_on)
            if writer is None:
                writer = csv.DictWriter(file, record)
                writer.writeheader()
            writer.writerow(record)
