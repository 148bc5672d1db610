"""Latent diffusion: the package that the latent and text-to-image families live in."""
