"""What quantized linear layers make of their inputs, in plain torch: the oracle of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuserve.quantization import QuantizedLinear

LARGEST = 127


@dataclass(frozen=True, slots=True)
class ReferenceInput:
    """How one quantized linear takes its input, and what it adds to its output."""

    layer: QuantizedLinear

    def prepare(self, x: Tensor) -> Tensor:
        """Rows as the product sees them: shifted, smoothed, rounded  # [tokens, in]"""
        if self.layer.input_shift is not None:
            x = x - torch.from_numpy(self.layer.input_shift).to(x)
        if self.layer.input_smoothing is not None:
            x = x / torch.from_numpy(self.layer.input_smoothing).to(x)
        scheme = self.layer.scheme
        if scheme.activations == "tensor":
            assert self.layer.input_scale is not None
            return _rounded(x, torch.full_like(x[:, :1], self.layer.input_scale))
        if scheme.activations != "token":
            return x
        outliers = torch.zeros_like(x)
        if scheme.outlier_threshold is not None:
            limit = scheme.outlier_threshold * outlier_unit(x)
            outliers = torch.where(x.abs() > limit, x, outliers)
        rest = x - outliers
        return _rounded(rest, rest.abs().amax(-1, keepdim=True) / LARGEST) + outliers

    def add_shift(self, y: Tensor) -> Tensor:
        """The product with the shift's share of it  # [tokens, out]"""
        shift = self.layer.output_shift
        return y if shift is None else y + torch.from_numpy(shift).to(y)


def outlier_unit(x: Tensor) -> Tensor:
    """What LLM.int8()'s threshold is counted in: each row's root mean square, at most 1."""
    return x.square().mean(-1, keepdim=True).sqrt().clamp(max=1.0)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    steps = torch.where(scale > 0, x / scale, torch.zeros_like(x))
    return steps.round().clamp(-LARGEST, LARGEST) * scale
