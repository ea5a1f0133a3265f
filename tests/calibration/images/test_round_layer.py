"""Rounding single layers: smoothing, scales of concatenated halves, and which layers are kept."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fuserve.architectures.fields import Fields
from fuserve.calibration.images import ImageCalibrationOptions
from fuserve.calibration.images.layers import IMAGE_RECIPES, ChosenLayer, chosen_layers
from fuserve.calibration.images.round_layer import round_layer
from fuserve.calibration.options import CalibrationOptions
from fuserve.checkpoints.quantized.compressed_tensors import write_compressed
from fuserve.diffusion.program import Array, Conv, Linear, Value
from fuserve.diffusion.unet_spec import unet_spec
from fuserve.diffusion.weights import ArrayWeights
from fuserve.errors import CheckpointError, InvalidRequestError
from fuserve.quantization import LayerChoice, QuantizedLinear, QuantScheme
from fuserve.quantization.smoothquant import Smoothing, round_inputs
from fuserve.quantization.statistics import InputObserver, InputStatistics
from tests.diffusion.oracles import UNET

STATIC = QuantScheme(8, activations="tensor")
TOKEN = QuantScheme(8, activations="token")
INT4 = QuantScheme(4, 32)


def statistics(rows: Array) -> InputStatistics:
    observer = InputObserver(rows.shape[1], len(rows), with_hessian=False, sample_rows=256)
    observer.add(rows)
    return observer.result()


def linear(channels: int, rows: int, *names: str) -> Linear:
    source, out = Value(0, 1, 1, 1, channels), Value(1, 1, 1, 1, rows * len(names))
    return Linear("layer", out, source, names)


def conv(first: int, second: int, rows: int) -> Conv:
    sources = Value(0, 1, 4, 4, first), Value(1, 1, 4, 4, second)
    out = Value(2, 1, 4, 4, rows)
    return Conv("layer", out, sources, ("layer.weight",), padding=(1, 1, 1, 1))


def taps(values: Array) -> list[Array]:
    """The matrices of a convolution's places  # each [out, in]."""
    return list(values.reshape(*values.shape[:2], -1).transpose(2, 0, 1))


