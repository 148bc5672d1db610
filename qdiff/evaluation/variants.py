"""Variants of one network side by side: the same inputs, the same starting noise, the same yardsticks."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddim.config import PixelConfig
from ddim.noise import ImageNoise
from ddim.pretrained import checkpoint_path, load_weights
from ddim.samplers import ddim_sample, timestep_batch
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from ddim.unet import UNet
from qdiff.checkpoint import load_quantized, read_packed_info
from qdiff.evaluation.image_metrics import output_error
from qdiff.evaluation.timing import median_seconds
from qdiff.quant_model import QuantModel, evaluating

HELD_OUT_SEED = 987_654_321  # of starting noise that no calibration command draws by default


def full_precision(config: PixelConfig) -> UNet:
    """The network of a config with its published or bundled weights, on the CPU."""
    unet = UNet.from_config(config).eval()
    load_weights(checkpoint_path(config), unet)
    return unet


def from_packed(path: Path, config: PixelConfig, *, quant_act: bool = True) -> QuantModel:
    """The quantized network of a packed checkpoint, which needs no full-precision weights, on the CPU."""
    model = QuantModel.from_config(UNet.from_config(config).eval(), read_packed_info(path).quant)
    load_quantized(path, model, quant_act=quant_act)
    return model


@dataclass(frozen=True)
class HeldOutInputs:
    """Noisy inputs along the full-precision trajectory of images that no calibration saw.

    Attributes:
        x, t: network inputs, steps x per_step of them, noisiest first.
        target: what the full-precision network makes of them.
        per_step: consecutive rows that belong to one step.
        context: of each input, where the network is conditional.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    per_step: int
    context: Tensor | None = None

    def error(self, model: nn.Module, batch_size: int = 64) -> Tensor:
        """Relative output error of a quantized network, one value a step (see :func:`output_error`)."""
        return output_error(run_batches(model, self.x, self.t, batch_size, self.context), self.target, self.per_step)


@torch.no_grad()
def run_batches(model: nn.Module, x: Tensor, t: Tensor, batch_size: int, context: Tensor | None = None) -> Tensor:
    """The network's output for all rows, on the device of ``x``."""
    columns = [x, t] if context is None else [x, t, context]
    with evaluating(model):
        batches = zip(*(column.split(batch_size) for column in columns), strict=True)
        return torch.cat([model(*batch) for batch in batches])


def held_out_inputs(
    model: nn.Module, config: PixelConfig, *, device: torch.device | str, steps: int = 20, per_step: int = 8
) -> HeldOutInputs:
    """Record the inputs of a full-precision DDIM run (quad steps, eta 0) over fresh noise."""
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    start = ImageNoise(HELD_OUT_SEED, range(per_step), shape, device=device).start()
    alpha_bar = alphas_cumprod(make_betas(config.diffusion)).to(device)
    timesteps = sampling_timesteps(config.diffusion.num_diffusion_timesteps, steps, "quad")
    seen: list[tuple[Tensor, Tensor]] = []

    def record(k: int, t: float, x: Tensor) -> None:
        seen.append((x.clone(), timestep_batch(t, x)))

    with evaluating(model):
        ddim_sample(model, start, timesteps, alpha_bar, on_step=record)
    x, t = (torch.cat(column) for column in zip(*seen, strict=True))
    return HeldOutInputs(x, t, run_batches(model, x, t, 64), per_step)


@torch.no_grad()
def seconds_per_step(model: Callable[..., Tensor], *inputs: Tensor, repeats: int = 5) -> float:
    """Median time of one network call."""
    return median_seconds(lambda: model(*inputs), inputs[0].device, repeats=repeats)


def comparison_picture(
    rows: dict[str, Tensor], path: Path, *, title: str, columns: int = 12, captions: Sequence[str] | None = None
) -> None:
    """One row of images a variant, the same noise in the same column.

    Args:
        rows: label -> N x C x H x W in [0, 1]; the first ``columns`` images are shown.
        captions: of the columns, for the top.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {label: images[:columns].cpu() for label, images in rows.items()}
    count = min(len(images) for images in shown.values())
    tops = [textwrap.fill(caption, 13) for caption in (captions or ())[:count]]
    room = 0.5 + 0.12 * max((1 + top.count("\n") for top in tops), default=0)
    figure, axes = pyplot.subplots(
        len(shown), count, figsize=(0.8 * count + 2.6, 0.86 * len(shown) + room), squeeze=False, layout="constrained"
    )
    for axis, top in zip(axes[0], tops, strict=False):
        axis.set_title(top, fontsize=6)
    for (label, images), line in zip(shown.items(), axes, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(
                image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns line up in plain text too."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
