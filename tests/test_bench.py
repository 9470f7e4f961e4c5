"""The benchmark times what is right, refuses what is not, and counts what a forward pass moves and computes."""

from __future__ import annotations

import csv
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swincupy import bench, cli, registry
from swincupy.config import SwinConfig, flops
from swincupy.errors import SwincupyError
from swincupy.model import SwinTransformer
from swincupy.ops import cublaslt, fused
from swincupy.parameters import parameter_shapes
from tests.host import device, emulator

MADE_ON = {"device": "GPU", "driver": "CUDA 13.0"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CPU_SIDE", 64)


def test_rows_on_the_cpu() -> None:
    rows = list(bench.run(["demo"], [1, 3], ["fp32", "fp64"], "cpu", check=True, repeats=3))
    assert [(r.model, r.image, r.batch, r.precision) for r in rows] == [
        ("demo", "32x32", 1, "fp32"), ("demo", "32x32", 3, "fp32"),
        ("demo", "32x32", 1, "fp64"), ("demo", "32x32", 3, "fp64"),
    ]  # fmt: skip
    _, config = bench.weights("demo")
    for r in rows:
        assert r.images_s == pytest.approx(1e3 * r.batch / r.ms)
        assert r.tflops == pytest.approx(r.batch * flops(config, 32, 32) / r.ms / 1e9)
        assert r.percent_of_ceiling > 0
        assert r.error is not None and r.error <= (1e-5 if r.precision == "fp32" else 1e-12)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SwinTransformer.__call__

    def wrong(self: SwinTransformer, x: Any) -> Any:
        return right(self, x) + (np.float32(1e-3) if self.precision == "fp32" else 0)

    monkeypatch.setattr(SwinTransformer, "__call__", wrong)
    monkeypatch.setattr(bench, "milliseconds", lambda *args: pytest.fail("timed"))
    with pytest.raises(SwincupyError, match="logits of demo in fp32 at batch 1 must be within 1e-05 of the CPU's, got"):
        list(bench.run(["demo"], [1], ["fp32"], "cpu", check=True))


def test_what_cannot_be_right_is_infinitely_far() -> None:
    assert bench.distance(np.array([np.nan, 1]), np.ones(2)) == float("inf")
    assert bench.distance(np.ones((1, 2)), np.ones((2, 2))) == float("inf")


@pytest.mark.parametrize("name", ["swin_tiny", "swinv2_tiny"])
def test_random_weights(name: str) -> None:
    """All that the configuration asks for, and outputs that are neither tiny nor huge."""
    config = registry.named_config(name).replace(depths=(2, 2), num_heads=(3, 6))
    params = bench.random_weights(config)
    assert {k: v.shape for k, v in params.items()} == parameter_shapes(config)
    assert all(v.dtype == np.float32 for v in params.values())
    y = SwinTransformer(params, config)(bench.images(1, config, (64, 64)))
    assert 0.1 < np.std(y) < 10


def test_larger_batches_begin_with_the_same_images() -> None:
    config = registry.named_config("swin_tiny")
    np.testing.assert_array_equal(bench.images(5, config, (8, 8))[:2], bench.images(2, config, (8, 8)))


def test_tables(tmp_path: Path) -> None:
    rows = [bench.Row("T", "224x224", 1, "fp16", 0.3, 3333.3, 30.0, 4.1, None)]
    text = bench.markdown(rows, MADE_ON)
    assert text.splitlines()[0] == "device GPU, driver CUDA 13.0"
    assert text.splitlines()[2].startswith(
        "| model | image | batch | precision | ms | images/s | tflops | % of ceiling |"
    )
    assert text.splitlines()[4] == "| T | 224x224 | 1 | fp16 | 0.300 | 3333 | 30.0 | 4.100 | - |"
    bench.write_csv(tmp_path / "t.csv", rows, MADE_ON)
    with open(tmp_path / "t.csv", newline="") as file:
        (record,) = csv.DictReader(file)
    assert record["ms"] == "0.3" and record["device"] == "GPU" and record["error"] == ""


# ------------------------------------------------------------------ the command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "rows.csv", tmp_path / "table.md"
    args = ["bench", "--model", "demo", "--batch", "2", "--device", "cpu", "--repeats", "3", "--check"]
    assert cli.main([*args, "--csv", str(written[0]), "--markdown", str(written[1]), "--img-size", "24x40"]) == 0
    out, err = capsys.readouterr()
    assert written[1].read_text() == out and "| demo | 24x40 | 2 | fp32 |" in out and "swincupy: demo 24x40 2" in err
    assert len(written[0].read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--kernels", "--model", "demo", "--batch", "1"], 'kernels must be timed on a GPU, got device "cpu"'),
        (["--kernels", "--batch", "1", "2"], "--kernels must be of one model, batch and precision"),
        (["--model", "swin_huge"], "name must be a published one, got 'swin_huge'"),
        (["--precision", "fp16"], "precision on the CPU must be 'fp32' or 'fp64', got 'fp16'"),
    ],
)
def test_command_refuses(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cpu", *args]) == 1
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ on a GPU, of host memory

CONFIG = SwinConfig(
    img_size=16, patch_size=2, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4, num_classes=3
).with_conventions("microsoft")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    monkeypatch.setattr(bench, "weights", lambda name: (bench.random_weights(CONFIG), CONFIG))
    monkeypatch.setattr(bench, "ceiling", lambda device, precision: 2.0)
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e12)
    monkeypatch.setattr(cublaslt, "bindings", lambda: types.SimpleNamespace(get_version=lambda: 130100))
    with emulator.installed():
        yield


