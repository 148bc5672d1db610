"""The networks of the usual scores, as torch-fidelity has them, and where their weights come from.

Weights are files of one's own, or those that torch's cache holds under the names that torch-fidelity gives them, or
downloaded there. Files are read as weights and nothing else before torch-fidelity, which would run what a hostile file
tells it to, gets to see them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import tempfile
import urllib.error
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.evaluation.errors import EvaluationError
from qdiff.evaluation.image_sets import as_bytes

LOGITS = "logits_unbiased"  # of Inception: what the Inception Score is made of


@dataclass(frozen=True)
class WeightFile:
    """A file that torch-fidelity wants.

    Attributes:
        name: in torch's cache; url: where it is published; flag: by which users name a file of their own.
    """

    name: str
    url: str
    flag: str
    what: str

    @property
    def cached(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


_RELEASES = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION = WeightFile(
    "weights-inception-2015-12-05-6726825d.pth",
    _RELEASES + "weights-inception-2015-12-05-6726825d.pth",
    "--inception_weights",
    "Inception v3",
)
VGG16 = WeightFile(
    "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "--vgg16_weights", "VGG16"
)
LPIPS = WeightFile(
    "weights-vgg16-lpips.pth", _RELEASES + "weights-vgg16-lpips.pth", "--lpips_weights", "the linear layers of LPIPS"
)


def import_torch_fidelity() -> Any:
    """The package, which the extra ``evaluate`` brings.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise EvaluationError(
            f"FID, Inception Score, KID, precision and recall and LPIPS need the package torch-fidelity ({error}): "
            "pip install torch-fidelity, or install this project with the extra `evaluate`. --features bundled, the "
            "text scores and --metrics psnr do without"
        ) from None
    return torch_fidelity


def find_weights(file: WeightFile, own: str | Path | None = None) -> Path:
    """The file itself: one's own, the cached one, or downloaded into the cache now.

    Raises:
        EvaluationError: it is not to be had, or holds more than weights.
    """
    path = Path(own) if own is not None else file.cached
    if own is not None and not path.is_file():
        raise EvaluationError(f"{file.flag} {path}: no such file")
    if not path.is_file():
        _download(file)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EvaluationError(f"{path}: not a file of weights ({reason})") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise EvaluationError(f"{path}: not the weights of {file.what}: it holds no dict of tensors")
    return path.absolute()


def _download(file: WeightFile) -> None:
    """As torch does it: whole, or not there."""
    file.cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(file.url, str(file.cached))
    except (OSError, urllib.error.URLError) as error:
        raise EvaluationError(
            f"the weights of {file.what} are not in the cache and could not be downloaded ({error}). Without network, "
            f"put {file.url} at {file.cached}, or name a copy with {file.flag}"
        ) from None


def identity(name: str, path: Path) -> str:
    """What a network's features are of: its name and the beginning of its file's SHA-256."""
    with open(path, "rb") as file:
        return f"{name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


class FidelityNetwork:
    """A feature extractor of torch-fidelity.

    Attributes:
        name: with the hash of its weights.
        layer: whose output Fréchet distance, KID, precision and recall are made of.
        channels: of the images it takes.
    """

    channels = 3

    def __init__(self, file: WeightFile, path: Path, device: torch.device, *, logits: bool = False):
        """Builds Inception v3 (``file`` is :data:`INCEPTION`) or VGG16.

        Raises:
            EvaluationError: the weights are those of another network.
        """
        package = import_torch_fidelity()
        kind = "inception-v3-compat" if file is INCEPTION else "vgg16"
        cls = package.registry.FEATURE_EXTRACTORS_REGISTRY[kind]
        self.layer = cls.get_default_feature_layer_for_metric("fid")
        self._layers = [self.layer, LOGITS] if logits else [self.layer]
        try:
            network = cls(kind, self._layers, feature_extractor_weights_path=str(path))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise EvaluationError(
                f"{path}: not the weights of {file.what} as torch-fidelity reads it ({reason})"
            ) from None
        self._network: nn.Module = network.eval().requires_grad_(False).to(device)
        self.device = device
        self.name = identity(kind, path)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """N x 3 x H x W, uint8 or floats in [0, 1] -> ``features`` N x D, and ``logits`` N x 1008 where asked for."""
        values = self._network(as_bytes(images).contiguous().to(self.device))
        found = dict(zip(self._layers, values, strict=True))
        return {"features": found[self.layer].cpu()} | ({"logits": found[LOGITS].cpu()} if LOGITS in found else {})


def lpips_network(lpips: Path, vgg16: Path, device: torch.device) -> nn.Module:
    """LPIPS on VGG16 (Zhang et al. 2018): two N x 3 x H x W uint8 -> N distances.

    torch-fidelity reads its weights from torch's cache alone, so while the network is built the cache is a folder that
    has the two files under the names it looks for.

    Raises:
        EvaluationError: a file holds other weights.
    """
    registry = import_torch_fidelity().registry.SAMPLE_SIMILARITY_REGISTRY
    try:
        with _cache_of({LPIPS.name: lpips, VGG16.name: vgg16}), contextlib.redirect_stderr(io.StringIO()):
            network = registry["lpips-vgg16"]("lpips-vgg16", sample_similarity_dtype="uint8")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"{lpips} or {vgg16}: not the weights of LPIPS and VGG16 ({reason})") from None
    return network.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def _cache_of(files: Mapping[str, Path]) -> Iterator[None]:
    """Inside the block torch's cache of weights holds these files alone."""
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoints"
        place.mkdir()
        for name, path in files.items():
            os.symlink(path.absolute(), place / name)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
