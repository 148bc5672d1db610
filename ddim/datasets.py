"""Training images as the config names them: CIFAR-10, Fashion-MNIST, LSUN, or a folder of one's own.

Every data set gives pairs (image: C x H x W float32 in [0, 1], label: int) at the config's size;
:func:`ddim.transforms.to_model` takes them to the network's range.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ddim.config import DataConfig
from ddim.untrusted import DEFLATE_RATIO, UntrustedFileError, gunzip, read_image

Item = TypeVar("Item", covariant=True)


class Indexed(Protocol[Item]):
    """What every data set here and in torchvision is: numbered, and finite."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


ImageData = Indexed[tuple[Tensor, int]]

# Where Debian's package dataset-fashion-mnist puts its four files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FLIP_PROBABILITY = 0.5


class DatasetUnavailable(RuntimeError):  # noqa: N818 - says what is the matter, as CheckpointUnavailable does
    """The images are not where they were looked for; the message names the folder and how to get them."""


def open_dataset(config: DataConfig, root: str | Path, train: bool = True, download: bool = False) -> ImageData:
    """The data set a config names.

    Args:
        config: ``dataset`` is CIFAR10, FashionMNIST, LSUN (with ``category``) or FOLDER.
        root: the folder that torchvision would keep the data set in; for FOLDER, the folder of images.
        train: the training split, mirrored at random if ``random_flip``; else the test split (LSUN: validation).
        download: let torchvision fetch CIFAR10 or FashionMNIST into ``root`` first.

    Raises:
        ValueError: an unknown name, or a number of channels the images do not have.
        DatasetUnavailable: the files are missing.
    """
    if config.dataset not in _OPENERS:
        raise ValueError(f"data.dataset {config.dataset!r} is not one of {', '.join(_OPENERS)}")
    opened = _OPENERS[config.dataset](config, Path(root), train, download)
    return _Flipped(opened) if train and config.random_flip else opened


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """A data set small enough for memory.

    Attributes:
        images: N x C x H x W uint8.
        labels: N int64.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 255, int(self.labels[index])


class FolderImages(Dataset[tuple[Tensor, int]]):
    """All images under a folder in the order of their paths: cut to the central square, resized, label 0."""

    def __init__(self, folder: Path, image_size: int, channels: int):
        if not folder.is_dir():
            raise DatasetUnavailable(f"{folder}: no such folder; data.dataset FOLDER needs one that holds images")
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise DatasetUnavailable(f"{folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
        self.image_size, self.mode = image_size, _pillow_mode(channels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = read_image(self.paths[index], self.mode)
        except UntrustedFileError as error:
            raise DatasetUnavailable(f"{self.paths[index]}: {error}") from None
        return _square(image, self.image_size), 0


class LmdbImages(Dataset[tuple[Tensor, int]]):
    """The images of an LMDB in the order of its keys: cut to the central square, resized, label 0.

    The keys are read anew each time. torchvision's class for LSUN keeps them in a pickle in the working folder, which
    it takes from there again whatever made it, and for another database whose path has the same letters.
    """

    def __init__(self, path: Path, image_size: int, channels: int):
        self.path, self.image_size, self.mode = path, image_size, _pillow_mode(channels)
        self._store = open_lmdb(path)
        with self._store.begin() as transaction:
            self.keys = list(transaction.cursor().iternext(keys=True, values=False))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        key = self.keys[index]
        with self._store.begin() as transaction:
            value = transaction.get(key)
        try:
            image = read_image(io.BytesIO(value), self.mode)
        except UntrustedFileError as error:
            raise DatasetUnavailable(f"{self.path}, key {key.decode('ascii', 'replace')}: {error}") from None
        return _square(image, self.image_size), 0


class _Flipped(Dataset[tuple[Tensor, int]]):
    """Mirrors half of the images, chosen anew at every access (by torch's generator of the loading process)."""

    def __init__(self, source: ImageData):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return (image.flip(-1) if torch.rand(()) < FLIP_PROBABILITY else image), label


def _open_cifar10(config: DataConfig, root: Path, train: bool, download: bool) -> ImageData:
    from torchvision.datasets import CIFAR10  # torchvision is imported where it is used: it takes as long as torch

    _require_channels(config, 3)
    try:
        source = CIFAR10(str(root), train=train, download=download)
    except RuntimeError:
        raise DatasetUnavailable(
            f"CIFAR-10 is not in {root} (looked for {root / 'cifar-10-batches-py'}); unpack cifar-10-python.tar.gz "
            "there, or let torchvision download it (download=True)"
        ) from None
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2)  # N, 32, 32, C -> N, C, 32, 32
    return ArrayImages(_resized(images, config.image_size), torch.tensor(source.targets))


