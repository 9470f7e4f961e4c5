"""Embeddings on their way to a file: kept after every batch, so that an interrupted run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from swincupy.errors import InputError

FORMATS = (".npy", ".safetensors")


class Journal:
    """Finished embeddings beside the output file, in ``<output>.journal``, until `finish` makes the output.

    The journal is a line of JSON that says what is computed, then for each batch a line of JSON with the
    names and their rows of little-endian float32. It only grows; a batch cut off by a crash is dropped.
    Rows are never all in memory.

    Parameters
    ----------
    output : Path
        ``.npy`` or ``.safetensors``.
    job : mapping
        All that the embeddings depend on, as JSON values; a journal of another job is not continued.
    dim : int
        Length of an embedding.
    resume : bool
        Go on with the journal that is there.

    Raises
    ------
    InputError
        The output has another ending, or there is a journal that cannot or must not be continued.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], dim: int, *, resume: bool) -> None:
        check_output(output)
        self.output, self.path, self._dim = output, output.with_name(output.name + ".journal"), dim
        self._job = json.loads(json.dumps(dict(job, dim=dim)))  # as it comes back from the file
        self._offsets: dict[str, int] = {}
        if self.path.exists() and not resume:
            raise InputError(
                f"embed: {self.path} was left by a run that did not finish; continue it with --resume, or delete it"
            )
        self._file: IO[bytes] = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115 (`close`)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, names: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Keep the embeddings [len(names), dim] of a batch."""
        line = json.dumps({"names": list(names)}).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(line + np.ascontiguousarray(rows, "<f4").tobytes())
        self._file.flush()
        self._note(names, start + len(line))

    def finish(self, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        """Write the embeddings of ``names``, in that order, and delete the journal.

        ``.npy``: float32 [len(names), dim], the names one on a line in ``<output>.names.txt``.
        ``.safetensors``: the array ``embeddings``, the names as a JSON list in the metadata.
        Each file appears complete or not at all.
        """
        shape = (len(names), self._dim)

        def rows(file: IO[bytes]) -> None:
            for name in names:
                self._file.seek(self._offsets[name])
                file.write(self._file.read(4 * self._dim))

        def npy(file: IO[bytes]) -> None:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            rows(file)

        def safetensors(file: IO[bytes]) -> None:
            tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
            entries = {"__metadata__": dict(metadata, names=json.dumps(names)), "embeddings": tensor}
            header = json.dumps(entries).encode()
            header += b" " * (-len(header) % 8)  # the format wants the data aligned
            file.write(len(header).to_bytes(8, "little") + header)
            rows(file)

        if self.output.suffix == ".npy":
            listing = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
            _write(self.output.with_name(self.output.name + ".names.txt"), lambda file: file.write(listing))
            _write(self.output, npy)
        else:
            _write(self.output, safetensors)
        self.close()
        self.path.unlink()

    def close(self) -> None:
        """Close the journal; one that holds nothing is deleted."""
        self._file.close()
        if not self._offsets:
            self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        """Note what the journal holds, and cut off what is not whole."""
        end = 0
        line = self._file.readline()
        if line.endswith(b"\n"):
            if _json(line) != self._job:
                raise InputError(
                    f"embed: {self.path} must come from the same model and options to be continued, it does not; "
                    "delete it to start anew"
                )
            end = self._file.tell()
        else:
            self._file.seek(0)
            self._file.write(json.dumps(self._job).encode() + b"\n")
            end = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(end)
        while (line := self._file.readline()).endswith(b"\n"):
            batch = _json(line)
            names = batch.get("names") or [] if isinstance(batch, dict) else []
            start = self._file.tell()
            after = start + 4 * self._dim * len(names)
            if not names or after > size:
                break
            self._note(names, start)
            end = self._file.seek(after)
        self._file.truncate(end)

    def _note(self, names: Sequence[str], start: int) -> None:
        for i, name in enumerate(names):
            self._offsets[name] = start + 4 * self._dim * i


def check_output(output: Path) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    if output.suffix not in FORMATS:
        raise InputError(f"embed: output must end in {' or '.join(FORMATS)}, got {output}")
    if not output.parent.is_dir():
        raise InputError(f"embed: output must lie in an existing folder, got {output}")


def _write(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place and move it there, so that nobody sees half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
