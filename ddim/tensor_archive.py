"""Pickled tensors from strangers: the files of ``torch.save``, checked before PyTorch is given them.

Weights-only unpickling runs no code of a file. But it believes sizes: a name on its list makes a tensor of any length,
and a storage grows to whatever shape is laid over it. So the pickle is gone through first, without making anything of
it but plain containers and descriptions of tensors, in which each tensor must lie within its storage, and each storage
must be a record of the file, of exactly its length. Only then is the file loaded.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch.serialization import safe_globals

from ddim.untrusted import UntrustedFileError, check_names, reason

MAX_AXES = 16
MOST_SHARED = 2  # tensors may lie in one storage, but all together are at most this many times the file
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which files of PyTorch before 1.6 begin

DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}

_CODE = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID")  # what only objects need


class CodeInFileError(UntrustedFileError):
    """A pickle that names more than tensors and plain containers. Nothing of it was run.

    Attributes:
        found: what it names; empty where that is not known.
    """

    def __init__(self, found: str = ""):
        super().__init__("holds something other than tensors and plain containers" + (f" ({found})" if found else ""))
        self.found = found


def load_archive(path: str | Path, *, inert: tuple[str, ...] = (), repeated_rows: bool = False) -> Any:
    """The content of a file of ``torch.save``, on the CPU. Where the format allows it, tensors are mapped.

    Args:
        inert: beginnings of names of classes that the file may mention; objects of them keep nothing.
        repeated_rows: a tensor may say that all its rows are the one that is stored (stride 0).

    Raises:
        CodeInFileError: it names other classes or functions.
        UntrustedFileError: it is damaged, or claims sizes that it does not have.
        OSError: it cannot be read.
    """
    rules = _Rules(inert, repeated_rows)
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        (_check_zip if zipped else _check_old)(file, rules)
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (type(name, (_Inert,), {}), name) for name in sorted(rules.mentioned)
    ]
    try:
        with warnings.catch_warnings(), safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UntrustedFileError(f"truncated or damaged ({reason(error)})") from None


class _Inert:
    """Stands for a class of the trainer: takes what the file says about an object of it and keeps nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass
class _Rules:
    """What a file may hold, and what was met in it.

    Attributes:
        mentioned: names of classes that get stand-ins.
        bytes_of_tensors: of all together, as they would be by themselves.
    """

    inert: tuple[str, ...]
    repeated_rows: bool
    mentioned: set[str] = field(default_factory=set)
    bytes_of_tensors: int = 0

    def count(self, elements: int, dtype: torch.dtype) -> None:
        self.bytes_of_tensors += elements * dtype.itemsize

    def check_total(self, size: int) -> None:
        if not self.repeated_rows and self.bytes_of_tensors > MOST_SHARED * size:
            raise UntrustedFileError(f"its tensors claim {self.bytes_of_tensors} bytes, the file has {size}")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Placeholder:
    """What a pickle would make of a name."""


