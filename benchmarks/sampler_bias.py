"""How far a deterministic sampler misses a Gaussian with the data's mean and covariance, in closed form.

    python benchmarks/sampler_bias.py --config configs/fashion_mnist.yml --data DIR

For Gaussian data the best noise estimate is linear, so every DDIM step is, and the sampler's result is a Gaussian too:
its mean and its standard deviation along each principal axis follow by recursion, without a network. What is left is
the bias of schedule and steps alone, the same for any network trained well. (DDIM, Song et al. 2021, equation 12 with
eta 0; starting noise with mean zero, as samplers draw it.)
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ddim.config import DiffusionConfig, load_config
from ddim.datasets import open_dataset
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from qdiff.evaluation.variants import markdown_table


def gaussian_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean in the basis of principal axes, and variances along them, largest first: N x ... uint8 -> D, D."""
    rows = images.flatten(1).double() / 127.5 - 1
    mean = rows.mean(0)
    centred = rows - mean
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    return (axes.T @ mean).flip(0), variance.flip(0).clamp(min=1e-7)


def sampled_gaussian(
    mean: Tensor, variance: Tensor, diffusion: DiffusionConfig, timesteps: list[int]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what DDIM makes of standard normal noise, axis by axis."""
    alpha_bar = alphas_cumprod(make_betas(diffusion)).double()
    levels = [torch.ones((), dtype=torch.float64), *alpha_bar[timesteps]]
    m, s = torch.zeros_like(mean), torch.ones_like(variance)
    for index in reversed(range(len(timesteps))):
        a, a_next = levels[index + 1], levels[index]
        gain = a.sqrt() * variance / (a * variance + 1 - a)  # of E[x0 | x] = mean + gain (x - sqrt(a) mean)
        keep = ((1 - a_next) / (1 - a)).sqrt()
        pull = a_next.sqrt() - keep * a.sqrt()  # x_next = pull x0 + keep x
        m = (pull * gain + keep) * m + pull * (1 - gain * a.sqrt()) * mean
        s = (pull * gain + keep) * s
    return m, s.abs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--timesteps", type=int, default=100)
    parser.add_argument("--beta_end", type=float, nargs="*", default=[0.02, 0.025, 0.03, 0.035, 0.04])
    args = parser.parse_args()
    config = load_config(args.config)
    dataset = open_dataset(config.data, args.data, train=True)
    mean, variance = gaussian_of(getattr(dataset, "source", dataset).images)
    rows = []
    for beta_end in args.beta_end:
        diffusion = dataclasses.replace(config.diffusion, beta_end=beta_end)
        timesteps = sampling_timesteps(diffusion.num_diffusion_timesteps, args.timesteps, "quad")
        m, s = sampled_gaussian(mean, variance, diffusion, timesteps)
        spread = s / variance.sqrt()
        rows.append(
            [
                f"{beta_end:g}",
                f"{(m - mean).square().sum():.3f}",
                f"{(s - variance.sqrt()).square().sum():.3f}",
                ", ".join(f"{spread[i]:.3f}" for i in (0, 1, 2, 10)),
            ]
        )
    print(markdown_table(["beta_end", "error of the mean", "of the spread", "spread of axes 1, 2, 3, 11"], rows))


if __name__ == "__main__":
    main()
