"""A diffusion model whose denoiser runs in several processes."""
