"""Quantized layers in plain torch: their integers are those of the native kernels.

As there, inputs are multiplied by the reciprocal of their scale, in float32: a division would round
a value beside a tie to the other side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fuserve.diffusion.quantized_weight import QuantizedWeight
from fuserve.quantization.smoothquant import BLOCK


def quantized_linear(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """The product without bias  # [..., in] -> [..., out]."""
    values = _like(weight.values, x).flatten(1)  # [out, in]
    scales = _like(weight.scales, x)  # [out, groups]
    smoothed = _smoothed(weight, x)
    if weight.input_scale is not None:
        codes = _codes(smoothed, _quotient(1, torch.tensor(weight.input_scale)))
        return (codes @ values.T * (weight.input_scale * scales[:, 0])).to(x.dtype)
    group = weight.group_size or values.shape[1]
    block = values.shape[1] if weight.bits == 8 and not weight.group_size else BLOCK
    total = torch.zeros(())
    for first in range(0, values.shape[1], block):
        part = smoothed[..., first : first + block]
        largest = part.abs().amax(-1, keepdim=True)
        codes = _codes(part, _quotient(127, largest).where(largest > 0, 0.0))
        sums = codes @ values[:, first : first + block].T
        total = total + sums * (largest / 127 * scales[:, first // group])
    return total.to(x.dtype)


def quantized_conv_input(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """The integers that a convolution makes of its normalized input  # [B, H, W, C]."""
    assert weight.input_scale is not None
    return _codes(_smoothed(weight, x), _quotient(1, torch.tensor(weight.input_scale)))


def quantized_conv(
    weight: QuantizedWeight, codes: Tensor, size: int, stride: int, dtype: torch.dtype
) -> Tensor:
    """The product of padded codes without bias  # [B, C, H, W] -> [B, out, h, w]."""
    assert weight.input_scale is not None
    values = _like(weight.values, codes)
    values = values.view(values.shape[0], -1, size, size)
    scales = weight.input_scale * _like(weight.scales, codes)  # [out, 1]
    return (functional.conv2d(codes, values, stride=stride) * scales[..., None]).to(dtype)


def _smoothed(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """In float32."""
    x = x.float()
    return x if weight.multiplier is None else x * _like(weight.multiplier, x).float()


def _quotient(number: int, x: Tensor) -> Tensor:
    """Of float32, rounded once; torch makes ``number / x`` a product with ``1 / x``."""
    return torch.full_like(x, number, dtype=torch.float32) / x.float()


def _codes(x: Tensor, reciprocal: Tensor) -> Tensor:
    """In float64, where sums of products of them are exact."""
    return (x * reciprocal).round().clamp(-127, 127).double()


def _like(array: object, x: Tensor) -> Tensor:
    return torch.as_tensor(array, device=x.device).double()
