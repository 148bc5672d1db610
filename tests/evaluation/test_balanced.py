"""Statistics in which every class weighs the same, and classifiers that their file names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdiff.evaluation.features import (
    EmojiClassifier,
    FashionClassifier,
    balanced_statistics,
    guesses,
    load_classifier,
    pooled_features,
    save_classifier,
)
from qdiff.evaluation.frechet import FeatureStatistics, equal_mixture


def test_a_mixture_is_that_of_repeated_vectors() -> None:
    draws = torch.Generator().manual_seed(0)
    few, many = torch.randn(5, 3, generator=draws), torch.randn(20, 3, generator=draws) + 2
    mixed = equal_mixture([FeatureStatistics.from_features(part) for part in (few, many)], "both")
    repeated = torch.cat([few.repeat(4, 1), many]).double()  # 20 of each
    torch.testing.assert_close(mixed.mean, repeated.mean(0))
    torch.testing.assert_close(mixed.covariance, repeated.T.cov(correction=0))
    assert (mixed.count, mixed.name) == (25, "both")


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="0 parts"):
        equal_mixture([])
    with pytest.raises(ValueError, match="of one length"):
        equal_mixture([FeatureStatistics.from_features(torch.randn(3, size)) for size in (2, 3)])


def test_classes_weigh_equally() -> None:
    torch.manual_seed(0)
    classifier = EmojiClassifier().eval()
    images = torch.randint(256, (9, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0] * 6 + [4] * 3)
    balanced = balanced_statistics(classifier, images, labels, "all")
    features = pooled_features(classifier, images).double()
    torch.testing.assert_close(balanced.mean, (features[:6].mean(0) + features[6:].mean(0)) / 2)
    with pytest.raises(ValueError, match="at least 2"):
        balanced_statistics(classifier, images[5:8], labels[5:8], "a class of one")


def test_a_file_says_whose_classifier_it_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = EmojiClassifier().eval()
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, made.state_dict(), {"network": "emoji64"})
    read = load_classifier(path)
    assert isinstance(read, EmojiClassifier)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(pooled_features(read, images), pooled_features(made, images), atol=1e-2, rtol=1e-2)
    assert torch.equal(guesses(read, images), read(2 * images - 1).argmax(1))
    assert load_file(path)["body.0.0.weight"].dtype == torch.float16
    assert load_file(path)["body.0.1.running_var"].dtype == torch.float32

    save_file(FashionClassifier().state_dict(), path)  # as the first releases wrote it, without a word
    assert isinstance(load_classifier(path), FashionClassifier)
    save_file(made.state_dict(), path, {"network": "cats"})
    with pytest.raises(ValueError, match="'cats'; known are fashion_mnist, emoji64"):
        load_classifier(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not the weights of a classifier"):
        load_classifier(path)
    with pytest.raises(ValueError, match="no such classifier"):
        load_classifier(tmp_path / "missing")
