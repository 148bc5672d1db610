"""The pixel UNet in full precision: the miniature, the published CIFAR-10 names, and the trained model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddim.config import load_config
from ddim.pretrained import load_weights
from ddim.unet import UNet

from .conftest import (
    REPOSITORY,
    golden_json,
    golden_keys,
    golden_path,
    golden_root,
    golden_tensors,
    parameters,
    relative_error,
)

TOLERANCE = 1e-4
BATCH = 32


def unet_from_golden(config: dict[str, Any]) -> UNet:
    """The golden configs state the architecture only, not what a config file must say about data."""
    numbers = {key: value for key, value in config["model"].items() if key != "type"}
    return UNet(image_size=config["data"]["image_size"], **numbers)


def miniatures() -> list[Any]:
    """Families of pixel UNets whose miniature is here with its output; a cut has neither all weights nor outputs."""
    root = golden_root() / "unets"
    found = sorted(path.parent.name for path in root.glob("*/model.json"))
    pixel = [name for name in found if golden_json(f"unets/{name}/model.json")["family"] == "ddim"]
    return [name for name in pixel if "fp.output" in golden_keys(f"unets/{name}/model.safetensors")]


@pytest.mark.parametrize("name", parameters(miniatures(), "whole pixel UNet"))
def test_miniature_output(name: str) -> None:
    tensors = golden_tensors(f"unets/{name}/model.safetensors")
    model = unet_from_golden(golden_json(f"unets/{name}/model.json")["config"]).eval()
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        got = model(tensors["input.x"], tensors["input.t"])
    assert relative_error(got, tensors["fp.output"]) < TOLERANCE


def manifests() -> list[Any]:
    name = "manifests/cifar10_model.json.gz"
    return [name] if golden_json(name) else []


@pytest.mark.parametrize("name", parameters(manifests(), "CIFAR-10 manifest"))
def test_published_names_shapes_and_types(name: str) -> None:
    with torch.device("meta"):
        model = UNet.from_config(load_config(REPOSITORY / "configs" / "cifar10.yml"))
    ours = {key: (list(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in model.state_dict().items()}
    assert ours == {key: (shape, dtype) for key, shape, dtype in golden_json(name)["keys"]}


def trained() -> list[Any]:
    return ["trained"] if golden_json("trained/config.json") else []


@pytest.mark.parametrize("folder", parameters(trained(), "trained model"))
def test_trained_model_output(folder: str) -> None:
    evaluation = golden_tensors(f"{folder}/evaluation.safetensors")
    model = unet_from_golden(golden_json(f"{folder}/config.json")).eval()
    load_weights(golden_path(f"{folder}/model.safetensors"), model)
    with torch.no_grad():
        outputs = [model(x, t) for x, t in zip(evaluation["x"].split(BATCH), evaluation["t"].split(BATCH), strict=True)]
    assert relative_error(torch.cat(outputs), evaluation["full_precision"]) < TOLERANCE
