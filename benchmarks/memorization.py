"""How close samples come to a training image: does a small model make up images, or remember them?

    python benchmarks/memorization.py --images RUN/img --data data/emoji64

prints, for the samples and for the held-out images, the PSNR to the nearest training image: its median, and how many
lie within some decibels. Held-out images say how near one another different images are anyway.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ldm.training import load_image_set as load_part
from qdiff.evaluation.image_sets import load_image_set
from qdiff.evaluation.variants import markdown_table

LEVELS = 20.0, 25.0, 30.0  # dB
IMAGES_AT_ONCE = 100


def nearest_psnr(images: Tensor, others: Tensor) -> Tensor:
    """N x ... and M x ... in [0, 1] -> N: PSNR of each image to the one of the others that is nearest, in dB."""
    flat = others.flatten(1)
    distance = torch.cat([torch.cdist(part, flat).amin(1) for part in images.flatten(1).split(IMAGES_AT_ONCE)])
    return -10 * torch.log10((distance.square() / flat.shape[1]).clamp(min=1e-8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="folder of numbered PNG files, .npz or .pt")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and heldout.safetensors")
    args = parser.parse_args()
    images = load_image_set(args.images)
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    train, heldout = (
        load_part(args.data, part, images.shape[-1]).images.float() / 255 for part in ("train", "heldout")
    )
    rows = []
    for name, some in (("samples", images), ("held-out images", heldout)):
        psnr = nearest_psnr(some, train)
        shares = (f"{(psnr >= level).float().mean().item():.1%}" for level in LEVELS)
        rows.append([name, str(len(some)), f"{psnr.median().item():.1f}", *shares])
    header = [
        "PSNR to the nearest training image",
        "images",
        "median, dB",
        *(f"{level:g} dB or more" for level in LEVELS),
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
