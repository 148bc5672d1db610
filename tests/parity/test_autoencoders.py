"""The first stages against stored encodings and decoded images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderKL, VQModelInterface

from .conftest import golden_json, golden_tensors, parameters, relative_error

TOLERANCE = 1e-4
CLASSES = {"kl": AutoencoderKL, "vq": VQModelInterface}


def cases() -> list[str]:
    return [name for name in CLASSES if golden_json(f"autoencoders/{name}.json")]


def first_stage(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    facts, tensors = golden_json(f"autoencoders/{name}.json"), golden_tensors(f"autoencoders/{name}.safetensors")
    codes = {} if facts["n_embed"] is None else {"n_embed": facts["n_embed"]}
    model = CLASSES[name](ddconfig=facts["ddconfig"], embed_dim=facts["embed_dim"], **codes).eval()
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    return model.requires_grad_(False), tensors


@pytest.mark.parametrize("name", parameters(cases(), "autoencoders"))
def test_encoding(name: str) -> None:
    model, tensors = first_stage(name)
    got = model.encode(tensors["image"])
    if name == "kl":
        assert relative_error(got.mean, tensors["encoded.mean"]) < TOLERANCE
        assert relative_error(got.logvar, tensors["encoded.logvar"]) < TOLERANCE
    else:
        assert relative_error(got, tensors["encoded"]) < TOLERANCE


@pytest.mark.parametrize("name", parameters(cases(), "autoencoders"))
def test_decoded_image(name: str) -> None:
    model, tensors = first_stage(name)
    assert relative_error(model.decode(tensors["latent"]), tensors["decoded"]) < TOLERANCE
    if "decoded_not_quantized" in tensors:
        got = model.decode(tensors["latent"], quantize=False)
        assert relative_error(got, tensors["decoded_not_quantized"]) < TOLERANCE


@pytest.mark.parametrize("name", parameters([name for name in cases() if name == "vq"], "autoencoders/vq"))
def test_codes(name: str) -> None:
    model, tensors = first_stage(name)
    assert torch.equal(model.quantize.indices(tensors["latent"]).flatten(), tensors["indices"].long())
    assert relative_error(model.quantize(tensors["latent"]), tensors["quantized"]) < TOLERANCE
