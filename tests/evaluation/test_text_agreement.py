"""Whether images show what their captions say: shares in closed form, the metric against numpy, files, wrong input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from qdiff.evaluation.features import EmojiClassifier, guesses, load_classifier, pooled_features, save_classifier
from qdiff.evaluation.text_agreement import SMALLEST_VARIANCE, KnownImages, agreement

GROUPS = (5, 2, 8)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (sum(GROUPS), 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("judges") / "classifier.safetensors"
    torch.manual_seed(0)
    save_classifier(path, EmojiClassifier().state_dict(), {"network": "emoji64"})
    return path


@pytest.fixture(scope="module")
def known(images, classifier_file) -> KnownImages:
    """Of three groups; every two images that follow one another are variants of one thing."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(GROUPS))
    captions = [f"thing {number}" for number in range(len(images))]
    bases = torch.arange(len(images)) // 2
    return KnownImages.of(classifier_file, load_classifier(classifier_file), images, labels, bases, captions)


def test_shares_of_images_that_agree(images, classifier_file, known):
    classifier = load_classifier(classifier_file)
    captions = list(known.captions)
    found = agreement(classifier, known, images, captions)
    assert (found.count, found.named, found.base) == (15, 1.0, 1.0)
    right = guesses(classifier, images) == known.labels
    assert found.group == pytest.approx(right.double().mean().item())

    # The first four images under other captions, three of them under a variant's.
    shuffled = [captions[n] for n in (1, 0, 5, 2)] + captions[4:]
    found = agreement(classifier, known, images, shuffled, batch_size=4)
    assert found.named == pytest.approx(11 / 15)
    assert found.base == pytest.approx(14 / 15)
    assert agreement(classifier, known, images[3:4].float() / 255, captions[3:4]).to_dict()["named"] == 1


def test_the_nearest_is_that_of_mahalanobis(known):
    """Against numpy, with the inverse of the covariance, small variances taken to be larger."""
    features = known.features.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(features.T))
    inverse = vectors @ np.diag(1 / np.maximum(values, SMALLEST_VARIANCE * values[-1])) @ vectors.T
    generator = np.random.default_rng(0)
    asked = features[:10] + 0.3 * features.std() * generator.standard_normal((10, features.shape[1]))
    differences = asked[:, None] - features[None]
    expected = np.einsum("nmd,de,nme->nm", differences, inverse, differences).argmin(1)
    assert known.nearest(torch.from_numpy(asked).float()).tolist() == expected.tolist()
    assert (expected != np.arange(10)).any()  # the noise is large enough to matter


def test_captions_take_the_groups_in_turn(known):
    order = known.in_turn(0)
    groups = [int(known.labels[known.index[caption]]) for caption in order]
    assert groups == [0, 1, 2] * max(GROUPS)
    assert set(order[2::3]) == {f"thing {n}" for n in range(7, 15)}  # the largest group, each once
    counts = Counter(order[0::3])
    assert sorted(counts.values()) == [1, 1, 2, 2, 2]  # 8 times 5 captions
    assert known.in_turn(0) == order
    assert known.in_turn(1) != order


def test_a_file_gives_back_what_was_known(known, classifier_file, tmp_path):
    known.save(tmp_path / "names.safetensors")
    again = KnownImages.load(tmp_path / "names.safetensors", classifier_file)
    assert torch.equal(again.features, known.features)
    assert torch.equal(again.labels, known.labels)
    assert torch.equal(again.bases, known.bases)
    assert (again.captions, again.classifier) == (known.captions, known.classifier)


def test_wrong_input(images, known, classifier_file, tmp_path):
    classifier, captions = load_classifier(classifier_file), list(known.captions)
    with pytest.raises(ValueError, match="15 images and 14 captions"):
        agreement(classifier, known, images, captions[1:])
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        agreement(classifier, known, images[:0], [])
    with pytest.raises(ValueError, match="1 captions are of no known image, as 'unicorn'"):
        agreement(classifier, known, images, ["unicorn", *captions[1:]])
    path = tmp_path / "names.safetensors"
    with pytest.raises(ValueError, match="no such file of known images"):
        KnownImages.load(path, classifier_file)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a file of known images"):
        KnownImages.load(path, classifier_file)
    known.save(path)
    other = tmp_path / "other.safetensors"
    save_classifier(other, EmojiClassifier().state_dict(), {"network": "emoji64"})
    with pytest.raises(ValueError, match="of another classifier"):
        KnownImages.load(path, other)
    with pytest.raises(ValueError, match="cannot be read"):
        KnownImages.load(path, tmp_path / "missing")
    features = pooled_features(classifier, images)
    with pytest.raises(ValueError, match="a caption is there twice"):
        KnownImages(features, known.labels, known.bases, (*captions[1:], captions[1]), "")
    with pytest.raises(ValueError, match="14 captions do not belong"):
        KnownImages(features, known.labels, known.bases, tuple(captions[1:]), "")
