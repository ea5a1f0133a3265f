"""The image engine: denoising steps of many requests, one after the other."""
