"""UNets in full precision: the miniatures, the names in published checkpoints, and the trained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ddim.config import load_config
from ddim.pretrained import load_weights
from ddim.unet import UNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel

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


def latent_unet(config: dict[str, Any]) -> UNetModel:
    return UNetModel(**config)


# What makes a family's miniature from its stored config.
BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "ddim": unet_from_golden,
    "ldm_beds": latent_unet,
    "ldm_churches": latent_unet,
    "sd": latent_unet,
}


def miniatures() -> list[Any]:
    """Families whose miniature is here with its output; a cut has neither all weights nor outputs."""
    root = golden_root() / "unets"
    found = sorted(path.parent.name for path in root.glob("*/model.json"))
    return [name for name in found if "fp.output" in golden_keys(f"unets/{name}/model.safetensors")]


@pytest.mark.parametrize("name", parameters(miniatures(), "whole UNet"))
def test_miniature_output(name: str) -> None:
    tensors = golden_tensors(f"unets/{name}/model.safetensors")
    facts = golden_json(f"unets/{name}/model.json")
    model = BUILDERS[facts["family"]](facts["config"]).eval()
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    inputs = [tensors[key] for key in ("input.x", "input.t", "input.context") if key in tensors]
    with torch.no_grad():
        got = model(*inputs)
    assert relative_error(got, tensors["fp.output"]) < TOLERANCE


# The full-size networks, as the published configs describe them. All have two residual blocks a level.

LATENT: dict[str, dict[str, Any]] = {
    "beds": {"image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224}
    | {"channel_mult": (1, 2, 3, 4), "attention_resolutions": (8, 4, 2), "num_head_channels": 32},
    "churches": {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 192}
    | {"channel_mult": (1, 2, 2, 4, 4), "attention_resolutions": (1, 2, 4, 8), "num_heads": 8}
    | {"use_scale_shift_norm": True, "resblock_updown": True},
    "cinv2": {"image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192}
    | {"channel_mult": (1, 2, 3, 5), "attention_resolutions": (8, 4, 2), "num_heads": 1}
    | {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512},
    "sd": {"image_size": 64, "in_channels": 4, "out_channels": 4, "model_channels": 320}
    | {"channel_mult": (1, 2, 4, 4), "attention_resolutions": (4, 2, 1), "num_heads": 8}
    | {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768}
    | {"legacy": False, "use_checkpoint": True},
}
LATENT["celeba"] = LATENT["ffhq"] = LATENT["beds"]


def full_size(network: str) -> nn.Module:
    """The network behind a manifest's name, with random weights."""
    if network == "cifar10":
        return UNet.from_config(load_config(REPOSITORY / "configs" / "cifar10.yml"))
    return UNetModel(num_res_blocks=2, **LATENT[network])


def manifests() -> list[Any]:
    """``(manifest, network, prefix)`` of every published full-precision checkpoint, with the prefix of its UNet."""
    cases = [("cifar10_model", "cifar10", "")]
    cases += [(f"{network}_latent_diffusion", network, "model.diffusion_model.") for network in LATENT]
    return [case for case in cases if golden_json(f"manifests/{case[0]}.json.gz")]


@pytest.mark.parametrize("case", parameters(manifests(), "full-precision manifest"), ids=lambda case: case and case[0])
def test_published_names_shapes_and_types(case: tuple[str, str, str]) -> None:
    name, network, prefix = case
    with torch.device("meta"):
        model = full_size(network)
    ours = {key: (list(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in model.state_dict().items()}
    published = golden_json(f"manifests/{name}.json.gz")["keys"]
    of_unet = {key.removeprefix(prefix): (shape, dtype) for key, shape, dtype in published if key.startswith(prefix)}
    assert ours == of_unet


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
