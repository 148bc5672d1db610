"""Fréchet distance of finished images to the training images of a bundled model.

    python scripts/score_samples.py --images runs/samples/DATE/img

needs no data set: the classifier whose features are compared, and the training images' statistics, are bundled, by
default those of Fashion-MNIST; ``--bundle models/ldm/emoji64`` takes those of the emoji. The result is printed as one
line of JSON, and appended to a file with ``--append``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qdiff.evaluation.features import image_statistics, load_classifier
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.image_sets import load_image_set

BUNDLE = Path(__file__).resolve().parents[1] / "models" / "pixel" / "fashion_mnist"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="folder of numbered PNG files, .npz or .pt")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="folder of the classifier and the statistics")
    parser.add_argument("--label", default="", help="what the images are, for the record")
    parser.add_argument("--append", type=Path, help="file of JSON lines that the result is added to")
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        images = load_image_set(args.images)
        reference = FeatureStatistics.load(args.bundle / "reference_statistics.safetensors")
        classifier = load_classifier(args.bundle / "classifier.safetensors", args.device)
        statistics = image_statistics(classifier, images, args.label or str(args.images), args.batch_size)
    except ValueError as error:
        parser.error(str(error))
    result = {
        "images": statistics.name,
        "count": statistics.count,
        "frechet_distance": round(frechet_distance(statistics, reference), 5),
        "reference": reference.name,
    }
    line = json.dumps(result, ensure_ascii=False)
    print(line)
    if args.append is not None:
        with args.append.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
