"""How a forward pass is run: operation by operation, or replayed as a CUDA graph."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from swincupy import forward
from swincupy.config import SwinConfig
from swincupy.parameters import fold, plan

if TYPE_CHECKING:
    from swincupy import jit

Array = Any
Floats: TypeAlias = tuple[float, ...]
Normalise: TypeAlias = tuple[Floats, Floats]  # mean and standard deviation of each channel, on the scale 0..1

_PLANS = 8  # input sizes whose masks and biases are kept


class Eager:
    """Runs the forward pass operation by operation.

    Parameters
    ----------
    params : mapping
        Flat parameters, see `parameters.parameter_shapes`.
    config : SwinConfig
        With its conventions filled in.
    ops : module or object
        The array operations of `forward`.
    convert : callable
        Takes an array to the dtype and device of the model.
    exact, prepare_bias, masks
        See `parameters.fold` and `parameters.plan`.
    export : callable
        Takes a result to the dtype in which it is given out.
    settle : callable
        Waits until weights and plans that were just made are where they belong, for calls on any stream.
    normaliser : callable
        (mean, std) -> what ``ops.patch_embed`` keeps of them, which is made before it is needed: graphs share it,
        so that it must not lie in the memory of one.
    packers : mapping, optional
        ``pack_attention``, ``pack_mlp``, ``fold_norm`` and ``merge_in_place`` of `parameters.fold`.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        config: SwinConfig,
        ops: Any,
        convert: Callable[[Any], Array],
        *,
        exact: Callable[[Any], Array] | None = None,
        prepare_bias: Callable[[np.ndarray], Array] | None = None,
        masks: bool = True,
        export: Callable[[Array], Array] = lambda y: y,
        settle: Callable[[], object] = lambda: None,
        normaliser: Callable[[Floats, Floats], Any] = lambda mean, std: None,
        packers: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.ops, self._export, self._settle = config, ops, export, settle
        self.weights = fold(params, config, convert, exact, **(packers or {}))
        settle()
        self._plan_options: dict[str, Any] = {"convert": convert, "prepare_bias": prepare_bias, "masks": masks}
        self._plans: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._normaliser, self._normalised = normaliser, dict[Normalise, Any]()
        self._lock = threading.Lock()

    def run(self, what: Callable[..., Any], pixels: Array, normalise: Normalise | None = None, **options: Any) -> Any:
        """``what`` of `forward` (logits, embed, features).

        ``pixels`` are floats [B, C, H, W], or uint8 [B, H, W, C] with the mean and deviation to normalise them with.
        """
        patches, rest = self._forward(what, pixels.shape, options, normalise)
        y = rest(patches(pixels))
        return [self._export(z) for z in y] if isinstance(y, list) else self._export(y)

    def _forward(
        self,
        what: Callable[..., Any],
        shape: tuple[int, ...],
        options: Mapping[str, Any],
        normalise: Normalise | None = None,
    ) -> tuple[Callable[..., Array], Callable[[Array], Any]]:
        """`forward.patches` and ``what``, for pixels of a shape; they hold all that they read, and not the engine."""
        block = forward.BLOCK[self.config.version]
        if normalise is None:
            plan = self.plan(*shape[2:])
        else:
            plan = {**self.plan(*shape[1:3]), **self._normalisation(normalise)}
        given = {"w": self.weights, "plan": plan, "ops": self.ops}
        return functools.partial(forward.patches, **given), functools.partial(what, **given, block=block, **options)

    def plan(self, height: int, width: int) -> Any:
        """The plan of an input size: masks and biases, kept for the last few sizes."""
        size = (height, width)
        with self._lock:
            found = self._plans.pop(size, None)
            if found is None:
                found = plan(self.weights, self.config, height, width, **self._plan_options)
                self._settle()
            self._plans[size] = found
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return found

    def _normalisation(self, normalise: Normalise) -> dict[str, Any]:
        """What a plan has besides for bytes: the options of ``patch_embed``, and what these read."""
        with self._lock:
            if normalise not in self._normalised:
                self._normalised[normalise] = self._normaliser(*normalise)
                self._settle()
            mean, std = normalise
            return {"normalise": {"mean": mean, "std": std}, "held": self._normalised[normalise]}