def _open_fashion_mnist(config: DataConfig, root: Path, train: bool, download: bool) -> ImageData:
    _require_channels(config, 1)
    unpacked = root / "FashionMNIST" / "raw"
    if download or unpacked.is_dir():
        from torchvision.datasets import FashionMNIST

        try:
            source = FashionMNIST(str(root), train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise DatasetUnavailable(f"Fashion-MNIST in {unpacked} is incomplete: {error}") from None
        images, labels = source.data, source.targets
    else:
        folder = next((f for f in (root, DEBIAN_FASHION_MNIST) if (f / _idx_name(train, "images")).is_file()), None)
        if folder is None:
            raise DatasetUnavailable(
                f"Fashion-MNIST is neither in {unpacked} nor, as {_idx_name(train, 'images')}, in {root} or "
                f"{DEBIAN_FASHION_MNIST}; on Debian and Ubuntu `apt-get install dataset-fashion-mnist` brings it, "
                "elsewhere let torchvision download it (download=True)"
            )
        images = read_idx(folder / _idx_name(train, "images"))
        labels = read_idx(folder / _idx_name(train, "labels")).long()
    images = images.unsqueeze(1)  # N, 1, 28, 28
    if config.image_size == 32:
        # Zeros are this data set's background: two more rows and columns on each side let the size be halved thrice.
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return ArrayImages(_resized(images, config.image_size), labels)


def _open_lsun(config: DataConfig, root: Path, train: bool, download: bool) -> ImageData:
    if not config.category:
        raise ValueError("data.dataset LSUN needs data.category, for example bedroom, church_outdoor or cat")
    name = f"{config.category}_{'train' if train else 'val'}"
    if not (root / f"{name}_lmdb").is_dir():
        raise DatasetUnavailable(
            f"{root / f'{name}_lmdb'}: no such folder; download and unpack the LSUN archive of {config.category} there"
        )
    return LmdbImages(root / f"{name}_lmdb", config.image_size, config.channels)


_stores: WeakValueDictionary[Path, Any] = WeakValueDictionary()


def open_lmdb(path: Path) -> Any:
    """An LMDB (``lmdb.Environment``) to read from.

    A process opens a folder only once, so all that ask for it share it, for as long as one of them keeps it.

    Raises:
        DatasetUnavailable: it is no LMDB, or the package is missing.
    """
    try:
        import lmdb
    except ImportError:
        raise DatasetUnavailable(
            f"{path}: reading an LMDB needs the package lmdb: pip install lmdb, or install this project with the extra "
            "`evaluate`"
        ) from None
    path = path.resolve()
    store = _stores.get(path)
    if store is None:
        try:
            store = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise DatasetUnavailable(f"{path}: not an LMDB that can be read ({error})") from None
        _stores[path] = store
    return store


def _open_folder(config: DataConfig, root: Path, train: bool, download: bool) -> ImageData:
    return FolderImages(root, config.image_size, config.channels)


_OPENERS: dict[str, Callable[[DataConfig, Path, bool, bool], ImageData]] = {
    "CIFAR10": _open_cifar10,
    "FashionMNIST": _open_fashion_mnist,
    "LSUN": _open_lsun,
    "FOLDER": _open_folder,
}


def read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of bytes, the format of MNIST: two zeros, type 8, rank, big-endian sizes, values.

    Raises:
        DatasetUnavailable: the file is not one, or is truncated.
    """
    try:
        packed = path.read_bytes()
        header = gunzip(packed, 4 + 4 * 255, cut=True)
        if len(header) < 4 or header[:3] != b"\0\0\x08" or len(header) < 4 + 4 * header[3]:
            raise DatasetUnavailable(f"{path}: not an IDX file of bytes")
        start = 4 + 4 * header[3]
        sizes = tuple(np.frombuffer(header[4:start], dtype=">u4").tolist())
        content = gunzip(packed, start + min(math.prod(sizes), DEFLATE_RATIO * len(packed)))
    except UntrustedFileError as error:
        raise DatasetUnavailable(f"{path}: {error}") from None
    except OSError as error:
        raise DatasetUnavailable(f"{path}: cannot be read ({error.strerror})") from None
    values = np.frombuffer(content, dtype=np.uint8, offset=start)
    if values.size != math.prod(sizes):
        raise DatasetUnavailable(f"{path}: holds {values.size} values, its header promises {math.prod(sizes)}")
    return torch.from_numpy(values.reshape(sizes).copy())


def _idx_name(train: bool, what: str) -> str:
    rank = 3 if what == "images" else 1
    return f"{'train' if train else 't10k'}-{what}-idx{rank}-ubyte.gz"


def _require_channels(config: DataConfig, channels: int) -> None:
    if config.channels != channels:
        raise ValueError(f"data.channels {config.channels}: the images of {config.dataset} have {channels}")


def _pillow_mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ValueError(f"data.channels {channels}: images are read with 1 or 3 channels")
    return "L" if channels == 1 else "RGB"


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    from torchvision.transforms.functional import resize

    return resize(images, [size, size], antialias=True)


def _square(image: Image.Image, size: int) -> Tensor:
    """The central square at ``size`` x ``size``: C x H x W in [0, 1]."""
    from torchvision.transforms.functional import center_crop, resize, to_tensor

    return to_tensor(resize(center_crop(image, [min(image.size)] * 2), [size, size], antialias=True))
