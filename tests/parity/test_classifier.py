"""The bundled classifier is the one in ``trained/``, up to the rounding of its matrices to float16."""

from __future__ import annotations

import pytest
import torch

from qdiff.evaluation.features import FashionClassifier, pooled_features

from .conftest import REPOSITORY, golden_root, golden_tensors, relative_error

BUNDLE = REPOSITORY / "models" / "pixel" / "fashion_mnist"


def test_features_match_the_bundled_classifier() -> None:
    path = golden_root() / "trained" / "features.safetensors"
    if not path.is_file():
        pytest.skip(f"trained/features.safetensors is not in {golden_root()}")
    images = (golden_tensors("trained/samples.safetensors")["w4a8_images"].clamp(-1, 1) + 1) / 2
    stored, bundled = (FashionClassifier.load(file) for file in (path, BUNDLE / "classifier.safetensors"))
    got, expected = (pooled_features(model, images) for model in (bundled, stored))
    assert torch.isfinite(expected).all()
    assert relative_error(got, expected) < 3e-3  # float16 rounds by up to 5e-4, in each of five layers
