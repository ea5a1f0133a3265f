"""Quantizing the linear layers of one decoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.calibration.options import CalibrationOptions
from fuserve.calibration.places import Layer, Place
from fuserve.kernels.linear import Codes
from fuserve.quantization import QuantizedLinear, Recipe
from fuserve.quantization.awq import awq_smoothing, clipped_codes
from fuserve.quantization.gptq import ColumnOrder, column_order, gptq
from fuserve.quantization.rounding import round_to_nearest
from fuserve.quantization.smoothquant import (
    channel_shift,
    search_input_scale,
    search_smoothing,
    widest_scale,
)
from fuserve.quantization.statistics import InputStatistics

Floats = npt.NDArray[np.float32]
Recipes = Mapping[str, Recipe | None]
"""The recipe of each linear layer by canonical name, without ``layers.{i}.``; None keeps it."""

NOT_CLIPPED = ("q", "k")
"""Clipping them changes which tokens attend to which, which no linear layer's error tells."""


@dataclass(frozen=True, slots=True)
class PreparedInputs:
    """What is left to be done to a place's inputs at run time, and their statistics after it.

    Attributes:
        shift: subtracted first.  # [in]
        smoothing: divides then.  # [in]
        output_shifts: each linear layer's share of the shift, where it has no bias to take it.
        statistics: of what is rounded.
    """

    shift: Floats | None
    smoothing: Floats | None
    output_shifts: Mapping[str, Floats]
    statistics: InputStatistics | None


def quantize_layer(
    layer: Layer,
    places: Sequence[Place],
    recipes: Recipes,
    statistics: Mapping[str, InputStatistics],
    options: CalibrationOptions,
) -> dict[str, QuantizedLinear]:
    """Quantize a layer's linear layers.

    Args:
        layer: its tensors in float32; changed where vectors are folded into them.
        places: of the spec, in the order of folding.
        recipes: what each linear layer becomes.
        statistics: of the inputs of each place that needs them.
        options: of the methods.
    """
    ready = [
        _prepare(layer, place, recipes, statistics.get(place.name), options) for place in places
    ]
    quantized: dict[str, QuantizedLinear] = {}
    for place, inputs in zip(places, ready, strict=True):
        input_scale = _input_scale(layer, place, recipes, inputs.statistics)
        order = _column_order(place, recipes, inputs.statistics, options)
        for name in place.linears:
            if (recipe := recipes[name]) is not None:
                is_static = recipe.scheme.activations == "tensor"
                quantized[name] = QuantizedLinear(
                    recipe.scheme,
                    _codes(name, layer[name], recipe, inputs.statistics, order),
                    input_scale=input_scale if is_static else None,
                    input_smoothing=inputs.smoothing,
                    input_shift=inputs.shift,
                    output_shift=inputs.output_shifts.get(name),
                )
    return quantized


def with_rounded_weights(layer: Layer, quantized: Mapping[str, QuantizedLinear]) -> Layer:
    """The layer's tensors with what its quantized linear layers compute, inputs not rounded."""
    rounded = dict(layer)
    for name, one in quantized.items():
        matrix = one.values()
        if one.input_smoothing is not None:
            matrix = matrix / one.input_smoothing
        rounded[name] = matrix
        shift = np.zeros(len(matrix), np.float32) if one.output_shift is None else one.output_shift
        if one.input_shift is not None:
            shift = shift - matrix @ one.input_shift
        if one.input_shift is not None or one.output_shift is not None:
            rounded[f"{name}.bias"] = rounded.get(f"{name}.bias", np.float32(0)) + shift
    return rounded


def needs_statistics(place: Place, recipes: Recipes) -> bool:
    """Whether text must be run through the model for this place."""
    return any(recipe.needs_calibration for recipe in _recipes(place, recipes))


def needs_hessian(place: Place, recipes: Recipes) -> bool:
    """Whether a method of the place asks for its inputs' second moments."""
    return any(recipe.method in ("gptq", "awq") for recipe in _recipes(place, recipes))


