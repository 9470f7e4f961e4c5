"""Where the references are."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--microsoft", type=Path, help="a checkout of microsoft/Swin-Transformer")
    parser.addoption("--draw", type=int, default=2, help="random configurations per source and version")
    parser.addoption("--draw-seed", type=int, help="first seed of the random configurations; a new one each run")