class _Structure:
    """Goes through pickles of torch.save, whose operations are few, as a stack machine.

    Attributes:
        storages: those that were named, by their keys.
    """

    def __init__(self, rules: _Rules):
        self._rules, self.storages = rules, dict[str, _Storage]()

    def read(self, file: BinaryIO | mmap.mmap) -> Any:
        """One pickle, from where the file stands."""
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            for operation, argument, _ in pickletools.genops(cast(IO[bytes], file)):  # a mapped file reads like one
                if operation.name == "STOP":
                    return self._stack.pop()
                self._run(operation.name, argument)
        except UntrustedFileError:
            raise
        except Exception as error:  # of the stack, of the reader: all say that the pickle is not one
            raise UntrustedFileError(f"truncated or damaged ({reason(error)})") from None
        raise UntrustedFileError("truncated or damaged (it does not end)")

    def _run(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]() if argument is None else argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in _FROM_MARK:
            self._stack = self._marks.pop()
            _FROM_MARK[name](self._stack, stack)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_popped(stack, int(name[-1]))))
        elif name == "APPEND":
            _extend(stack, _popped(stack, 1))
        elif name == "SETITEM":
            _set_items(stack, _popped(stack, 2))
        elif name == "GLOBAL":
            stack.append(self._find(argument.replace(" ", ".", 1)))
        elif name in ("REDUCE", "NEWOBJ"):
            made, arguments = _popped(stack, 2)
            stack.append(_made(made, arguments))
        elif name == "BUILD":
            target = _popped(stack, 2)[0]
            if not isinstance(target, (OrderedDict, _Placeholder)):
                raise CodeInFileError()
            stack.append(target)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in _CODE:
            raise CodeInFileError()
        elif name != "PROTO":
            raise UntrustedFileError(f"truncated or damaged (no file of torch.save has {name})")

    def _find(self, name: str) -> Callable[..., Any]:
        name = name.replace("__builtin__.", "builtins.", 1)
        if name in DTYPES:
            return cast(Callable[..., Any], _NamedDtype(DTYPES[name]))  # named, as classes are, and never called
        known: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": lambda pairs=(): _ordered(pairs),
            "collections.Counter": lambda *_: _Placeholder(),
            "builtins.set": lambda *_: _Placeholder(),
            "torch.Size": lambda *_: _Placeholder(),
            "torch.device": lambda *_: _Placeholder(),
            "_codecs.encode": _encoded,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        if name in known:
            return known[name]
        if name.startswith(self._rules.inert or ("\0",)):
            self._rules.mentioned.add(name)
            return lambda *_: _Placeholder()
        if isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
            return lambda *_: _Placeholder()
        raise CodeInFileError("".join(c if c.isprintable() else "?" for c in name[:60]))

    def _storage(self, named: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = named
        if kind != "storage" or not isinstance(dtype, _NamedDtype) or view not in ([], [None]):
            raise UntrustedFileError("truncated or damaged (a storage that is none)")
        if not isinstance(key, str) or not _natural(numel):
            raise UntrustedFileError("truncated or damaged (a storage without a name or a length)")
        storage = _Storage(key, dtype.dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise UntrustedFileError(f"says two things of its storage {key[:60]!r}")
        return storage

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Placeholder:
        """Arguments as ``torch._utils._rebuild_tensor_v2`` has them: then requires_grad, hooks and metadata."""
        if not isinstance(storage, _Storage) or not all(isinstance(axes, tuple) for axes in (size, stride)):
            raise UntrustedFileError("truncated or damaged (a tensor without a storage or a shape)")
        if not all(map(_natural, (offset, *size, *stride))) or not len(size) == len(stride) <= MAX_AXES:
            raise UntrustedFileError("has a tensor of an impossible shape")
        if any(more[1:]):
            raise CodeInFileError("a tensor with hooks")
        own = list(size)
        if self._rules.repeated_rows and size and size[0] and stride[0] == 0:
            own[0] = 1
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        elements = math.prod(own)
        if elements > storage.numel or (elements and last >= storage.numel):
            shape = "x".join(map(str, size)) or "one"
            raise UntrustedFileError(
                f"claims a tensor of {shape[:60]} values where it holds {storage.numel} (storage {storage.key[:60]!r})"
            )
        self._rules.count(elements, storage.dtype)
        return _Placeholder()


class _NamedDtype(_Placeholder):
    """A class of storages, which the file may name but not make."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


_CONSTANTS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), object),
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": OrderedDict},
}


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _popped(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise UntrustedFileError("truncated or damaged (its stack runs empty)")
    taken = stack[-count:]
    del stack[-count:]
    return taken


def _made(what: Any, arguments: Any) -> Any:
    if not callable(what) or not isinstance(arguments, tuple):
        raise CodeInFileError()
    return what(*arguments)


def _extend(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise CodeInFileError()
    stack[-1].extend(items)


def _set_items(stack: list[Any], items: list[Any]) -> None:
    target = stack[-1]
    if not isinstance(target, OrderedDict) or len(items) % 2:
        raise CodeInFileError()
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)) and not callable(key):  # trainers use classes, too
            raise UntrustedFileError("has a key that is neither text nor a number")
        if key in target:
            raise UntrustedFileError(f"has the key {str(key)[:80]!r} twice")
        target[key] = value


_FROM_MARK: dict[str, Callable[[list[Any], list[Any]], None]] = {
    "TUPLE": lambda stack, items: stack.append(tuple(items)),
    "APPENDS": _extend,
    "SETITEMS": _set_items,
}


def _ordered(pairs: Any) -> OrderedDict[Any, Any]:
    made: OrderedDict[Any, Any] = OrderedDict()
    _set_items([made], [item for pair in pairs for item in pair])
    return made


def _encoded(text: Any, encoding: Any) -> _Placeholder:
    """Bytes, as the second protocol of pickle has them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise CodeInFileError("_codecs.encode")
    return _Placeholder()


# The two formats.


def _check_zip(file: BinaryIO, rules: _Rules) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            check_names(entry.filename for entry in entries)
            if archive.comment:
                raise UntrustedFileError("has a comment, which no file of torch.save has")
            root = _root_of([entry.filename for entry in entries])
            _check_places(file, entries, size)
            structure = _Structure(rules)
            structure.read(BytesIO(archive.read(f"{root}/data.pkl")))
    except UntrustedFileError:
        raise
    except Exception as error:  # zipfile meets garbage with many kinds of exceptions
        raise UntrustedFileError(f"truncated or damaged ({reason(error)})") from None
    records = {entry.filename: entry.file_size for entry in entries}
    for key, storage in structure.storages.items():
        found = records.get(f"{root}/data/{key}")
        if found != storage.nbytes:
            raise UntrustedFileError(
                f"its storage {key[:60]!r} claims {storage.nbytes} bytes, where the file has {found or 0}"
            )
    rules.check_total(size)


def _root_of(names: list[str]) -> str:
    """The folder that all records lie in."""
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or f"{min(roots)}/data.pkl" not in names:
        raise UntrustedFileError("not a file of torch.save: it has no data.pkl")
    return min(roots)


def _check_places(file: BinaryIO, entries: list[zipfile.ZipInfo], size: int) -> None:
    """Every record is stored as it is, under its name, between its neighbours: so every reader finds the same bytes."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = f"the record {entry.filename[:80]!r}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise UntrustedFileError(f"{name} is compressed or encrypted, which torch.save does not do")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4" or entry.header_offset < end:
            raise UntrustedFileError(f"{name} is not where the archive says")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        if file.read(name_length) != entry.orig_filename.encode("utf-8"):
            raise UntrustedFileError(f"{name} has another name in its place")
        end = entry.header_offset + 30 + name_length + extra_length + entry.file_size
    if end > size or min(entry.header_offset for entry in entries) != 0:
        raise UntrustedFileError("its records lie outside the file")


def _check_old(file: BinaryIO, rules: _Rules) -> None:
    """Files of PyTorch before 1.6: five pickles, then the length and the bytes of every storage."""
    if not os.fstat(file.fileno()).st_size:
        raise UntrustedFileError("truncated or damaged (it is empty)")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:1] != pickle.PROTO:
            raise UntrustedFileError("not a file written by torch.save")
        structure = _Structure(rules)
        if structure.read(content) != MAGIC or structure.read(content) != PROTOCOL:
            raise UntrustedFileError("not a file written by torch.save, or damaged")
        structure.read(content)  # facts of the machine
        structure.read(content)
        keys, at = structure.read(content), content.tell()
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(structure.storages):
            raise UntrustedFileError("truncated or damaged (other storages than it names)")
        for storage in (structure.storages[key] for key in keys):
            if content[at : at + 8] != struct.pack("<q", storage.numel):
                raise UntrustedFileError(f"truncated or damaged (storage {storage.key[:60]!r} has another length)")
            at += 8 + storage.nbytes
        if at != len(content):
            raise UntrustedFileError(f"truncated or damaged (it has {len(content)} bytes instead of {at})")
        rules.check_total(len(content))


def is_state(content: object) -> bool:
    """Whether a file held names and tensors, one at least."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items())
