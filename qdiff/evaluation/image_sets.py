"""Sets of finished images, as sampling leaves them on disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
        images = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{path}: expected a folder of PNG files, an .npz or a .pt file")
    _check(images, path)
    return images


def _from_folder(path: Path) -> Tensor:
    files = sorted(file for file in path.glob("*.png") if re.fullmatch(r"\d+", file.stem))
    if not files:
        raise ValueError(f"{path}: no images named by their number, such as 000000.png")
    return _channels_first(np.stack([np.asarray(Image.open(file)) for file in files]))


def _from_npz(path: Path) -> Tensor:
    with np.load(path, allow_pickle=False) as arrays:
        if not arrays.files:
            raise ValueError(f"{path}: holds no array")
        return _channels_first(arrays[arrays.files[0]])


def _channels_first(images: np.ndarray) -> Tensor:
    if images.ndim == 3:
        images = images[..., None]  # N, H, W, C
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def _check(images: object, path: Path) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{path}: expected a tensor N x C x H x W, found {found}")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{path}: expected uint8 or float images, found {images.dtype}")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ValueError(f"{path}: values from {low:.3g} to {high:.3g}; expected [0, 1]")
