"""swincupy: Swin Transformer inference over plain arrays, without PyTorch.

>>> import swincupy
>>> model = swincupy.load("swin_tiny_patch4_window7_224.ms_in1k")
>>> logits = model(pixels)  # [B, 3, H, W] float32 -> [B, 1000]
"""

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
