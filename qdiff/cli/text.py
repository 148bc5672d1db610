"""What the commands for text-to-image models share: their flags, the model with its text encoder, and the sampler."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ddim.noise import ImageNoise
from ddim.untrusted import parse_json
from ldm.modules.encoders.modules import TextEncoder
from ldm.pretrained import find_checkpoint
from qdiff.cli.errors import UserError
from qdiff.cli.flags import Parser, at_least, real
from qdiff.cli.latent import LatentModel, LatentSampler, SamplerOptions, chosen_scale

REPOSITORY = Path(__file__).resolve().parents[2]
STABLE_DIFFUSION = ("configs/stable-diffusion/v1-inference.yaml", "models/ldm/stable-diffusion-v1/model.ckpt")
LAION400M = ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/text2img-large/model.ckpt")
PLACES = {
    "models/ldm/stable-diffusion-v1/model.ckpt": "sd-v1-4.ckpt of Stable Diffusion",
    "models/ldm/text2img-large/model.ckpt": "model.ckpt of the LAION-400M model",
}
OTHER_NAMES = ("model.safetensors", "sd-v1-4.ckpt", "sd-v1-4.safetensors")
SCALE = 7.5  # of classifier-free guidance

logger = logging.getLogger(__name__)


def add_prompt_flags(group: argparse._ArgumentGroup) -> None:
    """What to draw."""
    group.add_argument("--prompt", metavar="TEXT", help="what the images shall show")
    group.add_argument(
        "--from-file",
        metavar="FILE",
        help="prompts, one a line, or a .json of COCO captions; an image of each in turn",
    )


def add_text_model_flags(group: argparse._ArgumentGroup) -> None:
    """What a text-to-image model has beside ``--config`` and ``--ckpt``."""
    group.add_argument(
        "--laion400m",
        action="store_true",
        help=f"the model trained on LAION-400M: config {LAION400M[0]}, checkpoint {LAION400M[1]}",
    )
    group.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of the text encoder's tokenizer: vocab.json and merges.txt of CLIP, vocab.txt of BERT [beside the "
        "config, where that says so; otherwise looked for in models/tokenizers/, in the hub's cache and on the hub]",
    )
    group.add_argument("--H", type=at_least(1), metavar="N", help="height of images in pixels [the config's]")
    group.add_argument("--W", type=at_least(1), metavar="N", help="width of images in pixels [the config's]")


def add_text_sampler_flags(group: argparse._ArgumentGroup) -> None:
    """Which sampler beside DDIM and DPM-Solver++, and over how many steps."""
    group.add_argument("--ddim_steps", type=at_least(1), default=50, metavar="N", help="steps of any of the samplers")
    group.add_argument("--plms", action="store_true", help="PLMS in place of DDIM: the published commands' sampler")


def add_guidance_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scale",
        type=real(zero=True),
        metavar="X",
        help="classifier-free guidance; 1 is none, and half the work [what the model's config recommends, else "
        f"{SCALE}]",
    )


def check_text_flags(parser: Parser, args: argparse.Namespace, *, eta: str) -> None:
    """Refuse flags that contradict one another; no file but that of prompts is looked for.

    Args:
        eta: which flag says how much noise DDIM adds.
    """
    if args.plms and args.dpm:
        parser.error("--plms and --dpm exclude each other: both choose the sampler; leave one of them out")
    other = "--plms" if args.plms else "--dpm" if args.dpm else None
    if other and getattr(args, eta):
        parser.error(f"--{eta} {getattr(args, eta):g} has no effect with {other}: it is DDIM's; leave one of them out")
    if args.prompt is not None and args.from_file is not None:
        parser.error("--prompt and --from-file exclude each other: both say what to draw")
    if args.prompt is None and args.from_file is None:
        parser.error('say what to draw: --prompt "a puppy wearing a hat", or --from-file FILE with a prompt a line')
    if args.from_file is not None and not Path(args.from_file).is_file():
        parser.error(f"--from-file {args.from_file}: no such file; it holds a prompt a line")
    if args.tokenizer is not None and not Path(args.tokenizer).is_dir():
        parser.error(f"--tokenizer {args.tokenizer}: no such folder; it holds the text encoder's tokenizer")


def read_prompts(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompts of the flags, empty ones left out: the lines of a file, or the captions of a COCO JSON in its order.

    Raises:
        UserError: the file cannot be read or holds none.
    """
    if args.prompt is not None:
        return (args.prompt,)
    path = Path(args.from_file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--from-file {path}: is not a text file in UTF-8") from None
    lines = _captions(path, text) if path.suffix.lower() == ".json" else text.splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--from-file {path}: holds no prompt")
    return prompts


def _captions(path: Path, text: str) -> list[str]:
    """The captions of a file in the structure of COCO's ``captions_*.json``."""
    remedy = 'expected COCO captions, {"annotations": [{"caption": "..."}]}; prompts, one a line, go in a .txt'
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"--from-file {path}: is not JSON ({error}); {remedy}") from None
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"--from-file {path}: has no list of annotations; {remedy}")
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            raise UserError(f"--from-file {path}: annotation {number} has no caption; {remedy}")
        if any("\ud800" <= character <= "\udfff" for character in annotation["caption"]):  # of \\ud800, JSON's escape
            raise UserError(
                f"--from-file {path}: the caption of annotation {number} has half a character (one of the two escapes"
                " \\ud800 to \\udfff that make one); write it whole or take it out"
            )
    return [" ".join(annotation["caption"].split()) for annotation in annotations]  # some are of several lines


