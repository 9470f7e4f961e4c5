"""Class names for heads whose classes are known."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def imagenet1k() -> tuple[str, ...]:
    """The 1000 class names of ImageNet-1k in the order of the published heads (read once, see ``data/README.md``)."""
    text = (Path(__file__).parent / "data" / "imagenet1k.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
