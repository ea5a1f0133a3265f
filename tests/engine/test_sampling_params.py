from __future__ import annotations

import math
from typing import Any

import pytest

from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", None),
        pytest.param("temperature", 10**400, id="temperature-beyond-floats"),
        ("top_k", -2),
        ("top_k", 5.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"1": 1}),
        ("logit_bias", [1, 2]),
        ("seed", 2**64),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", b"end"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 5),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
        ("include_stop_str_in_output", None),
    ],
)
def test_a_value_out_of_range_is_refused_naming_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field} must be ") as refusal:
        SamplingParams(**{field: value})
    if field != "stop_token_ids" and field != "logit_bias":
        assert str(refusal.value).endswith(f"got {value!r}.")


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature) == (1, 16, 1.0)
    assert (params.top_k, params.top_p, params.min_p) == (0, 1.0, 0.0)
    assert params.logprobs is None
    assert not params.greedy


def test_temperature_0_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy


def test_later_changes_of_the_callers_lists_do_not_reach_the_parameters() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("")
    bias[2] = math.nan
    assert params.stop_strings == ("a",)
    assert params.logit_bias == {1: 2.0}


def test_one_stop_string_is_not_taken_for_a_list_of_letters() -> None:
    assert SamplingParams(stop="END").stop_strings == ("END",)


def test_a_models_generation_config_gives_the_defaults() -> None:
    config = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": None,
        "max_new_tokens": 99,
        "eos_token_id": [1, 2],
        "do_sample": True,
    }
    expected = SamplingParams(temperature=0.6, top_k=20, max_tokens=99)
    assert SamplingParams.from_generation_config(config) == expected


def test_a_damaged_generation_config_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="top_p must be"):
        SamplingParams.from_generation_config({"top_p": "0.9"})
