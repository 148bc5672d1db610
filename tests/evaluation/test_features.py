"""The classifier, the bundle made from it, and the script that scores with both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddim.config import load_config
from ddim.datasets import ArrayImages, DatasetUnavailable, open_dataset
from qdiff.cli import evaluate
from qdiff.evaluation.features import FashionClassifier, accuracy, image_statistics, pooled_features
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLE = REPOSITORY / "models" / "pixel" / "fashion_mnist"


@pytest.fixture(scope="module")
def classifier() -> FashionClassifier:
    return FashionClassifier.load(BUNDLE / "classifier.safetensors")


@pytest.fixture(scope="module")
def reference() -> FeatureStatistics:
    return FeatureStatistics.load(BUNDLE / "reference_statistics.safetensors")


@pytest.fixture(scope="module")
def held_out() -> ArrayImages:
    try:
        return open_dataset(load_config(REPOSITORY / "configs" / "fashion_mnist.yml").data, "data", train=False)
    except DatasetUnavailable as error:
        pytest.skip(str(error))


def random_images(count: int = 20) -> Tensor:
    return torch.randint(256, (count, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_do_not_depend_on_batches_or_on_the_type_of_the_images(classifier: FashionClassifier) -> None:
    images = random_images()
    features = pooled_features(classifier, images)
    assert features.shape == (20, 128)
    torch.testing.assert_close(pooled_features(classifier, images.float() / 255, batch_size=7), features)


def test_bundled_classifier_recognises_what_it_was_trained_on(
    classifier: FashionClassifier, held_out: ArrayImages
) -> None:
    assert accuracy(classifier, held_out.images[:1000], held_out.labels[:1000]) > 0.89  # 0.914 on all


def test_bundled_statistics_are_those_of_the_training_images(
    classifier: FashionClassifier, reference: FeatureStatistics, held_out: ArrayImages
) -> None:
    assert reference.count == 60000
    real = image_statistics(classifier, held_out.images[:2000], "real")
    assert frechet_distance(real, reference) < 0.1  # 0.009 for all 10 000


def test_noise_is_far_from_the_training_images(classifier: FashionClassifier, reference: FeatureStatistics) -> None:
    noise = image_statistics(classifier, random_images(300), "noise")
    assert frechet_distance(noise, reference) > 10


def test_other_images_and_files_are_refused(classifier: FashionClassifier, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes N x 1 x H x W"):
        pooled_features(classifier, torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="no such classifier"):
        FashionClassifier.load(tmp_path / "missing")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not the weights of a FashionClassifier"):
        FashionClassifier.load(tmp_path / "other.safetensors")


def test_the_command_prints_and_appends_the_distance(
    classifier: FashionClassifier, reference: FeatureStatistics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(random_images(), tmp_path / "images.pt")
    words = ["--images", tmp_path / "images.pt", "--features", "bundled", "--append", tmp_path / "all.jsonl"]
    for label in ("first", "second"):
        evaluate.main([str(word) for word in [*words, "--label", label, "--device", "cpu", "--batch_size", "7"]])
    expected = frechet_distance(image_statistics(classifier, random_images(), "noise"), reference)
    assert f"| Fréchet distance | {expected:.4f}" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [(r["label"], r["count"]) for r in records] == [("first", 20), ("second", 20)]
    for record in records:
        assert record["metrics"] == {"frechet_distance": pytest.approx(expected, rel=1e-9)}
        assert record["reference"] == reference.name
        assert record["environment"]["device"]
