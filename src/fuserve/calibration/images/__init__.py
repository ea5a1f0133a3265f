"""Quantizing diffusion models: the denoiser runs over prompts and timesteps, and is rounded."""

from fuserve.calibration.images.layers import IMAGE_RECIPES
from fuserve.calibration.images.options import ImageCalibrationOptions
from fuserve.calibration.images.quantize import ImageQuantizationReport, quantize_image_model

__all__ = [
    "IMAGE_RECIPES",
    "ImageCalibrationOptions",
    "ImageQuantizationReport",
    "quantize_image_model",
]
