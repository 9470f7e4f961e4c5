"""Fixtures that every folder of tests may use."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def digits() -> list[Path]:
    """Paths of the sample images, in order; ``digit-<class>-<n>.png``."""
    paths = sorted((ROOT / "examples" / "digits").glob("digit-*.png"))
    if not paths:
        raise FileNotFoundError("the sample images are missing: examples/digits/digit-<class>-<n>.png")
    return paths
