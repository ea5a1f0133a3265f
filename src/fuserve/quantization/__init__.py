"""How weights are quantized: schemes, and the grids of quantized checkpoints."""

from fuserve.quantization.ggml_grid import GGML_GRIDS, REGRIDDED, codes_of, describe_dtype
from fuserve.quantization.scheme import QuantScheme

__all__ = ["GGML_GRIDS", "REGRIDDED", "QuantScheme", "codes_of", "describe_dtype"]
