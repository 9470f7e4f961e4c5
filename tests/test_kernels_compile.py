"""Every kernel compiles for every GPU generation, with no GPU there; and each has one name everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swincupy import jit
from swincupy.errors import DeviceError
from swincupy.ops import (
    attention,
    cutlass,
    fused,
    fused_attention,
    fused_mlp,
    gemm,
    gemv,
    kernels,
    reference,
    wgmma,
)
from tests.op_cases import CASES

SMS = (75, 80, 86, 89, 90, 100, 120)
MODULES = (kernels, attention, gemm, gemv, wgmma, cutlass, fused_attention, fused_mlp)
VARIANTS = [v for module in MODULES for v in module.variants()]
NAMES = sorted({v.name for v in VARIANTS})

# Launched by a module of its own, or a step of the operations beside it
HELPERS = {
    "gemm": gemm.gemm, "gemv": gemv.Product, "wgmma_gemm": wgmma.Product, "cutlass_gemm": cutlass.Product,
    "window_attention": attention.window_attention, "attention_block": fused_attention.attention_block,
    "attention_cluster": fused_attention.attention_block,
    "mlp_block": fused_mlp.mlp_block,
}  # fmt: skip
#: What no kernel of a forward pass writes.
CONSTANT = {
    "gamma", "beta", "bias", "qkv_bias", "position_bias", "logit_scale", "affine", "weight", "weights", "vectors",
    "image", "position", "w", "sums_of_w",
}  # fmt: skip


def jobs(name: str) -> Iterator[tuple[jit.Variant, int]]:
    """The kernel's first variant for all generations, the others for their oldest, SM 9.0, and one more in turn."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy, for NVRTC")
    known = set(map(int, cupy.cuda.nvrtc.getSupportedArchs()))
    for i, v in enumerate(v for v in VARIANTS if v.name == name):
        sms = {90} if v.arch else {v.min_sm, 90, SMS[i % len(SMS)]} if i else set(SMS)
        yield from ((v, sm) for sm in sms & known if sm >= v.min_sm)


@pytest.mark.parametrize("name", NAMES)
def test_compiles(name: str) -> None:
    if name == "cutlass_gemm":
        try:
            jit.cutlass()
        except DeviceError as error:
            pytest.skip(str(error))
    with ThreadPoolExecutor(2) as pool:
        sizes = list(pool.map(lambda job: len(jit.compile_to_cubin(*job)), jobs(name)))
    assert sizes and min(sizes) > 0


@pytest.mark.parametrize("name", NAMES)
def test_first_variant_runs_on_every_generation(name: str) -> None:
    first = next(v for v in VARIANTS if v.name == name)
    assert first.arch or first.min_sm == min(SMS)  # what is made for one GPU alone is never the only way


def test_one_name_everywhere(root: Path) -> None:
    """cuda/<op>.cu holds extern "C" <op>, a method of Fused or a helper named above, documented and tested."""
    files = sorted((root / "cuda").glob("*.cu"))
    assert sorted(f.stem for f in files) == NAMES
    readme = (root / "cuda" / "README.md").read_text()
    tested = {c.op for c in CASES} | {f.stem[5:] for f in (root / "tests" / "gpu").glob("test_*.py")}
    for file in files:
        text = file.read_text()
        attributes = r"(?:__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*"
        entries = re.findall(rf'extern\s+"C"\s+__global__\s+void\s+{attributes}(\w+)\s*\(', text)
        assert entries == [file.stem]
        assert hasattr(fused.Fused, file.stem) or file.stem in HELPERS, f"{file.name}: no operation of that name"
        assert hasattr(kernels, file.stem) or file.stem in HELPERS, f"{file.name}: no launcher of that name"
        assert f"| `{file.stem}` |" in readme, f"{file.name}: no row in cuda/README.md"
        assert file.stem in tested, f"{file.name}: no test on a GPU"
        assert text.startswith(f"// {file.stem} "), f"{file.name}: must open with its facts"


@pytest.mark.parametrize("name", NAMES)
def test_what_kernels_write_is_not_read_as_constant(name: str, root: Path) -> None:
    """A kernel that starts before the one ahead is done must see what that one writes, see cuda/common.cuh."""
    text = (root / "cuda" / f"{name}.cu").read_text()
    if "wait_for_kernels_ahead();" not in text:
        pytest.skip("starts after the kernels ahead of it")
    found = set(re.findall(r"const \w+\* __restrict__ (\w+)", text))
    assert found <= CONSTANT and len(found) == text.count("__restrict__")


def test_operations_have_the_arguments_of_the_reference() -> None:
    """Fused takes what the reference takes, in the same order; what it takes besides comes last, by keyword."""
    import inspect

    for name, method in inspect.getmembers(fused.Fused, inspect.isfunction):
        if name.startswith("_") or not hasattr(reference, name):
            continue
        mine = list(inspect.signature(method).parameters)[1:]
        theirs = list(inspect.signature(getattr(reference, name)).parameters)
        assert mine[: len(theirs)] == theirs, name


def test_launch_parameters_are_read_from_the_source() -> None:
    found = jit.parameters("layer_norm", {"scalar_t": "__half"})
    assert [(p.name, p.ctype, p.pointer) for p in found] == [
        ("x", "__half", True), ("gamma", "__half", True), ("beta", "__half", True), ("out", "__half", True),
        ("rows", "int", False), ("eps", "float", False),
    ]  # fmt: skip


def test_hash_covers_included_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "resource_dir", lambda name: tmp_path)
    monkeypatch.setattr(jit, "_read", jit._read.__wrapped__)
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text('#include "c.cuh"\n')
    (tmp_path / "c.cuh").write_text('#include "b.cuh"\nint one;\n')
    before = jit.include_hash.__wrapped__("a.cu")
    (tmp_path / "c.cuh").write_text('#include "b.cuh"\nint two;\n')
    assert jit.include_hash.__wrapped__("a.cu") != before


def test_prelude() -> None:
    text = jit.prelude({"scalar_t": "__half", "C": 96, "NORM": True, "SCALE": 1e-5})
    assert text.splitlines() == [
        "constexpr int C = 96;", "constexpr bool NORM = true;", "constexpr float SCALE = 1e-05f;",
        "using scalar_t = __half;",
    ]  # fmt: skip


def test_a_kernel_that_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", reason="needs CuPy, for NVRTC")
    variant = jit.Variant("layer_norm", {"scalar_t": "float", "C": 7, "VEC": 2, "GROUP": 4, "ROWS": 32})
    with pytest.raises(DeviceError, match="packs must fill a row"):
        jit.compile_to_cubin(variant, 90)
