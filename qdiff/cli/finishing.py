"""What becomes of decoded images before they are saved: a checker's objections, and an invisible watermark.

Both need packages that are no part of an installation: ``pip install qdiff[watermark]``, ``qdiff[safety]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdiff.cli.errors import UserError

WATERMARK = b"StableDiffusionV1"  # what detectors of the published scripts' images look for
SMALLEST_MARKED = 256 * 256  # pixels; the method needs as many
OBJECTIONABLE = ("nsfw", "unsafe", "porn", "hentai", "sexy")  # labels of classifiers that mean it

ImageStep = Callable[[Tensor], Tensor]
"""Images in [0, 1], N x 3 x H x W -> the same."""

logger = logging.getLogger(__name__)


def image_steps(args: argparse.Namespace) -> list[ImageStep]:
    """What the flags ask for, and the installation offers.

    Raises:
        UserError: a checker was asked for that cannot be loaded.
    """
    steps: list[ImageStep] = [SafetyChecker(args.safety_checker)] if args.safety_checker else [_TellOnce()]
    if not args.no_watermark and importlib.util.find_spec("imwatermark"):
        steps.append(Watermark())
    return steps


class _TellOnce:
    """Says in the log of the run that images are not checked."""

    def __init__(self) -> None:
        self.told = False

    def __call__(self, images: Tensor) -> Tensor:
        if not self.told:
            logger.info("images are not checked for content: --safety_checker is not given")
        self.told = True
        return images


class Watermark:
    """Marks images as made by a machine, invisibly (frequencies of a wavelet transform), for programs to find."""

    def __init__(self) -> None:
        from imwatermark import WatermarkEncoder

        self.encoder = WatermarkEncoder()
        self.encoder.set_watermark("bytes", WATERMARK)
        self.told = False

    def __call__(self, images: Tensor) -> Tensor:
        small = images.shape[2] * images.shape[3] < SMALLEST_MARKED
        if not self.told:
            logger.info("images are %s", "too small for a watermark" if small else "marked invisibly (--no_watermark)")
        self.told = True
        return images if small else torch.stack([self._marked(image) for image in images])

    def _marked(self, image: Tensor) -> Tensor:
        pixels = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()  # H, W, RGB
        marked = self.encoder.encode(np.ascontiguousarray(pixels[..., ::-1]), "dwtDct")[..., ::-1]  # as BGR
        return torch.from_numpy(np.ascontiguousarray(marked)).permute(2, 0, 1).float().div(255).to(image.device)


class SafetyChecker:
    """Blacks out images that a checker objects to.

    Args:
        name: a folder or a name on the hub: a ``StableDiffusionSafetyChecker`` of diffusers, or an image classifier of
            transformers one of whose labels is in :data:`OBJECTIONABLE`.

    Raises:
        UserError: it cannot be loaded, or its labels say nothing.
    """

    def __init__(self, name: str):
        self.name = name
        try:
            self.flags = self._diffusers(name) if _is_diffusers(name) else self._transformers(name)
        except UserError:
            raise
        except Exception as error:  # a missing package, no network, files of another kind: the remedy is the same
            reason = (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
            raise UserError(
                f"--safety_checker {name}: cannot be loaded ({reason}); name a folder of a "
                "StableDiffusionSafetyChecker or of an image classifier (pip install qdiff[safety]), or leave it out"
            ) from None
        self.told = False

    def __call__(self, images: Tensor) -> Tensor:
        if not self.told:
            logger.info("images are checked by %s; those it objects to become black", self.name)
        self.told = True
        flagged = self.flags(images)
        if any(flagged):
            logger.info("%d of %d images were objected to and are black", sum(flagged), len(flagged))
        keep = torch.tensor([not flag for flag in flagged], device=images.device)
        return images * keep[:, None, None, None]

    @staticmethod
    def _diffusers(name: str) -> Callable[[Tensor], list[bool]]:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        checker = StableDiffusionSafetyChecker.from_pretrained(name).eval()
        processor = CLIPImageProcessor.from_pretrained(name)

        @torch.no_grad()
        def flags(images: Tensor) -> list[bool]:
            pixels = images.permute(0, 2, 3, 1).cpu().float().numpy()
            inputs = processor(list((pixels * 255).round().astype(np.uint8)), return_tensors="pt").pixel_values
            return [bool(flag) for flag in checker(images=list(pixels), clip_input=inputs)[1]]

        return flags

    @staticmethod
    def _transformers(name: str) -> Callable[[Tensor], list[bool]]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(name).eval()
        labels = {int(number): str(label).lower() for number, label in model.config.id2label.items()}
        bad = {number for number, label in labels.items() if label in OBJECTIONABLE}
        if not bad:
            raise UserError(
                f"--safety_checker {name}: none of its labels ({', '.join(labels.values())}) is one of "
                f"{', '.join(OBJECTIONABLE)}"
            )
        processor: Any = AutoImageProcessor.from_pretrained(name)

        @torch.no_grad()
        def flags(images: Tensor) -> list[bool]:
            pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            logits = model(**processor(list(pixels), return_tensors="pt")).logits
            return [int(number) in bad for number in logits.argmax(1)]

        return flags


def _is_diffusers(name: str) -> bool:
    """Whether a checker is diffusers' own: its config says so, or, on the hub, its name does."""
    config = Path(name) / "config.json"
    if not config.is_file():
        return "stable-diffusion" in name
    return "StableDiffusionSafetyChecker" in json.loads(config.read_text()).get("architectures", [])
