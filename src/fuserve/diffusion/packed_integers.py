"""Quantized weights on their way to the layouts that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fuserve.diffusion.program import Weights
from fuserve.diffusion.quantized_weight import QuantizedWeight
from fuserve.errors import CheckpointError, UnsupportedModelError
from fuserve.kernels.conv import ConvQuantization
from fuserve.kernels.linear import Codes, InputKind, LinearInput, Storage, WeightFormat
from fuserve.quantization.scheme import GROUP_SIZES


def stacked(weights: Weights, names: Sequence[str]) -> QuantizedWeight | None:
    """The tensors that an operation stacks by rows as one; None where they are float ones.

    Raises:
        CheckpointError: they want their common input in different forms.
    """
    parts = [weights.quantized(name) for name in names]
    found = [part for part in parts if part is not None]
    if not found:
        return None
    # What most of them are is taken for what all should be.
    usual = max(found, key=lambda one: sum(_difference(one, other) is None for other in found))
    for name, part in zip(names, parts, strict=True):
        fault = "is not quantized" if part is None else _difference(usual, part)
        if fault:
            raise CheckpointError(
                f"{fault}, unlike {', '.join(other for other in names if other != name)}, with "
                "which it is computed in one product of one input.",
                tensor=name,
                remedy="Quantize them in one way, or none of them.",
            )
    if len(found) == 1:
        return found[0]
    return replace(
        found[0],
        values=np.concatenate([part.values for part in found]),
        scales=np.concatenate([part.scales for part in found]),
    )


def linear_storage(weight: QuantizedWeight, layer: str) -> Storage:
    """The packed format of a linear's weight.

    Raises:
        UnsupportedModelError: there is none; the layer is named.
    """
    is_channel = weight.bits == 8 and weight.group_size == 0
    if weight.group_size not in (0, *GROUP_SIZES):
        raise UnsupportedModelError(
            f"{layer}: groups of {weight.group_size} input channels share a scale; supported are "
            f"{', '.join(map(str, GROUP_SIZES))}, or all channels."
        )
    if weight.input_scale is not None and not is_channel:
        raise UnsupportedModelError(
            f"{layer}: a fixed scale of the input goes with 8-bit weights that have one scale a "
            "row; others take it in blocks of 32, each with its own scale."
        )
    if is_channel:
        return Storage(WeightFormat.Q8_CHANNEL)
    return Storage(WeightFormat.Q4 if weight.bits == 4 else WeightFormat.Q8, weight.group_size)


def linear_input(weight: QuantizedWeight) -> LinearInput:
    """What a linear with this weight does to its input."""
    if weight.input_scale is not None:
        kind = InputKind.FIXED
    elif weight.bits == 8 and weight.group_size == 0:
        kind = InputKind.TOKEN
    else:
        kind = InputKind.BLOCKS
    return LinearInput(kind, weight.input_scale or 0.0, multiplier=weight.multiplier)


def linear_codes(weight: QuantizedWeight) -> Codes:
    """The codes and scales of a linear's weight  # [out, in], [out, groups]."""
    values = np.ascontiguousarray(weight.values.reshape(len(weight.values), -1))
    codes = (values + np.int8(8) if weight.bits == 4 else values).view(np.uint8)
    return Codes(codes, np.ascontiguousarray(weight.scales, np.float32))


def conv_quantization(weight: QuantizedWeight, layer: str) -> ConvQuantization:
    """The scales of an integer convolution.

    Raises:
        UnsupportedModelError: it is quantized in another way; the layer is named.
    """
    if weight.bits != 8 or weight.group_size != 0 or weight.input_scale is None:
        raise UnsupportedModelError(
            f"{layer}: a quantized convolution has 8-bit weights with one scale for each output "
            "channel, and one fixed scale of its input."
        )
    scales = np.ascontiguousarray(weight.scales.reshape(-1), np.float32)
    return ConvQuantization(scales, weight.input_scale, weight.multiplier)


def _difference(one: QuantizedWeight, other: QuantizedWeight) -> str | None:
    """In what the schemes or inputs of two weights differ."""
    if (one.bits, one.group_size) != (other.bits, other.group_size):
        return f"has {other.bits} bits and a scale for {other.group_size or 'all'} channels"
    if one.input_scale != other.input_scale:
        return f"has the input scale {other.input_scale}"
    ours, theirs = one.multiplier, other.multiplier
    if (ours is None) != (theirs is None):
        return f"has {'no' if theirs is None else 'a'} multiplier of the input"
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        return "has another multiplier of the input"
    return None
