"""Ways to spoil a file: bytes of any kind, and for each format what only somebody who knows it would think of."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Mutation = Callable[[Path], None]
"""Changes the file of that path, which is valid, in place."""

HOSTILE = (
    *(0, 1, -1, 2**31, -(2**31), 2**62, 2**63, 10**30, 0.5, 1e308, -0.0, True, None),
    *(
        "",
        "x",
        "../../x",
        "/etc/passwd",
        "${oc.env:HOME}",
        "\0",
        "\ud800",
        "a\nb\nc\nd\ne\nf\ng",
        [],
        [[]],
        {},
        [2**40, 2**40],
        {"a": 1},
    ),
)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 0.5, 1e-46, 1e30, -(2.0**40))


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


CALLS = {
    "a command": Calls(os.system, "touch fuzz-was-here"),
    "a long tensor": Calls(torch.FloatTensor, 10**10),
    "a long storage": Calls(torch.UntypedStorage, 10**10),
    "a long bytearray": Calls(bytearray, 10**10),
    "an import": Calls(__import__, "os"),
    "evaluation": Calls(eval, "1"),
}


# Bytes.


@st.composite
def bytes_changed(draw: DrawFn, content: bytes) -> bytes:
    """A few changes of a file's bytes, most of them where headers are."""
    for _ in range(draw(st.integers(1, 3))):
        length = len(content)
        if not length:
            return content
        near = st.one_of(st.integers(0, min(300, length - 1)), st.integers(max(0, length - 300), length - 1))
        at = draw(st.one_of(near, near, st.integers(0, length - 1)))
        span = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(("flip", "cut", "insert", "delete", "repeat", "number")))
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + span :]
        elif kind == "repeat":
            content = content[: at + span] + content[at:]
        else:
            number = draw(st.sampled_from((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)))
            form = draw(st.sampled_from(("<Q", "<I", ">I", "<H")))
            packed = struct.pack(form, number & (256 ** struct.calcsize(form) - 1))
            content = content[:at] + packed + content[at + len(packed) :]
    return content


@st.composite
def any_bytes(draw: DrawFn, path: Path) -> Mutation:
    changed = draw(bytes_changed(path.read_bytes()))
    return lambda target: target.write_bytes(changed) and None


# Structures of plain values.


