"""Quantization schemes as data: how weights and activations of linear layers are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import Storage, WeightFormat

Activations = Literal["float", "block", "token", "tensor"]

GROUP_SIZES = (32, 64, 128)

OUTLIER_THRESHOLD = 6.0
"""Magnitude from which LLM.int8() (arXiv 2208.07339) keeps a feature in float."""


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How one linear layer computes.

    Attributes:
        weight_bits: 8 or 4.
        group_size: input features that share a scale; 0 is one scale per channel.
        symmetric: weights without zero points.
        activations: "float" computes in fp32 from the rounded weights; "block" rounds activations
            to int8 per token and block of 32 features; "token" to int8 with one scale per token
            found as it comes; "tensor" to int8 with one scale for all tokens, found by calibration.
        outlier_threshold: values of larger magnitude stay in float, found anew in each token
            (LLM.int8(), arXiv 2208.07339); None rounds all.

    Raises:
        InvalidRequestError: there is no arithmetic for this combination.
    """

    weight_bits: Literal[4, 8]
    group_size: int = 0
    symmetric: bool = True
    activations: Activations = "block"
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.group_size not in (0, *GROUP_SIZES):
            raise InvalidRequestError(
                f"group_size {self.group_size} is not supported; choose one of "
                f"{', '.join(map(str, GROUP_SIZES))}, or 0 for one scale per channel"
            )
        whole_rows = self.weight_bits == 8 and self.group_size == 0 and self.symmetric
        if self.activations in ("token", "tensor") and not whole_rows:
            raise InvalidRequestError(
                "activations with one scale per token or tensor need symmetric int8 weights with "
                "one scale per channel (group_size 0)"
            )
        if self.outlier_threshold is not None and (
            self.activations != "token" or not self.outlier_threshold > 0
        ):
            raise InvalidRequestError(
                "outlier_threshold must be positive, and needs activations quantized per token"
            )

    @classmethod
    def from_name(
        cls, name: Literal["int8", "int4"], group_size: int | None, symmetric: bool
    ) -> QuantScheme:
        """The weight-only scheme that a user asks for by name while loading.

        The defaults, int8 in groups of 128 and asymmetric int4 in groups of 64, keep a model at
        8.1 and 4.5 bits a weight. int8 is symmetric here.

        Raises:
            InvalidRequestError: the group size does not exist for the scheme.
        """
        if name == "int8":
            return cls(8, 128 if group_size is None else group_size)
        return cls(4, 64 if group_size is None else group_size, symmetric)

    @property
    def is_weight_only(self) -> bool:
        """Whether only weights are rounded by the scheme; the rest is the engine's choice."""
        return self.activations in ("float", "block")

    @property
    def storage(self) -> Storage:
        """The packed format of the scheme's weights."""
        if self.activations in ("token", "tensor"):
            return Storage(WeightFormat.Q8_CHANNEL)
        if self.weight_bits == 8:
            return Storage(WeightFormat.Q8, self.group_size)
        chosen = WeightFormat.Q4 if self.symmetric else WeightFormat.Q4_ASYMMETRIC
        return Storage(chosen, self.group_size)

    @property
    def keeps_codes(self) -> bool:
        """Whether ``storage`` holds the scheme's codes as they are; else they are regridded."""
        return self.weight_bits == 4 or self.symmetric

    def describe(self) -> str:
        """A short name, such as ``int4 asymmetric, groups of 32``."""
        kind = "" if self.symmetric else " asymmetric"
        groups = f"groups of {self.group_size}" if self.group_size else "per channel"
        activations = {
            "float": "",
            "block": "",
            "token": ", int8 activations per token",
            "tensor": ", int8 activations per tensor",
        }[self.activations]
        outliers = ", outliers in float" if self.outlier_threshold is not None else ""
        return f"int{self.weight_bits}{kind}, {groups}{activations}{outliers}"


Method = Literal["rtn", "smoothquant", "gptq", "awq"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A scheme, and the method that finds its numbers.

    Attributes:
        method: round-to-nearest; SmoothQuant (arXiv 2211.10438); GPTQ (arXiv 2210.17323); AWQ
            (arXiv 2306.00978).
        scheme: what comes out.
    """

    method: Method
    scheme: QuantScheme

    @property
    def needs_calibration(self) -> bool:
        """Whether text must be run through the model to find the numbers."""
        return self.method != "rtn" or self.scheme.activations == "tensor"


_TOKEN = QuantScheme(8, activations="token")
_TENSOR = QuantScheme(8, activations="tensor")

RECIPES: dict[str, Recipe] = {
    "int8": Recipe("rtn", QuantScheme(8, 128)),
    "int4": Recipe("rtn", QuantScheme(4, 128, symmetric=False)),
    "llm-int8": Recipe("rtn", replace(_TOKEN, outlier_threshold=OUTLIER_THRESHOLD)),
    "w8a8": Recipe("rtn", _TOKEN),
    "w8a8-static": Recipe("rtn", _TENSOR),
    "smoothquant": Recipe("smoothquant", _TOKEN),
    "smoothquant-static": Recipe("smoothquant", _TENSOR),
    "gptq": Recipe("gptq", QuantScheme(4, 128, symmetric=False)),
    "gptq-int8": Recipe("gptq", QuantScheme(8, 128)),
    "awq": Recipe("awq", QuantScheme(4, 128, symmetric=False)),
    "awq-int8": Recipe("awq", QuantScheme(8, 128)),
}
"""What the command line calls them. Group size and symmetry can be asked for beside the name."""


def recipe_named(
    name: str,
    group_size: int | None = None,
    symmetric: bool | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> Recipe:
    """The recipe of a command-line name, with its group size and symmetry where given.

    Raises:
        InvalidRequestError: there is no such name, or the scheme does not exist in such groups.
    """
    if name not in recipes:
        raise InvalidRequestError(
            f"there is no quantization scheme {name!r}; choose one of {', '.join(recipes)}"
        )
    recipe = recipes[name]
    scheme = recipe.scheme
    if group_size is not None:
        scheme = replace(scheme, group_size=group_size)
    if symmetric is not None:
        scheme = replace(scheme, symmetric=symmetric)
    return replace(recipe, scheme=scheme)