def test_rows_on_a_gpu(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--device", "cuda", "--batch", "1", "3", "--precision", "fp32", "bf16", "--check", "--repeats", "2"]
    assert cli.main(["bench", *args]) == 0
    out = capsys.readouterr().out
    assert out.startswith("device Host memory, swincupy ") and "cublaslt 130100" in out
    assert [line.split(" | ")[2:5] for line in out.splitlines()[4:]] == [
        ["1", "fp32", "0.500"], ["3", "fp32", "0.500"], ["1", "bf16", "0.500"], ["3", "bf16", "0.500"],
    ]  # fmt: skip


def test_kernels(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "on_events", lambda call, repeats: [call(), 0.5][1])
    rows = bench.kernels("any", 2, "fp16", "cuda")
    assert fused.gemm is emulator.gemm, "the launchers are as they were"
    calls = {(r.call, r.shape): r for r in rows}
    assert sum(r.share for r in rows) == pytest.approx(100)
    assert sum(r.times for r in rows) == 1 + 3 * (2 + 2 + 3) + 2 + 2
    # 2 images of 8 x 8 tokens: the first stage's QKV product reads rows and weights, and writes three times the rows
    qkv = calls["gemm", "128x16 128x48"]
    assert qkv.times == 2 and qkv.gflop == pytest.approx(2e-9 * 128 * 16 * 48)
    assert qkv.bytes == 2 * (128 * 16 + 48 * 16 + 48 + 128 * 48)
    assert qkv.us == pytest.approx(1e3 * 0.5 / 20)
    assert qkv.floor_us == pytest.approx(1e6 * max(qkv.bytes / 1e12, qkv.gflop * 1e9 / 2e12))
    residual = calls["gemm residual", "128x16 128x16"]
    assert residual.bytes == 2 * (128 * 16 + 16 * 16 + 16 + 2 * 128 * 16)
    attention = calls["window_attention", "128x48 128x16"]
    assert attention.gflop == pytest.approx(4e-9 * 128 * 16 * 16)
    counted = sum(r.gflop * r.times for r in rows)
    assert counted == pytest.approx(2e-9 * flops(CONFIG, 16, 16), rel=0.01)
    assert device.get_current_stream() is device.null
