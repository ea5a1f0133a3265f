"""Diffusion models: specs, programs and their executors, schedulers, and the generation loop."""
