"""Plans are made once for a size and bounded in number; batches are rounded up by a rule of their own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from swincupy import engine, forward
from swincupy.config import SwinConfig
from swincupy.engine import Eager, bucket
from swincupy.ops import reference
from swincupy.parameters import parameter_shapes
from tests.parity import recipe

CONFIG = SwinConfig(
    img_size=16, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=2, num_classes=3
).with_conventions("microsoft")


@pytest.fixture
def eager() -> Eager:
    params = recipe.state_dict(parameter_shapes(CONFIG), seed=1)
    return Eager(params, CONFIG, reference, lambda x: np.asarray(x, np.float32))


def test_runs_what_it_is_asked(eager: Eager) -> None:
    x = recipe.images((2, 3, 16, 20), seed=1)
    assert eager.run(forward.logits, x).shape == (2, 3)
    assert eager.run(forward.embed, x).shape == (2, 16)
    assert [m.shape for m in eager.run(forward.features, x, wanted=(1, 0), norm=False)] == [(2, 2, 3, 16), (2, 4, 5, 8)]


def test_plans_are_kept_for_the_last_sizes(eager: Eager) -> None:
    first = eager.plan(16, 16)
    assert eager.plan(16, 16) is first
    for i in range(1, engine._PLANS):
        eager.plan(16, 16 + i)
    assert eager.plan(16, 16) is first  # used again, so it is now the newest
    for i in range(engine._PLANS - 1):
        eager.plan(32, 16 + i)
    assert eager.plan(16, 16) is first
    for i in range(engine._PLANS):
        eager.plan(48, 16 + i)
    assert eager.plan(16, 16) is not first
    assert len(eager._plans) == engine._PLANS


def test_a_plan_is_made_once_by_many_threads(eager: Eager, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        made.append(args[2:4])
        return original(*args, **options)

    original = engine.plan
    monkeypatch.setattr(engine, "plan", counted)
    together = threading.Barrier(4)

    def ask() -> Any:
        together.wait()
        return eager.plan(24, 32)

    with ThreadPoolExecutor(4) as pool:
        plans = [job.result() for job in [pool.submit(ask) for _ in range(4)]]
    assert made == [(24, 32)] and all(one is plans[0] for one in plans)


def test_buckets() -> None:
    """Exact to 16, then at most an eighth more; monotone, and a bucket is its own bucket."""
    sizes = range(1, 2000)
    assert all(bucket(n) == n for n in range(1, 17))
    assert all(n <= bucket(n) <= n * 1.125 for n in sizes)
    assert all(bucket(n) <= bucket(n + 1) and bucket(bucket(n)) == bucket(n) for n in sizes)
    assert len({bucket(n) for n in range(1, 1025)}) <= 16 + 8 * 6
