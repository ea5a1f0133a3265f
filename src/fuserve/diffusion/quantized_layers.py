"""The quantized layers of a denoising network's folder, as ``fuserve quantize`` writes them."""

from __future__ import annotations

from typing import NoReturn

from fuserve.checkpoints.quantized.compressed_tensors import compressed_layers
from fuserve.checkpoints.quantized.stored_layer import StoredLayer, refuse
from fuserve.checkpoints.safetensors_folder import StoredTensors
from fuserve.diffusion.program import Conv, Linear, Program
from fuserve.diffusion.weights import CheckpointWeights
from fuserve.errors import UnsupportedModelError
from fuserve.quantization import QuantScheme

METHODS = ("fuserve", "compressed-tensors")
"""``quant_method`` of the configs that are read."""


def quantized_layers(stored: StoredTensors, config: object) -> dict[str, StoredLayer]:
    """The quantized layers of a folder, by the names of their weights; none without a config.

    Args:
        stored: the folder's tensors.
        config: its ``quantization_config``, None where there is none.

    Raises:
        CheckpointError: parts of a layer are missing or do not fit together.
        UnsupportedModelError: a layout or a scheme that there is no arithmetic for.
    """
    if config is None:
        return {}
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(config, dict) or method not in METHODS:
        raise UnsupportedModelError(
            f"{stored.path / 'config.json'}: quantization_config.quant_method is {method!r}. "
            f"Supported: {', '.join(METHODS)}. Quantize the original model with fuserve quantize."
        )
    layers = compressed_layers(stored, config)
    by_weight = {f"{module}.weight": layer for module, layer in layers.items()}
    for name in stored.tensor_names():
        if name.endswith(".weight") and stored.dtype(name) == "I8" and name not in by_weight:
            refuse(stored, name, "is of integers, but its weight_scale is missing.")
    return by_weight


def check_layers(programs: tuple[Program, ...], weights: CheckpointWeights) -> None:
    """Check that there is arithmetic for every quantized layer, as far as headers tell.

    Raises:
        CheckpointError: matrices of one operation have different schemes.
        UnsupportedModelError: a scheme that there is no arithmetic for; the layer is named.
    """
    for program in programs:
        for op in program.ops:
            if isinstance(op, Conv | Linear):
                _check_layer(op, weights)


def _check_layer(op: Conv | Linear, weights: CheckpointWeights) -> None:
    layers = [weights.layer(name) for name in op.weight]
    first = layers[0]
    if all(layer is None for layer in layers):
        return
    for name, layer in zip(op.weight, layers, strict=True):
        if first is None or layer is None or layer.scheme != first.scheme:
            refuse(weights.stored, name, f"is not quantized as {op.weight[0]}, which it goes with.")
        if layer.vectors - {"input_smoothing"}:
            _unsupported(weights, name, "inputs that are shifted", "symmetric inputs")
        _check_scheme(op, name, layer.scheme, weights)


def _check_scheme(
    op: Conv | Linear, name: str, scheme: QuantScheme, weights: CheckpointWeights
) -> None:
    if isinstance(op, Conv):
        supported = ("tensor",)
        wanted = "for convolutions int8 with inputs of one fixed scale"
    else:
        supported = ("token", "tensor", *(("block",) if scheme.weight_bits == 4 else ()))
        wanted = "int8 with int8 inputs, or symmetric int4 in groups"
    if scheme.activations not in supported or not scheme.symmetric:
        _unsupported(weights, name, scheme.describe(), wanted)


def _unsupported(weights: CheckpointWeights, name: str, what: str, supported: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{weights.path}: layer {name!r} has {what}. Supported: {supported}. Quantize the original "
        "model with fuserve quantize."
    )
