"""What the training scripts of latent models share beside their loop: options, data, the learning rate, files.

The loop is :mod:`ldm.training_loop`; unlike it, nothing here needs PyTorch Lightning.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from ddim.untrusted import UntrustedFileError, open_safetensors, parse_json

WARMUP_STEPS = 1000
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained.

    Attributes:
        steps: length of the whole run, over all its invocations; the learning rate depends on it. None: as many as
            ``for_minutes`` have room for, counted from the speed of the first.
        for_minutes: length of the whole run, from the beginning of its first invocation; in place of ``steps``.
        minutes: wall time of this invocation, after which it stops and can be resumed; None for no limit.
        lr: highest learning rate.
        ema: decay of the averaged weights, in [0, 1).
        precision: ``bf16`` for automatic mixed precision.
        compile: torch.compile the loss (GPU only).
    """

    steps: int | None
    batch_size: int
    lr: float
    ema: float
    seed: int = 0
    for_minutes: float | None = None
    minutes: float | None = None
    precision: str = "fp32"
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.for_minutes is None):
            raise ValueError("say how long: --steps or --for_minutes, one of the two")
        for name in ("steps", "batch_size", "lr", "for_minutes", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value}: must be above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema}: must lie in [0, 1)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision {self.precision}: is none of {', '.join(PRECISIONS)}")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: this machine has no CUDA device; --device cpu is slow but works")

    def identity(self) -> dict[str, Any]:
        """What must not change between the invocations of one run."""
        return {key: value for key, value in asdict(self).items() if key not in ("minutes", "compile")}


class Task(Protocol):
    """What the loop trains: an ``nn.Module`` with these members.

    Attributes:
        model: holds the weights; those with ``requires_grad`` are trained and averaged.
    """

    model: nn.Module

    def draw(self, batch_size: int) -> tuple[Tensor, ...]:
        """A random batch: everything random of a step, made on the device without waiting for it."""

    def loss(self, *batch: Tensor) -> Tensor:
        """The loss, a scalar, of what :meth:`draw` gave."""


class ImageSet(NamedTuple):
    """Images, N x 3 x H x W uint8, the class of each, N int64, and N captions, where the file has them."""

    images: Tensor
    classes: Tensor
    captions: tuple[str, ...] | None = None


def load_image_set(folder: Path, part: str, size: int) -> ImageSet:
    """One part of a prepared image folder: ``FOLDER/PART.safetensors`` with ``images`` (N x H x W x 3) and ``labels``.

    Captions are in the header, as :func:`ldm.data.emoji.pack_split` writes them.

    Args:
        part: ``train`` or ``heldout``.
        size: H and W that the model is made for, in pixels.

    Raises:
        ValueError: no such file, or content of another kind, shape or type.
    """
    path = folder / f"{part}.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data names a folder with train.safetensors and heldout.safetensors")
    try:
        with open_safetensors(path) as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = parse_json((file.metadata() or {}).get("about", "{}"))
        captions = about.get("captions") if isinstance(about, dict) else 0
        if captions is not None and not isinstance(captions, list):
            raise UntrustedFileError("its captions are no list")
    except UntrustedFileError as error:
        raise ValueError(f"{path}: {error}") from None
    missing = {"images", "labels"} - content.keys()
    if missing:
        raise ValueError(f"{path}: has no tensor '{min(missing)}', only {', '.join(sorted(content)) or 'nothing'}")
    images, classes = content["images"], content["labels"]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
        raise ValueError(f"{path}: images are {_described(images)}, expected uint8 N x {size} x {size} x 3")
    if classes.dtype != torch.int64 or classes.shape != (len(images),):
        raise ValueError(f"{path}: labels are {_described(classes)}, expected int64 {len(images)}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{path}: has {len(captions)} captions of {len(images)} images")
    return ImageSet(
        images.permute(0, 3, 1, 2).contiguous(), classes, None if captions is None else tuple(map(str, captions))
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape)) or 'scalar'}"


def to_model(images: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1] float32."""
    return images.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1], clamped, to uint8 pixels."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def learning_rate_factor(step: int, total: int | None) -> float:
    """Factor on the highest rate: linear warm-up, then half a cosine down to 0 (Loshchilov and Hutter 2017).

    Args:
        step: steps already taken.
        total: length of the run; a tenth of it at most is warm-up. None: not known yet, the end is far.
    """
    if total is None:
        return min(1.0, (step + 1) / WARMUP_STEPS)
    warmup = max(1, min(WARMUP_STEPS, total // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def weights_for_file(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's state dict on the CPU; parameters in ``dtype``, buffers as they are.

    Buffers hold the noise schedule, and float16 would change it.
    """
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: tensor.detach().to("cpu", dtype if name in parameters else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }


def encode_weights(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file with ``facts`` in its header, those that are no strings as JSON."""
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    return save(dict(weights), metadata=header)


def encode_grid(images: Tensor, columns: int) -> bytes:
    """uint8 images, N x 3 x H x W, in rows of ``columns``: a PNG file."""
    from torchvision.utils import make_grid  # as slow to import as torch

    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255).permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(grid.numpy()).save(buffer, "PNG")
    return buffer.getvalue()
