"""Bundled models of all kinds as tables and demos see them: loaded, recorded, sampled and scored in one way."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddim.config import PixelConfig, load_config
from ddim.samplers import timestep_batch
from qdiff.calibration_data import CalibrationSet, load_calibration_set, make_calibration_set
from qdiff.checkpoint import load_quantized, read_packed_info
from qdiff.cli import latent, pixel, text
from qdiff.cli.errors import UserError
from qdiff.cli.samplers import Sampler
from qdiff.evaluation.features import image_statistics, load_classifier
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.sampling import sample_images
from qdiff.evaluation.text_agreement import KnownImages, agreement
from qdiff.evaluation.variants import (
    HELD_OUT_SEED,
    HeldOutInputs,
    from_packed,
    full_precision,
    held_out_inputs,
    run_batches,
)
from qdiff.inference import InferenceConfig, prepare, tf32
from qdiff.quant_model import QuantModel, evaluating

ROOT = Path(__file__).resolve().parents[2]
AS_IT_IS = InferenceConfig()
SCORING = ("classifier.safetensors", "reference_statistics.safetensors")
NAMES = "names.safetensors"
TOKENIZER = "tokenizer"
CAPTIONS_SEED = 0  # of the captions that images are scored on; calibration takes those of the next seed
CAPTIONS_JUDGED = 500  # whose images are looked at for their agreement


@dataclass(frozen=True)
class Bundle(ABC):
    """A bundled model and what scores it. Nothing is read before it is needed.

    Attributes:
        folder: of the model.
        quant, calibration: fields of :class:`QuantConfig` and :class:`CalibrationConfig` that the family's published
            commands set otherwise than their defaults.
    """

    folder: Path
    quant: dict[str, Any] = field(default_factory=dict, kw_only=True)
    calibration: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def check(self, *more: str) -> None:
        """Whether all files are there, and ``more`` beside them.

        Raises:
            UserError: one is missing; names all that are.
        """
        lacking: dict[Path, list[str]] = {}
        for folder, names in ((self.folder, self.files), (self.yardstick, SCORING), (self.folder, more)):
            if missing := [name for name in names if not (folder / name).is_file()]:
                lacking.setdefault(folder, []).extend(missing)
        if lacking:
            said = "; ".join(f"{folder}: lacks {', '.join(names)}" for folder, names in lacking.items())
            raise UserError(f"{said}; {self.origin}")

    @property
    def yardstick(self) -> Path:
        """Folder of the classifier and of the statistics of the training images."""
        return self.folder

    @property
    @abstractmethod
    def files(self) -> tuple[str, ...]:
        """What the folder holds."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where missing files come from."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What checkpoints record of the model."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Of sampling: what belongs to the bundle rather than to a command's flags."""

    @property
    @abstractmethod
    def steps_are(self) -> str:
        """How a sampler's steps are spaced, and what guides it, for headings."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """C x H x W of the network's input."""

    @abstractmethod
    def full_precision(self) -> nn.Module:
        """The network, a new one each time, on the CPU."""

    @abstractmethod
    def from_packed(self, path: Path, *, quant_act: bool = True) -> QuantModel:
        """The quantized network of a packed checkpoint, on the CPU."""

    @abstractmethod
    def held_out(self, model: nn.Module, *, device: torch.device, steps: int, per_step: int) -> HeldOutInputs:
        """Inputs along the full-precision trajectory of ``per_step`` images that no calibration saw."""

    @abstractmethod
    def sampler(
        self, device: torch.device | str, *, timesteps: int, eta: float, seed: int, allow_tf32: bool = False
    ) -> Sampler:
        """As the family's command samples: DDIM, or PLMS where texts are drawn."""

    @abstractmethod
    def context(self, sampler: Sampler, count: int) -> tuple[Tensor, Tensor] | None:
        """Embeddings of the first images' conditions and of none; None where the network takes no context."""

    def record(
        self,
        model: nn.Module,
        *,
        device: torch.device | str,
        timesteps: int,
        seed: int,
        count: int,
        batch_size: int,
        cali_st: int,
        progress: Callable[[int], Any] | None = None,
    ) -> dict[str, list[Tensor]]:
        """A calibration set of ``count`` images, recorded along the network's trajectories without noise in them."""
        sampler = self.recording_sampler(device, timesteps=timesteps, seed=seed)
        return make_calibration_set(
            lambda indices, on_step: sampler(model, indices, on_step),
            n_samples=count,
            n_steps=sampler.n_steps,
            batch_size=batch_size,
            cali_st=cali_st,
            context=self.context(sampler, count),
            progress=progress,
        )

    def recording_sampler(self, device: torch.device | str, *, timesteps: int, seed: int) -> Sampler:
        """Of calibration sets."""
        return self.sampler(device, timesteps=timesteps, eta=0.0, seed=seed)

    @abstractmethod
    def calibration_samples(self, path: Path, *, cali_st: int, cali_n: int) -> CalibrationSet:
        """The part of a set's file that is calibrated on."""

    @abstractmethod
    def sample(
        self,
        model: nn.Module,
        *,
        count: int,
        batch_size: int,
        timesteps: int,
        eta: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        inference: InferenceConfig = AS_IT_IS,
        allow_tf32: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Images 0 ... count - 1 of a seed, as :func:`qdiff.evaluation.sampling.sample_images` gives them."""

    def distance(self, images: Tensor, device: torch.device | str = "cpu") -> float:
        """Fréchet distance to the training images, on the bundled classifier's features."""
        classifier = load_classifier(self.yardstick / SCORING[0], device)
        reference = FeatureStatistics.load(self.yardstick / SCORING[1])
        return frechet_distance(image_statistics(classifier, images, "samples"), reference)

    def asked_for(self, count: int) -> list[str] | None:
        """Captions of the first images of :meth:`sample`; None where nothing is asked for in words."""
        return None

    def agreement(self, images: Tensor, device: torch.device | str = "cpu") -> dict[str, float] | None:
        """How far the first images of :meth:`sample` show what they were asked for; None where nothing is asked for.

        See :class:`qdiff.evaluation.text_agreement.Agreement`.
        """
        return None


@dataclass(frozen=True)
class PixelBundle(Bundle):
    """A pixel-space model, sampled by DDIM over steps that are dense near the image (``quad``).

    Attributes:
        config_file: its YAML file.
    """

    config_file: Path

    files = ("model.safetensors",)
    origin = "the repository holds them"
    steps_are = "quad steps"

    @cached_property
    def config(self) -> PixelConfig:
        return load_config(self.config_file)

    @property
    def facts(self) -> dict[str, Any]:
        return self.config.to_dict()

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return pixel.image_shape(self.config)

    def full_precision(self) -> nn.Module:
        return full_precision(self.config)

    def from_packed(self, path: Path, *, quant_act: bool = True) -> QuantModel:
        return from_packed(path, self.config, quant_act=quant_act)

    def held_out(self, model: nn.Module, *, device: torch.device, steps: int, per_step: int) -> HeldOutInputs:
        return held_out_inputs(model, self.config, device=device, steps=steps, per_step=per_step)

    def sampler(
        self, device: torch.device | str, *, timesteps: int, eta: float, seed: int, allow_tf32: bool = False
    ) -> pixel.PixelSampler:
        options = pixel.SamplerOptions("generalized", "quad", timesteps, eta, seed)
        return pixel.PixelSampler(self.config, options, torch.device(device))

    def context(self, sampler: Sampler, count: int) -> None:
        return None

    def calibration_samples(self, path: Path, *, cali_st: int, cali_n: int) -> CalibrationSet:
        return load_calibration_set(path, cali_st=cali_st, cali_n=cali_n, image_shape=self.input_shape)

    def sample(self, model: nn.Module, **options: Any) -> Tensor:
        return sample_images(model, self.config, **options)


@dataclass(frozen=True)
class LatentBundle(Bundle):
    """A class-conditional latent model, sampled by DDIM over even steps, its classes in turn.

    Only the UNet is ever quantized; first stage and embeddings stay those of the bundle.

    Attributes:
        scale: of classifier-free guidance; 1 is none.
    """

    scale: float = 1.0

    files: ClassVar[tuple[str, ...]] = ("model.safetensors", "config.yaml")
    origin = "scripts/prepare_emoji_bundle.py makes them, of a model that scripts/train_ldm.py trained"

    @property
    def steps_are(self) -> str:
        return f"even steps, guidance {self.scale:g}, classes in turn"

    @cached_property
    def model(self) -> latent.LatentModel:
        """With its weights, but for its UNet."""
        self.check()
        model = latent.LatentModel(str(self.folder))
        if model.classes is None:
            raise UserError(f"{model.config_path}: the model is not conditional on classes")
        model.load()
        return model

    @cached_property
    def unet(self) -> nn.Module:
        """The UNet, taken out of the model: it stays as it is, on the CPU."""
        unet = self.model.unet
        self.model.diffusion.model.diffusion_model = nn.Identity()
        return unet

    @cached_property
    def facts(self) -> dict[str, Any]:
        return self.model.facts()

    @property
    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.model.diffusion.latent_shape

    def sampler(
        self, device: torch.device | str, *, timesteps: int, eta: float, seed: int, allow_tf32: bool = False
    ) -> latent.LatentSampler:
        classes = self.model.classes
        assert classes is not None
        labels = tuple(range(classes))
        options = latent.SamplerOptions("ddim", timesteps, eta, seed, labels, self.scale)
        self.unet  # noqa: B018 - first out of the model, which the sampler moves to its device
        return latent.LatentSampler(self.model, options, torch.device(device), allow_tf32=allow_tf32)

    def full_precision(self) -> nn.Module:
        return copy.deepcopy(self.unet)

    def from_packed(self, path: Path, *, quant_act: bool = True) -> QuantModel:
        model = QuantModel.from_config(copy.deepcopy(self.unet), read_packed_info(path).quant)
        load_quantized(path, model, quant_act=quant_act)
        return model

    @torch.no_grad()
    def held_out(self, model: nn.Module, *, device: torch.device, steps: int, per_step: int) -> HeldOutInputs:
        """Each input twice, without its class and with it, as guidance asks the network."""
        sampler = self.sampler(device, timesteps=steps, eta=0.0, seed=HELD_OUT_SEED)
        seen: list[tuple[Tensor, Tensor]] = []

        def record(k: int, t: float, x: Tensor) -> None:
            both = torch.cat([x, x])
            seen.append((both, timestep_batch(t, both)))

        with evaluating(model):
            sampler(model, range(per_step), on_step=record)
        x, t = (torch.cat(column) for column in zip(*seen, strict=True))
        cond, uncond = sampler.conditions(range(per_step))
        context = torch.cat([uncond, cond]).repeat(len(seen), 1, 1)
        return HeldOutInputs(x, t, run_batches(model, x, t, 64, context), 2 * per_step, context)

    def context(self, sampler: Sampler, count: int) -> tuple[Tensor, Tensor]:
        return sampler.conditions(range(count))

    def calibration_samples(self, path: Path, *, cali_st: int, cali_n: int) -> CalibrationSet:
        shape = self.model.context_shape
        assert shape is not None
        return load_calibration_set(
            path,
            cali_st=cali_st,
            cali_n=cali_n,
            image_shape=self.input_shape,
            conditional=True,
            context_width=shape[1],
        )

    def sample(
        self,
        model: nn.Module,
        *,
        count: int,
        batch_size: int,
        timesteps: int,
        eta: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        inference: InferenceConfig = AS_IT_IS,
        allow_tf32: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        sampler = self.sampler(device, timesteps=timesteps, eta=eta, seed=seed, allow_tf32=allow_tf32)
        return self.sample_with(
            sampler, model, count=count, batch_size=batch_size, inference=inference, on_batch=on_batch
        )

    def sample_with(
        self,
        sampler: latent.LatentSampler,
        model: nn.Module,
        *,
        count: int,
        batch_size: int,
        inference: InferenceConfig = AS_IT_IS,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Images 0 ... count - 1 of a sampler: count x 3 x H x W float32 in [0, 1], on the CPU."""
        images = []
        with torch.no_grad(), evaluating(model), tf32(sampler.allow_tf32):
            predict = prepare(
                model,
                inference,
                shape=(min(batch_size, count) * sampler.rows_per_image, *self.input_shape),
                device=sampler.device,
                context_shape=sampler.context_shape,
                allow_tf32=sampler.allow_tf32,
            )
            for numbers in _batches(count, batch_size):
                images.append(sampler.decode(sampler(predict, numbers)).cpu())
                if on_batch is not None:
                    on_batch(len(numbers))
        return torch.cat(images)


@dataclass(frozen=True)
class TextBundle(LatentBundle):
    """A text-to-image model, sampled by PLMS over even steps, as the published commands do.

    What is drawn are captions of the training images: the groups in turn, as every group weighs equally in the
    statistics that distances are measured to. The classifier and these statistics are another bundle's.

    Attributes:
        judges: folder of that other bundle.
    """

    judges: Path = field(kw_only=True)

    files = ("model.safetensors", "config.yaml", NAMES, f"{TOKENIZER}/vocab.json", f"{TOKENIZER}/merges.txt")

    @property
    def yardstick(self) -> Path:
        return self.judges

    @property
    def steps_are(self) -> str:
        return f"PLMS steps, guidance {self.scale:g}, captions of the groups in turn"

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"sampler": "plms"}

    @cached_property
    def model(self) -> text.TextModel:
        """With its weights, but for its UNet."""
        self.check()
        model = text.TextModel(str(self.folder), str(self.folder / "config.yaml"))
        model.load()
        return model

    @cached_property
    def known(self) -> KnownImages:
        """The training images, as the classifier sees them, with their captions.

        Raises:
            UserError: the file is damaged, or was made with another classifier.
        """
        try:
            return KnownImages.load(self.folder / NAMES, self.judges / SCORING[0])
        except ValueError as error:
            raise UserError(str(error)) from None

    @cached_property
    def captions(self) -> list[str]:
        """Of image 0, 1, ... and over again."""
        return self.known.in_turn(CAPTIONS_SEED)

    def asked_for(self, count: int) -> list[str]:
        return [self.captions[number % len(self.captions)] for number in range(count)]

    def sampler(
        self, device: torch.device | str, *, timesteps: int, eta: float, seed: int, allow_tf32: bool = False
    ) -> text.TextSampler:
        """
        Raises:
            ValueError: noise in the steps, which PLMS has not.
        """
        return self.drawing(self.captions, device, timesteps=timesteps, eta=eta, seed=seed, allow_tf32=allow_tf32)

    def recording_sampler(self, device: torch.device | str, *, timesteps: int, seed: int) -> text.TextSampler:
        """In another order than images are scored in: what is calibrated on is not what is measured."""
        captions = self.known.in_turn(CAPTIONS_SEED + 1)
        return self.drawing(captions, device, timesteps=timesteps, seed=seed)

    def drawing(
        self,
        prompts: Sequence[str],
        device: torch.device | str,
        *,
        timesteps: int,
        seed: int,
        eta: float = 0.0,
        allow_tf32: bool = False,
    ) -> text.TextSampler:
        """The sampler of any prompts, in turn."""
        if eta:
            raise ValueError(f"eta {eta:g}: PLMS has no noise in its steps")
        options = latent.SamplerOptions("plms", timesteps, eta, seed, scale=self.scale)
        self.unet  # noqa: B018 - first out of the model, which the sampler moves to its device
        return text.TextSampler(self.model, options, torch.device(device), prompts, allow_tf32=allow_tf32)

    def agreement(self, images: Tensor, device: torch.device | str = "cpu") -> dict[str, float]:
        judged = images[:CAPTIONS_JUDGED]
        classifier = load_classifier(self.judges / SCORING[0], device)
        return agreement(classifier, self.known, judged, self.asked_for(len(judged))).to_dict()


def _batches(count: int, size: int) -> Iterator[Sequence[int]]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


BUNDLES: dict[str, Bundle] = {
    "fashion_mnist": PixelBundle(ROOT / "models" / "pixel" / "fashion_mnist", ROOT / "configs" / "fashion_mnist.yml"),
    # What is set is as published for LSUN Bedroom.
    "emoji64": LatentBundle(
        ROOT / "models" / "ldm" / "emoji64",
        scale=2.0,
        quant={"weight_range": "mse"},
        calibration={"range_order": "first", "running_stat": True},
    ),
    # What is set is as published for Stable Diffusion; the guidance is this model's.
    "emoji-text": TextBundle(
        ROOT / "models" / "ldm" / "emoji-text",
        judges=ROOT / "models" / "ldm" / "emoji64",
        scale=2.0,
        quant={"weight_range": "mse", "act_range": "mse", "sm_abit": 16},
        calibration={"range_samples": 16, "running_stat": True},
    ),
}
