"""Miniature latent models on disk, one of each published kind, made by the command that makes random checkpoints."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from qdiff.cli import make_calibration_data, make_random_checkpoint
from qdiff.cli.run_folder import read_png
from qdiff.cli.sample_ldm import main
from qdiff.evaluation.features import EmojiClassifier, image_statistics, save_classifier

IMAGES, STEPS = 3, 4
CLASSES = 5
SHAPES = {"beds": (3, 8, 8), "churches": (4, 8, 8), "classes": (3, 8, 8)}
FACTORS = {"beds": 2, "churches": 2, "classes": 2}

_UNET: dict[str, Any] = {
    "image_size": 8,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
}
_DDCONFIG: dict[str, Any] = {
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
_KINDS: dict[str, dict[str, Any]] = {
    "beds": {"unet": {"num_head_channels": 32}, "model": {}},
    "churches": {
        "unet": {"num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True},
        "model": {"scale_by_std": True, "linear_end": 0.0155},
    },
    "classes": {
        "unet": {"num_heads": 2, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 12},
        "model": {"use_ema": False, "conditioning_key": "crossattn", "cond_stage_key": "class_label"},
    },
}


def config_of(kind: str) -> dict[str, Any]:
    """A whole config, sections for training beside the model's included."""
    channels = SHAPES[kind][0]
    first_stage = {"embed_dim": channels, "ddconfig": {**_DDCONFIG, "z_channels": channels}}
    first_stage["lossconfig"] = {"target": "torch.nn.Identity"}
    if kind != "churches":
        first_stage["n_embed"] = 64
    cond = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 12, "n_classes": CLASSES + 1, "key": "class_label"},
    }
    unet = _UNET | {"in_channels": channels, "out_channels": channels} | _KINDS[kind]["unet"]
    params = {
        "timesteps": 40,
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "channels": channels,
        "image_size": 8,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {
            "target": f"ldm.models.autoencoder.{'AutoencoderKL' if kind == 'churches' else 'VQModelInterface'}",
            "params": first_stage,
        },
        "cond_stage_config": cond if kind == "classes" else "__is_unconditional__",
    }
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params | _KINDS[kind]["model"]}
    return copy.deepcopy({"model": model, "data": {"target": "main.DataModule"}})


@dataclass(frozen=True)
class LatentMiniature:
    """A model's folder, and the flags of the documented commands, small numbers in the places of large ones."""

    kind: str
    folder: Path

    @property
    def ckpt(self) -> Path:
        return self.folder / "model.ckpt"

    @property
    def calibration_set(self) -> Path:
        return self.folder / "cali.pt"

    def flags(self, *more: object, seed: int = 41) -> list[str]:
        eta = "0.0" if self.kind == "churches" else "1.0"
        flags = ["-r", str(self.ckpt), "-n", str(IMAGES), "--batch_size", "10", "-c", str(STEPS), "-e", eta]
        labels = ["--class_labels", "1,4", "--scale", "1.5"] if self.kind == "classes" else []
        return [*flags, *labels, "--seed", str(seed), "--device", "cpu", *map(str, more)]

    def calibration_flags(self, *, samples: int = 4) -> list[str]:
        quick = ["--cali_iters", "6", "--cali_iters_a", "3", "--cali_batch_size", "4"]
        return [*quick, "--cali_st", "2", "--cali_n", str(samples), "--cali_data_path", str(self.calibration_set)]

    def activations(self, *, calibrate: bool) -> list[str]:
        """Flags of activations as the documented commands of each model have them."""
        flags = ["--quant_act", "--act_bit", "8"]
        if self.kind == "beds":
            flags += ["--a_sym", *(["--a_min_max", "--running_stat"] if calibrate else [])]
        return flags


def make_miniature(kind: str, parent: Path) -> LatentMiniature:
    """Config, random weights and calibration set, each by its command."""
    folder = parent / f"tiny_{kind}"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(kind)))
    miniature = LatentMiniature(kind, folder)
    make_random_checkpoint.main(["--config", str(folder / "config.yaml"), "--out", str(miniature.ckpt)])
    same = miniature.flags("--out", miniature.calibration_set, seed=7)
    make_calibration_data.main([word if word != str(IMAGES) else "6" for word in same])
    return miniature


def sample(flags: list[str], out: Path, *more: object) -> Path:
    """Run the command and return the run folder it made."""
    main([*flags, "-l", str(out), *map(str, more)])
    (folder,) = next(out.iterdir()).joinpath("samples").iterdir()
    return folder


def pictures(folder: Path) -> torch.Tensor:
    return torch.stack([read_png(path) for path in sorted((folder / "img").iterdir())])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images, in dB; images that are equal count 100."""
    mse = (a - b).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * mse.log10()).mean())


def make_bundle(parent: Path) -> Path:
    """A folder like that of the bundled latent model: random weights, a random classifier, its features of noise."""
    folder = parent / "tiny_emoji"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of("classes")))
    words = ["--config", str(folder / "config.yaml"), "--out", str(folder / "model.safetensors"), "--dtype", "fp16"]
    make_random_checkpoint.main(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = EmojiClassifier().eval()
        images = torch.rand(40, 3, 16, 16)
    save_classifier(folder / "classifier.safetensors", classifier.state_dict(), {"network": "emoji64"})
    image_statistics(classifier, images, "noise").save(folder / "reference_statistics.safetensors")
    return folder
