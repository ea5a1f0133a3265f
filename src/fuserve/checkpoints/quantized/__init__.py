"""Layouts of quantized Hugging Face checkpoints: compressed-tensors, GPTQ, AWQ, bitsandbytes."""

from fuserve.checkpoints.quantized.folder import QuantizedFolder

__all__ = ["QuantizedFolder"]