class Graphs(Eager):
    """Runs the forward pass as CUDA graphs, one for each shape and kind of input and kind of output.

    The first call of a shape compiles, warms up and captures; later ones embed the patches, which
    reads the input where it lies, replay the rest, and copy the result out. A graph's memory is its own. Batches are
    rounded up (`bucket`) so that neighbouring sizes share a graph; the number of graphs is bounded.
    Calls from several threads and on several streams are ordered where they use the same graph.

    Parameters
    ----------
    *args, **options
        See `Eager`; ``export`` must copy.
    capacity : int
        Graphs kept; the least recently used goes first.
    """

    def __init__(self, *args: Any, capacity: int = 16, **options: Any) -> None:
        super().__init__(*args, **options)
        self._capacity = capacity
        self._replays: OrderedDict[Any, _Replay] = OrderedDict()
        self._capturing = threading.Lock()

    def run(self, what: Callable[..., Any], pixels: Array, normalise: Normalise | None = None, **options: Any) -> Any:
        """As `Eager.run`; ``pixels`` is an array on the host or on the device."""
        try:
            return self._replay(what, pixels.shape, options, normalise)(pixels, self._export)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what was allocated so far
        self.clear()
        return self._replay(what, pixels.shape, options, normalise)(pixels, self._export)

    def _replay(
        self,
        what: Callable[..., Any],
        shape: tuple[int, ...],
        options: Mapping[str, Any],
        normalise: Normalise | None,
    ) -> _Replay:
        """The graph for a call, captured where it is new."""
        shape = (bucket(shape[0]), *shape[1:])
        key = (what, tuple(sorted(options.items())), shape, normalise)
        if (found := self._find(key)) is not None:
            return found
        with self._capturing:  # one at a time: each fills the memory that it will own
            if (found := self._find(key)) is not None:
                return found
            steps = self._forward(what, shape, options, normalise)
            replay = _Replay(*steps, shape, np.float32 if normalise is None else np.uint8)
            with self._lock:
                self._replays[key] = replay
                oldest = [self._replays.popitem(last=False) for _ in range(len(self._replays) - self._capacity)]
        del oldest  # freeing memory waits for the device, which other threads need not do
        return replay

    def _find(self, key: Any) -> _Replay | None:
        with self._lock:
            found = self._replays.get(key)
            if found is not None:
                self._replays.move_to_end(key)
        return found

    def clear(self) -> None:
        """Forget all graphs and give their memory, and what CuPy keeps for later, back to the device."""
        import cupy

        with self._lock:
            replays, self._replays = self._replays, OrderedDict()
        del replays
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()


def bucket(batch: int) -> int:
    """The batch size that a batch is rounded up to: exact to 16, then at most one eighth more.

    It depends on the batch alone, so that equal calls give equal bits whatever was called before.
    """
    step = max(1, 1 << (batch - 1).bit_length() >> 4)
    return -(-batch // step) * step


class _Replay:
    """One captured forward pass, from the embedded patches on: its graph, its memory, its input and its outputs."""

    def __init__(
        self,
        patches: Callable[..., Array],
        rest: Callable[[Array], Any],
        shape: tuple[int, ...],
        dtype: Any = np.float32,
    ) -> None:
        import cupy

        self._patches, self._rest = patches, rest  # which hold the weights and the plan that the graph reads
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._lock = threading.Lock()
        self._done = cupy.cuda.Event(disable_timing=True)
        self._launches: dict[tuple[int, int, bool], jit.Launch] = {}
        grown: list[int] = []

        def allocate(size: int) -> Any:
            memory = cupy.cuda.Memory(size)
            grown.append(size)
            return cupy.cuda.MemoryPointer(memory, 0)

        self._pool = cupy.cuda.MemoryPool(allocate)
        try:
            with self._stream:
                pixels = cupy.zeros(shape, dtype)
                self._device = pixels.device
                with cupy.cuda.using_allocator(self._pool.malloc):
                    self._input = patches(pixels)
                    rest(self._input)  # compiles kernels, chooses algorithms, and leaves its memory in the pool
                    self._stream.synchronize()
                    held = self._pool.total_bytes()
                    grown.clear()
                    self._capture()
            if self._pool.total_bytes() < held + sum(grown):
                # short of memory, the pool gave some back to the device that the graph was already going to use
                raise cupy.cuda.memory.OutOfMemoryError(sum(grown), held)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what they hold goes back to the pool
            self.__del__()
            raise

    def _capture(self) -> None:
        import cupy

        # relaxed, so that the pool may grow: it hands out its memory in another order than when it was empty
        self._stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        try:
            self._output = self._rest(self._input)
        except BaseException:
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                self._stream.end_capture()
            raise
        self._graph = self._stream.end_capture()

    def __del__(self) -> None:
        """Give all memory back while there is a pool: CuPy loses the pieces of what was split that outlive theirs."""
        if sys.is_finalizing():
            return
        self._graph = self._output = self._input = None
        self._launches.clear()
        if device := self.__dict__.pop("_device", None):
            with device:
                self._pool.free_all_blocks()

    def __call__(self, pixels: Array, export: Callable[[Array], Array]) -> Any:
        import cupy

        batch, stream = pixels.shape[0], cupy.cuda.get_current_stream()
        with self._lock:
            stream.wait_event(self._done)  # the buffers are free once the last call has copied its result out
            try:
                if not isinstance(pixels, cupy.ndarray):
                    host, pixels = np.ascontiguousarray(pixels), cupy.empty(pixels.shape, pixels.dtype)
                    pixels.set(host, stream=stream)
                self._embed(pixels)
                self._graph.launch(stream)
                if isinstance(self._output, list):
                    return [export(y[:batch]) for y in self._output]
                return export(self._output[:batch])
            finally:
                self._done.record(stream)

    def _embed(self, pixels: Array) -> None:
        """`forward.patches` into the graph's input; where one launch does it, the same one for the next such pixels."""
        batch, address = pixels.shape[0], pixels.data.ptr
        key = (batch, min(address & -address, 256), pixels.flags.c_contiguous)
        if key in self._launches:
            self._launches[key].again(pixels)
            return
        from swincupy import jit

        with jit.recorded() as launches:
            self._patches(pixels, out=self._input[:batch])
        if len(launches) == 1 and (launch := launches[0].without(pixels)) is not None:
            self._launches[key] = launch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether CuPy says so, or CUDA does: not all memory comes from CuPy's pools."""
    import cupy

    if isinstance(error, cupy.cuda.memory.OutOfMemoryError):
        return True
    return isinstance(error, cupy.cuda.runtime.CUDARuntimeError) and error.status == _MEMORY_ALLOCATION


_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation
