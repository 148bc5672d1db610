"""Judging images and quantized networks: Fréchet distance, PSNR, output error, fast sampling of many images.

Images are N x C x H x W floats in [0, 1] throughout.
"""

from qdiff.evaluation.features import Classifier, FashionClassifier, load_classifier, pooled_features
from qdiff.evaluation.frechet import FeatureAccumulator, FeatureStatistics, frechet_distance
from qdiff.evaluation.image_metrics import output_error, psnr
from qdiff.evaluation.sampling import sample_images

__all__ = [
    "Classifier",
    "FashionClassifier",
    "FeatureAccumulator",
    "FeatureStatistics",
    "frechet_distance",
    "load_classifier",
    "output_error",
    "pooled_features",
    "psnr",
    "sample_images",
]
