"""swincupy: Swin Transformer inference over plain arrays, without PyTorch.

>>> import swincupy
>>> model = swincupy.load("swin_tiny_patch4_window7_224.ms_in1k")
>>> logits = model(pixels)  # [B, 3, H, W] float32 -> [B, 1000]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swincupy import ops
    from swincupy.config import SwinConfig
    from swincupy.errors import CheckpointError, ConfigError, DeviceError, DownloadError, InputError, SwincupyError
    from swincupy.model import Prediction, SwinTransformer, load

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "DownloadError",
    "InputError",
    "Prediction",
    "SwinConfig",
    "SwinTransformer",
    "SwincupyError",
    "__version__",
    "load",
    "ops",
]


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is first asked for: the package itself costs next to nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ops":
        return importlib.import_module("swincupy.ops")
    of = {"SwinConfig": "config", "Prediction": "model", "SwinTransformer": "model", "load": "model"}.get(
        name, "errors"
    )
    globals()[name] = found = getattr(importlib.import_module(f"swincupy.{of}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