def conv_error(layer: QuantizedLinear, weight: Array, inputs: Array) -> float:
    """Relative error of the outputs at every place of the kernel, the inputs rounded too."""
    smoothing = layer.input_smoothing
    assert layer.input_scale is not None
    channels = weight.shape[1]
    divided = inputs if smoothing is None else inputs / smoothing[:: layer.shape[1] // channels]
    rounded = round_inputs(divided, np.float32(layer.input_scale))
    off = total = 0.0
    for ours, exact in zip(taps(layer.values().reshape(weight.shape)), taps(weight), strict=True):
        off += float(np.square(rounded @ ours.T - inputs @ exact.T).sum())
        total += float(np.square(inputs @ exact.T).sum())
    return (off / total) ** 0.5


def test_halves_of_different_size_get_scales_of_their_own() -> None:
    """One scale for both would leave the small half two bits."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((300, 48), np.float32)
    inputs[:, :32] *= 40
    weight = rng.standard_normal((16, 48, 3, 3), np.float32)
    weight[:, :32] /= 40
    weights = ArrayWeights({"layer.weight": weight})
    layer = ChosenLayer(conv(32, 16, 16), STATIC)
    found = round_layer(layer, weights, statistics(inputs), None)["layer.weight"]
    assert found.input_smoothing is not None
    smoothing = found.input_smoothing[::9]
    assert smoothing[:32].min() > 5 * smoothing[32:].max()
    assert conv_error(found, weight, inputs) < 0.02


def test_outlying_channels_are_smoothed_and_a_convolution_is_stored_by_channels() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((300, 32), np.float32)
    inputs[:, 5] *= 60
    weight = rng.standard_normal((8, 32, 3, 3), np.float32)
    op = conv(16, 16, 8)
    weights = ArrayWeights({"layer.weight": weight})
    found = round_layer(ChosenLayer(op, STATIC), weights, statistics(inputs), None)["layer.weight"]
    assert conv_error(found, weight, inputs) < 0.02
    parts = write_compressed("layer", found, weight.shape)
    assert parts["layer.weight"].shape == weight.shape
    assert parts["layer.weight"].dtype == np.int8
    assert np.abs(parts["layer.weight"].astype(np.int16)).max() == 127
    smoothing = parts["layer.input_smoothing"]
    assert smoothing.shape == (32,)
    assert smoothing.argmax() == 5
    assert parts["layer.weight_scale"].shape == (8, 1)
    assert parts["layer.input_scale"].shape == (1,)


@pytest.mark.parametrize("scheme", [TOKEN, STATIC, INT4])
def test_matrices_of_one_product_read_one_input(scheme: QuantScheme) -> None:
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((300, 64), np.float32) * np.geomspace(
        0.1, 20, 64, dtype=np.float32
    )
    names = ("q.weight", "k.weight")
    arrays = {name: rng.standard_normal((24, 64), np.float32) for name in names}
    layer = ChosenLayer(linear(64, 24, *names), scheme)
    found = round_layer(layer, ArrayWeights(arrays), statistics(inputs), None)
    query, key = (found[name] for name in names)
    assert query.input_scale == key.input_scale
    assert (query.input_scale is None) == (scheme is not STATIC)
    assert query.input_smoothing is not None and key.input_smoothing is not None
    np.testing.assert_array_equal(query.input_smoothing, key.input_smoothing)
    for name in names:
        values = found[name].values() / query.input_smoothing
        exact = inputs @ arrays[name].T
        off = inputs @ values.T - exact
        assert np.linalg.norm(off) < (0.13 if scheme is INT4 else 0.012) * np.linalg.norm(exact)


def test_codes_of_four_bits_are_as_wide_on_both_sides() -> None:
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((300, 64), np.float32)
    weights = ArrayWeights({"a.weight": rng.standard_normal((40, 64), np.float32)})
    layer = ChosenLayer(linear(64, 40, "a.weight"), INT4)
    codes = round_layer(layer, weights, statistics(inputs), 0.5)["a.weight"].codes
    assert (codes.codes.min(), codes.codes.max()) == (1, 15)
    assert codes.scales.shape == (40, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", [STATIC, INT4])
def test_inputs_that_are_not_finite_are_refused(scheme: QuantScheme, value: float) -> None:
    inputs = np.ones((300, 64), np.float32)
    inputs[17, 5] = value
    weights = ArrayWeights({"a.weight": np.ones((40, 64), np.float32)})
    layer = ChosenLayer(linear(64, 40, "a.weight"), scheme)
    with pytest.raises(CheckpointError, match=r"'layer'.*not finite: the float model fails too"):
        round_layer(layer, weights, statistics(inputs), 0.5)


@pytest.mark.parametrize("alpha", [np.nan, -0.1, 7.0])
def test_an_alpha_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(InvalidRequestError, match="alpha"):
        ImageCalibrationOptions(alpha=alpha)
    with pytest.raises(InvalidRequestError, match="alpha"):
        CalibrationOptions(smoothing=Smoothing(alpha))


def test_what_is_sensitive_or_gains_nothing_stays_in_float() -> None:
    spec = unet_spec(Fields(dict(UNET), where="unet"))
    layers = chosen_layers(spec, LayerChoice(IMAGE_RECIPES["w4a8"], ()))
    names = [name for layer in layers for name in layer.op.weight]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("conv_in", "conv_out", "time_emb"))]
    assert not [name for name in names if "time_emb_proj" in name or "conv_shortcut" in name]
    assert not [name for name in names if "attn2.to_k" in name or "attn2.to_v" in name]
    by_name = {layer.op.name: layer.scheme for layer in layers}
    block = "down_blocks.0.attentions.0"
    assert by_name[f"{block}.transformer_blocks.0.attn1.to_q"] == QuantScheme(4, 32)
    assert by_name["mid_block.attentions.0.transformer_blocks.0.ff.net.2"] == QuantScheme(4, 64)
    assert by_name[f"{block}.proj_in"] == STATIC
    assert by_name["up_blocks.2.resnets.1.conv1"] == STATIC


def test_patterns_choose_layers_but_not_a_part_of_one_product() -> None:
    spec = unet_spec(Fields(dict(UNET), where="unet"))

    def names(*overrides: str) -> dict[str, QuantScheme]:
        choice = LayerChoice.parse(IMAGE_RECIPES["w8a8"], overrides, IMAGE_RECIPES)
        return {layer.op.name: layer.scheme for layer in chosen_layers(spec, choice)}

    all_names = names()
    per_channel = names("*.ff.net.2=w4a8:0")
    assert per_channel["mid_block.attentions.0.transformer_blocks.0.ff.net.2"] == QuantScheme(4)
    kept = names("mid_block.*=keep", "*.ff.net.2=w4a8:32")
    assert {name for name in all_names if not name.startswith("mid_block.")} == set(kept)
    assert kept["up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"] == QuantScheme(4, 32)
    with pytest.raises(InvalidRequestError, match="one matrix product"):
        names("*.attn1.to_k=keep")
    with pytest.raises(InvalidRequestError, match="no layer is left"):
        names("*=keep")
    first = next(iter(all_names))
    for pattern in ("mid_blok.*", "conv_in", "time_embedding.linear_1"):
        with pytest.raises(InvalidRequestError, match=f"'{re.escape(pattern)}'.*'{first}'"):
            names("mid_block.*=keep", f"{pattern}=keep")
    with pytest.raises(InvalidRequestError, match="'gptq'; choose one of w8a8"):
        names("mid_block.*=gptq")
