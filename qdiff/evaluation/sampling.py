"""Many samples, quickly, for scoring."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddim.config import PixelConfig
from ddim.noise import ImageNoise
from ddim.samplers import EpsilonModel, ddim_sample
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from ddim.transforms import to_images
from qdiff.inference import InferenceConfig, prepare, tf32
from qdiff.quant_model import evaluating

AS_IT_IS = InferenceConfig()


def sample_images(
    model: EpsilonModel,
    config: PixelConfig,
    *,
    count: int,
    batch_size: int,
    timesteps: int = 100,
    skip_type: str = "quad",
    eta: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    inference: InferenceConfig = AS_IT_IS,
    cuda_graph: bool | None = None,
    allow_tf32: bool = False,
    start: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Images 0 ... count - 1 of a seed, by DDIM (Song et al. 2021).

    Args:
        model: predicts noise, (N x C x H x W, N) -> N x C x H x W, on ``device``.
        timesteps, skip_type, eta: as for :func:`ddim.schedule.sampling_timesteps` and
            :func:`ddim.samplers.ddim_sample`.
        seed: image i has the same noise whatever ``count`` and ``batch_size``.
        inference: precision and compilation. A network in another precision than ``full`` is changed in place
            (:func:`qdiff.inference.prepare`).
        cuda_graph: as for :func:`qdiff.inference.prepare`.
        allow_tf32: faster matrix products and convolutions on a GPU, with 10 bits of mantissa.
        start: starting noise, count x C x H x W, in place of the seed's.
        on_batch: told after each batch how many images it brought.

    Returns:
        count x C x H x W float32 in [0, 1], on the CPU.

    Raises:
        InferenceError: the model cannot be run as ``inference`` says.
        ValueError: a count or size below 1, starting noise of another shape, a graph asked for without a GPU.
    """
    device = torch.device(device)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    if count < 1 or batch_size < 1:
        raise ValueError(f"count {count} and batch_size {batch_size} must be at least 1")
    if start is not None and start.shape != (count, *shape):
        raise ValueError(f"start has shape {tuple(start.shape)}; expected {(count, *shape)}")

    alpha_bar = alphas_cumprod(make_betas(config.diffusion))
    times = sampling_timesteps(config.diffusion.num_diffusion_timesteps, timesteps, skip_type)
    images = []
    networks = [model] if isinstance(model, nn.Module) else []
    with torch.no_grad(), evaluating(*networks), tf32(allow_tf32):
        batch_shape = (min(batch_size, count), *shape)
        predict = prepare(
            model, inference, shape=batch_shape, device=device, cuda_graph=cuda_graph, allow_tf32=allow_tf32
        )
        for first in range(0, count, batch_size):
            numbers = range(first, min(first + batch_size, count))
            noise = ImageNoise(seed, numbers, shape, device)
            x = noise.start() if start is None else start[first : numbers.stop].to(device, torch.float32)
            x = ddim_sample(predict, x, times, alpha_bar, eta=eta, noise=noise.step)
            images.append(to_images(x, config.data).cpu())
            if on_batch is not None:
                on_batch(len(numbers))
    return torch.cat(images)
