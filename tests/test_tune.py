"""The cache of measurements, the products of a model, the seed's arguments; what needs no GPU."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swincupy import SwinConfig, tune
from swincupy.errors import ConfigError, DeviceError, SwincupyError
from swincupy.ops import cutlass, gemm, wgmma

HERE = "NVIDIA H200 | driver 13000 | cuBLASLt 130100 | kernel 0123456789ab"
STALE = "NVIDIA H200 | driver 12080 | cuBLASLt 120900 | kernel 0123456789ab"
OTHER = "NVIDIA A100 | driver 13000 | cuBLASLt 130100 | kernel 0123456789ab"
PROBLEM = gemm.Problem(3136, 384, 96, "fp16", True, True, False)
KEY = "3136 x 384 x 96 fp16 bias+gelu"
ALGORITHM = bytes(range(64))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of the cache, on a machine whose GPU is an H200."""
    monkeypatch.setenv("SWINCUPY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setattr(tune, "environment", lambda device: HERE)
    device = types.ModuleType("cupy.cuda.device")
    device.get_device_id = lambda: 0  # type: ignore[attr-defined]
    for name, module in {"cupy": types.ModuleType("cupy"), "cupy.cuda": types.ModuleType("cupy.cuda")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cupy.cuda.device", device)
    monkeypatch.setattr(tune, "shipped_path", lambda: tmp_path / "tuned.json")
    ship(tmp_path / "tuned.json", {})
    forget()
    yield tmp_path / "caches" / "gemm.json"
    forget()


def forget() -> None:
    tune._entries.cache_clear()
    tune._shipped.cache_clear()


def ship(path: Path, environments: Any) -> None:
    path.write_text(json.dumps({"format": 1, "environments": environments}))


def store(cache: Path, environments: Any) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps({"format": 1, "environments": environments}))


def result(choice: Any, *, M: int = 3136, microseconds: float = 5.0) -> tune.Result:
    return tune.Result(tune.Shape("stage0.fc1", M, 384, 96, "bias+gelu", 2), choice, microseconds, 6.0)


@pytest.mark.parametrize("choice", [ALGORITHM, gemm.TILES[2], wgmma.TILES[0], cutlass.TILES[1]], ids=str)
def test_what_is_saved_is_found(cache: Path, choice: Any) -> None:
    assert tune.save([result(choice)], "fp16") == cache
    assert tune.lookup(PROBLEM) == choice and type(tune.lookup(PROBLEM)) is type(choice)
    assert tune.lookup(PROBLEM._replace(M=1)) is None
    assert tune.lookup(PROBLEM._replace(precision="bf16")) is None
    assert tune.lookup(PROBLEM._replace(gelu=False)) is None
    assert tune.lookup(PROBLEM._replace(alignment=16)) is None


def test_no_cache(cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tune.lookup(PROBLEM) is None


def test_what_is_shipped(cache: Path) -> None:
    """Is used where the user has not measured: on the GPU it is from, with algorithms of the library it is from."""
    other = "49 x 384 x 96 fp16 bias+gelu"
    entries = {KEY: {"choice": ALGORITHM.hex()}, other: {"choice": tune._encode(wgmma.TILES[1])}}
    path = tune.shipped_path()
    for where, of_library, of_ours in (
        (HERE, ALGORITHM, wgmma.TILES[1]), (HERE.replace("13000", "13020"), ALGORITHM, wgmma.TILES[1]),
        (STALE, None, wgmma.TILES[1]), (OTHER, None, None),
    ):  # fmt: skip
        ship(path, {where: entries})
        forget()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tune.lookup(PROBLEM) == of_library
            assert tune.lookup(PROBLEM._replace(M=49)) == of_ours
    ship(path, {HERE: entries | {KEY: {"choice": ["a tile", "of long ago"]}}})
    forget()
    assert tune.lookup(PROBLEM) is None
    tune.save([result(gemm.TILES[0])], "fp16")
    assert tune.lookup(PROBLEM) == gemm.TILES[0]


def test_the_shipped_file() -> None:
    for entries in tune.read(tune.shipped_path()).values():
        for key, entry in entries.items():
            M, _, N, _, K, precision, epilogue = key.split()
            problem = tune.problem(tune.Shape("", int(M), int(N), int(K), epilogue, 1), precision)
            assert tune._key(problem) == key
            assert tune._decode(entry["choice"]) and entry["microseconds"] > 0


def test_saving_merges(cache: Path) -> None:
    store(cache, {OTHER: {KEY: {"choice": "ff"}}, STALE: {KEY: {"choice": "ff"}}})
    tune.save([result(ALGORITHM)], "fp16")
    tune.save([result(gemm.TILES[0], M=49), result(gemm.TILES[1])], "fp16")
    known = tune.read(cache)
    assert sorted(known) == [OTHER, HERE]  # another GPU's stay, stale ones of this GPU go
    assert known[HERE].keys() == {KEY, "49 x 384 x 96 fp16 bias+gelu"}
    assert tune.lookup(PROBLEM) == gemm.TILES[1]
    assert list(cache.parent.iterdir()) == [cache]


def test_a_stale_cache_is_ignored(cache: Path) -> None:
    store(cache, {STALE: {KEY: {"choice": ALGORITHM.hex()}}})
    with pytest.warns(RuntimeWarning, match=r"driver 12080.*driver 13000.*swincupy tune"):
        assert tune.lookup(PROBLEM) is None
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert tune.lookup(PROBLEM) is None


def test_another_gpus_cache_is_no_reason_to_warn(cache: Path) -> None:
    store(cache, {OTHER: {KEY: {"choice": ALGORITHM.hex()}}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tune.lookup(PROBLEM) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b'{"format": 99, "environments": {}}',
     b'{"format": 1}', b'{"format": 1, "environments": [1]}', b'{"format": 1, "environments": {"x": 3}}'],
    ids=["empty", "truncated", "list", "text", "not-utf8", "deep", "format", "no-entries", "a-list", "no-table"],
)  # fmt: skip
def test_a_corrupt_cache_is_ignored_and_replaced(cache: Path, content: bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"gemm\.json cannot be read"):
        assert tune.lookup(PROBLEM) is None
    tune.save([result(ALGORITHM)], "fp16")
    assert tune.lookup(PROBLEM) == ALGORITHM


@pytest.mark.parametrize(
    "entry",
    [3, {}, {"choice": "xyz"}, {"choice": 3}, {"choice": [1, 2]}, {"choice": [1, 2, 3, 4, 5]}, {"choice": None},
     {"choice": ["a"] * 5}, {"choice": [[], [], [], [], []]}],
    ids=str,
)  # fmt: skip
def test_a_corrupt_entry_is_ignored(cache: Path, entry: Any) -> None:
    store(cache, {HERE: {KEY: entry}})
    with pytest.warns(RuntimeWarning, match="3136 x 384 x 96"):
        assert tune.lookup(PROBLEM) is None


def test_a_folder_in_place_of_the_cache(cache: Path) -> None:
    cache.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert tune.lookup(PROBLEM) is None
    with pytest.raises(DeviceError, match="SWINCUPY_CACHE_DIR"):
        tune.save([result(ALGORITHM)], "fp16")
    assert list(cache.parent.iterdir()) == [cache]  # no half-written file is left


@pytest.mark.parametrize(
    ("platform", "variable", "where"),
    [("linux", "XDG_CACHE_HOME", "swincupy"), ("win32", "LOCALAPPDATA", "swincupy"),
     ("linux", None, ".cache/swincupy"), ("darwin", None, "Library/Caches/swincupy")],
)  # fmt: skip
def test_cache_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str | None, where: str
) -> None:
    for name in ("SWINCUPY_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path))
    assert tune.cache_path() == tmp_path / where / "gemm.json"


def test_gemm_shapes_of_swin_tiny() -> None:
    shapes = tune.gemm_shapes(SwinConfig(), 32, 224, 224)
    assert len(shapes) == 4 * 4 + 3 + 1
    assert shapes[0] == ("stage0.qkv", 100352, 288, 96, "bias", 2)
    assert shapes[2] == ("stage0.fc1", 100352, 384, 96, "bias+gelu", 2)
    assert shapes[4] == ("stage0.merge", 25088, 192, 384, "none", 1)
    assert shapes[13] == ("stage2.fc2", 6272, 384, 1536, "bias+residual", 6)
    assert shapes[-1] == ("head", 32, 1000, 768, "bias", 1)
    # published: 4.5 G multiply-adds an image, of which the patch embedding and the attention's products take 0.2
    multiply_adds = sum(s.times * s.M * s.N * s.K for s in shapes) / 32
    assert 4.2e9 < multiply_adds < 4.5e9


def test_gemm_shapes_with_norms_in_products() -> None:
    shapes = {s.name: s.epilogue for s in tune.gemm_shapes(SwinConfig(), 1, 224, 224, lambda M, N, K: M <= 256)}
    assert shapes["stage1.qkv"] == "bias" and shapes["stage0.merge"] == "none"
    names = ("stage1.merge", "stage2.qkv", "stage2.proj", "stage2.fc1", "stage2.fc2", "stage2.merge", "stage3.qkv")
    assert [shapes[n] for n in names] == [
        "moments", "norm+bias", "bias+residual+moments", "norm+bias+gelu", "bias+residual+moments", "moments",
        "norm+bias",
    ]  # fmt: skip
    assert tune.problem(tune.Shape("x", 784, 192, 384, "gather28+norm+bias", 1), "fp16").gather == 28
    merges = tune.gemm_shapes(SwinConfig(), 1, 224, 224, merge=lambda M, N, K, width: f"gather{width}")
    assert [s.epilogue for s in merges if "merge" in s.name] == ["gather28", "gather14", "gather7"]
    version_2 = tune.gemm_shapes(SwinConfig(version=2), 1, 224, 224, lambda M, N, K: True)
    assert not any("norm" in s.epilogue or "moments" in s.epilogue for s in version_2)


def test_gemm_shapes_of_odd_sizes() -> None:
    config = SwinConfig(version=2, depths=(1, 3), num_heads=(2, 4), embed_dim=24, num_classes=0, qkv_bias=False)
    shapes = {s.name: s for s in tune.gemm_shapes(config, 3, 50, 27)}  # 13 x 7 tokens, then 7 x 4
    assert shapes["stage0.qkv"] == ("stage0.qkv", 273, 72, 24, "none", 1)
    assert shapes["stage0.merge"] == ("stage0.merge", 84, 48, 96, "none", 1)
    assert shapes["stage1.fc2"] == ("stage1.fc2", 84, 48, 192, "bias", 3)  # the residual comes after the LayerNorm
    assert "head" not in shapes


def test_positional() -> None:
    config, batch, precision = tune.positional(["32", "256", "8", "4", "24", "1", "0"])
    assert (config.img_size, config.window_size, config.dims, config.num_heads) == (
        256, 8, (96, 192, 384, 768), (4, 8, 16, 32)
    )  # fmt: skip
    assert (batch, precision) == (32, "fp16")
    assert [tune.positional([1, 224, 7, 3, 32, d, 0])[2] for d in range(3)] == ["fp32", "fp16", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("32 224 7 3 32 1", "seven integers"),
        ("32 224 7 3 32 fp16 0", "seven integers"),
        ("0 224 7 3 32 1 0", "BATCH"),
        ("1 224 7 3 -32 1 0", "SIZE_PER_HEAD"),
        ("1 224 7 3 32 3 0", "DTYPE"),
        ("1 224 7 3 32 1 1", "INT8 must be 0, got 1"),
        ("1 224 7 3 32 1 3", "INT8 must be 0, 1 or 2"),
    ],
)
def test_positional_refuses(arguments: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        tune.positional(arguments.split())


def test_tune_refuses() -> None:
    with pytest.raises(ConfigError, match="img_size"):
        tune.measure(SwinConfig(img_size=None), 1)
    with pytest.raises(ConfigError, match="config"):
        tune.measure(3, 1)
    with pytest.raises(ValueError, match="batch"):
        tune.measure(SwinConfig(), 0)
    with pytest.raises(SwincupyError, match="did you mean 'swin_tiny'"):
        tune.measure("swin_tinny", 1)


def test_table() -> None:
    text = tune.table([result(ALGORITHM, microseconds=5.0), result(gemm.TILES[0], microseconds=2.0)])
    assert "cuBLASLt" in text and "gemm 128x128x64x32x3" in text
    assert "0.014 ms, 0.024 ms" in text  # each product twice
