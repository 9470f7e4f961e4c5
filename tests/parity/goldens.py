"""Golden files: what a reference answered, and all it takes to ask swincupy the same.

One safetensors file a case. Tensors: the outputs, float32. Metadata, as JSON: ``provenance`` (versions,
commit, seed), ``config`` (what the loader is told), ``shape`` of the input, ``parameters`` (name in
the source's layout -> shape; the values come from `recipe`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from swincupy import SwinConfig
from tests.parity import recipe

FOLDER = Path(__file__).resolve().parents[1] / "goldens"

#: Largest difference allowed in float32, as a part of the largest value of the output.
TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file; the fields are those of the module's text."""

    config: SwinConfig
    shape: tuple[int, int, int, int]
    parameters: dict[str, tuple[int, ...]]
    provenance: dict[str, str]
    outputs: dict[str, np.ndarray]

    @property
    def seed(self) -> int:
        return int(self.provenance["seed"])

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights behind it, in the source's layout."""
        return recipe.state_dict(self.parameters, self.seed)

    def images(self) -> np.ndarray:
        return recipe.images(self.shape, self.seed)

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        texts = {
            "provenance": self.provenance,
            "config": self.config.to_dict(),
            "shape": self.shape,
            "parameters": self.parameters,
        }
        outputs = {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in self.outputs.items()}
        save_file(outputs, path, {"golden": json.dumps(texts)})  # one entry: safetensors writes several in any order


def read(path: Path) -> Golden:
    """The inverse of `Golden.save`."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        texts = json.loads(file.metadata()["golden"])
        outputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Golden(
        SwinConfig.from_dict(texts["config"]),
        tuple(texts["shape"]),
        {name: tuple(shape) for name, shape in texts["parameters"].items()},
        texts["provenance"],
        outputs,
    )


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """Fail, with a table of all outputs, where one differs by more than ``tolerance`` of its scale."""
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    lines, worst = [], 0.0
    for name, b in theirs.items():
        a = ours[name]
        assert a.shape == b.shape, f"{name}: shape {a.shape} instead of {b.shape}"
        difference = float(np.abs(a - b).max() / np.abs(b).max())
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
        lines.append(f"{name:8} {a.shape!s:20} {difference:.2e}")
    assert worst <= tolerance, f"off by more than {tolerance} of the scale\n" + "\n".join(lines)