def places(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values lie, inner ones too."""
    found = []
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        found += [(*prefix, key), *places(content[key], (*prefix, key))]
    return found


@st.composite
def plain_changed(draw: DrawFn, content: Any) -> Any:
    """One value replaced, removed, added or doubled."""
    content = json.loads(json.dumps(content))
    place = draw(st.sampled_from(places(content)))
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    kind = draw(st.sampled_from(("replace", "replace", "remove", "add")))
    if kind == "replace":
        owner[place[-1]] = draw(st.sampled_from(HOSTILE))
    elif kind == "remove":
        del owner[place[-1]]
    elif isinstance(owner, dict):
        owner[draw(st.sampled_from(("another", "", "x.y", "../x")))] = draw(st.sampled_from(HOSTILE))
    else:
        owner.append(draw(st.sampled_from((*HOSTILE, owner[place[-1]]))))
    return content


@st.composite
def json_changed(draw: DrawFn, path: Path) -> Mutation:
    content = json.loads(path.read_text())
    text = json.dumps(draw(plain_changed(content)))
    nasty = ("[" * 50_000, "9" * 5000, text[:-1] + ', "quant": {}, "quant": {}}', "NaN", "null", "[]", '"x"', text)
    changed = draw(st.sampled_from((text, text, text, *nasty)))
    return lambda target: target.write_text(changed) and None


YAML_BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopq"))
NASTY_YAML = (
    *(
        YAML_BOMB,
        "a: &a [*a]\n",
        "{" * 3000,
        "[" * 3000,
        "a: 1\na: 2\n",
        "- 1\n",
        "",
        "x",
        "a: !!python/object:os.system {}\n",
    ),
    *(
        "model: !!binary x\n",
        "? [a]\n: b\n",
        "a: 0x_\n",
        "a: 2020-99-99\n",
        f"a: {'9' * 5000}\n",
        "a: 1\n---\nb: 2\n",
        "\x07",
    ),
    *(
        "<<: {a: 1}\n",
        "data: {image_size: ${oc.env:HOME}}\n",
        "model: {params: ${oc.env:PATH}}\n",
        "1: 2\nnull: 3\n~: 4\n",
    ),
)


@st.composite
def yaml_changed(draw: DrawFn, path: Path) -> Mutation:
    import yaml

    text = path.read_text()
    changed = yaml.safe_dump(draw(plain_changed(yaml.safe_load(text))))
    nasty = draw(st.sampled_from(NASTY_YAML))
    chosen = draw(st.sampled_from((changed, changed, changed, nasty, text + nasty)))
    return lambda target: target.write_text(chosen) and None


# Tensors.


@st.composite
def tensors_changed(draw: DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One tensor of a dictionary with another value, shape, type or name, or none."""
    tensors = dict(tensors)
    grids = [name for name in tensors if "delta" in name or "zero_point" in name]
    name = draw(st.sampled_from(sorted(grids) if grids and draw(st.booleans()) else sorted(tensors)))
    tensor = tensors[name]
    kind = draw(st.sampled_from(("value", "value", "value", "shape", "type", "remove", "rename", "add")))
    if kind == "value" and tensor.numel():
        tensor = tensor.clone()
        number = draw(st.sampled_from(NUMBERS))
        fits = tensor.is_floating_point() or number == 0
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = number if fits else 1
        tensors[name] = tensor
    elif kind == "shape":
        changes = (
            tensor[None],
            tensor.flatten(),
            tensor.flatten()[:-1],
            torch.cat([tensor.flatten()] * 2),
            tensor[..., None],
        )
        tensors[name] = draw(st.sampled_from(changes)).contiguous()
    elif kind == "type":
        dtype = draw(st.sampled_from((torch.float64, torch.float16, torch.int32, torch.int64, torch.bool, torch.uint8)))
        tensors[name] = tensor.to(dtype)
    elif kind == "rename":
        tensors[draw(st.sampled_from(("", "x", f"{name}.x", "../x", name.upper())))] = tensors.pop(name)
    elif kind == "remove":
        del tensors[name]
    else:
        tensors["another"] = tensor.clone()
    return tensors


@st.composite
def archive_changed(draw: DrawFn, path: Path) -> Mutation:
    """A zip archive whose members were changed, and which is whole again."""
    with zipfile.ZipFile(path) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = draw(st.integers(0, len(members) - 1))
    name, content = members[at]
    pickled = next((i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")), at)
    kind = draw(
        st.sampled_from(("pickle", "pickle", "pickle", "name", "twice", "content", "pack", "remove", "integer"))
    )
    method = zipfile.ZIP_DEFLATED if kind == "pack" else zipfile.ZIP_STORED
    if kind == "name":
        names = (f"../{name}", f"/{name}", name.replace("/", "\\"), f"x/{name}", f"{name}/../x", "")
        members[at] = (draw(st.sampled_from(names)), content)
    elif kind == "twice":
        members.append((name, draw(st.sampled_from((content, b"", content[::-1])))))
    elif kind == "content":
        members[at] = (name, draw(st.sampled_from((b"", content + b"\0" * 8, content[:-4], content * 2))))
    elif kind == "remove":
        del members[at]
    elif kind == "pickle":
        members[pickled] = (members[pickled][0], draw(bytes_changed(members[pickled][1])))
    else:
        members[pickled] = (members[pickled][0], draw(integers_changed(members[pickled][1])))

    def write(target: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(target, "w", method) as archive:
            warnings.simplefilter("ignore")  # of names that occur twice
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)

    return write


@st.composite
def integers_changed(draw: DrawFn, pickled: bytes) -> bytes:
    """A pickle with another number in one place: sizes, strides, offsets and lengths are all numbers."""
    places = [i for i, byte in enumerate(pickled[:-1]) if byte == ord("K")]
    if not places:
        return pickled
    at = draw(st.sampled_from(places))
    number = draw(st.sampled_from((0, 1, 255, 2**31 - 1, 2**40, -1, -(2**40))))
    raw = number.to_bytes(8, "little", signed=True)
    return pickled[:at] + b"\x8a\x08" + raw + pickled[at + 2 :]


@st.composite
def saved_otherwise(draw: DrawFn, path: Path) -> Mutation:
    """A file of torch.save with another dictionary of tensors, in either format, or with a call in it."""
    state = torch.load(path, weights_only=True)
    tensors = state if all(isinstance(value, torch.Tensor) for value in state.values()) else None
    changed: Any
    if tensors is not None and draw(st.booleans()):
        changed = draw(tensors_changed(tensors))
    else:
        changed = dict(state)
        name = draw(st.sampled_from(sorted(changed)))
        value = changed[name]
        expanded = torch.zeros(1).expand(10**6, 10**6)
        others = (
            *CALLS.values(),
            1,
            "x",
            None,
            [],
            [value],
            {"a": value},
            torch.tensor(0.0),
            torch.rand(2).to_sparse(),
        )
        if isinstance(value, list):
            others = (*others, value[:-1], [*value, value[0]], value[::-1], [*value[1:], None])
            others = (*others, [v.double() / 0 for v in value], [expanded] * len(value), [v[None] for v in value])
        changed[name] = draw(st.sampled_from((*others, expanded)))
        changed = draw(st.sampled_from((changed, changed, {"state_dict": changed}, [changed], value)))
    old = draw(st.booleans())
    return lambda target: torch.save(changed, target, _use_new_zipfile_serialization=not old)


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: str, data: bytes) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


@st.composite
def safetensors_header(draw: DrawFn, path: Path) -> Mutation:
    """Another header before the same numbers; entries of the metadata that are JSON are changed inside, too."""
    header, data = split_safetensors(path.read_bytes())
    about = header.get("__metadata__", {})
    inner = [key for key, value in about.items() if value[:1] in "{["]
    if inner and draw(st.booleans()):
        key = draw(st.sampled_from(inner))
        about[key] = json.dumps(draw(plain_changed(json.loads(about[key]))))
        text = json.dumps(header)
    else:
        text = json.dumps(draw(plain_changed(header)))
        twice = draw(st.sampled_from(sorted(header)))
        text = draw(st.sampled_from((text, text, text[:-1] + f", {json.dumps(twice)}: {json.dumps(header[twice])}}}")))
    changed = join_safetensors(text, data)
    return lambda target: target.write_bytes(changed) and None


@st.composite
def safetensors_tensors(draw: DrawFn, path: Path) -> Mutation:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = save(draw(tensors_changed(tensors)), metadata)
    return lambda target: target.write_bytes(changed) and None


# Arrays and pictures.


@st.composite
def npz_header(draw: DrawFn, path: Path) -> Mutation:
    with zipfile.ZipFile(path) as archive:
        name, content = archive.infolist()[0].filename, archive.read(archive.infolist()[0])
    length = struct.unpack("<H", content[8:10])[0]
    shape = draw(
        st.sampled_from(("(2, 4, 4, 3)", "(10000000000,)", "(-1,)", "(2.5,)", "(2, 4, 4)", "()", "(0,)", "'x'", "[["))
    )
    descr = draw(
        st.sampled_from(("'|u1'", "'|O'", "'<f8'", "'V1'", "[('a', '|u1')]", "'|S4'", "1", "'<U9'", "'<M8[s]'"))
    )
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(length - 1) + "\n"
    version = draw(st.sampled_from((b"\1\0", b"\2\0", b"\3\0", b"\0\0", b"\xff\0")))
    changed = content[:6] + version + struct.pack("<H", len(text)) + text.encode() + content[10 + length :]
    method = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))

    def write(target: Path) -> None:
        with zipfile.ZipFile(target, "w", method) as archive:
            archive.writestr(name, changed)

    return write


