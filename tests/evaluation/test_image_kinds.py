"""Every kind of set on disk gives the same images, part by part."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor

from qdiff.evaluation.errors import EvaluationError
from qdiff.evaluation.image_sets import ImageSet, Reading, open_image_set

COUNT = 7
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@pytest.fixture
def pixels() -> np.ndarray:
    """N x H x W x 3."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6, 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def write_lmdb(path: Path, values: list[bytes]) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=2**24) as store, store.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(f"{number:040d}".encode(), value)


def write(kind: str, folder: Path, pixels: np.ndarray) -> Path:
    path = folder / f"set{kind}"
    if kind in (".npz", ".compressed.npz"):
        (np.savez_compressed if "compressed" in kind else np.savez)(path, pixels)
    elif kind == ".pt":
        torch.save(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), path)
    elif kind == ".safetensors":
        save_file({"images": pixels}, path)
    elif kind == "_lmdb":
        write_lmdb(path, [encoded(image, "WEBP", lossless=True) for image in pixels])
    else:
        for number, image in enumerate(pixels):
            place = path / (str(number // 3) if kind == "_nested" else "")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:06d}.png").write_bytes(encoded(image))
        (path / "grid.png").write_bytes(encoded(pixels[0][:3]))
    return path


def whole(images: ImageSet, size: int = 3) -> Tensor:
    return torch.cat(list(images.parts(size)))


KINDS = (".npz", ".compressed.npz", ".pt", ".safetensors", "_lmdb", "_folder", "_nested")


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_hold_the_same_images(kind: str, pixels: np.ndarray, tmp_path: Path) -> None:
    images = open_image_set(write(kind, tmp_path, pixels))
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert len(images) == COUNT
    assert torch.equal(whole(images), expected)
    assert torch.equal(images.read(1, 3), expected[1:3])  # backwards too
    shared = [list(images.parts(2, rank, 2)) for rank in range(2)]  # as two processes take them
    assert torch.equal(torch.cat([shared[0][0], shared[1][0], shared[0][1], shared[1][1]]), expected)
    grey = open_image_set(images.path, Reading(channels=1, size=4))
    assert whole(grey).shape == (COUNT, 1, 4, 4)


def test_a_broken_lmdb_and_a_missing_package(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(b"no store" * 2000)
    with pytest.raises(EvaluationError, match="not an LMDB"):
        open_image_set(tmp_path)
    code = (
        "import sys; sys.modules['lmdb'] = None\n"
        "from qdiff.cli.evaluate import main\n"
        f"main(['--images', {str(tmp_path)!r}, '--features', 'bundled'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "pip install lmdb" in done.stderr


def test_grey_files_stay_grey_unless_colours_are_wanted(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 7).save(tmp_path / "000000.png")
    assert open_image_set(tmp_path).read(0, 1).shape == (1, 1, 4, 4)
    assert open_image_set(tmp_path, Reading(channels=3)).read(0, 1).unique().tolist() == [7]


def test_photographs_of_several_sizes_are_refused_or_made_square(tmp_path: Path) -> None:
    for number, size in enumerate([(6, 4), (5, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(EvaluationError, match="--crop_size"):
        whole(open_image_set(tmp_path))
    assert whole(open_image_set(tmp_path, Reading(size=4))).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"no image", "not a readable image"),
        ("a.png", encoded(np.zeros((64, 64, 3), np.uint8))[:60], "not a readable image"),
        ("a.png", encoded(np.zeros((4, 4), np.uint16)), "more than 8 bits"),
    ],
)
def test_broken_images_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        whole(open_image_set(tmp_path))


def test_other_arrays_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    for number, array in enumerate([pixels.astype(np.float32), pixels[0, 0], np.asfortranarray(pixels)]):
        np.savez(tmp_path / f"{number}.npz", array)
        with pytest.raises(EvaluationError, match="expected images"):
            open_image_set(tmp_path / f"{number}.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(EvaluationError, match=r"not an \.npz"):
        open_image_set(tmp_path / "text.npz")


def test_an_array_larger_than_a_part_is_read_part_by_part(tmp_path: Path) -> None:
    """64 MiB of images with a few of them in memory."""
    np.savez(tmp_path / "large.npz", np.zeros((1024, 148, 148, 3), np.uint8))
    images = open_image_set(tmp_path / "large.npz")
    tracemalloc.start()
    seen = sum(len(part) for part in images.parts(32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 1024
    assert peak < 16 * 2**20


# ---- CIFAR-10 by its name ----------------------------------------------------------------------------------------


def write_cifar10(root: Path, images: np.ndarray) -> None:
    """The archive of plain bytes, with few images: N x 3 x 32 x 32."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rows = np.concatenate([np.full((len(images), 1), 9, np.uint8), images.reshape(len(images), -1)], axis=1)
    for name, part in zip([f"data_batch_{i}" for i in range(1, 6)], np.array_split(rows, 5), strict=True):
        part.tofile(folder / f"{name}.bin")
    rows[:2].tofile(folder / "test_batch.bin")


def test_cifar10_from_plain_bytes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    write_cifar10(tmp_path, images)
    assert torch.equal(whole(open_image_set("cifar10-train", data_root=tmp_path)), torch.from_numpy(images))
    assert torch.equal(whole(open_image_set("cifar10-test", data_root=tmp_path)), torch.from_numpy(images[:2]))


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_cifar10_of_altered_pickles_is_refused_unread(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    with pytest.raises(EvaluationError, match="whole and unaltered"):
        open_image_set("cifar10-train", data_root=tmp_path)
    assert not (tmp_path / "mark").exists()


def test_cifar10_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--data_root"):
        open_image_set("cifar10-test", data_root=tmp_path)
