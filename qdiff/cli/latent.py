"""What the commands for latent diffusion models share: their flags, the model with its first stage, and the sampler."""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ddim.config import ConfigError
from ddim.noise import ImageNoise
from ddim.pretrained import read_weights
from ddim.samplers import OnStep
from ldm.models.diffusion.ddim import latent_timesteps
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import sample_latents
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import ClassEmbedder, TextEncoder
from ldm.pretrained import UNET, build_latent_diffusion, find_checkpoint, load_state
from ldm.util import load_guidance, load_model_config
from qdiff.cli.errors import UserError
from qdiff.cli.flags import Parser, at_least, real, whole_numbers
from qdiff.cli.sampling import plain
from qdiff.config import RangeMethod
from qdiff.inference import NoiseModel, tf32
from qdiff.progress import tensor_hash

# The keywords of a UNet that decide its layers or how they are connected; the others change nothing about a checkpoint.
LAYER_KEYS = (
    *("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions"),
    *("conv_resample", "num_heads", "num_head_channels", "num_heads_upsample", "use_scale_shift_norm"),
    *("resblock_updown", "use_new_attention_order", "use_spatial_transformer", "transformer_depth", "context_dim"),
)

SCALE = 3.0  # of classifier-free guidance
BATCH_SIZE = 10  # images at once, unless the command line says otherwise

logger = logging.getLogger(__name__)


def add_model_flags(parser: Parser, *, title: str = "model", required: bool = True) -> None:
    """``-r/--resume_base``; the parser itself takes the words that change the config.

    Args:
        title: of the group.
        required: the command has no other family of models.
    """
    group = parser.add_argument_group(
        title,
        "Bare words such as model.params.image_size=32 change the model's config.",
    )
    group.add_argument(
        "-r",
        "--resume_base",
        required=required,
        metavar="PATH",
        help="the full-precision model: a .ckpt or .safetensors with config.yaml beside it, or the folder of both",
    )


def add_trajectory_flags(group: argparse._ArgumentGroup) -> None:
    """Which sampler, over how many timesteps, and of which classes."""
    group.add_argument(
        "-c", "--custom_steps", type=at_least(1), default=50, metavar="N", help="steps of DDIM or DPM-Solver++"
    )
    other = group.add_mutually_exclusive_group()
    other.add_argument(
        "-v", "--vanilla_sample", action="store_true", help="ancestral sampling (DDPM) over all timesteps"
    )
    other.add_argument("--dpm", action="store_true", help="DPM-Solver++ of order 2 in place of DDIM")
    group.add_argument(
        "--class_labels",
        type=whole_numbers,
        metavar="I,I,...",
        help="class-conditional models: one image of each label in turn [all classes in turn]",
    )
    group.add_argument(
        "--scale",
        type=real(zero=True),
        metavar="X",
        help="class-conditional models: classifier-free guidance; 1 is none, and half the work [what the model's "
        f"config recommends, else {SCALE}]",
    )


def add_sampler_flags(parser: Parser) -> None:
    """How images are sampled."""
    group = parser.add_argument_group("sampler")
    add_trajectory_flags(group)
    group.add_argument(
        "-e", "--eta", type=real(zero=True), default=1.0, metavar="X", help="noise in DDIM steps: 0 none, 1 as in DDPM"
    )
    group.add_argument(
        "--batch_size",
        type=at_least(1),
        default=BATCH_SIZE,
        metavar="N",
        help="images at once; changes speed and memory, not the images",
    )


