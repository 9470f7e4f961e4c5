"""attention_cluster on a GPU: what the wide stages' kernel does besides the cases of test_attention_block.py."""

from __future__ import annotations

import numpy as np
import pytest

from swincupy import jit
from swincupy import precision as precisions
from swincupy.errors import InputError
from swincupy.ops import fused_attention
from tests.op_cases import distance

cupy = pytest.importorskip("cupy", reason="needs CuPy")
from tests.gpu.test_attention_block import NAMES, arrays_of, block, check, launch, pack  # noqa: E402  (needs it, too)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def only_on_hopper() -> None:
    if jit.compute_capability() != 90:
        pytest.skip("needs SM 9.0")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("C", [384, 512])
def test_moments(C: int, name: str) -> None:
    """Of each 32 neighbours in a row of the result, the mean and the sum of squared deviations from it."""
    precision, case = precisions.of(name), block((2, 14, 21, C), 7, (3, 2))
    arrays = arrays_of(case, precision, seed=6)
    moments = cupy.full((2 * 14 * 21, C // 32, 2), np.nan, np.float32)
    y = launch(case, arrays, precision, moments=moments)
    assert cupy.array_equal(y.view(np.uint16), launch(case, arrays, precision).view(np.uint16))
    parts = precisions.decode(y.get(), precision).astype(np.float64).reshape(-1, C // 32, 32)
    want = np.stack([parts.mean(-1), 32 * parts.var(-1)], axis=-1)
    assert distance(moments.get(), want) <= precision.tolerance
    with pytest.raises(InputError, match="^attention_block: moments must be"):
        launch(case, arrays, precision, moments=moments[1:])


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("C", [384, 512])
def test_every_number_of_clusters(C: int, cosine: bool) -> None:
    """One, as many as run at once, more; each shift of an axis; windows of the edges alone."""
    for size, shift in (((1, 7, 7), (3, 3)), ((1, 7, 49), (0, 3)), ((1, 63, 7), (6, 0)), ((2, 7, 7), (1, 6))):
        check(block((*size, C), 7, shift, cosine=cosine), "fp16")


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("C", [384, 512])
def test_in_place_within_a_graph(C: int, cosine: bool) -> None:
    """Blocks read all of their rows before one writes; kernels in a row overlap and still wait."""
    precision, case = precisions.of("fp16"), block((1, 14, 14, C), 7, (3, 3), cosine=cosine)
    arrays = arrays_of(case, precision, seed=7)
    packed, bias = pack(arrays, precision)
    x = cupy.asarray(arrays["x"])

    def run(x: object, out: object) -> object:
        return fused_attention.attention_block(
            x, packed, bias, window=(7, 7), shift=(3, 3), precision=precision, out=out
        )

    want = x
    for _ in range(20):
        want = run(want, None)
    stream, y = cupy.cuda.Stream(non_blocking=True), x.copy()
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        for _ in range(20):
            run(y, y)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    assert cupy.array_equal(y.view(np.uint16), want.view(np.uint16))
