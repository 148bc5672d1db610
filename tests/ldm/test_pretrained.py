"""Files as trainers leave them: moving averages, optimizers and classes beside the weights."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ddim.config import ConfigError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import EMA, EMA_COPY
from ldm.pretrained import build_latent_diffusion, load_latent_diffusion, load_state

from .conftest import build


def published(model: LatentDiffusion) -> dict[str, Tensor]:
    """The state dict of a training run: averages, here the weights plus one, beside the weights."""
    ema = EMA(model.model.requires_grad_(True))
    for average in ema.buffers():
        average += 1
    return model.state_dict() | {EMA_COPY + name: tensor for name, tensor in ema.state_dict().items()}


def write(folder: Path, content: Any, config: dict[str, Any]) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": config, "data": {"target": "main.Data"}}))
    torch.save(content, folder / "model.ckpt")
    return folder


@pytest.fixture
def trainer() -> Iterator[types.ModuleType]:
    """A stand-in for the trainer's package while a file is written; gone when it is read."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    packages = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    packages[module.__name__] = module
    sys.modules |= packages
    yield module
    for name in packages:
        sys.modules.pop(name, None)


def test_averages_are_what_is_sampled_with(config: dict[str, Any], tmp_path: Path) -> None:
    source = build(config)
    state = published(source)
    lightning = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
    }
    model = load_latent_diffusion(write(tmp_path, lightning, config))
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in (*model.parameters(), *model.buffers()))
    own = source.state_dict()
    for name, tensor in model.state_dict().items():
        expected = (
            state[EMA_COPY + name.removeprefix("model.").replace(".", "")] if name.startswith("model.") else own[name]
        )
        assert torch.equal(tensor, expected), name
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(model.decode(model.encode(image)), source.decode(source.encode(image)))


def test_one_copy_of_the_weights(config: dict[str, Any], tmp_path: Path) -> None:
    """The parameters are the tensors that were read, not copies of them."""
    config["params"]["use_ema"] = False
    state = build(config).state_dict()
    with torch.device("meta"):
        model = build_latent_diffusion(config)
    load_state(model, state)
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in model.state_dict().items())


def test_classes_of_the_trainer_are_not_needed(
    config: dict[str, Any], tmp_path: Path, trainer: types.ModuleType
) -> None:
    checkpoint, score = trainer.ModelCheckpoint, torch.tensor(0.5).numpy()[()]
    callback = checkpoint()
    callback.best = 3
    content = {"state_dict": published(build(config)), "callbacks": {checkpoint: {"best": score}, "other": callback}}
    folder = write(tmp_path, content, config)
    for name in list(sys.modules):
        if name.startswith("pytorch_lightning"):
            del sys.modules[name]
    load_latent_diffusion(folder)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def test_other_code_in_a_file_is_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path, {"state_dict": published(build(config)), "callbacks": Attack()}, config)
    with pytest.raises(ValueError, match="refused"):
        load_latent_diffusion(folder)
    assert not Path("attacked").exists()


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_half_precision_and_both_formats(config: dict[str, Any], tmp_path: Path, suffix: str) -> None:
    config["params"]["use_ema"] = False
    state = {name: tensor.half() for name, tensor in build(config).state_dict().items()}
    write(tmp_path, {"state_dict": state}, config)
    if suffix == "safetensors":
        (tmp_path / "model.ckpt").unlink()
        save_file(state, tmp_path / "model.safetensors")
    model = load_latent_diffusion(tmp_path)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    name = "model.diffusion_model.conv.weight"
    assert torch.equal(model.state_dict()[name], state[name].float())


def test_losses_of_the_first_stage_are_harmless(config: dict[str, Any], tmp_path: Path) -> None:
    state = published(build(config)) | {"first_stage_model.loss.discriminator.0.weight": torch.ones(1)}
    load_latent_diffusion(write(tmp_path, {"state_dict": state}, config))


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("betas", None, r"missing from the file \(betas\)"),
        (None, "model.diffusion_model.extra", "no moving average, as model.diffusion_model.extra"),
        (None, "model_ema.extra", r"not in the model \(model_ema.extra\)"),
        (None, "cond_stage_model.x", r"not in the model \(cond_stage_model.x\)"),
        ("model_ema.diffusion_modelconvweight", None, "no moving average, as model.diffusion_model.conv.weight"),
    ],
)
def test_what_does_not_fit_is_named(
    config: dict[str, Any], tmp_path: Path, removed: str | None, added: str | None, message: str
) -> None:
    state = published(build(config))
    if removed:
        del state[removed]
    if added:
        state[added] = torch.ones(1)
    with pytest.raises(ValueError, match=message):
        load_latent_diffusion(write(tmp_path, {"state_dict": state}, config))


def test_averages_and_the_config_must_agree(config: dict[str, Any], tmp_path: Path) -> None:
    source = build(config)
    with pytest.raises(ValueError, match=r"holds no moving averages.*use_ema: False"):
        load_latent_diffusion(write(tmp_path, {"state_dict": source.state_dict()}, config))
    config["params"]["use_ema"] = False
    with pytest.raises(ValueError, match=r"holds moving averages.*use_ema: True"):
        load_latent_diffusion(write(tmp_path, {"state_dict": published(source)}, config))


def test_missing_files_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.ckpt nor model\.safetensors"):
        load_latent_diffusion(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml: no such config file"):
        load_latent_diffusion(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_latent_diffusion(tmp_path / "model.ckpt", config)
    with pytest.raises(ConfigError, match="is not a latent diffusion model"):
        build_latent_diffusion({"target": "torch.nn.Identity"})
