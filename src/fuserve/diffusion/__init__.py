"""Diffusion models: specs, programs and their executors, and the models made of them."""
