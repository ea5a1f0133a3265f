"""Which layers of a denoiser are quantized, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fuserve.diffusion.program import Conv, Linear, sources_of
from fuserve.diffusion.unet_program import unet_program
from fuserve.diffusion.unet_spec import UNetSpec
from fuserve.errors import InvalidRequestError
from fuserve.quantization import RECIPES, LayerChoice, QuantScheme, Recipe
from fuserve.quantization.scheme import GROUP_SIZES

IMAGE_RECIPES: Mapping[str, Recipe] = {
    "w8a8": RECIPES["smoothquant"],
    "w8a8-static": RECIPES["smoothquant-static"],
    "w4a8": Recipe("smoothquant", QuantScheme(4, 64)),
}
"""What the command line calls them. All are smoothed; convolutions are static W8A8 in each."""

ENDS = ("conv_in", "conv_out")
"""Convolutions of few channels, where every error meets the latents as it is."""

LEAST_SHORTCUT = 128
"""Channels below which a shortcut stays in float: its input, which nothing else reads rounded, has
to be rounded for a product that costs hardly more than that."""


@dataclass(frozen=True, slots=True)
class ChosenLayer:
    """A layer to quantize: its operation in the network's program, and how."""

    op: Conv | Linear
    scheme: QuantScheme


def chosen_layers(spec: UNetSpec, choice: LayerChoice) -> list[ChosenLayer]:
    """What is quantized, in the order in which it runs.

    Keys and values of cross-attention and all that embeds the timestep are in other programs, and
    stay in float.

    Raises:
        InvalidRequestError: nothing is left, a pattern matches no such layer, or matrices that
            read the same input, and are multiplied with it at once, are to have different schemes.
    """
    side = spec.size_multiple
    ops = [
        op
        for op in unet_program(spec, 1, 1, side, side, tokens=1).ops
        if isinstance(op, Conv | Linear) and op.name not in ENDS and not _is_small_shortcut(op)
    ]
    choice.check_patterns([name for op in ops for name in _module_names(op)])
    layers = []
    for op in ops:
        recipe, *others = map(choice.recipe_of, _module_names(op))
        if any(other != recipe for other in others):
            raise InvalidRequestError(
                f"{', '.join(op.weight)} are one matrix product and need the same scheme"
            )
        if recipe is not None:
            layers.append(ChosenLayer(op, _scheme_of(op, recipe)))
    if not layers:
        raise InvalidRequestError("no layer is left to quantize")
    return layers


def _module_names(op: Conv | Linear) -> list[str]:
    return [name.removesuffix(".weight") for name in op.weight]


def _is_small_shortcut(op: Conv | Linear) -> bool:
    is_shortcut = op.name.endswith(".conv_shortcut")
    return is_shortcut and min(op.out.channels, in_channels(op)) < LEAST_SHORTCUT


def _scheme_of(op: Conv | Linear, recipe: Recipe) -> QuantScheme:
    """The recipe's scheme as far as this layer can have it."""
    if isinstance(op, Conv):
        return RECIPES["smoothquant-static"].scheme
    scheme = recipe.scheme
    if scheme.weight_bits == 8:
        return scheme
    fitting = [size for size in GROUP_SIZES if in_channels(op) % size == 0]
    if not fitting:  # a row of another width has no whole blocks
        return RECIPES["smoothquant"].scheme
    if scheme.group_size == 0:  # a scale for each output channel
        return scheme
    return replace(scheme, group_size=max(size for size in fitting if size <= scheme.group_size))


def in_channels(op: Conv | Linear) -> int:
    """Channels of all its sources."""
    return sum(source.channels for source in sources_of(op))
