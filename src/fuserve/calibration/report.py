"""What a quantization has written, and who can read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuserve.architectures import DecoderSpec, tensor_shapes
from fuserve.quantization import Recipe


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What was written.

    Attributes:
        folder: where.
        num_bytes: of all tensors.
        num_samples: windows of text that were run.
        schemes: how many linear layers have each scheme.
        limits: why other readers will refuse the folder, if they will.
    """

    folder: Path
    num_bytes: int
    num_samples: int
    schemes: Mapping[str, int]
    limits: tuple[str, ...]


def reading_limits(
    spec: DecoderSpec, recipes: Mapping[str, Recipe | None], config: Mapping[str, Any]
) -> tuple[str, ...]:
    """Why other readers will refuse a folder.

    Args:
        spec: the model.
        recipes: what each linear layer has become.
        config: the folder's ``quantization_config``.
    """
    limits = []
    if config["quant_method"] == "fuserve":
        limits.append("inputs are smoothed or shifted at run time, which only fuserve does")
    shapes = tensor_shapes(spec)
    for name, recipe in recipes.items():
        size = recipe.scheme.group_size if recipe is not None else 0
        if size and shapes[name][1] % size and "config_groups" in config:
            limits.append(
                f"groups of {size} do not divide the {shapes[name][1]} inputs of {name}, as "
                "compressed-tensors wants; --group-size 32 or 64, or --format gptq may"
            )
            break
    return tuple(limits)