def _recipes(place: Place, recipes: Recipes) -> list[Recipe]:
    return [recipe for name in place.linears if (recipe := recipes[name]) is not None]


def _prepare(
    layer: Layer,
    place: Place,
    recipes: Recipes,
    inputs: InputStatistics | None,
    options: CalibrationOptions,
) -> PreparedInputs:
    """Find shift and smoothing of a place's inputs, and fold what can be folded."""
    chosen = _recipes(place, recipes)
    smoothed = [recipe for recipe in chosen if recipe.method in ("smoothquant", "awq")]
    if not smoothed or inputs is None:
        return PreparedInputs(None, None, {}, inputs)
    recipe = smoothed[0]
    # A layer that is kept in float has no place for vectors that are applied at run time.
    may_wait = recipe.method == "smoothquant" and len(chosen) == len(place.linears)
    shift, output_shifts = None, {}
    if options.smoothing.shift and may_wait:
        shift = channel_shift(inputs, place.share)
        inputs = inputs.transformed(shift, None)
        output_shifts = _fold_output_shifts(layer, place, shift)
        if place.fold_shift(layer, shift):
            shift = None
    smoothing = None
    if place.source is not None or may_wait:
        matrices = [layer[name] for name in place.linears if recipes[name] == recipe]
        smoothing = _smoothing(matrices, recipe, inputs, place, options)
    if smoothing is not None:
        inputs = inputs.transformed(None, smoothing)
        if place.fold_smoothing(layer, smoothing):
            shift = None if shift is None else shift / smoothing
            smoothing = None
    return PreparedInputs(shift, smoothing, output_shifts, inputs)


def _smoothing(
    matrices: Sequence[Floats],
    recipe: Recipe,
    inputs: InputStatistics,
    place: Place,
    options: CalibrationOptions,
) -> Floats | None:
    if recipe.method == "awq":
        return awq_smoothing(matrices, recipe.scheme, inputs, place.share)
    return search_smoothing(matrices, recipe.scheme, inputs, options.smoothing, place.share)


def _fold_output_shifts(layer: Layer, place: Place, shift: Floats) -> dict[str, Floats]:
    """Add each linear layer's share of the shift to its bias, or return it if it has none."""
    left = {}
    for name in place.linears:
        share = layer[name] @ shift
        if (bias := layer.get(f"{name}.bias")) is not None:
            layer[f"{name}.bias"] = bias + share
        else:
            left[name] = share
    return left


def _input_scale(
    layer: Layer, place: Place, recipes: Recipes, inputs: InputStatistics | None
) -> float | None:
    """The step of a place's static activations, one for all that read them."""
    static = {
        name: recipe
        for name in place.linears
        if (recipe := recipes[name]) is not None and recipe.scheme.activations == "tensor"
    }
    if not static or inputs is None:
        return None
    recipe = next(iter(static.values()))
    if recipe.method == "rtn":
        return widest_scale(inputs)
    return search_input_scale([layer[name] for name in static], recipe.scheme, inputs)


def _column_order(
    place: Place, recipes: Recipes, inputs: InputStatistics | None, options: CalibrationOptions
) -> ColumnOrder | None:
    """What GPTQ needs to know of a place's inputs; None where it is not used."""
    if all(recipe.method != "gptq" for recipe in _recipes(place, recipes)):
        return None
    assert inputs is not None and inputs.hessian is not None
    return column_order(inputs.hessian, damping=options.damping, act_order=options.act_order)


def _codes(
    name: str,
    weights: Floats,
    recipe: Recipe,
    inputs: InputStatistics | None,
    order: ColumnOrder | None,
) -> Codes:
    if recipe.method == "gptq":
        assert order is not None
        return gptq(weights, order, recipe.scheme)
    if recipe.method == "awq" and name not in NOT_CLIPPED:
        assert inputs is not None
        return clipped_codes(weights, recipe.scheme, inputs)
    return round_to_nearest(weights, recipe.scheme)
