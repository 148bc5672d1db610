"""Data sets for latent models."""
