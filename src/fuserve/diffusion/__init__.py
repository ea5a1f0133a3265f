"""Text to image: schedulers, the generation loop."""
