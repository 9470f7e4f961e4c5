"""Agreement with the stored answers of the reference implementations; no torch needed.

`tests/parity` says where the files come from and compares live with the same references.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import swincupy
from tests.parity import goldens
from tests.parity.ask import ask

FILES = sorted(goldens.FOLDER.glob("*.safetensors"))


def test_there_are_goldens_of_every_source() -> None:
    sources = {path.stem.split("-v")[0] for path in FILES}
    assert sources == {"microsoft", "timm", "huggingface", "huggingface-backbone", "torchvision", "openmmlab"}
    assert sum(path.stat().st_size for path in FILES) < 3e6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_golden(path: Path) -> None:
    golden = goldens.read(path)
    model = swincupy.load(golden.state_dict(), config=golden.config)
    goldens.compare(ask(model, golden.images(), golden.outputs), golden.outputs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_double_precision_agrees_with_golden(path: Path) -> None:
    """The stored answers are float32; what is left is their own rounding."""
    golden = goldens.read(path)
    model = swincupy.load(golden.state_dict(), config=golden.config, precision="fp64")
    ours = ask(model, golden.images().astype("float64"), golden.outputs)
    assert all(a.dtype == "float64" for a in ours.values())
    goldens.compare(ours, golden.outputs)
