"""Schemes, their names on the command line, and mixed schemes."""

from __future__ import annotations

import pytest

from fuserve.errors import InvalidRequestError
from fuserve.kernels.linear import Storage, WeightFormat
from fuserve.quantization import RECIPES, LayerChoice, QuantScheme, recipe_named


def test_every_name_says_what_it_needs() -> None:
    needing = {name for name, recipe in RECIPES.items() if recipe.needs_calibration}
    assert needing == {
        "w8a8-static",
        "smoothquant",
        "smoothquant-static",
        "gptq",
        "gptq-int8",
        "awq",
        "awq-int8",
    }


def test_a_name_takes_another_group_size_and_zero_points() -> None:
    scheme = recipe_named("gptq", group_size=32, symmetric=True).scheme
    assert scheme == QuantScheme(4, 32)
    assert scheme.storage == Storage(WeightFormat.Q4, 32)
    assert recipe_named("int4", group_size=64).scheme == QuantScheme(4, 64, symmetric=False)


def test_llm_int8_keeps_outliers_from_six_up() -> None:
    scheme = recipe_named("llm-int8").scheme
    assert scheme == QuantScheme(8, activations="token", outlier_threshold=6.0)
    assert scheme.describe() == "int8, per channel, int8 activations per token, outliers in float"


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"weight_bits": 4, "group_size": 16}, "group_size 16 is not supported"),
        ({"weight_bits": 8, "group_size": 48}, "choose one of 32, 64, 128, or 0 for"),
        ({"weight_bits": 4, "group_size": 32, "activations": "token"}, "need symmetric int8"),
        ({"weight_bits": 8, "group_size": 32, "activations": "tensor"}, "need symmetric int8"),
        ({"weight_bits": 8, "outlier_threshold": 6.0}, "quantized per token"),
        (
            {"weight_bits": 8, "activations": "token", "outlier_threshold": 0.0},
            "must be positive",
        ),
    ),
)
def test_schemes_without_arithmetic_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        QuantScheme(**fields)  # type: ignore[arg-type]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"int9.*choose one of int8, int4, llm-int8"):
        recipe_named("int9")


def test_layers_are_chosen_by_patterns_and_the_first_that_matches_wins() -> None:
    choice = LayerChoice.parse(
        recipe_named("gptq"),
        ["model.layers.1.mlp.down_proj=int8", "layers.1.*=keep", "lm_head=int8:64"],
    )
    assert choice.recipe_of("layers.1.down") == recipe_named("int8")
    assert choice.recipe_of("layers.1.up") is None
    assert choice.recipe_of("layers.11.down") == recipe_named("gptq")
    assert choice.recipe_of("head") == recipe_named("int8", group_size=64)
    assert choice.recipe_of("embedding") is None


def test_head_and_embedding_are_kept_unless_named() -> None:
    choice = LayerChoice.parse(recipe_named("int8"), ["*.down=keep"])
    assert choice.recipe_of("head") is None
    assert choice.recipe_of("layers.0.q") == recipe_named("int8")


@pytest.mark.parametrize("text", ("down", "=int8", "down=", "down=int9", "down=int8:x"))
def test_a_bad_choice_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        LayerChoice.parse(recipe_named("int8"), [text])
