"""Make what scores Fashion-MNIST samples without the data set: the classifier and the training images' statistics.

    python scripts/prepare_fashion_bundle.py --classifier FILE --data DIR

writes ``classifier.safetensors`` (convolutions and the linear layer's matrix in float16, the rest float32) and
``reference_statistics.safetensors`` beside the model they belong to, and prints what rounding the classifier costs:
its accuracy, and the Fréchet distance of the test images to the training images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

from ddim.config import load_config
from ddim.datasets import ArrayImages, open_dataset
from qdiff.evaluation.features import FashionClassifier, accuracy, image_statistics, save_classifier
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLE = REPOSITORY / "models" / "pixel" / "fashion_mnist"
CONFIG = REPOSITORY / "configs" / "fashion_mnist.yml"


def judge(path: Path, train: ArrayImages, test: ArrayImages) -> tuple[FeatureStatistics, float]:
    """Statistics of the training images and accuracy on the test images, by the classifier in ``path``; prints both."""
    classifier = FashionClassifier.load(path)
    right = accuracy(classifier, test.images, test.labels)
    reference = image_statistics(classifier, train.images, "Fashion-MNIST, 60000 training images, 32x32")
    distance = frechet_distance(image_statistics(classifier, test.images, "test images"), reference)
    print(f"{path.name}: accuracy {right:.4f}; test images against training images {distance:.5f}", flush=True)
    return reference, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--classifier", type=Path, required=True, help="its float32 weights, safetensors")
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST, see ddim.datasets")
    parser.add_argument("--out", type=Path, default=BUNDLE, help="default: the bundle in this repository")
    args = parser.parse_args()

    data = load_config(CONFIG).data
    train, test = (open_dataset(data, args.data, train=split) for split in (True, False))
    _, right = judge(args.classifier, train, test)
    target = args.out / "classifier.safetensors"
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"what": "Fashion-MNIST classifier, grey images in [-1, 1]", "test_accuracy": json.dumps(right)}
    save_classifier(target, load_file(args.classifier), about)
    reference, right_rounded = judge(target, train, test)
    if abs(right - right_rounded) > 5e-4:
        raise SystemExit(f"float16 changes the accuracy from {right} to {right_rounded}: keep float32")
    reference.save(args.out / "reference_statistics.safetensors")


if __name__ == "__main__":
    main()
