"""A UNet2DModel of diffusers: the same function in stages, quantized, calibrated, saved and read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.config import ConfigError
from ddim.diffusers_config import read_folder
from ddim.models import build, load_pixel_config
from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet
from qdiff.checkpoint import load_quantized, save_packed, save_published
from qdiff.cli import model_stats, sample_ddim
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.quant_layer import SplitQuantModule
from qdiff.quant_model import QuantModel
from qdiff.reconstruction import UnitReport

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddpm": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "resampled in blocks": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "layers_per_block": 2},
    "centred, no attention in the middle": {"center_input_sample": True, "add_attention": False},
    "three levels": {
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
}
SHORT = CalibrationConfig(iters=20, iters_a=10, batch_size=4, weight_lr=0.02)
W4A8 = QuantConfig(4, quant_act=True, split=True, a_sym=True)


def saved(folder: Path, **changes: Any) -> diffusers.UNet2DModel:
    """A pipeline on the disk; its network."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**(UNET | changes))
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.02 * torch.randn_like(p))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_end=0.015)).save_pretrained(folder)
    return unet.eval()


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 16, 16, generator=generator), torch.randint(0, 1000, (rows,), generator=generator)


def loaded(folder: Path) -> torch.nn.Module:
    from ddim.pretrained import load_weights

    config = load_pixel_config(folder)
    model = build(config).eval()
    load_weights(config.weights, model)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_stages_it_is_the_same_function(variant: str, tmp_path: Path) -> None:
    unet = saved(tmp_path, **VARIANTS[variant])
    x, t = inputs(2)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path)(x, t), unet(x, t).sample)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrapped_it_is_still_the_same(variant: str, tmp_path: Path) -> None:
    unet = saved(tmp_path, **VARIANTS[variant])
    qnn = QuantModel.from_config(loaded(tmp_path), W4A8)
    x, t = inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(qnn(x, t), unet(x, t).sample, rtol=1e-4, atol=1e-5)
    cuts = {path: layer for path, layer in qnn.layers().items() if isinstance(layer, SplitQuantModule)}
    assert len(cuts) == sum(path.endswith("conv_shortcut") and "up_blocks" in path for path in qnn.layers()) > 0


def test_splits_lie_where_the_concatenation_is(tmp_path: Path) -> None:
    """Decoder channels first: what the network's own blocks were built from."""
    unet = saved(tmp_path, layers_per_block=2, block_out_channels=(8, 24), down_block_types=("DownBlock2D",) * 2)
    qnn = QuantModel.from_config(loaded(tmp_path), W4A8)
    seen: dict[str, int] = {}
    for number, block in enumerate(unet.up_blocks):

        def record(module: Any, args: Any, kwargs: dict[str, Any], number: int = number) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[f"up_blocks.{number}.resnets.0.conv_shortcut"] = hidden.shape[1]

        block.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        unet(*inputs(1))
    for path, channels in seen.items():
        assert qnn.layers()[path].split_channels == channels
    assert qnn.layers()["up_blocks.1.resnets.2.conv_shortcut"].split_channels == 8


def test_calibration_end_to_end(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    qnn = QuantModel.from_config(loaded(tmp_path / "model"), W4A8)
    reports: list[UnitReport] = calibrate(qnn, CalibrationSet(*inputs(16)), SHORT)
    assert [report.name for report in reports] == [unit.path for unit in qnn.units()] * 2
    assert [unit.path for unit in qnn.units() if unit.entry is not unit.module] == ["up_blocks.0.upsamplers.0.conv"]
    assert all(report.loss_after <= report.loss_before for report in reports)
    x, t = inputs(3, seed=1)
    with torch.no_grad():
        expected = qnn(x, t)
        full = loaded(tmp_path / "model")(x, t)
    nearest = QuantModel.from_config(loaded(tmp_path / "model"), W4A8)
    calibrate(nearest, CalibrationSet(*inputs(16)), SHORT, mode="linear")
    with torch.no_grad():
        assert 0 < (expected - full).square().sum() < 0.8 * (nearest(x, t) - full).square().sum()
    for path, save in ((tmp_path / "ckpt.safetensors", save_packed), (tmp_path / "ckpt.pth", save_published)):
        save(path, qnn)
        again = QuantModel.from_config(build(load_pixel_config(tmp_path / "model")).eval(), W4A8)
        load_quantized(path, again, quant_act=True)
        with torch.no_grad():
            assert torch.equal(again(x, t), expected), path


def test_the_folder_is_read(tmp_path: Path) -> None:
    saved(tmp_path)
    config = read_folder(tmp_path)
    assert (config.data.image_size, config.data.channels) == (16, 3)
    assert (config.model.ch, config.model.ch_mult, config.model.attn_resolutions) == (16, [1, 2], [8])
    assert (config.diffusion.beta_end, config.diffusion.num_diffusion_timesteps) == (0.015, 1000)
    assert read_folder(tmp_path / "unet") == config
    shutil.move(tmp_path / "unet", tmp_path / "alone")
    assert read_folder(tmp_path / "alone").diffusion.beta_end == 0.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types.*SkipDownBlock2D"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"sample_size": None}, "sample_size"),
        ({"sample_size": True}, "sample_size"),
        ({"block_out_channels": [16, -1]}, "block_out_channels"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"norm_num_groups": 7}, "cannot be built"),
        ({"attention_head_dim": 0}, "cannot be built"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=said):
        build(load_pixel_config(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"beta_end": "large"}, "large"),
    ],
)
def test_schedules_that_are_not_known(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=said):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": ' * 5000])
def test_files_that_are_no_description(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_folder(tmp_path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder that diffusers saved"):
        load_pixel_config(tmp_path)


def test_commands_take_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrate and sample, sample again from the checkpoint, count; a folder without weights is told."""
    saved(tmp_path / "model")
    steps = ["--timesteps", "5", "--max_images", "3", "--device", "cpu"]
    command = ["--config", str(tmp_path / "model"), *steps, "--ptq", "--weight_bit", "4", "--quant_act", "--split"]
    quick = ["--cali_st", "2", "--cali_n", "4", "--cali_batch_size", "4", "--cali_iters", "3", "--cali_iters_a", "3"]
    sample_ddim.main([*command, *quick, "--cali_data_path", "auto", "-l", str(tmp_path / "a")])
    (run,) = (tmp_path / "a" / "samples").iterdir()
    resume = ["--resume", "--cali_ckpt", str(run / "ckpt.safetensors"), "-l", str(tmp_path / "b")]
    sample_ddim.main([*command, *resume])
    (again,) = (tmp_path / "b" / "samples").iterdir()
    for file in (run / "img").iterdir():
        assert file.read_bytes() == (again / "img" / file.name).read_bytes()
    capsys.readouterr()
    model_stats.main(["--config", str(tmp_path / "model")])
    assert f"{sum(p.numel() for p in loaded(tmp_path / 'model').parameters()):,} parameters" in capsys.readouterr().out
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SystemExit) as caught:
        sample_ddim.main([*command[:2], *steps, "-l", str(tmp_path / "c")])
    assert caught.value.code == 2
    assert "has no diffusion_pytorch_model.safetensors" in capsys.readouterr().err
