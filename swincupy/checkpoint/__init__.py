"""Checkpoints: reading those of every known source, without torch, and writing our own."""

from swincupy.checkpoint.inspection import inspect_checkpoint
from swincupy.checkpoint.reading import Checkpoint, read_checkpoint
from swincupy.checkpoint.writing import save_checkpoint

__all__ = ["Checkpoint", "inspect_checkpoint", "read_checkpoint", "save_checkpoint"]
