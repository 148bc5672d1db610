"""Sets of images of any kind on disk, read part by part: memory holds one part, however many images there are.

A set is a folder, an ``.npz``, ``.pt`` or ``.safetensors`` file, an LMDB, or CIFAR-10 by its name.
"""

from __future__ import annotations

import contextlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim.config import DataConfig
from ddim.datasets import IMAGE_SUFFIXES, DatasetUnavailable, open_dataset, open_lmdb
from ddim.tensor_archive import load_archive
from ddim.untrusted import (
    UntrustedFileError,
    npz_errors,
    open_npz,
    open_safetensors,
    read_image,
    read_npy_header,
)
from qdiff.evaluation.errors import EvaluationError
from qdiff.evaluation.preparation import DEFAULT_FILTER, square_image

CIFAR10_NAMES = ("cifar10-train", "cifar10-test")
CIFAR10_BINARY = {  # below the data root, in the archive that is free of pickles
    "cifar10-train": tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
    "cifar10-test": ("cifar-10-batches-bin/test_batch.bin",),
}
CIFAR10_ROW = 1 + 3 * 32 * 32  # label, then red, green and blue, row by row

NOT_IMAGES = ("grid.png", "contact_sheet.png")
DECODERS = 4  # threads: Pillow decodes outside of Python's lock
KNOWN_MODES = {"L": 1, "1": 1}
REFUSED_MODES = ("I", "F")  # and all that begin so: 16 and 32 bits, which 8 would clip


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        channels: 1 or 3, to which every image is turned; None for those of the first image.
        size: cut images that are not size x size to their central square, and resize it; None to take them as they
            are.
        method: the filter of resizing, of :data:`~qdiff.evaluation.preparation.FILTERS`.
    """

    channels: int | None = None
    size: int | None = None
    method: str = DEFAULT_FILTER


class ImageSet(ABC):
    """N images of one size.

    Attributes:
        path: what was named.
    """

    def __init__(self, path: Path | str, reading: Reading):
        self.path, self.reading = path, reading

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop - 1: n x C x H x W, uint8, or floats in [0, 1] where a file holds these.

        Parts are best read in ascending order.

        Raises:
            EvaluationError: an image cannot be read, or differs in size from the others.
        """

    @property
    def numbers(self) -> list[int] | None:
        """The number of each image, where the set has some of its own; else they count from 0."""
        return None

    def texts(self) -> list[str]:
        """What each image was drawn of.

        Raises:
            EvaluationError: that is not recorded.
        """
        raise EvaluationError(f"{self.path}: does not say what its images were drawn of; name a file with --captions")

    def parts(self, size: int, first: int = 0, step: int = 1) -> Iterator[Tensor]:
        """Every ``step``-th part of ``size`` images from part ``first`` on; the next one is read meanwhile."""
        ranges = [(start, min(start + size, len(self))) for start in range(0, len(self), size)][first::step]
        with ThreadPoolExecutor(1) as ahead:
            coming = [ahead.submit(self.read, *ranges[0])] if ranges else []
            for following in [*ranges[1:], None]:
                if not coming:
                    return
                part = coming.pop().result()
                if following is not None:
                    coming.append(ahead.submit(self.read, *following))
                yield part


def open_image_set(path: str | Path, reading: Reading | None = None, data_root: str | Path = "data") -> ImageSet:
    """Find out what a set is, and open it.

    Args:
        path: a folder of images, also in folders inside it; an ``.npz`` of uint8, N x H x W or
            N x H x W x C; a ``.pt`` tensor, N x C x H x W; a ``.safetensors`` with ``images``, N x H x W x C; an LMDB
            of encoded images; or a name of :data:`CIFAR10_NAMES`.
        data_root: where CIFAR-10 lies.

    Raises:
        EvaluationError: nothing there, or another content.
    """
    reading = reading or Reading()
    if str(path) in CIFAR10_NAMES:
        return _open_cifar10(str(path), Path(data_root), reading)
    path = Path(path)
    if path.is_dir():
        if (path / "data.mdb").is_file():
            return LmdbImages(path, reading)
        return FolderImages(path, reading)
    if not path.is_file():
        raise EvaluationError(f"{path}: there is no such file or folder of images")
    if path.suffix == ".npz":
        return ArchiveImages(path, reading)
    if path.suffix == ".pt":
        return ArrayImages(path, _tensor_of(path), reading)
    if path.suffix == ".safetensors":
        return ArrayImages(path, _images_of(path), reading)
    raise EvaluationError(f"{path}: expected a folder of images, an LMDB, or an .npz, .pt or .safetensors file")


def load_image_set(path: str | Path) -> Tensor:
    """All images of a small set: N x C x H x W, uint8 or float in [0, 1].

    Raises:
        EvaluationError: as :func:`open_image_set`.
    """
    images = open_image_set(path)
    return images.read(0, len(images))


