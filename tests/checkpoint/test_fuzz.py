"""Whatever the bytes, only the project's own errors come out, soon and in bounded memory."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swincupy.checkpoint import inspect_checkpoint, read_checkpoint
from swincupy.config import SwinConfig
from swincupy.errors import SwincupyError
from tests.checkpoint import writers
from tests.checkpoint.writers import random_params, save_safetensors, save_torch

TINY = SwinConfig(img_size=8, embed_dim=4, depths=(1, 2), num_heads=(1, 2), window_size=2, num_classes=2)
TINY_V2 = TINY.replace(version=2, img_size=16)
FUZZ = settings(
    max_examples=100, deadline=2000, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def seeds() -> dict[str, bytes]:
    """Valid files of both formats, the smaller the better: every byte of them matters."""
    from safetensors.numpy import save

    params = random_params(TINY, dtype="float16")
    own = {"format": "swincupy", "format_version": "1", "config": json.dumps(TINY.to_dict())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        hf = writers.huggingface(params, TINY)
        v2 = writers.microsoft(random_params(TINY_V2), TINY_V2)
        args = writers.Call(writers.Name("argparse", "Namespace"))
        return {
            "own.safetensors": save(params, own),
            "hf.safetensors": save({k: v.copy() for k, v in hf.items()}),
            "model.pth": save_torch(path, {"model": params, "epoch": 3}).read_bytes(),
            "v2.pth": save_torch(path, {"model": v2, "args": args}).read_bytes(),
        }


SEEDS = seeds()


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20  # all examples of a test and hypothesis itself; the files have 100 kB


def survives(path: Path) -> None:
    for read in (read_checkpoint, lambda p: inspect_checkpoint(p, check_values=True)):
        try:
            read(path)
        except SwincupyError as error:
            assert 0 < len(str(error)) < 10_000


@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_valid(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SEEDS[name])
    read_checkpoint(tmp_path / name)


def interesting(raw: bytes) -> Any:
    """Offsets: half of them where the structure is (the header; the pickle; the central directory)."""
    structure = [raw.find(b"data.pkl"), len(raw) - 6000, 0]
    return st.one_of(
        st.integers(0, len(raw) - 1),
        *(st.integers(max(at, 0), min(max(at, 0) + 6000, len(raw) - 1)) for at in structure),
    )


@pytest.mark.parametrize("name", SEEDS)
@given(data=st.data())
@FUZZ
def test_mutated_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    raw = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(interesting(bytes(raw)))
        kind = data.draw(st.sampled_from(["set", "flip", "delete", "insert", "copy", "cut", "length"]))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "flip":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        elif kind == "copy":
            other = data.draw(st.integers(0, len(raw) - 1))
            raw[at : at + 32] = raw[other : other + 32]
        elif kind == "length":
            raw[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"]))
        elif len(raw) > 600:
            raw = raw[: max(at, 1)]
        raw = raw or bytearray(b"\0")
    path = tmp_path / name
    path.write_bytes(bytes(raw))
    survives(path)


@given(st.binary(max_size=400), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x02\0\0\0\0\0\0\0{}"]))
@FUZZ
def test_any_bytes(tmp_path: Path, raw: bytes, head: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(head + raw)
    survives(tmp_path / "x.bin")


PICKLE = st.lists(
    st.one_of(
        st.sampled_from([
            b"}", b"]", b")", b"(", b"t", b"u", b"e", b"s", b"a", b"R", b"b", b"Q", b"N", b"\x85", b"\x86", b"\x87",
            b"0", b"1", b"2", b"\x81", b"\x90", b"\x93", b"\x94", b"ccollections\nOrderedDict\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nFloatStorage\n",
            b"cargparse\nNamespace\n", b"c__builtin__\nset\n", b"X\x07\0\0\0storage", b"X\x01\0\0\x000",
            b"r\xff\xff\xff\x7f", b"q\x01", b"h\x01", b"K\x02", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        ]),
        st.binary(min_size=1, max_size=3),
    ),
    max_size=60,
)  # fmt: skip


@given(PICKLE)
@FUZZ
def test_any_pickle(tmp_path: Path, opcodes: list[bytes]) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + b"".join(opcodes) + b".")
        file.writestr("x/data/0", bytes(64))
    survives(tmp_path / "x.pth")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([7, 2**40, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = {
    **TINY.to_dict(), "model_type": "swin", "architecture": "x", "image_size": 8, "layer_norm_eps": 1, "id2label": {},
    "hidden_act": "gelu", "model_args": {}, "pretrained_cfg": {}, "label_names": [],
}  # fmt: skip


@given(st.dictionaries(st.sampled_from(list(FIELDS)), JSON, max_size=6), st.sampled_from(["swin", "swinv2", None]))
@FUZZ
def test_any_config_json(tmp_path: Path, config: dict[str, Any], model_type: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(SEEDS["hf.safetensors"])
    text = json.dumps(config | ({"model_type": model_type} if model_type else {"architecture": "swin"}))
    for name in ("config", "preprocessor_config"):
        (tmp_path / f"{name}.json").write_text(text)
    survives(tmp_path)


@given(st.dictionaries(st.sampled_from(list(TINY.to_dict())), JSON, min_size=1, max_size=4))
@FUZZ
def test_any_config_in_the_metadata(tmp_path: Path, change: dict[str, Any]) -> None:
    raw = SEEDS["own.safetensors"]
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["config"] = json.dumps(TINY.to_dict() | change)
    survives(save_safetensors(tmp_path / "x.safetensors", header, raw[8 + length :]))


@given(data=st.data())
@FUZZ
def test_any_shapes(tmp_path: Path, data: st.DataObject) -> None:
    """Arrays of the right names and wrong shapes, dtypes and presence."""
    raw = SEEDS[data.draw(st.sampled_from(["own.safetensors", "hf.safetensors"]))]
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if data.draw(st.booleans()):
        header.pop("__metadata__", None)
    for name in data.draw(st.lists(st.sampled_from(sorted(k for k in header if k[0] != "_")), max_size=5)):
        change = data.draw(st.sampled_from(["drop", "shape", "dtype", "rename"]))
        if name not in header:
            continue
        if change == "drop":
            del header[name]
        elif change == "shape":
            header[name]["shape"] = data.draw(st.lists(st.integers(0, 9), max_size=4))
        elif change == "dtype":
            header[name]["dtype"] = data.draw(st.sampled_from(["I64", "U8", "F32", "F16", "BOOL"]))
        else:
            header[name.replace("0", data.draw(st.sampled_from(["1", "7", "999", "99999999999"])))] = header.pop(name)
    end, sizes = 0, {"I64": 8, "U8": 1, "F32": 4, "F16": 2, "BOOL": 1}
    for name in [k for k in header if k[0] != "_"]:
        n = sizes[header[name]["dtype"]]
        for d in header[name]["shape"]:
            n *= d
        header[name]["data_offsets"] = [end, end + n]
        end += n
    survives(save_safetensors(tmp_path / "x.safetensors", header, bytes(end)))
