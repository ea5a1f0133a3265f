"""Convolutions of diffusion models beside torch's, and in int8 beside those in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fuserve import _native
from fuserve._native import ConvShape, PackedConv, ThreadPool
from fuserve.kernels.conv import (
    ConvActivation,
    ConvMethod,
    ConvQuantization,
    ConvWeights,
    conv_shape,
    pack_conv,
    pack_conv_codes,
    packed_conv,
)
from fuserve.kernels.machine import measure_fp32, measure_row_dot, selected_isa

from .measure import Call, Effort, Row, in_turns

Filters = npt.NDArray[np.float32]
"""``[out channels, in channels, size, size]``."""


@dataclass(frozen=True)
class Layer:
    """A convolution of a model, its input normalized and activated (which torch is spared)."""

    channels: tuple[int, int]
    out_channels: int
    size: int  # of the square image
    batch: int = 1
    filter: int = 3
    stride: int = 1
    upsample: bool = False

    @property
    def name(self) -> str:
        """Such as ``320+320 to 320``."""
        first, second = self.channels
        return f"{first}{f'+{second}' if second else ''} to {self.out_channels}"

    @property
    def case(self) -> str:
        """The rest of what tells it apart."""
        kind = " up" if self.upsample else f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.batch}x{self.size}x{self.size} k{self.filter}{kind}"


UNET = [  # Stable Diffusion 1.5 at 512x512, a guided step
    Layer((320, 0), 320, 64, 2),
    Layer((640, 320), 320, 64, 2),
    Layer((640, 0), 640, 32, 2),
    Layer((1280, 640), 640, 32, 2),
    Layer((1280, 0), 1280, 16, 2),
    Layer((1280, 0), 1280, 8, 2),
    Layer((320, 0), 320, 64, 2, stride=2),
    Layer((640, 0), 640, 32, 2, upsample=True),
    Layer((320, 0), 320, 64, 2, filter=1),
    Layer((4, 0), 320, 64, 2),
    Layer((320, 0), 4, 64, 2),
]
DECODER = [  # its autoencoder
    Layer((512, 0), 512, 64),
    Layer((256, 0), 256, 256),
    Layer((128, 0), 128, 512),
    Layer((256, 0), 256, 128, upsample=True),
    Layer((128, 0), 3, 512),
]
QUICK = [UNET[0], UNET[2], UNET[5], DECODER[0]]
INTEGER = [layer for layer in UNET if min(layer.channels[0], layer.out_channels) >= 32]
LARGEST_INPUT = 5.0  # of SiLU of standard normal values, of which int8 has 127 steps
METHODS = {
    ConvMethod.DIRECT: "conv",
    ConvMethod.WINOGRAD2: "conv F(2x2)",
    ConvMethod.WINOGRAD4: "conv F(4x4)",
}


def measure_convs(effort: Effort, quick: bool) -> Iterator[Row]:
    """Every method on every layer it can do; rates are those of the multiplications that the
    definition has, so Winograd can pass the ceiling.
    """
    pool = ThreadPool(effort.threads)
    for layer in QUICK if quick else UNET + DECODER:
        yield from _measure_layer(layer, pool, effort)


def measure_integer_convs(effort: Effort, quick: bool) -> Iterator[Row]:
    """Every method in int8 on every layer of the denoiser, beside the fastest of those in fp32."""
    pool = ThreadPool(effort.threads)
    for layer in [layer for layer in QUICK if layer in INTEGER] if quick else INTEGER:
        ceiling = measure_row_dot(effort.threads)
        rng = np.random.default_rng(sum(layer.channels))
        filters = _filters(layer, rng)
        calls: dict[str, tuple[Call, int]] = {
            METHODS[method]: (_our_conv(layer, filters, method, pool), 1)
            for method in _methods(layer)
        }
        integer = [method for method in _methods(layer) if method != ConvMethod.WINOGRAD4]
        for method in integer:
            calls[f"{METHODS[method]} int8"] = (
                _our_conv(layer, filters, method, pool, ConvWeights.INT8),
                1,
            )
        seconds = in_turns(calls, effort)
        best = min(map(METHODS.__getitem__, _methods(layer)), key=seconds.__getitem__)
        for name in (f"{METHODS[method]} int8" for method in integer):
            yield Row(
                name,
                layer.name,
                layer.case,
                seconds[name],
                _operations(layer) / seconds[name] / 1e9,
                "GOP/s",
                "row dot",
                ceiling / 1e9,
                best,
                seconds[best],
            )


def _measure_layer(layer: Layer, pool: ThreadPool, effort: Effort) -> Iterator[Row]:
    ceiling = measure_fp32(effort.threads)
    rng = np.random.default_rng(sum(layer.channels))
    filters, methods = _filters(layer, rng), _methods(layer)
    calls: dict[str, tuple[Call, int]] = {
        METHODS[method]: (_our_conv(layer, filters, method, pool), 1) for method in methods
    }
    calls["conv2d"] = (_torch_conv(layer, filters), 1)
    seconds = in_turns(calls, effort)
    operations = _operations(layer)
    for method in methods:
        ours = seconds[METHODS[method]]
        yield Row(
            METHODS[method],
            layer.name,
            layer.case,
            ours,
            operations / ours / 1e9,
            "GOP/s",
            "fp32 FMA",
            ceiling / 1e9,
            "conv2d",
            seconds["conv2d"],
        )


def _filters(layer: Layer, rng: np.random.Generator) -> Filters:
    shape = (layer.out_channels, sum(layer.channels), layer.filter, layer.filter)
    return rng.standard_normal(shape, np.float32)


def _methods(layer: Layer) -> list[ConvMethod]:
    """Those in fp32 that can compute it."""
    if layer.upsample:
        return [ConvMethod.WINOGRAD2]
    return list(METHODS) if (layer.filter, layer.stride) == (3, 1) else [ConvMethod.DIRECT]


def _operations(layer: Layer) -> int:
    """Multiplications and additions that the definition has."""
    out = layer.size * (2 if layer.upsample else 1) // layer.stride
    return 2 * layer.batch * out * out * layer.out_channels * sum(layer.channels) * layer.filter**2


def _packed(shape: ConvShape, filters: Filters, pool: ThreadPool) -> PackedConv:
    packed = np.empty(shape.packed_bytes, np.uint8)
    bias = np.zeros(shape.out_channels, np.float32)
    if not shape.is_integer:
        pack_conv(shape, filters, packed, pool)
        return packed_conv(shape, packed, bias)
    scales = np.abs(filters).max(axis=(1, 2, 3)) / 127
    codes = np.rint(filters / scales[:, None, None, None]).astype(np.int8)
    pack_conv_codes(shape, codes, packed, pool)
    return packed_conv(shape, packed, bias, ConvQuantization(scales, LARGEST_INPUT / 127))


def _our_conv(
    layer: Layer,
    filters: Filters,
    method: ConvMethod,
    pool: ThreadPool,
    weights: ConvWeights = ConvWeights.FLOAT32,
) -> Call:
    shape = conv_shape(
        layer.channels,
        layer.out_channels,
        layer.filter,
        stride=layer.stride,
        upsample=layer.upsample,
        method=method,
        weights=weights,
    )
    conv = _packed(shape, filters, pool)
    rng = np.random.default_rng(layer.size)
    image = (layer.batch, layer.size, layer.size)
    first, second = (
        rng.standard_normal((*image, channels), np.float32) if channels else None
        for channels in layer.channels
    )
    scale = np.ones((1, sum(layer.channels)), np.float32)
    size = shape.out_height(layer.size)
    out = np.zeros((layer.batch, size, size, layer.out_channels), np.float32)
    isa, none = selected_isa(), int(ConvActivation.NONE)
    return lambda _: _native.convolve(
        isa, pool, conv, first, second, scale, scale, True, None, None, none, 0, 0, out
    )


def _torch_conv(layer: Layer, filters: Filters) -> Call:
    """torch's on one source that is normalized, activated and upsampled already, channels last."""
    size = layer.size * (2 if layer.upsample else 1)
    last = torch.channels_last
    x = torch.randn(layer.batch, sum(layer.channels), size, size).contiguous(memory_format=last)
    weight = torch.from_numpy(filters).contiguous(memory_format=last)

    def call(_: int) -> None:
        with torch.inference_mode():
            F.conv2d(x, weight, stride=layer.stride, padding=layer.filter // 2)

    return call