class FolderImages(ImageSet):
    """All images below a folder, in the order of their paths. Pictures of several images at once are left out."""

    def __init__(self, path: Path, reading: Reading):
        super().__init__(path, reading)
        found = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        self.files = sorted(f for f in found if f.name not in NOT_IMAGES and not f.name.startswith("."))
        if not self.files:
            raise EvaluationError(f"{path}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def numbers(self) -> list[int] | None:
        stems = [file.stem for file in self.files]
        return [int(stem) for stem in stems] if all(re.fullmatch(r"\d+", stem) for stem in stems) else None

    def texts(self) -> list[str]:
        texts = []
        for file in self.files:
            with _told(file):
                text = read_image(file).info.get("prompt")
            if text is None:
                raise EvaluationError(f"{file}: its file names no prompt; name a file of them with --captions")
            texts.append(text)
        return texts

    def read(self, start: int, stop: int) -> Tensor:
        files = self.files[start:stop]
        if self._shape is None:
            self._shape = self._decoded(self.files[0]).shape
        with ThreadPoolExecutor(DECODERS) as pool:
            images = list(pool.map(self._decoded, files))
        return _stacked(images, files, self._shape, self.files[0])

    def _decoded(self, file: Path) -> np.ndarray:
        channels = self.reading.channels or (self._shape[-1] if self._shape else None)
        return decoded(file, replace(self.reading, channels=channels), file)


class LmdbImages(ImageSet):
    """The values of an LMDB, in the order of its keys: images in files' formats, as LSUN is published."""

    def __init__(self, path: Path, reading: Reading):
        super().__init__(path, reading)
        try:
            self._store = open_lmdb(path)
        except DatasetUnavailable as error:
            raise EvaluationError(str(error)) from None
        self._transaction = self._store.begin(buffers=True)
        self._cursor, self._at = self._transaction.cursor(), 0
        self._cursor.first()
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self._store.stat()["entries"]

    def _values(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        if start < self._at:
            self._cursor.first()
            self._at = 0
        while self._at < stop:
            if self._at >= start:
                key, value = self._cursor.item()
                yield bytes(key).decode("ascii", "replace"), bytes(value)
            self._cursor.next()
            self._at += 1

    def read(self, start: int, stop: int) -> Tensor:
        entries = list(self._values(start, stop))
        names = [f"{self.path}, key {key}" for key, _ in entries]
        if self._shape is None:
            self._shape = decoded(io.BytesIO(entries[0][1]), self.reading, names[0]).shape
        reading = replace(self.reading, channels=self._shape[-1])
        with ThreadPoolExecutor(DECODERS) as pool:
            images = list(pool.map(lambda e, name: decoded(io.BytesIO(e[1]), reading, name), entries, names))
        return _stacked(images, names, self._shape, "the first image read")


class ArrayImages(ImageSet):
    """Images in memory, N x C x H x W, uint8 or floats in [0, 1]; also of a file that is mapped into it."""

    def __init__(self, path: Path | str, images: Tensor, reading: Reading):
        super().__init__(path, reading)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Tensor:
        return _adapted(self.images[start:stop], self.reading)


class ArchiveImages(ImageSet):
    """The first array of an ``.npz``, read from the archive as it goes."""

    def __init__(self, path: Path, reading: Reading):
        super().__init__(path, reading)
        with _told(path), npz_errors():
            archive = open_npz(path)
            self._file = archive.open(archive.namelist()[0])
            self._shape = _image_array(*read_npy_header(self._file, archive.infolist()[0].file_size))
            self._offset = self._file.tell()

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        size = int(np.prod(self._shape[1:]))
        with _told(self.path), npz_errors():
            self._file.seek(self._offset + start * size)
            content = self._file.read((stop - start) * size)
            if stop == len(self):
                self._file.read(1)  # compares the checksum, where all before was read in order
        if len(content) != (stop - start) * size:
            raise EvaluationError(f"{self.path}: cut short; it holds fewer images than the {len(self)} it promises")
        images = np.frombuffer(content, np.uint8).reshape(stop - start, *self._shape[1:])
        return _adapted(_channels_first(images), self.reading)


def decoded(source: Path | BinaryIO, reading: Reading, name: object) -> np.ndarray:
    """One image of a file: H x W x C uint8.

    Args:
        name: of the image, for messages.

    Raises:
        EvaluationError: it cannot be read, or has more than 8 bits a channel.
    """
    with _told(name):
        image = read_image(source)
    if image.mode.startswith(REFUSED_MODES):
        raise EvaluationError(f"{name}: has more than 8 bits a channel (mode {image.mode}); make 8-bit images of it")
    channels = reading.channels or KNOWN_MODES.get(image.mode, 3)
    image = image.convert("L" if channels == 1 else "RGB")
    if reading.size is not None:
        image = square_image(image, reading.size, reading.method)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@contextlib.contextmanager
def _told(name: object) -> Iterator[None]:
    """Files that are not what they claim to be, as an :class:`EvaluationError` that names them."""
    try:
        yield
    except UntrustedFileError as error:
        raise EvaluationError(f"{name}: {error}") from None


def _stacked(images: Sequence[np.ndarray], names: Sequence[object], shape: tuple[int, ...], first: object) -> Tensor:
    """n x H x W x C -> n x C x H x W.

    Raises:
        EvaluationError: an image of another size, with the remedy.
    """
    for image, name in zip(images, names, strict=True):
        if image.shape != shape:
            theirs, ours = ("x".join(map(str, s[:2])) for s in (image.shape, shape))
            raise EvaluationError(
                f"{name}: {theirs} pixels, while {first} has {ours}; photographs are made equal by --crop_size N, or "
                "once and for all by scripts/prepare_lsun.py"
            )
    return _channels_first(np.stack(images))


def _channels_first(images: np.ndarray) -> Tensor:
    if images.ndim == 3:
        images = images[..., None]  # N, H, W, C
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def _adapted(images: Tensor, reading: Reading) -> Tensor:
    """Arrays in the channels that are wanted, and cut and resized like files."""
    channels, wanted = images.shape[1], reading.channels or images.shape[1]
    if reading.size is not None and images.shape[-2:] != (reading.size, reading.size):
        pictures = (Image.fromarray(p.permute(1, 2, 0).squeeze(-1).numpy()) for p in as_bytes(images))
        squares = [np.asarray(square_image(picture, reading.size, reading.method)) for picture in pictures]
        images = _channels_first(np.stack(squares))
    if channels == 1 and wanted == 3:
        return images.expand(-1, 3, -1, -1)
    if channels == 3 and wanted == 1:
        pictures = (Image.fromarray(p.permute(1, 2, 0).numpy()).convert("L") for p in as_bytes(images))
        return _channels_first(np.stack([np.asarray(picture) for picture in pictures]))
    return images


def as_bytes(images: Tensor) -> Tensor:
    """As an image's file holds them: uint8 of uint8, or of floats in [0, 1] rounded to nearest."""
    return images if images.dtype == torch.uint8 else images.mul(255).round().clamp(0, 255).to(torch.uint8)


def _image_array(shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> tuple[int, ...]:
    """The shape, if it is one of images."""
    good = len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3))
    if dtype != np.uint8 or fortran or not good or 0 in shape:
        raise UntrustedFileError(
            f"expected images, uint8, N x H x W or N x H x W x 3; its first array is {dtype} of shape {shape}"
        )
    return shape


def _tensor_of(path: Path) -> Tensor:
    with _told(path):
        images = load_archive(path)
    _check(images, path)
    return images


def _images_of(path: Path) -> Tensor:
    with _told(path), open_safetensors(path) as file:
        images = file.get_tensor("images") if "images" in file.keys() else None  # noqa: SIM118 - not a mapping
    if images is None or images.ndim != 4:
        raise EvaluationError(f"{path}: no data set with N x H x W x C images in it")
    images = images.permute(0, 3, 1, 2)  # N, H, W, C -> N, C, H, W
    _check(images, path)
    return images


def _check(images: object, path: Path) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise EvaluationError(f"{path}: expected a tensor N x C x H x W of 1 or 3 channels, found {found}")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise EvaluationError(f"{path}: expected uint8 or float images, found {images.dtype}")
    low, high = images.aminmax() if images.numel() else (torch.zeros(()), torch.zeros(()))
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise EvaluationError(f"{path}: values from {low:.3g} to {high:.3g}; expected [0, 1]")


def _open_cifar10(name: str, root: Path, reading: Reading) -> ImageSet:
    """From the archive of plain bytes, or through torchvision, which checks the pickles' MD5 before it opens them."""
    files = [root / file for file in CIFAR10_BINARY[name]]
    if all(file.is_file() for file in files):
        content = np.concatenate([np.fromfile(file, np.uint8) for file in files])
        if len(content) == 0 or len(content) % CIFAR10_ROW:
            raise EvaluationError(f"{files[0].parent}: its files are not CIFAR-10's: {len(content)} bytes in all")
        rows = torch.from_numpy(content.reshape(-1, CIFAR10_ROW)[:, 1:])
        return ArrayImages(name, rows.reshape(-1, 3, 32, 32), reading)
    config = DataConfig(dataset="CIFAR10", image_size=32, channels=3)
    try:
        images: Any = open_dataset(config, root, train=name == CIFAR10_NAMES[0])
        return ArrayImages(name, images.images, reading)
    except DatasetUnavailable:
        raise EvaluationError(
            f"{name}: neither {files[0].parent} nor {root / 'cifar-10-batches-py'} holds it, whole and unaltered; "
            "unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz there, or name another place with --data_root"
        ) from None
