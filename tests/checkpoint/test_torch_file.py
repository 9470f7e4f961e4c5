"""Files of torch.save: tensors come out, nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swincupy.checkpoint import read_checkpoint
from swincupy.checkpoint.tensors import StoredTensor
from swincupy.checkpoint.torch_file import read_torch
from swincupy.errors import CheckpointError
from tests.checkpoint import writers
from tests.checkpoint.writers import V1, Call, Name, Tensor, pickled, random_params, save_torch

ORDERED = Name("collections", "OrderedDict")


def plain(tree: Any) -> Any:
    if isinstance(tree, StoredTensor):
        return tree.read()
    return {k: plain(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_tensors_and_plain_values(tmp_path: Path, byteorder: str) -> None:
    r = np.random.default_rng(0)
    arrays = {dtype: (9 * r.random((2, 3))).astype(dtype) for dtype in writers.KINDS}
    arrays |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(3.5)}
    rest = {"epoch": 3, "lr": 1e-4, "name": "ä", "flags": [True, None, (1, -70_000)], "big": 2**70}
    found = plain(read_torch(save_torch(tmp_path / "x.pth", arrays | rest, byteorder=byteorder)))
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    assert {k: found[k] for k in rest} == rest


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    x = np.array([1.0, -2.5, 0.0], np.float32)
    found = read_torch(save_torch(tmp_path / "x.pth", {"a": ("bf16", x)}))["a"]
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.read(), x)


def test_views_of_a_storage(tmp_path: Path) -> None:
    raw = np.arange(24, dtype=np.float32)
    tree = {
        "whole": Tensor("Float", "s", 24, (4, 6), (6, 1)),
        "transposed": Tensor("Float", "s", 24, (6, 4), (1, 6)),
        "row": Tensor("Float", "s", 24, (6,), (1,), 12),
        "column": Tensor("Float", "s", 24, (4,), (6,), 5),
        "one": Tensor("Float", "s", 24, (1, 1), (10**30, 10**30), 23),
    }
    found = plain(read_torch(save_torch(tmp_path / "x.pth", tree, records={"s": raw.tobytes()})))
    whole = raw.reshape(4, 6)
    for name, x in dict(whole=whole, transposed=whole.T, row=whole[2], column=whole[:, 5], one=whole[3:, 5:]).items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert not found[name].flags.writeable


def test_a_published_looking_file(tmp_path: Path) -> None:
    """microsoft's: weights, optimizer, a yacs configuration, scheduler."""
    params = random_params(V1)
    node = Call(Name("yacs.config", "CfgNode"), opcode=b"\x81", state={"__immutable__": True})
    tree = {
        "model": writers.microsoft(params, V1),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": params["norm.weight"]}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 3},
        "max_accuracy": 81.2,
        "config": node,
        "args": Call(Name("argparse", "Namespace"), opcode=b"\x81", state={"cfg": "x.yaml"}),
        "epoch": 299,
    }
    found = read_checkpoint(save_torch(tmp_path / "swin_tiny.pth", tree))
    assert all(np.array_equal(found.params[k], v) for k, v in params.items())


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's own files")
    x = torch.randn(4, 6)
    tree = torch.nn.Linear(3, 2).state_dict() | {
        "t": x.t(), "half": x.half(), "bf16": x.bfloat16(), "p": torch.nn.Parameter(x), "n": {"long": x.long()},
        "set": {1},
    }  # fmt: skip
    for protocol in (2, 3, 4, 5):
        torch.save(tree, tmp_path / "x.pth", pickle_protocol=protocol)
        found = plain(read_torch(tmp_path / "x.pth"))
        np.testing.assert_array_equal(found["weight"], tree["weight"].numpy())
        np.testing.assert_array_equal(found["t"], x.t().numpy())
        np.testing.assert_array_equal(found["half"], x.half().numpy())
        np.testing.assert_array_equal(found["bf16"], x.bfloat16().float().numpy())
        np.testing.assert_array_equal(found["p"], x.numpy())
        np.testing.assert_array_equal(found["n"]["long"], x.long().numpy())
    torch.save(tree, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6.*torch\.save\(torch\.load"):
        read_torch(tmp_path / "old.pth")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    save_torch(tmp_path / "x.pth", {"a": Tensor("Float", "s", 2**24, (2**24,), (1,))}, records={"s": bytes(2**26)})
    tracemalloc.start()
    read_torch(tmp_path / "x.pth")["a"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# --- files that try to run code


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, pickle_bytes: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle_bytes)
        for name, raw in records.items():
            file.writestr(f"archive/data/{name}", raw)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"model": {"a": x}}, lambda x: [(x,)], lambda x: {"a": {x: 1}}]
)
def test_nothing_runs(tmp_path: Path, protocol: int, wrap: Any) -> None:
    mark = tmp_path / "ran"
    for evil in (
        Evil(os.system, f"touch {mark}"),
        Evil(eval, f"open({str(mark)!r}, 'w')"),
        Evil(exec, f"open({str(mark)!r}, 'w')"),
        Evil(getattr, Evil(__import__, "os"), "system"),
        Evil(open, str(mark), "w"),
        Evil(pickle.loads, b"N."),
    ):
        with pytest.raises(CheckpointError, match="pickle asks for|data.pkl"):
            read_torch(archive(tmp_path / "x.pth", pickle.dumps(wrap(evil), protocol)))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (Call(Name("os", "system"), "true"), "os.system"),
        (Call(Name("builtins", "getattr"), ORDERED, "x"), "builtins.getattr"),
        (Call(ORDERED, [("a", 1)]), "arguments that torch.save never gives"),
        (Call(Name("argparse", "Namespace"), opcode=b"R", state=Call(Name("posix", "system"), "true")), "posix.system"),
        (Call(Name("mmengine.logging", "HistoryBuffer")), "mmengine.logging.HistoryBuffer.*torch.save"),
        (Call(Name("torch._utils", "_rebuild_qtensor")), "_rebuild_qtensor"),
        (Name("torch.jit", "FloatStorage"), "torch.jit.FloatStorage"),
        (Name("torch", "load"), "torch.load"),
        ({(1, 2): 3}, "a key of a dictionary"),
        (Call(Name("torch._utils", "_rebuild_tensor_v2"), 1, 2, 3, 4, 5, 6), "without storage"),
        (writers.Persistent("x"), "no storage"),
        (writers.Persistent(("storage", Name("torch", "FloatStorage"), "absent", "cpu", 1)), "missing from"),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, tree: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_torch(archive(tmp_path / "x.pth", pickled(tree)))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x80\x02(i" + b"os\nsystem\n.",  # INST
        b"\x80\x02c__builtin__\nset\n(o.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b".",  # BYTEARRAY8 of a terabyte
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",  # BINBYTES8
        b"\x80\x02r\xff\xff\xff\x7f.",  # LONG_BINPUT on an empty stack
        b"\x80\x02h\x07.",  # BINGET of nothing
        b"\x80\x02u.", b"\x80\x02}(K\x01u.", b"\x80\x02K\x01(K\x01u.", b"\x80\x02K\x01R.", b"\x80\x02\x87.",
        b"\x80\x02.", b"\x80\x02", b"", b"garbage", b"\x80\x04](](\x8c\x01ae\x8c\x01x\x93.",
    ],
)  # fmt: skip
def test_damaged_pickles(tmp_path: Path, opcodes: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"data\.pkl"):
        read_torch(archive(tmp_path / "x.pth", opcodes))


