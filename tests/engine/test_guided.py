"""Answers of a given form, from a model that would say anything."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from fuserve.engine.guided import GuideCompiler, GuidedDecoding
from fuserve.engine.outputs import RequestOutput
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import InvalidRequestError, RequestFailedError
from tests.engine.driving import Job, make_engine, run_together
from tests.engine.fake_model import EOS, VOCAB_SIZE, ByteCodec, FakeExecutor, Logits, hashed_logits

PROMPT = [*b"tell me?"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = GuidedDecoding("json_schema", json.dumps(PERSON))


def guided(
    constraint: GuidedDecoding, *, temperature: float = 1.0, seed: int = 0, **params: object
) -> SamplingParams:
    return SamplingParams(
        guided=constraint, temperature=temperature, seed=seed, max_tokens=400, **params
    )


def answer(params: SamplingParams, **engine: int) -> RequestOutput:
    return run_together(make_engine(**engine), [(PROMPT, params)])[0]


def text_of(output: RequestOutput) -> str:
    assert output.error is None
    assert output.outputs[0].finish_reason == "stop"
    return output.outputs[0].text


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_to_a_schema_has_its_form(seed: int) -> None:
    person = json.loads(text_of(answer(guided(SCHEMA, seed=seed))))
    assert set(person) >= {"name", "age"}
    assert len(person["name"]) <= 6
    assert 0 <= person["age"] <= 150
    assert set(person.get("tags", [])) <= {"a", "b"}


def test_a_greedy_answer_has_the_form_too() -> None:
    assert set(json.loads(text_of(answer(guided(SCHEMA, temperature=0))))) >= {"name", "age"}


def test_any_object_will_do() -> None:
    closing = {ord(letter): 12.0 for letter in '}"]'}
    output = answer(guided(GuidedDecoding("json_object"), logit_bias=closing))
    assert isinstance(json.loads(text_of(output)), dict)


@pytest.mark.parametrize("expression", [r"[a-c]{3,5}", r"(yes|no)!?", r"\d{4}-\d{2}", "ü+漢"])
def test_an_answer_to_a_regular_expression_matches_it_whole(expression: str) -> None:
    output = answer(guided(GuidedDecoding("regex", expression), logit_bias={EOS: 20.0}))
    assert re.fullmatch(expression, text_of(output))


@pytest.mark.parametrize(
    "grammar",
    [
        'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/',
        'root ::= number ("+" number)*\nnumber ::= [0-9] [0-9]? [0-9]?',
    ],
    ids=["lark", "gbnf"],
)
def test_an_answer_to_a_grammar_belongs_to_it(grammar: str) -> None:
    output = answer(guided(GuidedDecoding("grammar", grammar), logit_bias={EOS: 20.0}))
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text_of(output))


CHOICES = ["red", "bl\nue", 'gr"een\\', "ü漢😀", "redder"]


def test_a_choice_is_one_of_those_given() -> None:
    choice = GuidedDecoding("choice", json.dumps(CHOICES))
    texts = {text_of(answer(guided(choice, seed=seed, logit_bias={EOS: 9}))) for seed in range(25)}
    assert len(texts) > 2
    assert texts <= set(CHOICES)


def test_the_sequence_ends_only_where_the_grammar_is_satisfied() -> None:
    digits = GuidedDecoding("regex", "[0-9]{4}")
    output = answer(guided(digits, logit_bias={EOS: 100.0}))
    assert re.fullmatch("[0-9]{4}", text_of(output))
    assert output.outputs[0].token_ids[-1] == EOS


def test_ignoring_the_end_of_sequence_does_not_outlast_the_grammar() -> None:
    output = answer(guided(GuidedDecoding("regex", "[0-9]{4}"), ignore_eos=True))
    assert re.fullmatch("[0-9]{4}", text_of(output))


def test_min_tokens_holds_as_far_as_the_grammar_has_other_tokens() -> None:
    bias = {EOS: 100.0}
    longer = answer(guided(GuidedDecoding("regex", "a+"), min_tokens=9, logit_bias=bias))
    assert text_of(longer) == "a" * 9
    shorter = answer(guided(GuidedDecoding("regex", "aaa"), min_tokens=9, logit_bias=bias))
    assert text_of(shorter) == "aaa"


def test_a_stop_string_ends_a_guided_answer() -> None:
    output = answer(guided(GuidedDecoding("regex", "abcdef"), stop="cd"))
    assert text_of(output) == "ab"
    assert output.outputs[0].stop_reason == "cd"


def test_logprobs_are_those_of_the_free_model() -> None:
    (completion,) = answer(guided(GuidedDecoding("regex", "z{3}"), logprobs=1)).outputs
    assert completion.logprobs is not None
    history = list(PROMPT)
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = hashed_logits(history).astype(np.float64)
        expected = logits[token] - np.log(np.exp(logits).sum())
        assert entry[token].logprob == pytest.approx(expected, abs=1e-5)
        history.append(token)


def test_all_completions_of_a_prompt_have_the_form_and_differ() -> None:
    output = answer(guided(SCHEMA, n=3))
    texts = [completion.text for completion in output.outputs]
    assert all("name" in json.loads(text) for text in texts)
    assert len(set(texts)) == 3


# --- refused at once


@pytest.mark.parametrize(
    ("constraint", "names"),
    [
        (GuidedDecoding("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (GuidedDecoding("json_schema", '{"not": {"type": "string"}}'), "not"),
        (
            GuidedDecoding(
                "json_schema",
                '{"properties": {"a": {"if": {"type": "string"}, "then": {"minLength": 2}}}}',
            ),
            "if",
        ),
        (GuidedDecoding("json_schema", '{"type": "string", "format": "odd"}'), "odd"),
        (GuidedDecoding("json_schema", '{"type": "frob"}'), "frob"),
        (GuidedDecoding("json_schema", '{"$ref": "#/nowhere"}'), "nowhere"),
        (GuidedDecoding("json_schema", '{"$ref": "https://example.com/a"}'), "example.com"),
        (
            GuidedDecoding("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'),
            "maximum",
        ),
        (GuidedDecoding("json_schema", '{"type": "string"'), "is not JSON"),
        (GuidedDecoding("json_schema", "[" * 100_000), "is not JSON"),
        (GuidedDecoding("json_schema", '{"x-guidance": {"lenient": true}}'), "x-guidance"),
        (GuidedDecoding("regex", "[a-z"), "unclosed character class"),
        (GuidedDecoding("regex", "(?=a)b"), "look-ahead"),
        (GuidedDecoding("regex", "\ud800"), "surrogate"),
        (GuidedDecoding("grammar", 'start: "a" | nope'), "nope"),
        (GuidedDecoding("grammar", 'root ::= "a" [0-9'), "line 1"),
        (
            GuidedDecoding(
                "grammar",
                'start: %json {"not": {"type": "string"}, "x-guidance": {"lenient": true}}',
            ),
            "not",
        ),
        (GuidedDecoding("choice", "[]"), "at least one"),
        (GuidedDecoding("choice", '["a", 1]'), "got 1"),
        (GuidedDecoding("choice", '"a"'), "list"),
    ],
)
def test_what_cannot_be_enforced_is_refused_naming_it(
    constraint: GuidedDecoding, names: str
) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match=re.escape(names)):
        engine.add_request(PROMPT, guided(constraint))
    assert not engine.has_unfinished


def test_an_unknown_kind_or_a_spec_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="yaml"):
        GuidedDecoding("yaml", "a: b")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="dict"):
        GuidedDecoding("json_schema", {"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="guided must be"):
        SamplingParams(guided="json")  # type: ignore[arg-type]


def test_a_model_without_tokenizer_refuses_every_constraint() -> None:
    with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        GuideCompiler(None, VOCAB_SIZE).check(SCHEMA)


# --- compiled once


class CountingCodec(ByteCodec):
    def __init__(self) -> None:
        self.num_read = 0

    def tokenizer_json(self) -> str:
        self.num_read += 1
        return super().tokenizer_json()


def test_the_tokenizer_is_taken_over_once_and_the_latest_grammars_are_kept() -> None:
    codec = CountingCodec()
    compiler = GuideCompiler(codec, VOCAB_SIZE)
    assert codec.num_read == 0
    for number in range(100):
        compiler.check(GuidedDecoding("regex", f"a{{{number + 1}}}"))
    assert codec.num_read == 1
    assert len(compiler._compiled) == 64


def test_completions_of_one_grammar_do_not_disturb_each_other() -> None:
    compiler = GuideCompiler(ByteCodec(), VOCAB_SIZE)
    first, second = compiler.constraint(SCHEMA), compiler.constraint(SCHEMA)
    first.advance(ord("{"))
    assert not np.array_equal(first.allowed(), second.allowed())
    second.advance(ord("{"))
    assert np.array_equal(first.allowed(), second.allowed())


# --- beside others


def mixed_jobs() -> list[Job]:
    random = np.random.default_rng(5)
    forms = [None, SCHEMA, GuidedDecoding("regex", "[a-f]{30,60}"), None, SCHEMA, None]
    return [
        (
            random.integers(0, 256, size=20 + 13 * i).tolist(),
            SamplingParams(
                guided=form, seed=i, temperature=0 if i == 3 else 0.8, top_p=0.9, max_tokens=70
            ),
        )
        for i, form in enumerate(forms)
    ]


def test_guided_and_free_answers_are_the_same_alone_and_together_in_a_tight_cache() -> None:
    alone = [run_together(make_engine(), [job])[0] for job in mixed_jobs()]
    tight = make_engine(FakeExecutor(num_blocks=7), max_num_batched_tokens=24)
    together = run_together(tight, mixed_jobs())
    assert [o.outputs for o in together] == [o.outputs for o in alone]
    assert sum(output.num_preemptions for output in together) > 0


def test_a_grammar_that_fails_while_it_runs_ends_its_own_request_only() -> None:
    dead_end: set[int] = set()

    def logits_of(history: list[int]) -> Logits:
        logits = hashed_logits(history)
        if dead_end and history[: len(PROMPT)] == PROMPT and len(history) > len(PROMPT) + 3:
            logits[[*range(ord("0"), ord("9") + 1)]] = -np.inf  # all that the grammar allows
        return logits

    neighbours = mixed_jobs()
    without = run_together(make_engine(FakeExecutor(logits_of=logits_of)), neighbours)
    dead_end.add(1)
    failing = (PROMPT, guided(GuidedDecoding("regex", "[0-9]{9}")))
    engine = make_engine(FakeExecutor(logits_of=logits_of))
    failed, *others = run_together(engine, [failing, *neighbours])
    assert isinstance(failed.error, RequestFailedError)
    assert failed.outputs[0].finish_reason == "error"
    assert re.fullmatch("[0-9]{4}", failed.outputs[0].text)
    assert [o.outputs for o in others] == [o.outputs for o in without]
    assert engine.num_free_blocks == 64


def test_a_grammar_that_grows_too_complex_is_an_error_and_never_a_free_answer() -> None:
    explosive = GuidedDecoding("regex", "(a|b)*a(a|b){2000}c")
    output = answer(guided(explosive, temperature=0))
    completion = output.outputs[0]
    assert set(completion.text) <= set("abc")
    if output.error is None:
        assert completion.finish_reason == "length"
