"""Fréchet distance of finished images to the training images of a bundled model, and agreement with captions.

    python scripts/score_samples.py --images runs/samples/DATE/img

needs no data set: the classifier whose features are compared, and the training images' statistics, are bundled, by
default those of Fashion-MNIST; ``--bundle models/ldm/emoji64`` takes those of the emoji. The result is printed as one
line of JSON, and appended to a file with ``--append``.

    python scripts/score_samples.py --images OUT/DATE/samples --captions models/ldm/emoji-text/captions.txt

also tells how far images of emoji agree with the captions that they were drawn of, in turn one for each image: in how
many the classifier sees the caption's group (``group``), and in how many the nearest training image, in its features,
has that very caption (``named``), or is a variant of the same emoji, such as another skin tone (``base``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qdiff.evaluation.features import image_statistics, load_classifier
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.image_sets import load_image_set
from qdiff.evaluation.text_agreement import KnownImages, agreement

MODELS = Path(__file__).resolve().parents[1] / "models"
BUNDLE, EMOJI = MODELS / "pixel" / "fashion_mnist", MODELS / "ldm" / "emoji64"
NAMES = MODELS / "ldm" / "emoji-text" / "names.safetensors"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="folder of numbered PNG files, .npz or .pt")
    parser.add_argument(
        "--bundle",
        type=Path,
        help="folder of the classifier and the statistics [models/pixel/fashion_mnist, with --captions "
        "models/ldm/emoji64]",
    )
    parser.add_argument("--captions", type=Path, metavar="FILE", help="what was drawn, a caption a line")
    parser.add_argument(
        "--names",
        type=Path,
        default=NAMES,
        metavar="FILE",
        help="captions that are known [of models/ldm/emoji-text]",
    )
    parser.add_argument("--label", default="", help="what the images are, for the record")
    parser.add_argument("--append", type=Path, help="file of JSON lines that the result is added to")
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    bundle = args.bundle or (BUNDLE if args.captions is None else EMOJI)
    shares = {}
    try:
        images = load_image_set(args.images)
        reference = FeatureStatistics.load(bundle / "reference_statistics.safetensors")
        classifier = load_classifier(bundle / "classifier.safetensors", args.device)
        statistics = image_statistics(classifier, images, args.label or str(args.images), args.batch_size)
        if args.captions is not None:
            captions = read_captions(args.captions, len(images))
            known = KnownImages.load(args.names, bundle / "classifier.safetensors")
            shares = agreement(classifier, known, images, captions, args.batch_size).to_dict()
            del shares["count"]
    except ValueError as error:
        parser.error(str(error))
    result = {
        "images": statistics.name,
        "count": statistics.count,
        "frechet_distance": round(frechet_distance(statistics, reference), 5),
        **shares,
        "reference": reference.name,
    }
    line = json.dumps(result, ensure_ascii=False)
    print(line)
    if args.append is not None:
        with args.append.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_captions(path: Path, count: int) -> list[str]:
    """The captions of ``count`` images, which are those of a file's lines in turn, empty ones left out.

    Raises:
        ValueError: the file is missing, is no text or holds no caption.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--captions {path}: cannot be read ({error})") from None
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"--captions {path}: holds no caption")
    return [captions[number % len(captions)] for number in range(count)]


if __name__ == "__main__":
    main()
