"""Train a small latent diffusion model (Rombach et al. 2022), conditional on classes or captions, on a first stage.

    python scripts/train_ldm.py --config configs/latent-diffusion/emoji64.yaml --first_stage AE/model.safetensors \
        --data DIR -l OUT --steps 200000

writes to OUT: ``model.safetensors`` (the whole model with averaged weights, facts in the header; ``config.yaml`` beside
it makes the folder loadable), ``samples.png`` (a row for each class, or each of a few captions), ``train.json`` (the
facts), a TensorBoard log and ``last.ckpt``. ``--minutes`` stops earlier, with all of these files; ``--resume`` goes on,
also after a kill.

``--first_stage`` takes the weights of a first stage, or a whole model for its first stage. ``--init`` takes a whole
model that this script wrote, and trains its UNet and its encoder of conditions on.

Which it is, the config says. A text encoder is trained together with the UNet, as that of Rombach et al. 2022, section
4.3.1, was; its tokenizer, which ``--tokenizer`` names, is put beside the model. For classifier-free guidance (Ho and
Salimans 2022) some of the conditions are replaced, while training, by none: the last class that the ClassEmbedder has,
or the empty text.
"""

from __future__ import annotations

import argparse
import hashlib
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
from ddim.pretrained import describe_differences, load_weights, read_weights, weights_facts
from ldm.data.emoji import PROMPTS
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import sample_latents
from ldm.modules.encoders.modules import ClassEmbedder, TextEncoder
from ldm.modules.encoders.tokenizers import BESIDE, tokenizer_files
from ldm.pretrained import build_latent_diffusion, load_state
from ldm.training import ImageSet, encode_grid, load_image_set, to_model, to_pixels
from ldm.util import load_model_config
from qdiff.cli.train_latent import add_training_flags, device_and_layout, options_from, save_results
from qdiff.files import write_atomically

IMAGES_AT_ONCE = 64
GRID_COLUMNS, GRID_STEPS, GUIDANCE = 8, 50, 2.0
HELDOUT_DRAWS = 16  # timesteps and noises for each held-out image
FIRST_STAGE = "first_stage_model."  # beginning of its tensors' names in a whole model
TOKENIZER = "tokenizer"  # folder beside a text-conditional model


class Posteriors(NamedTuple):
    """What a first stage makes of a set of images, unscaled, and their conditions.

    Attributes:
        mean, std: N x C x h x w.
        conditions: what the encoder of conditions takes: N x L int64, of each image its class or its caption's tokens.
    """

    mean: Tensor
    std: Tensor
    conditions: Tensor


@torch.no_grad()
def encode_set(model: LatentDiffusion, data: ImageSet, device: str) -> Posteriors:
    """The posteriors of all images, and their conditions, on ``device``. Captions are tokenized here, once for all.

    Raises:
        ValueError: the data has no conditions for this model.
    """
    conditions = conditions_of(model, data).to(device)
    stage = model.first_stage_model
    parts = [stage.encode(to_model(images.to(device))) for images in data.images.split(IMAGES_AT_ONCE)]
    mean = torch.cat([part.mean for part in parts])
    std = torch.cat([(0.5 * part.logvar).exp() for part in parts])
    return Posteriors(mean, std, conditions)


def latent_std(latents: Posteriors) -> float:
    """Standard deviation of draws from the posteriors, over all elements (Rombach et al. 2022, appendix G)."""
    return float((latents.mean.double().var() + latents.std.double().square().mean()).sqrt())