def check_sampler_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect on the sampler that was chosen; no file is read."""
    other = "--vanilla_sample" if args.vanilla_sample else "--dpm" if args.dpm else None
    if other and "eta" in args.given:
        parser.error(f"--eta {args.eta:g} has no effect with {other}: it is DDIM's; leave one of them out")
    if args.vanilla_sample and "custom_steps" in args.given:
        parser.error(
            f"--custom_steps {args.custom_steps} has no effect with --vanilla_sample, which visits all timesteps; "
            "leave one of them out"
        )


@dataclass(frozen=True)
class SamplerOptions:
    """The sampler's flags.

    Attributes:
        method: as in :func:`ldm.models.diffusion.sampling.sample_latents`.
        labels: classes, in turn one for each image; empty for an unconditional model.
    """

    method: str
    steps: int
    eta: float
    seed: int
    labels: tuple[int, ...] = ()
    scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LatentModel:
    """A latent diffusion model on its way from files to a device.

    Made, it has read and checked the config and found the file of weights, of which nothing was read.

    Args:
        path: checkpoint, or folder of one.
        overrides: ``key=value`` words that change the config.

    Attributes:
        checkpoint, config_path: the files.
        name: of the checkpoint's folder.
        diffusion: the model; on the meta device until :meth:`load`.

    Raises:
        UserError, ConfigError: a file is missing, the config is wrong, or the model is of a kind that is not sampled
            from here.
    """

    def __init__(self, path: str, overrides: Sequence[str] = ()):
        self.checkpoint = _found(path)
        self._build(self.checkpoint.with_name("config.yaml"), overrides)
        conditional = self.diffusion.conditional
        if conditional and not isinstance(self.diffusion.cond_stage_model, ClassEmbedder):
            text = isinstance(self.diffusion.cond_stage_model, TextEncoder)
            raise UserError(
                f"{self.config_path}: the model is conditional on '{self.diffusion.cond_stage_key}'; this command "
                "samples from unconditional and class-conditional models"
                + (", scripts/txt2img.py from text-to-image ones" if text else "")
            )
        self._check_condition("classes")

    def _build(self, config_path: Path, overrides: Sequence[str]) -> None:
        """Everything but the weights."""
        self.config_path = config_path
        self.config = load_model_config(self.config_path, overrides)
        self.guidance = load_guidance(self.config_path, overrides)
        self.name = self.checkpoint.absolute().parent.name
        with torch.device("meta"):
            try:
                self.diffusion: LatentDiffusion = build_latent_diffusion(self.config).eval()
            except ConfigError as error:
                raise ConfigError(f"{self.config_path}: {error}") from None
            except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
                raise UserError(f"{self.config_path}: the model cannot be built: {error}") from None
        size = self.diffusion.image_size
        if size % self.coarsest:
            raise UserError(
                f"{self.config_path}: image_size {size} cannot be halved as often as the UNet does; use a multiple of "
                f"{self.coarsest}"
            )

    def _check_condition(self, what: str) -> None:
        if self.diffusion.conditional and self.diffusion.model.conditioning_key != "crossattn":
            raise UserError(f"{self.config_path}: {what} reach the UNet through conditioning_key crossattn only")

    @property
    def coarsest(self) -> int:
        """What the height and width of a latent must be multiples of: the UNet halves them level by level."""
        return 2 ** (len(self.layer_facts()["channel_mult"]) - 1)

    @property
    def unet(self) -> nn.Module:
        return self.diffusion.model.diffusion_model

    @property
    def classes(self) -> int | None:
        """How many classes there are, apart from the one for "no condition"; None for an unconditional model."""
        return self.embedder.n_classes - 1 if self.diffusion.conditional else None

    @property
    def embedder(self) -> ClassEmbedder:
        """Of a model that is conditional on classes."""
        embedder = self.diffusion.cond_stage_model
        assert isinstance(embedder, ClassEmbedder)
        return embedder

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """L x D of a class's embedding."""
        if not self.diffusion.conditional:
            return None
        return 1, self.embedder.embedding.embedding_dim

    def layer_facts(self) -> dict[str, Any]:
        """:data:`LAYER_KEYS` of the UNet and the latent's size, left-out keywords at their defaults."""
        defaults = {name: p.default for name, p in inspect.signature(UNetModel).parameters.items()}
        given = self.config["params"]["unet_config"].get("params") or {}
        facts = {key: given.get(key, defaults[key]) for key in LAYER_KEYS}
        return plain({"latent_size": self.diffusion.image_size, **facts})

    def facts(self) -> dict[str, Any]:
        """What checkpoints record of the model: the config as it was used, and the UNet with nothing left out."""
        return {"model": plain(self.config), "unet": self.layer_facts()}

    def architecture(self) -> dict[str, Any]:
        """``unet.<key>`` -> value: what decides the network's layers."""
        return {f"unet.{key}": value for key, value in self.layer_facts().items()}

    def load(self, *, unet: bool = True, device: torch.device | str = "cpu") -> None:
        """Read the weights: averaged ones, where the model has them.

        Args:
            unet: whether the UNet's are wanted. Otherwise the file need not have them, they are not read, and the UNet
                is left with memory for its weights and nothing in it.
            device: where that memory is. Weights that are read are on the CPU.

        Raises:
            UserError: they are damaged or of another architecture.
        """
        try:
            state = read_weights(self.checkpoint, without=() if unet else UNET)
            load_state(self.diffusion, state, source=str(self.checkpoint), unet=unet)
        except ValueError as error:
            raise UserError(str(error)) from None
        if not unet:
            self.unet.to_empty(device=device)
        self.diffusion.eval().requires_grad_(False)
        logger.debug("full-precision weights from %s", self.checkpoint)