@st.composite
def packed_text(draw: DrawFn, path: Path) -> Mutation:
    """A file of gzip whose content was changed, with the right checksum."""
    changed = gzip.compress(draw(bytes_changed(gzip.decompress(path.read_bytes()))), compresslevel=1, mtime=0)
    return lambda target: target.write_bytes(changed) and None


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@st.composite
def png_header(draw: DrawFn, path: Path) -> Mutation:
    """Another size, depth or colour, with the right checksum."""
    content = path.read_bytes()
    size = st.sampled_from((0, 1, 4, 5, 4000, 12_000, 2**20, 2**31 - 1, 2**31, 2**32 - 1))
    kind = draw(st.sampled_from((0, 1, 2, 3, 4, 6, 7, 255)))
    depth = draw(st.sampled_from((1, 2, 4, 8, 16, 0, 255)))
    header = struct.pack(">IIBBBBB", draw(size), draw(size), depth, kind, 0, 0, draw(st.sampled_from((0, 1, 9))))
    changed = content[:8] + chunk(b"IHDR", header) + content[33:]
    return lambda target: target.write_bytes(changed) and None


@st.composite
def other_format(draw: DrawFn, path: Path) -> Mutation:
    """A picture of another kind under the same name: a script, a palette, an animation."""
    from PIL import Image

    buffer = io.BytesIO()
    mode, form = draw(
        st.sampled_from((("L", "GIF"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG")))
    )
    Image.new(mode, (4, 4)).save(buffer, form)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(x) run\n"
    changed = draw(st.sampled_from((buffer.getvalue(), script, b"P6 100000 100000 255\n", b"")))
    return lambda target: target.write_bytes(changed) and None


def spoiled(path: Path, *formats: Callable[[Path], SearchStrategy[Mutation]]) -> SearchStrategy[Mutation]:
    """Every way that fits a file."""
    return st.one_of(any_bytes(path), *(form(path) for form in formats))
