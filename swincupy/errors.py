"""The error types of the package: everything it refuses, it refuses with one of these."""

from __future__ import annotations


class SwincupyError(Exception):
    """Base class of all errors raised on purpose by swincupy."""


class ConfigError(SwincupyError, ValueError):
    """A configuration that no Swin Transformer has, or that contradicts the arrays."""


class CheckpointError(SwincupyError, ValueError):
    """A checkpoint that cannot be read, is not a Swin Transformer, or is incomplete."""


class InputError(SwincupyError, ValueError):
    """An image or array that the model cannot take."""


class DeviceError(SwincupyError, RuntimeError):
    """A device or precision that cannot be used on this machine."""


class OutOfMemoryError(DeviceError, MemoryError):
    """An input that does not fit into the device's memory."""


class DownloadError(SwincupyError, OSError):
    """A published checkpoint that could not be downloaded."""
