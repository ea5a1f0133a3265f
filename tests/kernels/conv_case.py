"""What a convolution to be tested is like."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve._native import ConvShape
from fuserve.kernels.conv import ConvActivation, ConvMethod, ConvWeights, conv_shape

ALL = (1, 1, 1, 1)
"""Padding of a pixel on every side."""


@dataclass(frozen=True)
class ConvCase:
    """Sizes, and what is fused before and behind."""

    channels: tuple[int, int]
    out_channels: int
    height: int
    width: int
    batch: int = 1
    size: int = 3
    stride: int = 1
    padding: tuple[int, int, int, int] = ALL
    upsample: bool = False
    norm: bool = False
    silu: bool = False
    bias: bool = True
    channel_add: bool = False
    residual: bool = False
    activation: ConvActivation = ConvActivation.NONE

    def __str__(self) -> str:
        name = f"{self.channels[0]}+{self.channels[1]}to{self.out_channels}"
        return f"{name}-{self.height}x{self.width}-{self.size}s{self.stride}u{self.upsample:d}"

    def shape(self, method: ConvMethod, weights: ConvWeights = ConvWeights.FLOAT32) -> ConvShape:
        """What its weights are packed for."""
        return conv_shape(
            self.channels,
            self.out_channels,
            self.size,
            stride=self.stride,
            padding=self.padding,
            upsample=self.upsample,
            method=method,
            weights=weights,
        )
