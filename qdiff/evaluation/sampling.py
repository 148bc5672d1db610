"""Many samples, quickly, for scoring."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddim.config import PixelConfig
from ddim.noise import ImageNoise
from ddim.samplers import EpsilonModel, ddim_sample
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from ddim.transforms import to_images
from qdiff.quant_model import evaluating

WARMUP_CALLS = 3  # before a capture: lazy allocations, cuBLAS handles, cuDNN's choice of kernels


class GraphedModel:
    """A noise predictor whose kernels are launched as one CUDA graph.

    A small network spends more time launching kernels than running them. The graph has fixed buffers of the size it was
    captured with; smaller batches use their first rows, and what is computed for the others is dropped.

    Args:
        model: free of traffic between device and host, and of branches on values.
        shape: of the largest batch, N x C x H x W.

    Raises:
        RuntimeError: the model cannot be captured.
    """

    @torch.no_grad()
    def __init__(self, model: EpsilonModel, shape: Sequence[int], device: torch.device):
        self._x = torch.zeros(*shape, device=device)
        self._t = torch.zeros(shape[0], device=device)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_CALLS):
                    model(self._x, self._t)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._out = model(self._x, self._t)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._x[: len(x)].copy_(x)
        self._t[: len(x)].copy_(t)
        self._graph.replay()
        return self._out[: len(x)].clone()  # the next replay overwrites it; multistep samplers keep it longer


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions for a while."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


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
    use_cuda_graph: bool | None = None,
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
        use_cuda_graph: None captures on a GPU and falls back, with a warning, where the model resists; True raises
            there.
        allow_tf32: faster matrix products and convolutions on a GPU, with 10 bits of mantissa.
        start: starting noise, count x C x H x W, in place of the seed's.
        on_batch: told after each batch how many images it brought.

    Returns:
        count x C x H x W float32 in [0, 1], on the CPU.

    Raises:
        ValueError: a count or size below 1, starting noise of another shape, a graph asked for without a GPU.
    """
    device = torch.device(device)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    if count < 1 or batch_size < 1:
        raise ValueError(f"count {count} and batch_size {batch_size} must be at least 1")
    if start is not None and start.shape != (count, *shape):
        raise ValueError(f"start has shape {tuple(start.shape)}; expected {(count, *shape)}")
    if use_cuda_graph and device.type != "cuda":
        raise ValueError(f"use_cuda_graph needs a GPU; device is {device}")

    alpha_bar = alphas_cumprod(make_betas(config.diffusion))
    times = sampling_timesteps(config.diffusion.num_diffusion_timesteps, timesteps, skip_type)
    images = []
    networks = [model] if isinstance(model, nn.Module) else []
    with torch.no_grad(), evaluating(*networks), tf32(allow_tf32):
        predict = model
        if use_cuda_graph or (use_cuda_graph is None and device.type == "cuda"):
            predict = _graphed(model, (min(batch_size, count), *shape), device, required=bool(use_cuda_graph))
        for first in range(0, count, batch_size):
            numbers = range(first, min(first + batch_size, count))
            noise = ImageNoise(seed, numbers, shape, device)
            x = noise.start() if start is None else start[first : numbers.stop].to(device, torch.float32)
            x = ddim_sample(predict, x, times, alpha_bar, eta=eta, noise=noise.step)
            images.append(to_images(x, config.data).cpu())
            if on_batch is not None:
                on_batch(len(numbers))
    return torch.cat(images)


def _graphed(model: EpsilonModel, shape: tuple[int, ...], device: torch.device, required: bool) -> EpsilonModel:
    """The model as a captured graph, or as it is where that fails and is not required."""
    try:
        return GraphedModel(model, shape, device)
    except RuntimeError as error:
        if required or isinstance(error, torch.OutOfMemoryError):
            raise
        warnings.warn(f"the model cannot be captured as a CUDA graph, sampling without: {error}", stacklevel=3)
        return model
