"""Sets of finished images, as sampling leaves them on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.tensor_archive import load_archive
from ddim.untrusted import UntrustedFileError, read_image, read_npz_array


def load_image_set(path: str | Path) -> Tensor:
    """Read a set of images: N x C x H x W, uint8 or float in [0, 1].

    Args:
        path: a folder of ``000000.png``, ``000001.png``, ... (files with other names, a grid for example, are left
            out); an ``.npz`` whose first array is uint8, N x H x W or N x H x W x C; or a ``.pt`` tensor,
            N x C x H x W, uint8 or float in [0, 1].

    Raises:
        ValueError: nothing there, another content, or values outside the range.
    """
    path = Path(path)
    if path.is_dir():
        images = _from_folder(path)
    elif not path.is_file():
        raise ValueError(f"{path}: there is no such file or folder of images")
    elif path.suffix == ".npz":
        images = _from_npz(path)
    elif path.suffix == ".pt":
        images = _checked(path, load_archive)
    else:
        raise ValueError(f"{path}: expected a folder of PNG files, an .npz or a .pt file")
    _check(images, path)
    return images


def _from_folder(path: Path) -> Tensor:
    files = sorted(file for file in path.glob("*.png") if re.fullmatch(r"\d+", file.stem))
    if not files:
        raise ValueError(f"{path}: no images named by their number, such as 000000.png")
    pictures = [np.asarray(_checked(file, read_image)) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise ValueError(f"{file}: is {picture.shape}, the first picture {pictures[0].shape}; expected one size")
    return _channels_first(np.stack(pictures), path)


def _from_npz(path: Path) -> Tensor:
    return _channels_first(_checked(path, read_npz_array), path)


def _checked(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except UntrustedFileError as error:
        raise ValueError(f"{path}: {error}") from None


def _channels_first(images: np.ndarray, path: Path) -> Tensor:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{path}: expected uint8 N x H x W x C, found {images.dtype} {images.shape}")
    if images.ndim == 3:
        images = images[..., None]  # N, H, W, C
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def _check(images: object, path: Path) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{path}: expected a tensor N x C x H x W, found {found}")
    if images.numel() == 0:
        raise ValueError(f"{path}: holds no image")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{path}: expected uint8 or float images, found {images.dtype}")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ValueError(f"{path}: values from {low:.3g} to {high:.3g}; expected [0, 1]")
