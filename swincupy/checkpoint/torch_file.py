"""Reading what ``torch.save`` writes, without torch and without running anything in it.

The file is a zip archive: ``<name>/data.pkl`` is a pickle whose tensors point to the records
``<name>/data/<key>``, which hold the raw numbers. Unpickling in general calls any function that
the file names. Here a small interpreter walks the opcodes, builds dictionaries, lists and tensor
descriptions, and refuses every name outside a short table; no name is ever imported or called.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from swincupy.checkpoint.tensors import (
    Array,
    Shape,
    StoredTensor,
    check_shape,
    decode,
    itemsize,
    map_file,
)
from swincupy.errors import CheckpointError

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

_DICTS = {"collections.OrderedDict", "builtins.dict", "__builtin__.dict"}
_LISTS = {"builtins.set", "__builtin__.set", "builtins.list", "__builtin__.list", "torch.Size"}
# Training settings that microsoft's and timm's scripts save beside the weights: read as empty records.
_RECORDS = {"argparse.Namespace", "yacs.config.CfgNode", "fvcore.common.config.CfgNode"}
_REBUILD = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}

_MAX_PICKLE = 8 * 2**20  # published ones take under 1 MB, with an optimizer's state too
_OLD_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # the first number pickled in files of torch < 1.6
_KEYS = (str, int, float, bool, bytes, type(None))  # hash quickly, unlike nested tuples

_SAVE_AGAIN = (
    'where torch is installed, write the weights alone: torch.save(torch.load(path, map_location="cpu")["model"], '
    "new_path), or without [\"model\"] if the file has no such entry (only for a file you trust)"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the pickle mentions; it stays a name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Record:
    """An object of a class in `_RECORDS`, contents dropped."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """One ``data/<key>`` record, and the number of elements of ``dtype`` in it."""

    dtype: str
    numel: int
    raw: Array


def read_torch(path: Path) -> Any:
    """The object saved in a .pth, .pt or .bin file: dictionaries and lists with `StoredTensor` at the leaves.

    Raises
    ------
    CheckpointError
        The file is damaged, has the format of torch < 1.6, or holds anything but tensors and plain values.
    """
    data = map_file(path)
    _check_format(data, path.name)
    archive = _Archive(data, path)
    pickle = archive.record("data.pkl")
    if pickle.size > _MAX_PICKLE:
        raise CheckpointError(f"{path.name}: data.pkl must be at most {_MAX_PICKLE} bytes, got {pickle.size}")
    return _Interpreter(archive, path.name).run(pickle.tobytes())


def _check_format(data: Array, file: str) -> None:
    head = data[:512].tobytes()
    if head.startswith(b"PK\x03\x04"):
        return
    if head[257:262] == b"ustar" or (head[:1] == b"\x80" and _OLD_MAGIC in head[:32]):
        raise CheckpointError(
            f"{file}: the file has the format of torch before 1.6 (not a zip archive), which is not read; where torch "
            'is installed, convert it: torch.save(torch.load(path, map_location="cpu", weights_only=True), new_path)'
        )
    if head[:1] == b"\x80":
        raise CheckpointError(
            f"{file}: a bare pickle, not a file of torch.save, and pickles can run code; {_SAVE_AGAIN}"
        )
    if head.lstrip()[:1] in (b"<", b"{") or head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: text, not a checkpoint (a web page or a Git LFS pointer?); download it again")
    raise CheckpointError(f"{file}: not a file of torch.save (no zip archive); it is damaged or of another kind")


class _Archive:
    """The records of a zip archive, as views of the mapped file; nothing is decompressed."""

    def __init__(self, data: Array, path: Path) -> None:
        self.data, self.file = data, path.name
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError, IndexError,
                OSError, RuntimeError) as error:  # fmt: skip
            raise CheckpointError(
                f"{self.file}: the zip archive is damaged or truncated ({error}); download it again"
            ) from None
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise CheckpointError(f"{self.file}: the zip archive names a record twice")
        roots = [
            name[: -len("data.pkl")] for name in self.entries if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise CheckpointError(
                f"{self.file}: a zip archive, but not of torch.save: it must have one <name>/data.pkl"
            )
        self.root = roots[0]
        if f"{self.root}constants.pkl" in self.entries:
            raise CheckpointError(
                f"{self.file}: a TorchScript archive, which holds code; where torch is installed, save the weights: "
                "torch.save(torch.jit.load(path).state_dict(), new_path)"
            )
        self.byteorder: Literal["<", ">"] = "<"
        if f"{self.root}byteorder" in self.entries:
            order = self.record("byteorder")[:16].tobytes()
            if order not in (b"little", b"big"):
                raise CheckpointError(f"{self.file}: byteorder must be little or big, got {order!r}")
            self.byteorder = "<" if order == b"little" else ">"

    def record(self, name: str) -> Array:
        """Bytes of a record."""
        entry = self.entries.get(self.root + name)
        what = f"{self.file}: record {name[:80]!r}"
        if entry is None:
            raise CheckpointError(f"{what} is missing from the archive; the file is damaged")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(f"{what} is compressed or encrypted, which torch.save never does; {_SAVE_AGAIN}")
        header = self.data[max(entry.header_offset, 0) :][:30].tobytes()
        if entry.header_offset < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{what} has no header where the archive says; the file is damaged")
        names, extra = struct.unpack("<HH", header[26:30])
        start = entry.header_offset + 30 + names + extra
        if start + entry.file_size > self.data.size:
            raise CheckpointError(f"{what} reaches beyond the end of the file; the file is truncated")
        return self.data[start : start + entry.file_size]


class _Interpreter:
    """A pickle machine for the opcodes that ``torch.save`` uses."""

    def __init__(self, archive: _Archive, file: str) -> None:
        self.archive, self.file = archive, file
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, pickle: bytes) -> Any:
        import pickletools

        try:
            for opcode, argument, _ in pickletools.genops(pickle):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except CheckpointError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, struct.error) as error:
            # genops and the stack machine fail so on bytes that are no pickle
            raise CheckpointError(f"{self.file}: data.pkl is damaged ({str(error)[:120]})") from None
        raise CheckpointError(f"{self.file}: data.pkl is damaged (it does not end)")

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _LITERALS:
            stack.append(arg)
        elif op in ("PROTO", "FRAME"):
            pass
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[arg])
        elif op == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif op == "EMPTY_TUPLE":
            stack.append(())
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(op[-1])
            stack[-n:] = [tuple(stack[-n:])] if len(stack) >= n else self.damaged("a tuple of too few items")
        elif op == "TUPLE":
            self.since_mark(lambda items: self.stack.append(tuple(items)))
        elif op == "APPEND":
            item = stack.pop()
            self.extend([item])
        elif op in ("APPENDS", "ADDITEMS"):
            self.since_mark(self.extend)
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.update([key, value])
        elif op == "SETITEMS":
            self.since_mark(self.update)
        elif op == "GLOBAL":
            stack.append(self.named(arg.replace(" ", ".", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                self.damaged("a name that is no string")
            stack.append(self.named(f"{module}.{name}"))
        elif op == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.build(function, arguments))
        elif op == "BUILD":
            stack.pop()  # attributes of an object: none is kept
        else:
            raise CheckpointError(f"{self.file}: data.pkl uses {op}, which torch.save never writes; {_SAVE_AGAIN}")

    def damaged(self, why: str) -> Any:
        raise CheckpointError(f"{self.file}: data.pkl is damaged ({why})")

    def since_mark(self, use: Any) -> None:
        items, self.stack = self.stack, self.marks.pop()
        use(items)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Record):
            self.damaged("items appended to what is no list")

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            return
        if not isinstance(target, dict) or len(items) % 2:
            self.damaged("items set in what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise CheckpointError(
                    f"{self.file}: data.pkl: a key of a dictionary must be a string or a number, got {_kind(key)}"
                )
            target[key] = value

    def named(self, name: str) -> Global:
        module, _, last = name.rpartition(".")
        known = name in _DICTS | _LISTS | _RECORDS | _REBUILD or (module == "torch" and last in STORAGES)
        if not known:
            raise CheckpointError(
                f"{self.file}: the pickle asks for {name[:120]!r}; only tensors and plain values are read, nothing is "
                f"run; {_SAVE_AGAIN}"
            )
        return Global(name)

    def build(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self.damaged("a call of what is no function")
        name = function.name
        if name in _RECORDS:
            return Record(name)
        if name in _DICTS and arguments == ():
            return {}
        if name in _LISTS and len(arguments) <= 1 and all(isinstance(a, (list, tuple)) for a in arguments):
            return arguments[0] if arguments else []  # not a copy: a small file could ask for many of a long list
        if name == "torch._utils._rebuild_parameter" and arguments and isinstance(arguments[0], StoredTensor):
            return arguments[0]
        if name == "torch._utils._rebuild_tensor_v2" and 6 <= len(arguments) <= 7:
            return self.tensor(*arguments[:4])
        raise CheckpointError(
            f"{self.file}: data.pkl is damaged ({name} with arguments that torch.save never gives it)"
        )

    def storage(self, reference: Any) -> _Storage:
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            self.damaged("a reference to what is no storage")
        _, kind, key, _, numel = reference
        ok = isinstance(kind, Global) and kind.name.rpartition(".")[2] in STORAGES and isinstance(key, str)
        if not ok or not _is_int(numel) or numel < 0:
            self.damaged("a storage without a type, a key and a size")
        if key not in self.storages:
            dtype = STORAGES[kind.name.rpartition(".")[2]]
            raw = self.archive.record(f"data/{key}")
            need = numel * itemsize(dtype)
            if raw.size < need:
                raise CheckpointError(
                    f"{self.file}: storage {key[:40]!r} should have {str(need)[:30]} bytes, its record has {raw.size}; "
                    "the file is damaged"
                )
            self.storages[key] = _Storage(dtype, numel, raw[:need])
        return self.storages[key]

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> StoredTensor:
        size, stride = (tuple(v) if isinstance(v, (list, tuple)) else None for v in (size, stride))
        if not isinstance(storage, _Storage) or size is None or stride is None or len(size) != len(stride):
            self.damaged("a tensor without storage, size and stride")
        if not all(_is_int(v) and v >= 0 for v in (offset, *size, *stride)):
            self.damaged("a tensor whose offset, size or stride is not an integer >= 0")
        check_shape(size, f"{self.file}: a tensor in data.pkl")
        numel = math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        # numel > storage.numel: a stride of 0 repeats elements, and a few bytes would claim terabytes
        if numel and (last >= storage.numel or numel > storage.numel):
            raise CheckpointError(
                f"{self.file}: a tensor of shape {list(size)} reaches beyond its storage of {storage.numel} elements; "
                "the file is damaged"
            )
        return StoredTensor("", storage.dtype, size, self.reader(storage, offset, size, stride))

    def reader(self, storage: _Storage, offset: int, size: Shape, stride: Shape) -> Any:
        byteorder = self.archive.byteorder

        def read() -> Array:
            if math.prod(size) == 0:
                return decode(storage.raw[:0], storage.dtype, byteorder).reshape(size)
            last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            item = itemsize(storage.dtype)
            flat = decode(storage.raw[offset * item : (last + 1) * item], storage.dtype, byteorder)
            steps = tuple(s * flat.itemsize if n > 1 else 0 for n, s in zip(size, stride, strict=True))
            return np.lib.stride_tricks.as_strided(flat, size, steps, writeable=False)

        return read


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES",
    "BINSTRING", "SHORT_BINSTRING", "STRING",
}  # fmt: skip


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    return type(value).__name__
