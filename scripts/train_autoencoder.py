"""Train a small KL first stage (Rombach et al. 2022, section 3.1) on a folder of prepared images.

    python scripts/train_autoencoder.py --config configs/autoencoder/emoji_kl.yaml --data DIR -l OUT --steps 40000

writes to OUT: ``model.safetensors`` (averaged weights, facts in the header), ``reconstructions.png`` (held-out images
above what became of them), ``train.json`` (the facts, PSNR on held-out images among them), a TensorBoard log and
``last.ckpt``. ``--minutes`` stops earlier, with all of these files; ``--resume`` goes on, also after a run was killed.

The loss has neither discriminator nor perceptual part, so it needs no other network: L1 on pixels, L1 on the
differences between neighbours, which keeps edges sharp, and a small Kullback-Leibler term. Images are shifted by a few
pixels but never mirrored: flags and letters would be wrong.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.config import ConfigError
from ldm.models.autoencoder import AutoencoderKL
from ldm.training import encode_grid, load_image_set, to_model, to_pixels
from ldm.util import instantiate_from_config, load_model_config
from qdiff.cli.train_latent import add_training_flags, device_and_layout, options_from, save_results

SHIFT = 2  # pixels at most, in either direction of either axis
GRID_IMAGES, GRID_COLUMNS = 32, 8
IMAGES_AT_ONCE = 64


class FirstStageTask(nn.Module):
    """Reconstruction of shifted images.

    Args:
        model: trained on the resolution of ``images``.
        images: N x 3 x H x W uint8.
        kl_weight: of the divergence, a mean over the latent's elements, beside losses that are means over pixels.
    """

    def __init__(self, model: AutoencoderKL, images: Tensor, kl_weight: float):
        super().__init__()
        self.model, self.kl_weight = model, kl_weight
        self.register_buffer("images", images, persistent=False)

    def draw(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Images, N x 3 x H x W in [-1, 1], and standard normal noise like their latents."""
        count, _, height, width = self.images.shape
        device = self.images.device
        index = torch.randint(count, (batch_size, 1, 1), device=device)
        dy, dx = torch.randint(-SHIFT, SHIFT + 1, (2, batch_size, 1), device=device)
        rows = (torch.arange(height, device=device) + dy).clamp(0, height - 1)  # N, H; the border is repeated
        columns = (torch.arange(width, device=device) + dx).clamp(0, width - 1)
        shifted = self.images[index, :, rows[:, :, None], columns[:, None, :]]  # N, H, W, 3
        factor = self.model.downsampling
        latent = (batch_size, self.model.post_quant_conv.in_channels, height // factor, width // factor)
        # Contiguous: the network would keep the gathered pixels' channels-last order, in which group norm is slow.
        return to_model(shifted.permute(0, 3, 1, 2).contiguous()), torch.randn(latent, device=device)

    def loss(self, image: Tensor, noise: Tensor) -> Tensor:
        posterior = self.model.encode(image)
        decoded = self.model.decode(posterior.sample(noise)).float()
        pixels = F.l1_loss(decoded, image)
        edges = sum(F.l1_loss(decoded.diff(dim=axis), image.diff(dim=axis)) for axis in (2, 3))
        return pixels + edges + self.kl_weight * posterior.kl().mean() / noise[0].numel()


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: Tensor) -> Tensor:
    """What the means of the posteriors decode to: uint8 N x 3 x H x W -> the same."""
    return torch.cat([to_pixels(model.decode(model.encode(to_model(x)).mean)) for x in images.split(IMAGES_AT_ONCE)])


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images of uint8 N x 3 x H x W."""
    error = (images.float() - others.float()).square().mean((1, 2, 3)).clamp(min=1e-3)  # equal images: 78 dB
    return float((10 * torch.log10(255**2 / error)).mean())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_training_flags(parser, steps=40_000, batch_size=64, lr=1e-3, ema=0.999)
    parser.add_argument("--kl_weight", type=float, default=5e-4, help="of the divergence for each latent element")
    return parser


def load_first_stage(config: dict) -> AutoencoderKL:
    """The first stage that a config's ``model`` section describes, with random weights.

    Raises:
        ConfigError: the section is of another class, or cannot be built.
    """
    model = instantiate_from_config(config)
    if not isinstance(model, AutoencoderKL):
        raise ConfigError(f"model: target {config['target']} is not AutoencoderKL")
    return model


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        from ldm.training_loop import fit  # Lightning is an optional extra, and --help works without it

        options = options_from(args)
        if args.kl_weight < 0:
            raise ValueError(f"--kl_weight {args.kl_weight}: must not be negative")
        config = load_model_config(args.config)
        torch.manual_seed(options.seed)
        model = load_first_stage(config).to(**device_and_layout(options)).train()
        size = config["params"]["ddconfig"]["resolution"]
        images, heldout = (load_image_set(args.data, part, size).images for part in ("train", "heldout"))
        task = FirstStageTask(model, images.to(options.device), args.kl_weight)
        settings = {"config": config, "kl_weight": args.kl_weight, "images": len(images)}
        loop = fit(task, options, settings, args.logdir, resume=args.resume, started=started)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))

    model = model.to(options.device).eval()
    with loop.ema.to(options.device).applied_to(model):
        images = heldout.to(options.device)
        decoded = reconstruct(model, images)
        shown = torch.linspace(0, len(images) - 1, min(GRID_IMAGES, len(images))).long()  # neighbours are alike
        rows = zip(images[shown].split(GRID_COLUMNS), decoded[shown].split(GRID_COLUMNS), strict=True)
        grid = encode_grid(torch.cat([part for pair in rows for part in pair]), min(GRID_COLUMNS, len(images)))
        facts = settings | loop.facts()
        facts |= {"heldout_psnr": round(psnr(images, decoded), 3), "heldout_images": len(images)}
        pictures = {"reconstructions.png": grid}
        save_results(args.logdir, model, facts, loop.progress.losses, dtype=args.weights, pictures=pictures)
    print(f"{loop.progress.step} of {loop.progress.total} steps; {facts['heldout_psnr']:.2f} dB on held-out images")


if __name__ == "__main__":
    main()
