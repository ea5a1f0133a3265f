"""The demo model: guessing ahead, constraints and embeddings change no bit of anything else."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from fuserve.checkpoints import Tokenizer, load_tokenizer
from fuserve.decoder import ExecutorOptions, LoadedModel, load_model
from fuserve.decoder.step import Executor
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.guided import GuidedDecoding
from fuserve.engine.outputs import RequestOutput
from fuserve.engine.sampling_params import SamplingParams
from tests.engine.driving import finish_all

CITY = GuidedDecoding(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "country": {"enum": ["France", "Japan", "Peru"]},
                "population": {"type": "integer", "minimum": 1},
            },
            "required": ["city", "country", "population"],
            "additionalProperties": False,
        }
    ),
)


@pytest.fixture(scope="module", params=["float16", "int8"])
def model(request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    """With either type of cache: nothing may depend on which blocks hold a request."""
    options = ExecutorOptions(
        max_model_len=2048, max_num_seqs=8, num_threads=2, kv_cache_dtype=request.param
    )
    loaded = load_model("demo", options)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def tokenizer(model: LoadedModel) -> Tokenizer:
    assert model.checkpoint is not None
    return load_tokenizer(model.checkpoint)


class FewBlocks:
    """The executor with a part of its cache."""

    def __init__(self, executor: Executor, num_blocks: int) -> None:
        self.spec = executor.spec
        self.num_blocks = num_blocks
        self.step = executor.step
        self.copy_blocks = executor.copy_blocks


def make_engine(
    model: LoadedModel,
    tokenizer: Tokenizer,
    *,
    budget: int = 512,
    num_guesses: int = 0,
    num_blocks: int | None = None,
) -> Engine:
    # Each engine begins with an empty prefix cache of its own.
    config = EngineConfig(2048, 8, budget, num_speculative_tokens=num_guesses)
    executor = FewBlocks(model.executor, num_blocks or model.executor.num_blocks)
    return Engine(executor, tokenizer, config)


def asked(tokenizer: Tokenizer, question: str) -> list[int]:
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return tokenizer.encode(text, add_special_tokens=False)


def run(engine: Engine, jobs: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    ids = [engine.add_request(prompt, params) for prompt, params in jobs]
    outputs = finish_all(engine)
    return [outputs[request_id] for request_id in ids]


@pytest.fixture(scope="module")
def jobs(tokenizer: Tokenizer, prose: str) -> list[tuple[list[int], SamplingParams]]:
    """Short and long contexts, so that attention is cut into splits in some of them."""
    passage = tokenizer.decode(tokenizer.encode(prose)[:600])
    repeat = asked(tokenizer, f"Repeat this text word for word:\n\n{passage}")
    return [
        (repeat, SamplingParams(temperature=0, max_tokens=60)),
        (repeat, SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=60)),
        (
            asked(tokenizer, "Count from 1 to 30, with commas."),
            SamplingParams(temperature=0.5, seed=2, presence_penalty=0.2, max_tokens=80),
        ),
        (
            asked(tokenizer, "Name a city as JSON."),
            SamplingParams(temperature=0.8, seed=3, guided=CITY, max_tokens=90),
        ),
        (asked(tokenizer, "Why is the sky blue?"), SamplingParams(temperature=0, max_tokens=40)),
    ]


@pytest.fixture(scope="module")
def alone(
    model: LoadedModel,
    tokenizer: Tokenizer,
    jobs: list[tuple[list[int], SamplingParams]],
) -> list[RequestOutput]:
    return [run(make_engine(model, tokenizer), [job])[0] for job in jobs]


@pytest.mark.parametrize(("budget", "num_guesses"), [(512, 0), (512, 6), (48, 3)])
def test_answers_are_bit_identical_alone_together_chunked_and_with_guesses(
    model: LoadedModel,
    tokenizer: Tokenizer,
    jobs: list[tuple[list[int], SamplingParams]],
    alone: list[RequestOutput],
    budget: int,
    num_guesses: int,
) -> None:
    engine = make_engine(model, tokenizer, budget=budget, num_guesses=num_guesses)
    outputs = run(engine, jobs)
    assert [o.outputs for o in outputs] == [o.outputs for o in alone]
    if num_guesses:
        stats = engine.stats()
        assert 0 < stats.accepted_tokens_total <= stats.draft_tokens_total


def test_answers_are_bit_identical_from_the_prefix_cache(
    model: LoadedModel,
    tokenizer: Tokenizer,
    jobs: list[tuple[list[int], SamplingParams]],
    alone: list[RequestOutput],
) -> None:
    engine = make_engine(model, tokenizer)
    for turn in range(2):
        outputs = run(engine, jobs)
        assert [o.outputs for o in outputs] == [o.outputs for o in alone]
        if turn:
            for (prompt, _), output in zip(jobs, outputs, strict=True):
                assert output.num_cached_tokens >= (len(prompt) - 1) // 32 * 32


def test_answers_are_bit_identical_when_they_are_set_back_and_computed_again(
    model: LoadedModel,
    tokenizer: Tokenizer,
    jobs: list[tuple[list[int], SamplingParams]],
    alone: list[RequestOutput],
) -> None:
    longest = max(len(o.prompt_token_ids) + o.num_generated_tokens for o in alone)
    tight = make_engine(model, tokenizer, num_blocks=longest // 32 + 6, budget=96)
    outputs = run(tight, jobs)
    assert [o.outputs for o in outputs] == [o.outputs for o in alone]
    assert tight.stats().num_preemptions_total > 0


def test_one_request_with_guesses_is_the_one_without_in_fewer_steps(
    model: LoadedModel,
    tokenizer: Tokenizer,
    jobs: list[tuple[list[int], SamplingParams]],
    alone: list[RequestOutput],
) -> None:
    for job, expected in zip(jobs, alone, strict=True):
        (output,) = run(make_engine(model, tokenizer, num_guesses=8), [job])
        assert output.outputs == expected.outputs


def test_a_small_model_answers_in_the_form_it_is_given(alone: list[RequestOutput]) -> None:
    answer = json.loads(alone[3].outputs[0].text)
    assert answer["country"] in ("France", "Japan", "Peru")
    assert answer["population"] >= 1


def test_the_scores_of_a_prompt_are_those_of_generating_it(
    model: LoadedModel, tokenizer: Tokenizer, alone: list[RequestOutput]
) -> None:
    """What the model generated, read as a prompt, has the log probabilities it was chosen with."""
    question = asked(tokenizer, "Why is the sky blue?")
    greedy = SamplingParams(temperature=0, max_tokens=20, logprobs=2)
    (generated,) = run(make_engine(model, tokenizer), [(question, greedy)])
    (completion,) = generated.outputs
    both = [*question, *completion.token_ids]
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    for budget in (512, 13):
        (output,) = run(make_engine(model, tokenizer, budget=budget), [(both, scored)])
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[len(question) :] == completion.logprobs


def test_embeddings_are_bit_identical_alone_batched_and_chunked(
    model: LoadedModel, tokenizer: Tokenizer, prose: str
) -> None:
    ids = tokenizer.encode(prose)[:700]
    texts = [ids, ids[:1], ids[100:133], ids[200:290]]

    def embed(engine: Engine, chosen: list[list[int]]) -> list[npt.NDArray[np.float32]]:
        requests = [engine.add_embedding(text, "mean") for text in chosen]
        outputs = finish_all(engine)
        vectors = [outputs[request_id].embedding for request_id in requests]
        assert all(vector is not None for vector in vectors)
        return [vector for vector in vectors if vector is not None]

    single = [embed(make_engine(model, tokenizer), [text])[0] for text in texts]
    for budget in (512, 50):
        together = embed(make_engine(model, tokenizer, budget=budget), texts)
        assert all(np.array_equal(a, b) for a, b in zip(single, together, strict=True))
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-6 for vector in single)
