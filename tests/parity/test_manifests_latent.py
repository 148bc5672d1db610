"""Each full-size latent model, built from its config without weights, against the names in its published file."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import COUNTERS, EMA_COPY, MODEL, buffer_names
from ldm.pretrained import build_latent_diffusion, load_state
from ldm.util import load_model_config

from .conftest import REPOSITORY, golden_json, parameters

CONFIGS = {
    "beds": "models/ldm/lsun_beds256/config.yaml",
    "celeba": "models/ldm/celeba256/config.yaml",
    "churches": "models/ldm/lsun_churches256/config.yaml",
    "cinv2": "configs/latent-diffusion/cin256-v2.yaml",
    "ffhq": "models/ldm/ffhq256/config.yaml",
    "sd": "configs/stable-diffusion/v1-inference.yaml",
}
HAS_UNET = importlib.util.find_spec("ldm.modules.diffusionmodules.openaimodel") is not None

Keys = dict[str, tuple[list[int], str]]


def manifest(family: str) -> Keys:
    content = golden_json(f"manifests/{family}_latent_diffusion.json.gz")
    return {name: (shape, dtype) for name, shape, dtype in content["keys"]}


def families() -> list[str]:
    return [name for name in CONFIGS if golden_json(f"manifests/{name}_latent_diffusion.json.gz")]


def keys_of(state: dict[str, torch.Tensor]) -> Keys:
    return {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()}


def build(config: dict[str, Any]) -> LatentDiffusion:
    with torch.device("meta"):
        return build_latent_diffusion(config)


@pytest.mark.parametrize("family", parameters(families(), "latent manifests"))
def test_names_outside_the_unet(family: str) -> None:
    """Both stages and the schedule; a placeholder stands for the UNet."""
    config = load_model_config(REPOSITORY / CONFIGS[family])
    config["params"]["unet_config"] = {"target": "torch.nn.Identity"}
    expected = {name: facts for name, facts in manifest(family).items() if not name.startswith((MODEL, EMA_COPY))}
    assert keys_of(build(config).state_dict()) == expected


@pytest.mark.skipif(not HAS_UNET, reason="the latent UNet is not there yet")
@pytest.mark.parametrize("family", parameters(families(), "latent manifests"))
def test_whole_manifest_is_consumed(family: str) -> None:
    model = build(load_model_config(REPOSITORY / CONFIGS[family]))
    names = keys_of(model.state_dict())
    if model.use_ema:
        short = buffer_names(name.removeprefix(MODEL) for name in names if name.startswith(MODEL))
        names |= {EMA_COPY + copy: names[MODEL + name] for name, copy in short.items()}
        names |= dict(zip([EMA_COPY + counter for counter in COUNTERS], [([], "float32"), ([], "int32")], strict=True))
    expected = manifest(family)
    assert names == expected

    file = {name: torch.empty(shape, dtype=getattr(torch, d), device="meta") for name, (shape, d) in expected.items()}
    load_state(model, file)  # reports any name that is missing or left over


def test_config_beside_the_class_conditional_checkpoint_is_the_same() -> None:
    beside = load_model_config(REPOSITORY / "models/ldm/cin256-v2/config.yaml")
    assert beside == load_model_config(REPOSITORY / CONFIGS["cinv2"])


def test_the_published_spelling_of_clip_names_is_consumed_too() -> None:
    """A prefix more than current releases of transformers have, and a buffer of positions."""
    content = golden_json("manifests/sd_latent_diffusion.json.gz")
    if not content:
        pytest.skip("no golden manifest here")
    prefix = "cond_stage_model.transformer."
    file = {}
    for name, (shape, dtype) in manifest("sd").items():
        spelt = f"{prefix}text_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        file[spelt] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    file[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    model = build(load_model_config(REPOSITORY / CONFIGS["sd"]))
    load_state(model, file)
    del file[f"{prefix}text_model.encoder.layers.3.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.fc1\.bias"):
        load_state(model, file)
