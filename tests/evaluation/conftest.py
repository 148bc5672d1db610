"""Networks of the usual scores with random weights: the published ones are large, and not here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor


def random_weights(shapes: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Of the size that keeps activations in range. Large matrices are views of few numbers: files stay small."""
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            found[name] = torch.zeros((), dtype=torch.int64)
        elif name.endswith("running_var"):
            found[name] = torch.rand(shape.shape, generator=draws) + 0.5
        elif shape.ndim == 2:
            numbers = torch.randn(sum(shape.shape), generator=draws) * (2 / shape.shape[1]) ** 0.5
            found[name] = numbers.as_strided(shape.shape, (1, 1))
        elif shape.ndim > 2:
            found[name] = torch.randn(shape.shape, generator=draws) * (2 / shape[0].numel()) ** 0.5
        else:
            gain = 1.0 if name.endswith("bn.weight") else 0.0
            found[name] = gain + 0.1 * torch.randn(shape.shape, generator=draws)
    return found


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Inception v3's weights as torch-fidelity names them."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    before = module.FeatureExtractorInceptionV3.load_state_dict
    module.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / "none.pth")
        )
    finally:
        module.FeatureExtractorInceptionV3.load_state_dict = before
    torch.save(random_weights(network.state_dict()), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="session")
def vgg16_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of VGG16's weights as torchvision names them."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = vgg16().state_dict()
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(random_weights(shapes), path)
    return path


@pytest.fixture(scope="session")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of LPIPS' linear layers: one weight a channel, none negative."""
    channels = (64, 128, 256, 512, 512)
    draws = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    weights = {
        f"lin{layer}.model.1.weight": torch.rand(1, c, 1, 1, generator=draws) for layer, c in enumerate(channels)
    }
    torch.save(weights, path)
    return path
