"""Products of few rows against float64: every type; columns that fill no block; early starts."""

from __future__ import annotations

import pytest

from swincupy import precision as precisions
from swincupy.ops import gemv
from tests.gpu.products import distance, draw, plain

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [(1, 1000, 768), (4, 1000, 1536), (2, 37, 1024), (3, 10, 45)], ids=str)
@pytest.mark.parametrize("parts", [("bias",), ()], ids=str)
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_gemv(name: str, parts: tuple[str, ...], size: tuple[int, int, int]) -> None:
    x, want = draw(name, *size, parts)
    precision, (M, N, K) = precisions.of(name), size
    for tile in gemv.TILES:
        guarded = cupy.full((M + 1, N * precision.storage.itemsize), 0xFF, "uint8").view(precision.storage)  # NaN
        out, beyond = guarded[:-1], guarded[-1].copy()
        for overlap in (False, True):
            gemv.Product(M, N, K, precision, tile=tile)(x["a"], x["w"], x.get("bias"), None, out, overlap=overlap)
            error = distance(out, want, name)
            assert error <= precision.tolerance
            if name != "fp32":
                assert error <= 2 * distance(plain(x, name, gelu=False), want, name)
        assert cupy.array_equal(guarded[-1].view("uint8"), beyond.view("uint8")), "wrote past the last row"
