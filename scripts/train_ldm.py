"""Train a small class-conditional latent diffusion model (Rombach et al. 2022) on the latents of a trained first stage.

    python scripts/train_ldm.py --config configs/latent-diffusion/emoji64.yaml --first_stage AE/model.safetensors \
        --data DIR -l OUT --steps 200000

writes to OUT: ``model.safetensors`` (the whole model with averaged weights, facts in the header; ``config.yaml`` beside
it makes the folder loadable), ``samples.png`` (a row for each class), ``train.json`` (the facts), a TensorBoard log
and ``last.ckpt``. ``--minutes`` stops earlier, with all of these files; ``--resume`` goes on, also after a kill.

``--init`` takes a whole model that this script wrote in place of a first stage, and trains its UNet and classes on.

For classifier-free guidance (Ho and Salimans 2022) some of the classes are replaced, while training, by the last one
that the ClassEmbedder has, which stands for "no condition".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from ddim.config import ConfigError
from ddim.noise import ImageNoise
from ddim.pretrained import load_weights, weights_facts
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import sample_latents
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.pretrained import build_latent_diffusion
from ldm.training import ImageSet, encode_grid, load_image_set, to_model, to_pixels
from ldm.util import load_model_config
from qdiff.cli.train_latent import add_training_flags, device_and_layout, options_from, save_results
from qdiff.files import write_atomically

IMAGES_AT_ONCE = 64
GRID_COLUMNS, GRID_STEPS, GUIDANCE = 8, 50, 2.0
HELDOUT_DRAWS = 16  # timesteps and noises for each held-out image


class Posteriors(NamedTuple):
    """What a first stage makes of a set of images, unscaled: mean and standard deviation N x C x h x w, classes N."""

    mean: Tensor
    std: Tensor
    classes: Tensor


@torch.no_grad()
def encode_set(first_stage: AutoencoderKL, data: ImageSet, device: str) -> Posteriors:
    """The posteriors of all images, on ``device``."""
    parts = [first_stage.encode(to_model(images.to(device))) for images in data.images.split(IMAGES_AT_ONCE)]
    mean = torch.cat([part.mean for part in parts])
    std = torch.cat([(0.5 * part.logvar).exp() for part in parts])
    return Posteriors(mean, std, data.classes.to(device))


def latent_std(latents: Posteriors) -> float:
    """Standard deviation of draws from the posteriors, over all elements (Rombach et al. 2022, appendix G)."""
    return float((latents.mean.double().var() + latents.std.double().square().mean()).sqrt())


class DiffusionTask(nn.Module):
    """Prediction of the noise in latents (Ho et al. 2020, algorithm 1).

    Args:
        model: conditional on classes; its first stage is not trained.
        latents: of the training images.
        drop: share of the classes that are replaced by "no condition".
    """

    def __init__(self, model: LatentDiffusion, latents: Posteriors, drop: float):
        super().__init__()
        self.model, self.drop = model, drop
        for name, tensor in latents._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def draw(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled latents and noise, both N x C x h x w, timesteps N and classes N, some of them dropped."""
        device = self.mean.device
        index = torch.randint(len(self.mean), (batch_size,), device=device)
        t = torch.randint(self.model.num_timesteps, (batch_size,), device=device)
        mean, std = self.mean[index], self.std[index]
        z = (mean + std * torch.randn_like(mean)) * self.model.scale_factor
        dropped = torch.rand(batch_size, device=device) < self.drop
        classes = self.classes[index].masked_fill(dropped, self.model.cond_stage_model.n_classes - 1)
        return z, torch.randn_like(z), t, classes

    def loss(self, z: Tensor, noise: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        signal = self.model.sqrt_alphas_cumprod[t][:, None, None, None]
        sigma = self.model.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
        # Not through the embedder's forward: it looks at the numbers, for which a captured step cannot wait.
        cond = self.model.cond_stage_model.embedding(classes)[:, None]  # N, 1 token, width
        return F.mse_loss(self.model.apply_model(signal * z + sigma * noise, t, cond).float(), noise)  # equation 14


@torch.no_grad()
def heldout_loss(model: LatentDiffusion, latents: Posteriors) -> float:
    """The loss on other images, with their classes, over the same draws whenever it is asked."""
    task = DiffusionTask(model, latents, drop=0.0)
    device = latents.mean.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        count = max(1, HELDOUT_DRAWS * len(latents.mean) // IMAGES_AT_ONCE)
        losses = [task.loss(*task.draw(IMAGES_AT_ONCE)) for _ in range(count)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def sample_grid(model: LatentDiffusion, columns: int, steps: int, scale: float) -> bytes:
    """A PNG file with a row of DDIM samples for each class but the unconditional one."""
    rows = []
    embedder = model.cond_stage_model
    for label in range(embedder.n_classes - 1):
        noise = ImageNoise(0, range(label * columns, (label + 1) * columns), model.latent_shape, model.betas.device)
        cond = model.get_learned_conditioning({embedder.key: torch.full((columns,), label)})
        uncond = embedder.unconditional(columns)
        latent = sample_latents(model, noise, steps=steps, cond=cond, uncond=uncond, scale=scale)
        rows.append(to_pixels(model.decode(latent)))
    return encode_grid(torch.cat(rows), columns)


def build(config: dict[str, Any], first_stage: Path | None = None, init: Path | None = None) -> LatentDiffusion:
    """The model that a config's ``model`` section describes: random, but for its first stage.

    Args:
        first_stage: weights that train_autoencoder.py wrote.
        init: a whole model's weights that this script wrote, in place of those.

    Raises:
        ConfigError: the model is not one that this script trains.
        ValueError: the weights do not fit.
    """
    model = build_latent_diffusion(config)
    if not isinstance(model.first_stage_model, AutoencoderKL):
        raise ConfigError("model: first_stage_config must be an AutoencoderKL")
    if not isinstance(getattr(model, "cond_stage_model", None), ClassEmbedder):
        raise ConfigError("model: cond_stage_config must be a ClassEmbedder: this script trains on classes")
    if not isinstance(model.scale_factor, Tensor):
        raise ConfigError("model: scale_by_std must be true: the latents' scale is measured here")
    if model.use_ema:
        raise ConfigError("model: use_ema must be false: the averages are written in place of the weights")
    if init is not None:
        load_weights(init, model)
    else:
        load_weights(first_stage, model.first_stage_model, "first_stage_config")
    model.first_stage_model.eval().requires_grad_(False)
    return model


def check_classes(data: ImageSet, model: LatentDiffusion) -> None:
    """Whether the embedder has every class of the data and one more.

    Raises:
        ValueError: it has not.
    """
    highest = model.cond_stage_model.n_classes - 2
    if int(data.classes.min()) < 0 or int(data.classes.max()) > highest:
        raise ValueError(
            f"classes run from {int(data.classes.min())} to {int(data.classes.max())}; the config's "
            f"n_classes {highest + 2} allows 0 to {highest}, and the last one for 'no condition'"
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_training_flags(parser, steps=200_000, batch_size=128, lr=5e-4, ema=0.9995)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--first_stage", type=Path, help="weights from train_autoencoder.py")
    start.add_argument("--init", type=Path, help="a whole model from this script, to be trained on")
    parser.add_argument("--drop", type=float, default=0.1, help="share of classes left out (%(default)s)")
    parser.add_argument("--grid_steps", type=int, default=GRID_STEPS, help="of DDIM for samples.png (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        from ldm.training_loop import fit  # Lightning is an optional extra, and --help works without it

        options = options_from(args)
        if not 0 <= args.drop < 1:
            raise ValueError(f"--drop {args.drop}: must lie in [0, 1)")
        config = load_model_config(args.config)
        torch.manual_seed(options.seed)
        model = build(config, args.first_stage, args.init).to(**device_and_layout(options))
        size = model.image_size * model.first_stage_model.downsampling
        train, heldout = (load_image_set(args.data, part, size) for part in ("train", "heldout"))
        for data in (train, heldout):
            check_classes(data, model)
        latents = encode_set(model.first_stage_model, train, options.device)
        model.scale_factor.fill_(1 / latent_std(latents))
        task = DiffusionTask(model, latents, args.drop)
        settings = {"config": config, "drop": args.drop, "images": len(train.images)}
        if args.init is not None:
            settings["init"] = {"file": args.init.name, **weights_facts(args.init)}
        loop = fit(task, options, settings, args.logdir, resume=args.resume, started=started)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))

    model.to(options.device).eval()
    facts = settings | loop.facts()
    if args.first_stage is not None:
        facts["first_stage"] = args.first_stage.name
    with loop.ema.to(options.device).applied_to(model):
        other = encode_set(model.first_stage_model, heldout, options.device)
        facts |= {"heldout_loss": round(heldout_loss(model, other), 5), "heldout_images": len(heldout.images)}
        pictures = {"samples.png": sample_grid(model, GRID_COLUMNS, args.grid_steps, GUIDANCE)}
        save_results(args.logdir, model, facts, loop.progress.losses, dtype=args.weights, pictures=pictures)
    write_atomically(args.logdir / "config.yaml", yaml.safe_dump({"model": config}, sort_keys=False).encode())
    print(f"{loop.progress.step} of {loop.progress.total} steps; loss on held-out images {facts['heldout_loss']:.4f}")


if __name__ == "__main__":
    main()
