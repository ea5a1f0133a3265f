"""A float checkpoint's layers rounded to int8 in memory: W8A8 for measuring speed and memory.

Weights go to nearest, one scale an output channel. Linears take each token's own scale, a
convolution's input has a fixed one (``input_scales.py``). What that does to pictures is for
calibrated folders to say (``fuserve quantize``), not for this.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fuserve.calibration.images.layers import IMAGE_RECIPES, chosen_layers
from fuserve.diffusion.program import Array, Weights
from fuserve.diffusion.quantized_weight import QuantizedWeight
from fuserve.diffusion.unet_spec import UNetSpec
from fuserve.quantization import LayerChoice


class RoundedWeights:
    """The weights with the layers that ``fuserve quantize`` would choose as int8.

    Args:
        weights: in floats.
        spec: of their network.
        input_scales: of its convolutions, by the names of their weights.
    """

    def __init__(self, weights: Weights, spec: UNetSpec, input_scales: Mapping[str, float]) -> None:
        self._weights, self._input_scales = weights, input_scales
        layers = chosen_layers(spec, LayerChoice(IMAGE_RECIPES["w8a8"]))
        self._chosen = {name for layer in layers for name in layer.op.weight}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def float32(self, name: str) -> Array:
        return self._weights.float32(name)

    def release(self, name: str) -> None:
        self._weights.release(name)

    def quantized(self, name: str) -> QuantizedWeight | None:
        if name not in self._chosen:
            return None
        floats = self._weights.float32(name)
        values = np.empty(floats.shape, np.int8)
        scales = np.empty((len(floats), 1), np.float32)
        for row, weights in enumerate(floats):
            scales[row] = np.abs(weights).max() / 127
            values[row] = np.rint(weights / scales[row])
        return QuantizedWeight(values, scales, input_scale=self._input_scales.get(name))