def text_model(args: argparse.Namespace) -> TextModel:
    """The model of the flags; what they leave open is that of Stable Diffusion, or with ``--laion400m`` of that one.

    Raises: as :class:`TextModel`.
    """
    config, checkpoint = LAION400M if args.laion400m else STABLE_DIFFUSION
    config = args.config or _from_repository(config)
    return TextModel(args.ckpt or _own_checkpoint(checkpoint), config, args.overrides, tokenizer=args.tokenizer)


def _own_checkpoint(path: str) -> str:
    """The place where a model's checkpoint is expected, or the same folder's file of another name that it comes by."""
    place = Path(_from_repository(path))
    names = (place.name, *(OTHER_NAMES if path == STABLE_DIFFUSION[1] else OTHER_NAMES[:1]))
    return str(next((p for p in map(place.with_name, names) if p.is_file()), place))


def _from_repository(path: str) -> str:
    """A file of the repository, from wherever the command is started; an installation has none."""
    return path if Path(path).exists() or not (REPOSITORY / "configs").is_dir() else str(REPOSITORY / path)


class TextModel(LatentModel):
    """A text-to-image model on its way from files to a device.

    Made, it has read the config and the tokenizer and found the file of weights, of which nothing was read.

    Args:
        path: checkpoint, or folder of one.
        config_path: YAML.
        overrides: ``key=value`` words that change the config.
        tokenizer: folder of the text encoder's tokenizer, where it is neither beside the config nor to be looked for.

    Raises:
        UserError, ConfigError: a file is missing, the config is wrong, or the model is of another kind.
    """

    def __init__(self, path: str, config_path: str, overrides: Sequence[str] = (), *, tokenizer: str | None = None):
        self.checkpoint = _checkpoint(path)
        self._build(Path(config_path), overrides)
        encoder = self.diffusion.cond_stage_model if self.diffusion.conditional else None
        if not isinstance(encoder, TextEncoder):
            kind = f"conditional on '{self.diffusion.cond_stage_key}'" if encoder is not None else "unconditional"
            raise UserError(
                f"{self.config_path}: the model is {kind}; this command takes text-to-image models, "
                "scripts/sample_diffusion_ldm.py the others"
            )
        self._check_condition("texts")
        if tokenizer is None:
            encoder.look_beside(self.config_path)
        else:
            encoder.tokenizer_folder = tokenizer
        _ = encoder.tokenizer  # its absence is told before gigabytes are read

    @property
    def encoder(self) -> TextEncoder:
        encoder = self.diffusion.cond_stage_model
        assert isinstance(encoder, TextEncoder)
        return encoder

    @property
    def factor(self) -> int:
        """Pixels along a side of a latent's pixel."""
        return self.diffusion.first_stage_model.downsampling

    @property
    def context_shape(self) -> tuple[int, int]:
        """L x D of a text's embedding."""
        return self.encoder.max_length, self.encoder.width

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """C x h x w of the latent of an image of so many pixels, by default of the config's size.

        Raises:
            UserError: no latent of this model has that size.
        """
        multiple, default = self.factor * self.coarsest, self.factor * self.diffusion.image_size
        for flag, pixels in (("--H", height), ("--W", width)):
            if pixels is not None and pixels % multiple:
                below = pixels // multiple * multiple
                near = f"{below} or {below + multiple}" if below else str(multiple)
                raise UserError(f"{flag} {pixels}: sizes are multiples of {multiple} pixels; use {near}")
        rows, columns = ((pixels or default) // self.factor for pixels in (height, width))
        return self.diffusion.channels, rows, columns


def _checkpoint(path: str) -> Path:
    try:
        if Path(path).exists():
            return find_checkpoint(path)
    except ValueError as error:
        raise UserError(f"--ckpt {error}") from None
    wanted = next((what for place, what in PLACES.items() if path.endswith(place)), None)
    remedy = f"put {wanted} there, or name it with --ckpt" if wanted else "name a .ckpt or .safetensors with --ckpt"
    raise UserError(
        f"{path}: no such checkpoint; {remedy} (scripts/make_random_checkpoint.py makes one with random weights to try "
        "things out)"
    )


class TextSampler(LatentSampler):
    """Samples latents of texts by number: image i has prompt i modulo their number.

    Args:
        prompts: in turn one for each image.
        size: height and width in pixels, None for the config's.
        codes: how many starting noises there are: image i starts from that of i modulo this number; None for one each.
    """

    model: TextModel

    def __init__(
        self,
        model: TextModel,
        options: SamplerOptions,
        device: torch.device,
        prompts: Sequence[str],
        *,
        size: tuple[int | None, int | None] = (None, None),
        codes: int | None = None,
        allow_tf32: bool = False,
    ):
        super().__init__(model, options, device, allow_tf32=allow_tf32)
        self.image_shape = model.latent_shape(*size)
        self.prompts, self.codes = tuple(prompts), codes

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]

    def noise(self, indices: Sequence[int]) -> ImageNoise:
        starts = None if self.codes is None else [index % self.codes for index in indices]
        return ImageNoise(self.options.seed, indices, self.image_shape, self.device, starts=starts)

    def reseeded(self, seed: int) -> Self:
        """A sampler of the same settings, of other noise; every sample starts from its own."""
        other = super().reseeded(seed)
        other.codes = None
        return other

    def facts(self) -> dict[str, Any]:
        """What decides the samples beside the network and its config; once the model is loaded."""
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {**super().facts(), "prompts": prompts}

    @torch.no_grad()
    def conditions(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings of the images' prompts and of the empty text: each N x L x D."""
        self._on_device()
        encoder = self.model.encoder
        prompts = [self.prompt(index) for index in indices]
        different = list(dict.fromkeys(prompts))
        parts = [encoder(different[start : start + TEXTS_AT_ONCE]) for start in range(0, len(different), TEXTS_AT_ONCE)]
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=self.device)
        return torch.cat(parts)[rows], encoder.unconditional(len(prompts))


TEXTS_AT_ONCE = 64


def text_options(parser: Parser, args: argparse.Namespace, model: TextModel, *, eta: float) -> SamplerOptions:
    """The flags, checked against the model's schedule."""
    train = model.diffusion.num_timesteps
    if args.ddim_steps > train:
        parser.error(
            f"--ddim_steps {args.ddim_steps}: the schedule of {model.config_path} has {train}; use 1 to {train}"
        )
    method = "plms" if args.plms else "dpm" if args.dpm else "ddim"
    args.scale = chosen_scale(args, model, SCALE)
    return SamplerOptions(method, args.ddim_steps, eta, args.seed, scale=args.scale)


def told_of_cut_prompts(model: TextModel, prompts: Sequence[str]) -> str:
    """Which prompts are longer than the encoder's input, in a line; empty for none."""
    cut = [prompt for prompt in dict.fromkeys(prompts) if model.encoder.too_long(prompt)]
    if not cut:
        return ""
    which = "the prompt is" if len(cut) == 1 else f"{len(cut)} prompts are"
    return f"{which} cut to the first {model.encoder.max_length} tokens: {cut[0][:60]!r}..."
