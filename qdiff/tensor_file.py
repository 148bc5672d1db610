"""Files of tensors larger than memory: laid out first, then filled in place, in any order and by several processes.

What comes out is what ``torch.save`` writes: a zip archive of uncompressed records, ``data.pkl`` with the structure, in
which a tensor names its record, and ``data/<key>`` with the numbers of each. ``torch.save`` itself needs all of them at
once. Here the place of each is known from the shapes alone, so rows are written where they belong as they come
into being. Last, :meth:`TensorFile.seal` reads the file once for the checksums that a zip archive has.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2  # by this name the files of torch.save rebuild a tensor

from qdiff.files import naming

STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage}

_ROOT = "archive"
_ALIGNMENT = 64  # bytes; torch.save's own, so that tensors can be mapped into memory
_LOCAL_HEADER, _LONG_SIZES, _PADDING_HEADER = 30, 20, 4  # bytes before a record in a zip archive, beside its name
_PADDING_ID = 0x4246
_FORMAT = b"3\n"
_CHUNK = 4 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file, told by its key.

    Attributes:
        shape: rows first.
        dtype: float32 or float16.
        repeated: all rows are the same, and the file holds one.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    repeated: bool = False

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def stored_rows(self) -> int:
        return 1 if self.repeated else self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stored_rows * self.row_bytes

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the tensor that a reader gets, in elements."""
        inner = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return (0, *inner[1:]) if self.repeated else tuple(inner)


Structure = Mapping[str, Sequence[StoredTensor]]
"""What the file holds: a dictionary of lists. A tensor may stand in several places; the file holds it once."""


class TensorFile:
    """The layout of one file, which follows from the structure alone.

    Args:
        path: of the file, which :meth:`create` makes.

    Attributes:
        size: bytes to the end of the last record.
    """

    def __init__(self, path: str | Path, structure: Structure):
        self.path = Path(path)
        self._tensors = {tensor.key: tensor for tensors in structure.values() for tensor in tensors}
        self._small = {"data.pkl": _pickled(structure), "byteorder": sys.byteorder.encode(), "version": _FORMAT}
        self._offsets: dict[str, int] = {}
        self._paddings: dict[str, int] = {}
        end = 0
        for name, size in self._records():
            start = end + _LOCAL_HEADER + len(f"{_ROOT}/{name}") + _LONG_SIZES + _PADDING_HEADER
            self._paddings[name] = -start % _ALIGNMENT
            self._offsets[name] = start + self._paddings[name]
            end = self._offsets[name] + size
        self.size = end

    def _records(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each, in the order of the file."""
        yield from ((name, len(content)) for name, content in self._small.items())
        yield from ((f"data/{key}", tensor.nbytes) for key, tensor in self._tensors.items())

    def create(self) -> None:
        """Make the file at its full size, without content: it takes no room on the disk yet.

        Raises:
            OSError: naming the file.
        """
        with open(self.path, "wb") as file, naming(self.path):
            file.truncate(self.size)

    def rows(self) -> RowWriter:
        """Open it for writing rows."""
        return RowWriter(self)

    def place(self, key: str, row: int) -> tuple[StoredTensor, int]:
        """A tensor, and where in the file one of its rows begins."""
        tensor = self._tensors[key]
        return tensor, self._offsets[f"data/{key}"] + (0 if tensor.repeated else row * tensor.row_bytes)

    def seal(self) -> None:
        """Make an archive of the filled file, in place. Reads all of it, holds little of it; may be done again.

        Raises:
            OSError: naming the file.
        """
        with open(self.path, "r+b") as file, naming(self.path):
            filled = _Filled(file)
            with zipfile.ZipFile(filled, "w", zipfile.ZIP_STORED) as archive:
                for name, size in self._records():
                    self._seal_record(archive, filled, name, size)
            file.flush()
            os.fsync(file.fileno())

    def _seal_record(self, archive: zipfile.ZipFile, filled: _Filled, name: str, size: int) -> None:
        entry = zipfile.ZipInfo(f"{_ROOT}/{name}")  # dated 1980: equal sets are equal files
        padding = self._paddings[name]
        entry.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        with archive.open(entry, "w", force_zip64=True) as record:
            if filled.tell() != self._offsets[name]:
                raise AssertionError(f"zipfile put {name} at {filled.tell()}, not at {self._offsets[name]}")
            if name in self._small:
                record.write(self._small[name])
                return
            with filled.as_it_is():
                for at in range(0, size, _CHUNK):
                    record.write(filled.read_at(self._offsets[name] + at, min(_CHUNK, size - at)))


class RowWriter:
    """Writes rows to their places; what several processes write at once does not get in each other's way."""

    def __init__(self, file: TensorFile):
        self._file, self._descriptor = file, os.open(file.path, os.O_WRONLY)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, key: str, row: int, values: Tensor) -> None:
        """Put consecutive rows, from number ``row`` on, into a tensor; a repeated tensor takes the first of them.

        Raises:
            ValueError: rows of another shape, or more than there are.
            OSError: naming the file, for instance when the disk is full.
        """
        tensor, at = self._file.place(key, row)
        if values.shape[1:] != tensor.shape[1:] or row + len(values) > tensor.shape[0]:
            raise ValueError(f"{tuple(values.shape)} rows from {row} on do not fit into {key} of {tensor.shape}")
        wanted = values[:1] if tensor.repeated else values
        content = wanted.detach().to("cpu", tensor.dtype).contiguous().numpy().reshape(-1).view("u1").data
        with naming(self._file.path):
            while len(content):  # the system may write less than it is given
                written = os.pwrite(self._descriptor, content, at)
                content, at = content[written:], at + written

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with naming(self._file.path):
            os.fsync(self._descriptor)


class _Filled:
    """A file for :mod:`zipfile` in which the records' contents are there already, and need no writing."""

    def __init__(self, file: BinaryIO):
        self._file, self._skip = file, False
        self.seek, self.tell, self.flush, self.seekable = file.seek, file.tell, file.flush, file.seekable

    def write(self, content: bytes) -> int:
        if self._skip:
            self._file.seek(len(content), os.SEEK_CUR)
            return len(content)
        return self._file.write(content)

    def close(self) -> None:
        """For :mod:`zipfile`'s protocol; it leaves open what it did not open."""

    def read_at(self, offset: int, count: int) -> bytes:
        content = os.pread(self._file.fileno(), count, offset)
        if len(content) != count:
            raise OSError(f"{self._file.name} ends at {offset + len(content)}, in the middle of a record")
        return content

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """In this ``with`` block writing only moves on."""
        self._skip = True
        try:
            yield
        finally:
            self._skip = False


def _pickled(structure: Structure) -> bytes:
    buffer = BytesIO()
    _StructurePickler(buffer, protocol=2).dump({name: list(tensors) for name, tensors in structure.items()})
    return buffer.getvalue()


class _Record:
    """Stands for a tensor's numbers while the structure is pickled."""

    def __init__(self, tensor: StoredTensor):
        self.tensor = tensor


class _StructurePickler(pickle.Pickler):
    """Pickles tensors that are not there as ``torch.save`` pickles those that are."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, _Record):
            return None
        tensor = value.tensor
        count = tensor.nbytes // tensor.dtype.itemsize
        return ("storage", STORAGES[tensor.dtype], tensor.key, "cpu", count)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, StoredTensor):
            return NotImplemented
        return _rebuild_tensor_v2, (_Record(value), 0, value.shape, value.strides, False, OrderedDict())
