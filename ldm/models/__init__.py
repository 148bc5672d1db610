"""First stages, between pixels and latents, and the diffusion models that work on the latents."""