class UNetOfLatentModel(LatentModel):
    """A latent diffusion model of any condition, texts too, for its UNet alone.

    Args:
        path: checkpoint, or folder of one.
        config_path: YAML; None: config.yaml beside it.
        overrides: ``key=value`` words that change the config.

    Raises:
        UserError, ConfigError: a file is missing, or the config is wrong.
    """

    def __init__(self, path: str, config_path: str | None, overrides: Sequence[str] = ()):
        self.checkpoint = _found(path)
        self._build(self.checkpoint.with_name("config.yaml") if config_path is None else Path(config_path), overrides)
        self._check_condition("conditions")

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """L x D of a condition's embedding."""
        encoder = self.diffusion.cond_stage_model if self.diffusion.conditional else None
        return (encoder.max_length, encoder.width) if isinstance(encoder, TextEncoder) else super().context_shape


def _found(path: str) -> Path:
    """The checkpoint that ``--resume_base`` names, or that lies in the folder it names."""
    if not Path(path).exists():
        raise UserError(
            f"--resume_base {path}: no such file or folder; it names a model.ckpt with config.yaml beside it, or "
            "their folder (scripts/make_random_checkpoint.py makes one with random weights to try things out)"
        )
    try:
        return find_checkpoint(path)
    except ValueError as error:
        raise UserError(f"--resume_base {error}") from None


