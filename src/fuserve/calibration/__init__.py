"""Calibration: runs a model layer by layer over a text, quantizes it, and writes it."""

from fuserve.calibration.options import CalibrationOptions
from fuserve.calibration.quantize import quantize_model
from fuserve.calibration.report import QuantizationReport

__all__ = ["CalibrationOptions", "QuantizationReport", "quantize_model"]
