"""Files from strangers: JSON, YAML, safetensors, arrays and pictures, read without believing what they claim.

Sizes in a header are compared with the file before anything is allocated, and what is ambiguous (a key twice, an alias
that multiplies) is refused rather than guessed. Pickled tensors have a module of their own, :mod:`ddim.tensor_archive`.
``docs/reliability.md`` lists the checks of every loader.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 4 << 20  # of a header or a file of facts; a thousand tensors take a hundredth of a megabyte
MAX_YAML_BYTES, MAX_YAML_NODES = 16 << 20, 100_000
MAX_DEPTH = 50  # of values within values, in JSON and YAML; what goes through them may call itself
MAX_SCALAR = 4000  # characters of a number; above this Python refuses to convert it
DEFLATE_RATIO = 1032  # the most bytes that one byte of deflate can stand for
SMALL_PICTURE = 1 << 24  # pixels that may be claimed by however few bytes
PICTURES = ("PNG", "JPEG", "WEBP", "BMP")  # no format whose reader starts another program
REASON_CHARACTERS = 200


LONGEST_MESSAGE = 1200


class FileError(ValueError):
    """A file that cannot be used. Its message is one line of a readable length, whatever names and values of the file
    are repeated in it.
    """

    def __init__(self, message: str):
        text = " ".join(message.splitlines())
        super().__init__(text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}...")


class UntrustedFileError(FileError):
    """A file that is damaged, or claims what cannot be. The message is one line and does not name the file: whoever
    knows its name and what helps says both.
    """


def reason(error: BaseException) -> str:
    """The first line of an exception, or its kind; short enough for a message."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:REASON_CHARACTERS]


# JSON.


def parse_json(text: str | bytes) -> Any:
    """JSON in which no object has a key twice.

    Raises:
        UntrustedFileError: it is something else, or nested too deeply.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise UntrustedFileError("nested too deeply") from None
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise UntrustedFileError(reason(error)) from None
    level = [content] if isinstance(content, dict | list) else []  # of one depth
    for _ in range(MAX_DEPTH):
        inner = itertools.chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return content
    raise UntrustedFileError("nested too deeply")


def read_json(path: str | Path) -> Any:
    """The JSON in a file of facts.

    Raises:
        UntrustedFileError: it is something else, or too long to be one.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise UntrustedFileError(f"longer than the {MAX_JSON_BYTES >> 20} MiB that a file of facts may have")
    return parse_json(content)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UntrustedFileError(f"has the key {_shown(twice)} twice")
    return found


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:80]}...")


# Safetensors.


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, as :func:`safetensors.safe_open` gives it for PyTorch, on the CPU. Its tensors are mapped.

    The library compares shapes, types and places with the file. It takes the last of equal keys; here they are refused.

    Raises:
        UntrustedFileError: the file cannot be read, or, inside the block, one of its tensors cannot.
    """
    try:
        _check_safetensors_header(path)
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, OverflowError) as error:
        raise UntrustedFileError(f"truncated or not a safetensors file: {reason(error)}") from None


def _check_safetensors_header(path: str | Path) -> None:
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UntrustedFileError("truncated or not a safetensors file: its header is longer than the file")
        if length > MAX_JSON_BYTES:
            raise UntrustedFileError(f"its header has {length} bytes; more than {MAX_JSON_BYTES} are not read")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise UntrustedFileError("truncated or not a safetensors file: its header is no object")


# YAML.


class _CheckedLoader(yaml.SafeLoader):
    """Composes a document within the limits above; duplicate keys, aliases and tags are refused."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UntrustedFileError("has an alias or an anchor (* or &); write the value out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise UntrustedFileError(f"has the tag {_shown(event.tag)}; only plain values are read")
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._nodes > MAX_YAML_NODES or self._depth > MAX_DEPTH:
            raise UntrustedFileError(f"has more than {MAX_YAML_NODES} values, or they lie more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.MappingNode):
            _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        elif isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":str") and len(node.value) > MAX_SCALAR:
            raise UntrustedFileError(f"has a number of {len(node.value)} characters")
        return node


