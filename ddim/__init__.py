"""Pixel-space diffusion: the UNet of DDPM/DDIM, its schedules, samplers, data and published checkpoints."""
