"""Random schemas: whatever the model would say, its answer is valid, or there is none."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserve.engine.guided import GuideCompiler, GuidedDecoding
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import InvalidRequestError
from tests.engine.driving import make_engine, run_together
from tests.engine.fake_model import EOS, VOCAB_SIZE, ByteCodec, FakeExecutor, Logits, hashed_logits

Schema = dict[str, Any]
SHORTEN = {ord('"'): 9.0, ord("}"): 9.0, ord("]"): 9.0, ord(","): 4.0, ord(" "): -9.0, EOS: 30.0}

strings = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"minLength": st.integers(0, 3), "maxLength": st.integers(3, 8)},
) | st.sampled_from(
    [
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"type": "string", "pattern": "b"},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "ipv4"},
        {"type": "string", "format": "uuid"},
    ]
)
numbers = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={
        "minimum": st.integers(-20, 5),
        "maximum": st.integers(6, 200),
        "multipleOf": st.sampled_from([1, 3, 5]),
    },
)
values = st.sampled_from([None, True, False, 0, -7, 2.5, "", "a\n", "ü漢", [1, "x"], {"k": []}])
leaves = (
    strings
    | numbers
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}])
    | values.map(lambda value: {"const": value})
    | st.lists(values, min_size=1, max_size=4).map(lambda some: {"enum": some})
)
names = st.sampled_from(["a", "b", "a b", 'q"', "ü"])


def arrays(items: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.fixed_dictionaries(
        {"type": st.just("array"), "items": items, "maxItems": st.integers(1, 3)},
        optional={
            "minItems": st.integers(0, 1),
            "prefixItems": st.lists(items, min_size=1, max_size=2),
        },
    )


@st.composite
def objects(draw: st.DrawFn, members: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(names, members, min_size=1, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    schema = {"type": "object", "properties": properties, "required": required}
    if draw(st.booleans()):
        schema["additionalProperties"] = draw(st.just(False) | members)
    return schema


def combinations(parts: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    some = st.lists(parts, min_size=1, max_size=3)
    return some.map(lambda schemas: {"anyOf": schemas}) | some.map(
        lambda schemas: {"allOf": schemas}
    )


refused = st.sampled_from(
    [
        {"not": {"type": "string"}},
        {"type": "array", "uniqueItems": True},
        {"type": "object", "propertyNames": {"maxLength": 2}},
        {"if": {"type": "string"}, "then": {"minLength": 3}},
        {"type": "array", "contains": {"type": "integer"}},
    ]
)
whole = st.recursive(
    leaves, lambda inner: arrays(inner) | objects(inner) | combinations(inner), max_leaves=6
)
# References begin at the root, so a definition further in would refer to another one or to itself.
schemas = whole | whole.map(lambda schema: {"$defs": {"part": schema}, "$ref": "#/$defs/part"})

compiler = GuideCompiler(ByteCodec(), VOCAB_SIZE)


def letters_first(history: list[int]) -> Logits:
    """Likes short printable answers, but has something against every token."""
    logits = hashed_logits(history)
    for token, bias in SHORTEN.items():
        logits[token] += bias
    return logits


def answer(schema: Schema, *, seed: int) -> tuple[str, str | None]:
    params = SamplingParams(
        guided=GuidedDecoding("json_schema", json.dumps(schema)),
        seed=seed,
        max_tokens=500,
    )
    engine = make_engine(FakeExecutor(logits_of=letters_first), num_speculative_tokens=4)
    (output,) = run_together(engine, [([*b"?"], params)])
    return output.outputs[0].text, output.outputs[0].finish_reason


@settings(max_examples=120, deadline=None)
@given(schemas, st.integers(0, 3))
def test_an_answer_to_any_schema_is_valid(schema: Schema, seed: int) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    try:
        text, reason = answer(schema, seed=seed)
    except InvalidRequestError:
        return  # a contradiction, or an intersection that cannot be enforced
    if reason == "stop":
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    else:
        assert reason in ("length", "error")  # cut off, or given up: it does not claim to be whole


@settings(max_examples=60, deadline=None)
@given(refused, st.lists(st.sampled_from("oai"), max_size=3))
def test_a_keyword_that_cannot_be_enforced_is_refused_wherever_it_stands(
    schema: Schema, nesting: list[str]
) -> None:
    keywords = set(schema) - {"type"}
    for level in nesting:
        if level == "o":
            schema = {"type": "object", "properties": {"x": schema}}
        elif level == "a":
            schema = {"anyOf": [{"type": "null"}, schema]}
        else:
            schema = {"type": "array", "items": schema}
    try:
        compiler.check(GuidedDecoding("json_schema", json.dumps(schema)))
    except InvalidRequestError as error:
        assert any(keyword in str(error) for keyword in keywords), error
    else:
        raise AssertionError(f"{schema} was accepted")


def test_a_schema_that_only_refers_to_itself_ends_with_an_error() -> None:
    def answer_of(part: Schema) -> tuple[str, str | None]:
        return answer({"$defs": {"part": part}, "$ref": "#/$defs/part"}, seed=1)

    again = {"$ref": "#/$defs/part"}
    tree = {"type": "array", "items": again, "maxItems": 2}
    text, reason = answer_of({"anyOf": [{"type": "null"}, tree]})
    assert (text, reason) == ("[]", "stop")
    for endless in (again, {"anyOf": [again]}, {"allOf": [again]}):
        assert answer_of(endless) == ("", "error")


def test_most_random_schemas_are_answered() -> None:
    """The test above would prove nothing if all were refused or cut off."""
    finished = 0
    rng = np.random.default_rng(0)
    for seed in rng.integers(0, 1000, size=20):
        schema = {
            "type": "object",
            "properties": {
                "kind": {"enum": ["x", "yy"]},
                "at": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 4}]},
            },
            "required": ["kind", "at"],
            "additionalProperties": False,
        }
        text, reason = answer(schema, seed=int(seed))
        finished += reason == "stop"
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema)
    assert finished >= 18
