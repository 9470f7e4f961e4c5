"""Fixtures that every folder of tests may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swincupy import devices

ROOT = Path(__file__).resolve().parents[1]
FIND = devices.find


@pytest.fixture(scope="module", autouse=True)
def no_gpu_is_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models for which no device is asked run on the CPU, whatever this machine has; not so in tests/gpu.

    Of the module, so that it is there before models that the tests of a module share.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not request.path.is_relative_to(ROOT / "tests" / "gpu"):
            patch.setattr(devices, "find", lambda: devices.Found(reason="these tests are of the CPU"))
        yield


@pytest.fixture
def gpus_are_looked_for() -> Iterator[None]:
    """What `no_gpu_is_found` took away, for a test that has GPUs of its own making."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "find", FIND)
        yield


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