def read_yaml_text(path: str | Path) -> str:
    """The text of a YAML file that any reader may parse: it holds one document of plain values, and is what it seems.

    Aliases are refused, because ten lines of them stand for any amount of memory; keys that occur twice, because
    readers disagree about them; tags, because they are there to make objects.

    Raises:
        UntrustedFileError: it is something else.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise UntrustedFileError(f"longer than the {MAX_YAML_BYTES >> 20} MiB that a YAML file may have")
    try:
        text = content.decode("utf-8")
        loader = _CheckedLoader(text)
        try:
            loader.get_single_node()
        finally:
            loader.dispose()
        yaml.safe_load(text)  # what looks like a number or a date is one
    except UntrustedFileError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UntrustedFileError(f"not a YAML file: {reason(error)}{where}") from None
    return text


def refuse_interpolations(content: Any, where: str = "") -> None:
    """Values of a config are what stands there. ``${...}`` would read the environment, or other keys again and again.

    Args:
        content: as parsed.

    Raises:
        UntrustedFileError: naming the key.
    """
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        name = f"{where}.{key}" if where else str(key)
        for text in (key, value):
            if isinstance(text, str) and "${" in text:
                raise UntrustedFileError(f"key {_shown(name)}: ${{...}} is not resolved; write the value itself")
        refuse_interpolations(value, name)


# Arrays.


@contextlib.contextmanager
def npz_errors() -> Iterator[None]:
    """What goes wrong while an ``.npz`` is read, as an :class:`UntrustedFileError`."""
    try:
        yield
    except UntrustedFileError:
        raise
    except Exception as error:  # zipfile and numpy's reader of headers, a tokenizer, fail in many ways
        raise UntrustedFileError(f"truncated or not an .npz file: {reason(error)}") from None


def open_npz(path: str | Path) -> zipfile.ZipFile:
    """An ``.npz`` file whose members are what they claim to be, as far as the archive's directory tells.

    Raises:
        UntrustedFileError: another file, or one with members that cannot be.
    """
    with npz_errors(), contextlib.ExitStack() as opened:
        archive = opened.enter_context(zipfile.ZipFile(path))
        entries = archive.infolist()
        if entries and min(entry.header_offset for entry in entries) != 0:
            raise UntrustedFileError("truncated or not an .npz file: something stands before its first array")
        check_names(entry.filename for entry in entries)
        if not entries or not entries[0].filename.endswith(".npy"):
            raise UntrustedFileError("holds no array")
        for entry in entries:
            check_claimed(entry, os.stat(path).st_size)
        opened.pop_all()
        return archive


def read_npz_array(path: str | Path, name: str | None = None) -> np.ndarray:
    """An array of an ``.npz`` file: numbers, not objects.

    Args:
        name: of the array; None for the first.

    Raises:
        UntrustedFileError: another file, or an array that is not as large as its header says.
    """
    with npz_errors(), open_npz(path) as archive:
        names = archive.namelist()
        member = names[0] if name is None else f"{name}.npy"
        if member not in names:
            raise UntrustedFileError(f"holds no array {name}")
        with archive.open(member) as array:
            return _read_npy(array, archive.getinfo(member).file_size)


def check_names(names: Iterator[str]) -> None:
    """The members of an archive have a place each, and none outside it.

    Raises:
        UntrustedFileError: naming the one that has not.
    """
    seen = set()
    for name in names:
        if name in seen:
            raise UntrustedFileError(f"has the member {_shown(name)} twice")
        seen.add(name)
        if "\\" in name or not set(name.split("/")).isdisjoint(("", ".", "..")):
            raise UntrustedFileError(f"has the member {_shown(name)}, a path that may lead elsewhere")


def check_claimed(entry: zipfile.ZipInfo, size: int) -> None:
    """A member of an archive of so many bytes is not longer than what packs it can stand for.

    Raises:
        UntrustedFileError: it is, or packed in another way than by deflate.
    """
    stored = entry.compress_type == zipfile.ZIP_STORED
    most = entry.compress_size * (1 if stored else DEFLATE_RATIO)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UntrustedFileError(f"{_shown(entry.filename)} is compressed in a way that is not read")
    if entry.compress_size > size or entry.file_size > most:
        raise UntrustedFileError(f"{_shown(entry.filename)} claims {entry.file_size} bytes, more than it can hold")


def read_npy_header(file: Any, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type of an array of numbers; the file stands before its values then.

    Args:
        size: bytes of the whole file, which the values must fill.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise UntrustedFileError(f"its array has the format {version}, which is not read")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject or dtype.subdtype is not None or dtype.kind not in "biuf":
        raise UntrustedFileError(f"its array is of {dtype}, not of numbers")
    if any(not isinstance(n, int) or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise UntrustedFileError(
            f"its array claims to be {'x'.join(map(str, shape))} {dtype}, which is not what the file holds"
        )
    return shape, fortran, dtype


def _read_npy(file: Any, size: int) -> np.ndarray:
    read_npy_header(file, size)
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):  # this read also compares the checksum
        raise UntrustedFileError("more follows after its array")
    return array


# Pictures, and what gzip packs.


def read_image(source: str | Path | BinaryIO, mode: str | None = None) -> Image.Image:
    """A picture, decoded, which holds on to no file. Texts beside it are in its ``info``.

    Args:
        source: its file, or what such a file holds.
        mode: of Pillow, that it is converted to; None for its own.

    Raises:
        UntrustedFileError: damaged, of a format that is not read, or of a size that so short a file cannot hold.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            size = os.stat(source).st_size if isinstance(source, str | Path) else source.seek(0, os.SEEK_END)
            with Image.open(source, formats=PICTURES) as image:
                _check_pixels(image, size)
                image.load()
                return image.convert(mode) if mode else image.copy()
    except UntrustedFileError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UntrustedFileError(reason(error)) from None
    except OSError as error:
        said = f"cannot be read ({error.strerror})" if error.strerror else f"not a readable image ({reason(error)})"
        raise UntrustedFileError(said) from None
    except (ValueError, SyntaxError, TypeError, IndexError, KeyError, struct.error, EOFError, OverflowError) as error:
        raise UntrustedFileError(f"not a readable image ({reason(error)})") from None


def _check_pixels(image: Image.Image, size: int) -> None:
    width, height = image.size
    if width * height > max(SMALL_PICTURE, DEFLATE_RATIO * size):
        raise UntrustedFileError(f"claims {width}x{height} pixels, more than its {size} bytes can hold")


def gunzip(content: bytes, most: int, *, cut: bool = False) -> bytes:
    """What gzip packed, at most so many bytes of it.

    Args:
        cut: the first ``most`` bytes are enough.

    Raises:
        UntrustedFileError: damaged, or longer.
    """
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unpacked = file.read(most if cut else most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UntrustedFileError(f"not a readable gzip file ({reason(error)})") from None
    if len(unpacked) > most:
        raise UntrustedFileError(f"unpacks to more than the {most} bytes that it may have")
    return unpacked