class DiffusionTask(nn.Module):
    """Prediction of the noise in latents (Ho et al. 2020, algorithm 1).

    Args:
        model: conditional on classes or texts; its first stage is not trained, its encoder of conditions is.
        latents: of the training images.
        drop: share of the conditions that are replaced by none.
    """

    def __init__(self, model: LatentDiffusion, latents: Posteriors, drop: float):
        super().__init__()
        self.model, self.drop = model, drop
        for name, tensor in latents._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("nothing", model.cond_stage_model.nothing.to(latents.mean.device), persistent=False)

    def draw(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled latents and noise, both N x C x h x w, timesteps N and conditions N x L, some of them dropped."""
        device = self.mean.device
        index = torch.randint(len(self.mean), (batch_size,), device=device)
        t = torch.randint(self.model.num_timesteps, (batch_size,), device=device)
        mean, std = self.mean[index], self.std[index]
        z = (mean + std * torch.randn_like(mean)) * self.model.scale_factor
        dropped = torch.rand(batch_size, device=device) < self.drop
        conditions = torch.where(dropped[:, None], self.nothing, self.conditions[index])
        return z, torch.randn_like(z), t, conditions

    def loss(self, z: Tensor, noise: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        signal = self.model.sqrt_alphas_cumprod[t][:, None, None, None]
        sigma = self.model.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
        # Not through the encoder's forward: it takes texts, or looks at the numbers; a captured step can do neither.
        cond = self.model.cond_stage_model.encode(conditions)  # N, L tokens, width
        return F.mse_loss(self.model.apply_model(signal * z + sigma * noise, t, cond).float(), noise)  # equation 14


@torch.no_grad()
def heldout_loss(model: LatentDiffusion, latents: Posteriors) -> float:
    """The loss on other images, with their conditions, over the same draws whenever it is asked."""
    task = DiffusionTask(model, latents, drop=0.0)
    device = latents.mean.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        count = max(1, HELDOUT_DRAWS * len(latents.mean) // IMAGES_AT_ONCE)
        losses = [task.loss(*task.draw(IMAGES_AT_ONCE)) for _ in range(count)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def sample_grid(model: LatentDiffusion, columns: int, steps: int, scale: float) -> bytes:
    """A PNG file with a row of DDIM samples for each class but the unconditional one, or for each of the prompts."""
    encoder, device = model.cond_stage_model, model.betas.device
    if isinstance(encoder, TextEncoder):
        asked = encoder.tokenize(PROMPTS)
    else:
        asked = torch.arange(encoder.n_classes - 1)[:, None]
    uncond = encoder.encode(encoder.nothing.to(device).expand(columns, -1))
    rows = []
    for number, condition in enumerate(asked.to(device)):
        noise = ImageNoise(0, range(number * columns, (number + 1) * columns), model.latent_shape, device)
        cond = encoder.encode(condition.expand(columns, -1))
        latent = sample_latents(model, noise, steps=steps, cond=cond, uncond=uncond, scale=scale)
        rows.append(to_pixels(model.decode(latent)))
    return encode_grid(torch.cat(rows), columns)


def build(config: dict[str, Any], first_stage: Path | None = None, init: Path | None = None) -> LatentDiffusion:
    """The model that a config's ``model`` section describes: random, but for its first stage.

    Args:
        first_stage: weights that train_autoencoder.py wrote, or a whole model's, of which the others are left out.
        init: a whole model's weights that this script wrote, in place of those.

    Raises:
        ConfigError: the model is not one that this script trains.
        ValueError: the weights do not fit.
    """
    model = build_latent_diffusion(config)
    if not isinstance(model.first_stage_model, AutoencoderKL):
        raise ConfigError("model: first_stage_config must be an AutoencoderKL")
    if not isinstance(getattr(model, "cond_stage_model", None), ClassEmbedder | TextEncoder):
        raise ConfigError("model: cond_stage_config must be a ClassEmbedder or a text encoder")
    if model.model.conditioning_key != "crossattn":
        raise ConfigError("model: conditioning_key must be crossattn: that is how conditions reach the UNet")
    if not isinstance(model.scale_factor, Tensor):
        raise ConfigError("model: scale_by_std must be true: the latents' scale is measured here")
    if model.use_ema:
        raise ConfigError("model: use_ema must be false: the averages are written in place of the weights")
    if init is not None:
        load_state(model, read_weights(init), source=str(init))
    else:
        load_first_stage(first_stage, model.first_stage_model)
    model.first_stage_model.eval().requires_grad_(False)
    return model


def load_first_stage(path: Path, stage: AutoencoderKL) -> None:
    """Weights of a first stage alone, or of a whole latent model.

    Raises:
        ValueError: the file is unusable, or of another first stage.
    """
    weights = read_weights(path)
    own = {name.removeprefix(FIRST_STAGE): w for name, w in weights.items() if name.startswith(FIRST_STAGE)}
    if not own:
        load_weights(path, stage, "first_stage_config")
        return
    if differences := describe_differences(own, stage.state_dict()):
        raise ValueError(f"{path}: does not fit the model of first_stage_config: {'; '.join(differences)}")
    stage.load_state_dict(own)


def find_tokenizer(model: LatentDiffusion, config: Path, folder: Path | None) -> dict[str, bytes]:
    """Have a text encoder use the tokenizer of a folder, or the one that its config names.

    Returns:
        its files, for a copy beside the trained model; none where the model has no text encoder.

    Raises:
        ValueError: there is no tokenizer, it is not the encoder's, or the model does not take any.
    """
    encoder = model.cond_stage_model
    if not isinstance(encoder, TextEncoder):
        if folder is not None:
            raise ValueError(f"--tokenizer {folder}: the model of {config} is conditional on classes; leave it out")
        return {}
    if folder is None:
        encoder.look_beside(config)
    else:
        encoder.tokenizer_folder = str(folder)
    if len(encoder.tokenizer) != encoder.vocabulary:
        raise ValueError(
            f"the tokenizer has {len(encoder.tokenizer)} tokens, the text encoder of {config} {encoder.vocabulary}"
        )
    if encoder.tokenizer_folder is None:
        raise ValueError(f"--tokenizer: names a folder, from which the tokenizer {encoder.tokenizer_name} is copied")
    return tokenizer_files(encoder.tokenizer_folder)


def conditions_of(model: LatentDiffusion, data: ImageSet) -> Tensor:
    """What the encoder of conditions takes of each image: N x L int64, classes (L is 1) or tokens of captions.

    Raises:
        ValueError: a class that the embedder has not, beside one more for "no condition"; images without captions, or
            with captions longer than the text encoder's input.
    """
    encoder = model.cond_stage_model
    if isinstance(encoder, TextEncoder):
        if data.captions is None:
            raise ValueError("the data has no captions: scripts/prepare_emoji.py makes files with them")
        if cut := [caption for caption in data.captions if encoder.too_long(caption)]:
            raise ValueError(f"{len(cut)} captions have more than {encoder.max_length} tokens, as {cut[0]!r}")
        return encoder.tokenize(data.captions)
    highest = encoder.n_classes - 2
    if int(data.classes.min()) < 0 or int(data.classes.max()) > highest:
        raise ValueError(
            f"classes run from {int(data.classes.min())} to {int(data.classes.max())}; the config's "
            f"n_classes {highest + 2} allows 0 to {highest}, and the last one for 'no condition'"
        )
    return data.classes[:, None]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_training_flags(parser, steps=200_000, batch_size=128, lr=5e-4, ema=0.9995)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--first_stage", type=Path, help="weights from train_autoencoder.py, or a whole model")
    start.add_argument("--init", type=Path, help="a whole model from this script, to be trained on")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="of the text encoder [where the config says it is]"
    )
    parser.add_argument("--drop", type=float, default=0.1, help="share of conditions left out (%(default)s)")
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
        tokenizer = find_tokenizer(model, args.config, args.tokenizer)
        train, heldout = (load_image_set(args.data, part, size) for part in ("train", "heldout"))
        conditions_of(model, heldout)  # looked at now, as they are needed after hours only
        latents = encode_set(model, train, options.device)
        model.scale_factor.fill_(1 / latent_std(latents))
        task = DiffusionTask(model, latents, args.drop)
        settings = {"config": config, "drop": args.drop, "images": len(train.images)}
        if tokenizer:
            digest = hashlib.sha256(b"".join(tokenizer[name] for name in sorted(tokenizer)))
            settings["tokenizer_sha256"] = digest.hexdigest()
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
        other = encode_set(model, heldout, options.device)
        facts |= {"heldout_loss": round(heldout_loss(model, other), 5), "heldout_images": len(heldout.images)}
        pictures = {"samples.png": sample_grid(model, GRID_COLUMNS, args.grid_steps, GUIDANCE)}
        save_results(args.logdir, model, facts, loop.progress.losses, dtype=args.weights, pictures=pictures)
    if tokenizer:
        config["params"]["cond_stage_config"]["params"]["version"] = f"{BESIDE}{TOKENIZER}"
        (args.logdir / TOKENIZER).mkdir(exist_ok=True)
        for name, content in tokenizer.items():
            write_atomically(args.logdir / TOKENIZER / name, content)
    write_atomically(args.logdir / "config.yaml", yaml.safe_dump({"model": config}, sort_keys=False).encode())
    print(f"{loop.progress.step} of {loop.progress.total} steps; loss on held-out images {facts['heldout_loss']:.4f}")


if __name__ == "__main__":
    main()
