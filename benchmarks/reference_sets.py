"""What preparing a reference set in a wrong way does to a Fréchet distance, measured on the bitmaps of emoji.

    python benchmarks/reference_sets.py --data data/emoji64

takes the emoji of a prepared folder out of the font again (136 x 128 pixels, on white), and brings them to 64 x 64: in
the way of the papers' evaluation (``qdiff.evaluation.preparation``), and in others. Features are those of the
classifier in models/ldm/emoji64. It prints the table of docs/evaluation.md: the distance of the training emoji
prepared in a wrong way to the same emoji prepared in the right way; and the distance of the held-out emoji, prepared
in the right way, to either, as a model's samples would have it.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.emoji import EmojiImages
from ldm.data.emoji_font import BACKGROUNDS, EmojiFont, on_background
from qdiff.evaluation.features import Classifier, image_statistics, load_classifier
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.preparation import center_square, square_image
from qdiff.evaluation.record import environment
from qdiff.evaluation.variants import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER = ROOT / "models" / "ldm" / "emoji64" / "classifier.safetensors"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 64
SMALL_SETS = (1000, 182)
DRAWS = 5  # of the small sets
Way = Callable[[Image.Image], Tensor]  # a picture -> 3 x 64 x 64, uint8 or floats in [0, 1]


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def right(picture: Image.Image) -> Tensor:
    return pixels(square_image(picture, SIZE))


def with_filter(picture: Image.Image, method: str) -> Tensor:
    return pixels(square_image(picture, SIZE, method))


def in_torch(picture: Image.Image, mode: str, antialias: bool, to_bytes: str) -> Tensor:
    """Resized as floats: ``to_bytes`` is round, truncate or no."""
    square = pixels(center_square(picture)).float()[None]
    small = F.interpolate(square, (SIZE, SIZE), mode=mode, antialias=antialias, align_corners=False)[0].clamp(0, 255)
    if to_bytes == "no":
        return small / 255
    return (small.round() if to_bytes == "round" else small.floor()).to(torch.uint8)


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def jpeg_after(picture: Image.Image, quality: int) -> Tensor:
    return pixels(through_jpeg(square_image(picture, SIZE), quality))


def jpeg_before(picture: Image.Image, quality: int) -> Tensor:
    return pixels(square_image(through_jpeg(picture, quality), SIZE))


def resized_then_cropped(picture: Image.Image) -> Tensor:
    scale = SIZE / min(picture.size)
    size = tuple(round(scale * side) for side in picture.size)
    return pixels(center_square(picture.resize(size, Image.Resampling.BICUBIC)))


def squashed(picture: Image.Image) -> Tensor:
    return pixels(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def twice(picture: Image.Image) -> Tensor:
    return pixels(square_image(square_image(picture, 96), SIZE))


WAYS: dict[str, Way] = {
    "Pillow's Lanczos": partial(with_filter, method="lanczos"),
    "Pillow's bilinear": partial(with_filter, method="bilinear"),
    "Pillow's box": partial(with_filter, method="box"),
    "nearest": partial(with_filter, method="nearest"),
    "bilinear without antialiasing (torch's default)": partial(
        in_torch, mode="bilinear", antialias=False, to_bytes="round"
    ),
    "bicubic without antialiasing": partial(in_torch, mode="bicubic", antialias=False, to_bytes="round"),
    "bicubic in two steps, over 96 pixels": twice,
    "JPEG of quality 75 after resizing": partial(jpeg_after, quality=75),
    "JPEG of quality 90 after resizing": partial(jpeg_after, quality=90),
    "JPEG of quality 95 after resizing": partial(jpeg_after, quality=95),
    "JPEG of quality 75 before resizing": partial(jpeg_before, quality=75),
    "resized first, then cropped": resized_then_cropped,
    "resized without cropping, squashed": squashed,
    "torch's antialiased bicubic, floats rounded": partial(in_torch, mode="bicubic", antialias=True, to_bytes="round"),
    "the same, floats truncated": partial(in_torch, mode="bicubic", antialias=True, to_bytes="truncate"),
    "the same, floats left as they are": partial(in_torch, mode="bicubic", antialias=True, to_bytes="no"),
}


def pictures(font: EmojiFont, data: EmojiImages) -> list[Image.Image]:
    """The bitmaps of a split's emoji, on white."""
    found = (font.picture([ord(character) for character in text]) for text in data.emoji)
    return [on_background(picture, BACKGROUNDS["white"]) for picture in found if picture is not None]


def statistics(classifier: Classifier, images: Sequence[Image.Image], way: Way) -> FeatureStatistics:
    return image_statistics(classifier, torch.stack([way(picture) for picture in images]), "")


def small_sets(classifier: Classifier, images: Tensor, whole: FeatureStatistics) -> list[list[str]]:
    """How far sets that are drawn from the reference lie from it, for being small."""
    rows = []
    for count in SMALL_SETS:
        draws = [
            torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count] for seed in range(DRAWS)
        ]
        found = torch.tensor([frechet_distance(image_statistics(classifier, images[d], ""), whole) for d in draws])
        rows.append([f"{count} of the images, at random", f"{found.mean():.4f} ± {found.std():.4f}", "", ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_emoji.py wrote")
    parser.add_argument("--font", type=Path, default=FONT, help="the font it was made of")
    args = parser.parse_args()
    font, classifier = EmojiFont(args.font), load_classifier(CLASSIFIER)
    train, heldout = (pictures(font, EmojiImages(args.data, split)) for split in ("train", "heldout"))
    exact = torch.stack([right(picture) for picture in train])
    reference, samples = image_statistics(classifier, exact, ""), statistics(classifier, heldout, right)
    base = frechet_distance(samples, reference)
    rows = [["cut to the central square, Pillow's bicubic, PNG", "0", f"{base:.4f}", ""]]
    for name, way in tqdm(WAYS.items()):
        wrong = statistics(classifier, train, way)
        against = frechet_distance(samples, wrong)
        rows.append([name, f"{frechet_distance(wrong, reference):.4f}", f"{against:.4f}", f"{against - base:+.4f}"])
    rows += small_sets(classifier, exact, reference)
    rows.append([f"the {len(heldout)} held-out images in place of the {len(train)}", f"{base:.4f}", "", ""])
    header = ["reference set", "distance to the right one", "held-out images against it", "change"]
    print(markdown_table(header, rows))
    print(f"\n{len(train)} training emoji, {len(heldout)} held out; {environment('cpu')}")


if __name__ == "__main__":
    main()