class LatentSampler:
    """Samples latents by number: the same number gives the same latent in any batch.

    Args:
        model: whose weights are read before the first call.
        device: its first stage and encoder of conditions move there with the first call.
        allow_tf32: faster matrix products and convolutions of the network on a GPU, with 10 bits of mantissa, which let
            images depend on the batch size.

    Attributes: those of :class:`qdiff.cli.samplers.Sampler`.
    """

    def __init__(self, model: LatentModel, options: SamplerOptions, device: torch.device, *, allow_tf32: bool = False):
        self.model, self.options, self.device, self.allow_tf32 = model, options, device, allow_tf32
        self.image_shape = model.diffusion.latent_shape
        self.context_shape = model.context_shape
        self.rows_per_image = 2 if self.context_shape is not None and options.scale != 1 else 1
        train = model.diffusion.num_timesteps
        if options.method == "ddpm":
            self.n_steps = train
        elif options.method == "dpm":
            self.n_steps = options.steps
        else:
            self.n_steps = len(latent_timesteps(train, options.steps))

    @torch.no_grad()
    def __call__(self, model: NoiseModel, indices: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """Latents ``indices`` of the seed, scaled as the network sees them: N x C x h x w."""
        options = self.options
        noise = self.noise(indices)
        cond, uncond = (None, None) if self.context_shape is None else self.conditions(indices)

        def apply_model(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            return model(x, t) if context is None else model(x, t, context)

        with tf32(self.allow_tf32):
            return sample_latents(
                self._on_device(),
                noise,
                method=options.method,
                steps=options.steps,
                eta=options.eta,
                cond=cond,
                uncond=uncond,
                scale=1.0 if cond is None else options.scale,
                on_step=on_step,
                apply_model=apply_model,
            )

    def noise(self, indices: Sequence[int]) -> ImageNoise:
        """Starting noise and draws of some images."""
        return ImageNoise(self.options.seed, indices, self.image_shape, self.device)

    def conditions(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings of the images' classes and of "no condition": each N x L x D."""
        diffusion, labels = self._on_device(), self.options.labels
        chosen = torch.tensor([labels[index % len(labels)] for index in indices])
        with torch.no_grad():
            embedder = self.model.embedder
            return diffusion.get_learned_conditioning({embedder.key: chosen}), embedder.unconditional(len(chosen))

    def reseeded(self, seed: int) -> Self:
        """A sampler of the same settings, of other noise."""
        other = copy.copy(self)
        other.options = replace(self.options, seed=seed)
        return other

    def facts(self) -> dict[str, Any]:
        """What decides the samples beside the network and its config; once the model is loaded."""
        facts = self.options.to_dict()
        if self.context_shape is not None:
            facts["encoder_weights"] = tensor_hash(self.model.diffusion.cond_stage_model.state_dict())
        return facts

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images in [0, 1], N x 3 x f h x f w."""
        with tf32(False):
            return ((self._on_device().decode(latents) + 1) / 2).clamp(0, 1)

    def _on_device(self) -> LatentDiffusion:
        """The model, all but its network, which is elsewhere: wrapped, compiled, or as it was."""
        diffusion = self.model.diffusion
        if diffusion.alphas_cumprod.device != self.device:
            diffusion.to(self.device)
        return diffusion


def chosen_scale(args: argparse.Namespace, model: LatentModel, default: float) -> float:
    """Of classifier-free guidance: the flag's, else what the model's config recommends, else the command's."""
    return next(scale for scale in (args.scale, model.guidance, default) if scale is not None)


def sampler_options(parser: Parser, args: argparse.Namespace, model: LatentModel) -> SamplerOptions:
    """The flags, checked against the model: more steps than its schedule has, classes that it has not."""
    train = model.diffusion.num_timesteps
    if not args.vanilla_sample and args.custom_steps > train:
        parser.error(
            f"--custom_steps {args.custom_steps}: the schedule of {model.config_path} has {train}; use 1 to {train}"
        )
    if model.classes is None:
        for name in ("class_labels", "scale", "cond"):
            if name in args.given:  # --cond is the sampling command's alone
                parser.error(f"{parser.flag(name)}: the model of {model.config_path} is unconditional; leave it out")
    method = "ddpm" if args.vanilla_sample else "dpm" if args.dpm else "ddim"
    labels = _labels(parser, args.class_labels, model)
    args.scale = chosen_scale(args, model, SCALE)
    return SamplerOptions(method, args.custom_steps, args.eta, args.seed, labels, args.scale if labels else 1.0)


def _labels(parser: Parser, wanted: Sequence[int] | None, model: LatentModel) -> tuple[int, ...]:
    if model.classes is None:
        return ()
    if wanted is None:
        return tuple(range(model.classes))
    outside = [label for label in wanted if label >= model.classes]
    if outside:
        parser.error(
            f"--class_labels {','.join(map(str, wanted))}: {outside[0]} is not a class of {model.config_path}; use 0 "
            f"to {model.classes - 1}"
        )
    return tuple(wanted)


def first_ranges(args: argparse.Namespace) -> dict[str, RangeMethod]:
    """How these families find their first ranges: by error, activations with ``--a_min_max`` by minimum and maximum."""
    return {"weight_range": "mse", "act_range": "max" if args.a_min_max else "mse"}
