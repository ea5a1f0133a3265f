"""``quantization_config`` of compressed-tensors checkpoints: which scheme each layer has.

The config has groups; each says how weights and inputs of its targets are quantized. A target is a
module's name, ``re:`` and a regular expression, or the class ``Linear``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fuserve.errors import CheckpointError, UnsupportedModelError
from fuserve.quantization.scheme import Activations, QuantScheme

WEIGHT_STRATEGIES = ("tensor", "channel", "group")


@dataclass(frozen=True, slots=True)
class CompressedGroup:
    """One group of the config.

    Attributes:
        targets: names, ``re:`` patterns, classes.
        bits: 4 or 8.
        strategy: what a weight scale is for.
        group_size: of strategy "group"; 0 for the others.
        symmetric: weights without zero points.
        activations: as ``QuantScheme.activations``.
        shifted_inputs: static activations have a zero point.
    """

    targets: tuple[str, ...]
    bits: int
    strategy: str
    group_size: int
    symmetric: bool
    activations: Activations
    shifted_inputs: bool


def read_groups(path: Path, config: Mapping[str, Any]) -> list[CompressedGroup]:
    """The groups of a config, checked.

    Raises:
        CheckpointError: the config is not of the form that it should have.
        UnsupportedModelError: types, bits or strategies that fuserve does not compute.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _damaged(path, "has no config_groups")
    return [_group(path, name, group) for name, group in groups.items()]


def group_of_module(path: Path, groups: Sequence[CompressedGroup], module: str) -> CompressedGroup:
    """The group of a module that is stored quantized; names go before classes.

    Raises:
        CheckpointError: no group names it.
    """
    for group in groups:
        if any(_names(path, target, module) for target in group.targets):
            return group
    for group in groups:
        if "Linear" in group.targets:
            return group
    _damaged(path, f"has no group for the quantized layer {module!r}")


def _names(path: Path, target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        _damaged(path, f"has the target {target!r}, which is no regular expression ({error})")


def _group(path: Path, name: str, group: Any) -> CompressedGroup:
    where = f"config_groups.{name}"
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        _damaged(path, f"has no weights in {where}")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        _damaged(path, f"has no list of targets in {where}")
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits not in (4, 8) or weights.get("type", "int") != "int":
        _unsupported(path, f"{where}.weights", weights, "integers of 4 or 8 bits")
    if strategy not in WEIGHT_STRATEGIES:
        _unsupported(
            path, f"{where}.weights", weights, f"one of the strategies {WEIGHT_STRATEGIES}"
        )
    size = weights.get("group_size") if strategy == "group" else 0
    if not isinstance(size, int) or size < 0:
        _damaged(path, f"has the group_size {size!r} in {where}.weights")
    inputs = group.get("input_activations")
    return CompressedGroup(
        targets=tuple(targets),
        bits=bits,
        strategy=strategy,
        group_size=size,
        symmetric=weights.get("symmetric", True) is True,
        activations=_activations(path, f"{where}.input_activations", inputs),
        shifted_inputs=isinstance(inputs, dict) and inputs.get("symmetric") is False,
    )


def _activations(path: Path, where: str, inputs: Any) -> Activations:
    if inputs is None:
        return "block"
    if not isinstance(inputs, dict):
        _damaged(path, f"has no mapping in {where}")
    if inputs.get("num_bits") != 8 or inputs.get("type", "int") != "int":
        _unsupported(path, where, inputs, "int8, or none")
    strategy, is_dynamic = inputs.get("strategy"), inputs.get("dynamic", False)
    if strategy == "tensor" and is_dynamic is False:
        return "tensor"
    if strategy in ("token", "tensor") and is_dynamic is True:
        if inputs.get("symmetric") is False:
            _unsupported(path, where, inputs, "symmetric dynamic activations")
        return "token"  # a scale per token is at least as fine as one of all tokens of a step
    _unsupported(path, where, inputs, "dynamic per token, or static per tensor")


def _damaged(path: Path, message: str) -> NoReturn:
    raise CheckpointError(
        f"its quantization_config {message}.",
        file=path / "config.json",
        remedy="Fetch or quantize the model again.",
    )


def _unsupported(path: Path, where: str, value: Mapping[str, Any], supported: str) -> NoReturn:
    shown = {key: entry for key, entry in value.items() if entry is not None}
    raise UnsupportedModelError(
        f"{path / 'config.json'}: quantization_config.{where} is {str(shown)[:200]}. "
        f"Supported: {supported}."
    )


def scheme_entry(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    """The group of the config for layers of a scheme."""
    weights: dict[str, Any] = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
        "observer": "minmax",
    }
    inputs: dict[str, Any] | None = None
    if not scheme.is_weight_only:
        inputs = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": scheme.activations,
            "dynamic": scheme.activations == "token",
            "observer": None if scheme.activations == "token" else "minmax",
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": storage_format(scheme),
    }


def storage_format(scheme: QuantScheme) -> str:
    """compressed-tensors' name of how the layers of a scheme are stored."""
    return "pack-quantized" if scheme.is_weight_only else "int-quantized"
