"""What the commands for pixel-space models share: their flags, the full-precision model and the sampler."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.config import ConfigError, PixelConfig
from ddim.diffusers_config import DiffusersConfig
from ddim.dpm_solver import dpm_solver_sample
from ddim.models import build
from ddim.noise import ImageNoise
from ddim.pretrained import CheckpointUnavailable, checkpoint_path, load_weights
from ddim.samplers import EpsilonModel, OnStep, ddim_sample, ddpm_sample
from ddim.schedule import SKIP_TYPES, alphas_cumprod, make_betas, sampling_timesteps
from qdiff.cli.errors import UserError
from qdiff.cli.flags import Parser, at_least, check_file, real
from qdiff.inference import tf32

SAMPLE_TYPES = ("generalized", "ddpm_noisy", "dpm_solver")
DPM_SKIP_TYPES = {"uniform": "time_uniform", "quad": "time_quadratic"}

logger = logging.getLogger(__name__)


def add_model_flags(parser: Parser, *, title: str = "model", required: bool = True) -> None:
    """``--config`` and where the full-precision weights come from.

    Args:
        title: of the group.
        required: the command has no other family of models.
    """
    group = parser.add_argument_group(title)
    group.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="the model's YAML file, one of configs/*.yml, or a folder that diffusers saved, with its own weights",
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--use_pretrained",
        action="store_true",
        help="the published (or bundled) full-precision weights of this config; downloaded once where needed",
    )
    source.add_argument(
        "--ckpt", metavar="FILE", help="full-precision weights of your own: .ckpt, .pth, .pt or .safetensors"
    )


def add_sampler_flags(parser: Parser) -> None:
    """How images are sampled."""
    group = parser.add_argument_group("sampler")
    add_trajectory_flags(group)
    group.add_argument(
        "--eta", type=real(zero=True), default=0.0, metavar="X", help="noise in DDIM steps: 0 none, 1 as in DDPM"
    )
    group.add_argument(
        "--batch_size",
        type=at_least(1),
        metavar="N",
        help="images at once; changes speed and memory, not the images [sampling.batch_size of the config]",
    )


def add_trajectory_flags(group: argparse._ArgumentGroup) -> None:
    """Which sampler, over which timesteps."""
    group.add_argument(
        "--sample_type",
        choices=SAMPLE_TYPES,
        default="generalized",
        help="generalized (DDIM), ddpm_noisy (ancestral) or dpm_solver (DPM-Solver++ of order 3)",
    )
    group.add_argument(
        "--skip_type", choices=SKIP_TYPES, default="uniform", help="spacing of the timesteps; quad is dense near 0"
    )
    group.add_argument(
        "--timesteps", type=at_least(1), default=1000, metavar="N", help="sampling steps, up to the schedule's"
    )


def check_model_flags(parser: Parser, args: argparse.Namespace, *, standalone: bool = False) -> None:
    """Args:
    standalone: a calibrated checkpoint stands in for the full-precision weights.
    """
    of_diffusers = Path(args.config).is_dir()
    if not of_diffusers:
        check_file(parser, args, "config", "the repository's configs/ has some")
    check_file(parser, args, "ckpt", "--use_pretrained takes the published weights instead")
    if not (args.use_pretrained or args.ckpt or standalone or of_diffusers):
        parser.error(
            "say where the full-precision weights come from: --use_pretrained (published or bundled) or --ckpt FILE"
        )


def check_sampler_flags(parser: Parser, args: argparse.Namespace, config: PixelConfig) -> None:
    """Refuse more steps than the schedule has, and noise where it has no effect."""
    most = config.diffusion.num_diffusion_timesteps
    if args.timesteps > most:
        parser.error(f"--timesteps {args.timesteps}: the schedule of {args.config} has {most}; use 1 to {most}")
    if args.eta > 0 and args.sample_type != "generalized":
        parser.error(
            f"--eta {args.eta} needs --sample_type generalized; {args.sample_type} has no noise that could be changed"
        )


@dataclass(frozen=True)
class SamplerOptions:
    """The sampler's flags."""

    sample_type: str
    skip_type: str
    timesteps: int
    eta: float
    seed: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> SamplerOptions:
        return cls(args.sample_type, args.skip_type, args.timesteps, args.eta, args.seed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PixelSampler:
    """Samples images by number: the same number gives the same image in any batch.

    Attributes:
        image_shape: C, H, W.
        n_steps: model calls of a trajectory. Can be more than ``options.timesteps``
            (:func:`ddim.schedule.sampling_timesteps`).
    """

    rows_per_image = 1
    context_shape: tuple[int, int] | None = None

    def __init__(self, config: PixelConfig, options: SamplerOptions, device: torch.device):
        self.options, self.device = options, device
        self.image_shape = image_shape(config)
        try:
            self._alpha_bar = alphas_cumprod(make_betas(config.diffusion))
        except ValueError as error:
            raise ConfigError(f"section 'diffusion' of the config: {error}") from None
        self._times = sampling_timesteps(config.diffusion.num_diffusion_timesteps, options.timesteps, options.skip_type)
        self.n_steps = options.timesteps if options.sample_type == "dpm_solver" else len(self._times)

    @torch.no_grad()
    def __call__(self, model: EpsilonModel, indices: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """Images ``indices`` of the seed, in the range the model was trained on: N x C x H x W."""
        options = self.options
        noise = ImageNoise(options.seed, indices, self.image_shape, self.device)
        x = noise.start()
        with tf32(False):  # ten bits of mantissa would let images depend on the batch size
            if options.sample_type == "dpm_solver":
                return dpm_solver_sample(
                    model,
                    x,
                    self._alpha_bar,
                    steps=options.timesteps,
                    order=3,
                    method="singlestep",
                    skip_type=DPM_SKIP_TYPES[options.skip_type],
                    on_step=on_step,
                )
            if options.sample_type == "ddpm_noisy":
                return ddpm_sample(model, x, self._times, self._alpha_bar, noise=noise.step, on_step=on_step)
            return ddim_sample(
                model, x, self._times, self._alpha_bar, eta=options.eta, noise=noise.step, on_step=on_step
            )

    def conditions(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """There are none."""
        raise ValueError("a pixel-space model takes no conditions")

    def reseeded(self, seed: int) -> PixelSampler:
        """A sampler of the same settings, of other noise."""
        other = copy.copy(self)
        other.options = replace(self.options, seed=seed)
        return other

    def facts(self) -> dict[str, Any]:
        """What decides the samples beside the network and its config."""
        return self.options.to_dict()


def image_shape(config: PixelConfig) -> tuple[int, int, int]:
    """C, H, W of what the network sees."""
    return config.data.channels, config.data.image_size, config.data.image_size


def architecture(config: PixelConfig) -> dict[str, Any]:
    """The keys of the config that decide which layers the UNet has, and their values."""
    keys = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resamp_with_conv")
    layers = {f"model.{key}": getattr(config.model, key) for key in keys}
    if isinstance(config, DiffusersConfig):
        layers |= {f"unet.{key}": value for key, value in config.unet.items() if not key.startswith("_")}
    return {"data.image_size": config.data.image_size, **layers}


def weights_path(args: argparse.Namespace, config: PixelConfig) -> Path:
    """Where the full-precision weights lie; downloads them where they have to be.

    Raises:
        UserError: no published weights are known for this config.
        CheckpointUnavailable: they could not be fetched.
    """
    if args.ckpt:
        return Path(args.ckpt)
    if isinstance(config, DiffusersConfig):
        if not config.weights.is_file():
            raise UserError(f"{config.folder}: has no {config.weights.name}; save it in that form, or name --ckpt")
        return config.weights
    try:
        return checkpoint_path(config)
    except CheckpointUnavailable:
        raise
    except ValueError as error:
        raise UserError(f"--use_pretrained: {error}") from None


def load_full_precision(args: argparse.Namespace, config: PixelConfig) -> nn.Module:
    """The UNet of the config with the weights the flags name, on the CPU, in eval mode.

    Raises:
        UserError: the weights are damaged or of another architecture.
    """
    path = weights_path(args, config)
    model = build(config).eval()
    try:
        load_weights(path, model, args.config)
    except ValueError as error:
        raise UserError(str(error)) from None
    logger.debug("full-precision weights from %s", path)
    return model
