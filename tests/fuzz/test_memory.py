"""Files that claim far more than they have, read in a process of their own: it never takes the memory they claim."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from . import mutations as m
from .loaders import LOADERS

ROOM = 100  # MiB beside what loading valid files takes, for all of the others together
ROOT = Path(__file__).parents[2]

# Reads every valid file first, then the others: prints what refused each, and by how much the peak has grown so far.
CHILD = """
import json, resource, sys
from pathlib import Path
from tests.fuzz.loaders import LOADERS, REFUSALS
cases = json.loads(sys.stdin.read())
for name, path, valid in cases:
    if valid:
        LOADERS[name].load(Path(path))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for name, path, valid in cases:
    if not valid:
        try:
            LOADERS[name].load(Path(path))
            said = None
        except REFUSALS as error:
            said = str(error)
        print(json.dumps([said, (peak() - before) // 1024]))
"""


def torch_saved(content: object) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def expanded(path: Path) -> None:
    """A number that says it is 4 TB."""
    torch.save(
        {"xs": [torch.zeros(1).expand(10**6, 10**6)] * 4, "conv.weight": torch.zeros(1).expand(10**6, 10**6)}, path
    )


def longer_storage(path: Path) -> None:
    """A pickle whose storage and shape are 2^31 - 1 numbers, where the record has 64."""
    torch.save({"conv.weight": torch.zeros(64)}, path)
    with zipfile.ZipFile(path) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content.replace(b"K@", b"J\xff\xff\xff\x7f"))  # both are the number 64


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 10 * 2**30) + path.read_bytes()[8:])


def long_tensor(path: Path) -> None:
    header, data = m.split_safetensors(path.read_bytes())
    name = min(key for key in header if key != "__metadata__")
    header[name] |= {"shape": [10**10], "data_offsets": [0, 4 * 10**10]}
    path.write_bytes(m.join_safetensors(json.dumps(header), data))


def long_index(path: Path) -> None:
    header, data = m.split_safetensors(path.read_bytes())
    about = json.loads(header["__metadata__"]["qdiff-packed"])
    about["index"]["layers"][0][1][0] = 10**10
    header["__metadata__"]["qdiff-packed"] = json.dumps(about)
    path.write_bytes(m.join_safetensors(json.dumps(header), data))


def zip_bomb(path: Path) -> None:
    """Ten thousand million bytes of zeros, so says its header; compressed, it is a thousand times shorter."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100, 10000, 10000), }".ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(2**24))


def large_picture(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + m.chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)) + content[33:])


def gzip_bomb(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09" + bytes(2**28), mtime=0))


def aliases(path: Path) -> None:
    path.write_text(m.YAML_BOMB + "".join(f"z{n}: *q\n" for n in range(50)))


def huge_network(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    content["model"]["ch"] = 2**30
    path.write_text(yaml.safe_dump(content))


CALLS = [torch_saved({"conv.weight": call}) for call in m.CALLS.values()]
HOSTILE: dict[str, list[Callable[[Path], None]]] = {
    "full precision, .ckpt": [*CALLS, expanded, longer_storage],
    "full precision, .safetensors": [long_header, long_tensor],
    "published checkpoint": [*CALLS, expanded, longer_storage],
    "packed checkpoint": [long_header, long_tensor, long_index],
    "calibration set": [*CALLS, expanded, longer_storage],
    "images, .npz": [zip_bomb],
    "images, .png": [large_picture],
    "images, IDX": [gzip_bomb],
    "images, LSUN": [large_picture],
    "images and captions": [long_header, long_tensor],
    "known images": [long_header, long_tensor],
    "CLIP's merges": [gzip_bomb],
    "config of a pixel model": [aliases, huge_network],
    "config of a latent model": [aliases],
    "options of a run": [aliases],
}


def test_what_is_claimed_is_not_taken(tmp_path: Path) -> None:
    cases: list[tuple[str, str, bool]] = []
    spoiled: list[tuple[str, Callable[[Path], None]]] = []
    for name, ways in HOSTILE.items():
        for number, spoil in enumerate((None, *ways)):
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            path = LOADERS[name].make(folder)
            if spoil is not None:
                spoil(path)
                spoiled.append((name, spoil))
            cases.append((name, str(path), spoil is None))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(
        command, input=json.dumps(cases), env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(spoiled)
    for case, (said, taken) in zip(spoiled, found, strict=True):
        assert said is not None, case
        assert taken < ROOM, (case, said)
    assert not (tmp_path / "fuzz-was-here").exists()
