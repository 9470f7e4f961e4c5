"""How a forward pass is run: operation by operation, or replayed as a CUDA graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from swincupy import forward
from swincupy.config import SwinConfig
from swincupy.parameters import fold, plan

Array = Any

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
    """

    def __init__(
        self, params: Mapping[str, np.ndarray], config: SwinConfig, ops: Any, convert: Callable[[Any], Array]
    ) -> None:
        self.config, self.ops, self.convert = config, ops, convert
        self.weights = fold(params, config, convert)
        self._plans: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, what: Callable[..., Any], pixels: Array, **options: Any) -> Any:
        """``what`` of `forward` (logits, embed, features) for pixels [B, C, H, W]."""
        block = forward.BLOCK[self.config.version]
        return what(pixels, self.weights, self.plan(*pixels.shape[2:]), block, self.ops, **options)

    def plan(self, height: int, width: int) -> Any:
        """The plan of an input size: masks and biases, kept for the last few sizes."""
        size = (height, width)
        with self._lock:
            found = self._plans.pop(size, None)
            if found is None:
                found = plan(self.weights, self.config, height, width, self.convert)
            self._plans[size] = found
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return found