def test_nested_tuples_take_no_time(tmp_path: Path) -> None:
    """Hashing or printing these would take 2^60 steps."""
    doubled = b"\x80\x02K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    with pytest.raises(CheckpointError):
        read_torch(archive(tmp_path / "x.pth", doubled + b"}" + b"h\x05K\x01s."))
    with pytest.raises(CheckpointError, match="dictionary"):
        read_checkpoint(archive(tmp_path / "x.pth", doubled + b"."))
    with pytest.raises(CheckpointError, match="no string"):
        read_torch(archive(tmp_path / "x.pth", b"\x80\x04" + doubled[2:] + b"\x8c\x01x\x93."))


# --- lies about tensors


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Tensor("Float", "s", 6, (7,), (1,)), "beyond its storage"),
        (Tensor("Float", "s", 6, (2, 3), (4, 1)), "beyond its storage"),
        (Tensor("Float", "s", 6, (6,), (1,), 1), "beyond its storage"),
        (Tensor("Float", "s", 7, (7,), (1,)), "should have 28 bytes"),
        (Tensor("Float", "s", 2**62, (1,), (1,)), "should have"),
        (Tensor("Float", "s", 6, (10**6, 10**6), (0, 0)), "beyond its storage"),
        (Tensor("Float", "s", 6, (10**30,), (0,)), "shape must be"),
        (Tensor("Float", "s", 6, (-1,), (1,)), "not an integer >= 0"),
        (Tensor("Float", "s", 6, (2,), (-1,), 3), "not an integer >= 0"),
        (Tensor("Float", "s", 6, (2,), (1,), -1), "not an integer >= 0"),
        (Tensor("Float", "s", 6, (2,), (1, 1)), "without storage, size and stride"),
        (Tensor("Float", "s", -1, (2,), (1,)), "without a type"),
        (Tensor("QInt8", "s", 6, (6,), (1,)), "torch.QInt8Storage"),
    ],
)
def test_tensors_that_lie(tmp_path: Path, tensor: Tensor, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_torch(save_torch(tmp_path / "x.pth", {"a": tensor}, records={"s": bytes(24)}))


def test_one_storage_many_times(tmp_path: Path) -> None:
    tree = {f"layers.0.blocks.{i}.norm1.weight": Tensor("Float", "s", 2**16, (2**16,), (1,)) for i in range(99)}
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_checkpoint(save_torch(tmp_path / "x.pth", tree, records={"s": bytes(2**18)}))


# --- archives


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "x.pth", {"a": np.zeros(2**20, np.float32)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch(path)


@pytest.mark.parametrize("keep", [10, 100, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, keep: float) -> None:
    path = save_torch(tmp_path / "x.pth", random_params(V1))
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(keep * len(raw))])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_torch(path)


def test_old_tar_format(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pth", "w") as file:
        info = tarfile.TarInfo("storages")
        info.size = 4
        file.addfile(info, io.BytesIO(bytes(4)))
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        read_torch(tmp_path / "x.pth")


def test_old_pickle_format(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + bytes(100))
    with pytest.raises(CheckpointError, match=r"before 1\.6.*torch\.save"):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps({"a": 1}), "bare pickle"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"\x93NUMPY", "not a file of torch.save"),
        (b"PK\x03\x04" + bytes(30), "damaged or truncated"),
    ],
)
def test_not_a_torch_file(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_torch(tmp_path / "x.pth")


def test_other_zip_archives(tmp_path: Path) -> None:
    for names, says in (
        (["word/document.xml"], "not of torch.save"),
        (["a/data.pkl", "a/constants.pkl"], "TorchScript"),
    ):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            for name in names:
                file.writestr(name, b"")
        with pytest.raises(CheckpointError, match=says):
            read_torch(tmp_path / "x.pth")
