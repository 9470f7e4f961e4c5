"""cuda/gemv.cu compiled by g++ and run on the CPU: its edges."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from swincupy import precision as precisions
from swincupy.ops import gemv, reference
from tests.host import emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU")


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with emulator.installed():
        yield


# one row and several; columns that fill no block; K of less than a warp's packs, of several steps, of odd packs
@pytest.mark.parametrize("size", [(1, 10, 96), (4, 7, 768), (2, 5, 1300), (3, 4, 45)], ids=str)
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("biased", [True, False])
def test_gemv(size: tuple[int, int, int], name: str, biased: bool) -> None:
    (M, N, K), precision, rng = size, precisions.of(name), np.random.default_rng()
    assert gemv.takes(M, K, gelu=False, residual=False)
    shapes = {"a": (M, K), "w": (N, K)} | ({"bias": (N,)} if biased else {})
    x = {
        k: precisions.encode(rng.standard_normal(s) * (K**-0.5 if k == "w" else 1), precision)
        for k, s in shapes.items()
    }
    on = {k: emulator.asarray(v) for k, v in x.items()}
    out = emulator.asarray(np.full((M, N), 0xFF, np.uint8).astype(precision.storage))
    gemv.Product(M, N, K, precision, tile=gemv.TILES[0])(on["a"], on["w"], on.get("bias"), None, out, overlap=True)
    exact = {k: precisions.decode(v, precision).astype(np.float64) for k, v in x.items()}
    want = reference.linear(exact["a"], exact["w"], exact.get("bias"))
    got = precisions.decode(np.asarray(out), precision).astype(np.float64)
    assert np.linalg.norm(got - want) <= precision.tolerance * np.linalg.norm(want)


def test_what_it_does_not_take() -> None:
    assert not gemv.takes(5, 768, gelu=False, residual=False)
    assert not gemv.takes(1, 768, gelu=True, residual=False) and not gemv.takes(1, 768, gelu=False, residual=True)
