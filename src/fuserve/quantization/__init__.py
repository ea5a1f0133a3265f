"""How weights are quantized: schemes, quantized layers, the grids of quantized checkpoints."""

from fuserve.quantization.columns import grid_from, scheme_from, take_columns
from fuserve.quantization.ggml_grid import GGML_GRIDS, REGRIDDED, codes_of, describe_dtype
from fuserve.quantization.layer_choice import LayerChoice
from fuserve.quantization.quantized import QuantizedLinear
from fuserve.quantization.scheme import RECIPES, QuantScheme, Recipe, recipe_named

__all__ = [
    "GGML_GRIDS",
    "RECIPES",
    "REGRIDDED",
    "LayerChoice",
    "QuantScheme",
    "QuantizedLinear",
    "Recipe",
    "codes_of",
    "describe_dtype",
    "grid_from",
    "recipe_named",
    "scheme_from",
    "take_columns",
]
