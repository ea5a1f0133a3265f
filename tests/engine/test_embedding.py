"""A prompt as one vector: the same alone, batched, chunked, preempted and from the cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fuserve.engine.embedding import Embedding, Pooling
from fuserve.engine.engine import Engine
from fuserve.errors import CapacityError, InvalidRequestError, RequestFailedError
from tests.engine.driving import finish_all, make_engine
from tests.engine.fake_model import FakeExecutor, hashed_state
from tests.engine.test_batch_invariance import jobs

PROMPT = np.random.default_rng(2).integers(0, 256, size=120).tolist()
Vector = npt.NDArray[np.float32]


def embedded(
    engine: Engine, prompt: list[int], pooling: Pooling = "mean", *, normalize: bool = True
) -> Vector:
    request_id = engine.add_embedding(prompt, pooling, normalize=normalize)
    output = finish_all(engine)[request_id]
    assert output.error is None and output.outputs == ()
    assert output.embedding is not None
    return output.embedding


def states(prompt: list[int]) -> npt.NDArray[np.float64]:
    rows = [hashed_state(prompt[: end + 1]) for end in range(len(prompt))]
    return np.array(rows, dtype=np.float64)


def test_the_mean_and_the_last_hidden_state_at_unit_length() -> None:
    for pooling, pooled in (("mean", states(PROMPT).mean(axis=0)), ("last", states(PROMPT)[-1])):
        vector = embedded(make_engine(), PROMPT, pooling)
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), rtol=1e-6)
        plain = embedded(make_engine(), PROMPT, pooling, normalize=False)
        np.testing.assert_allclose(plain, pooled, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 512},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 17, "num_blocks": 7},
        {"max_num_batched_tokens": 64, "num_speculative_tokens": 5},
    ],
    ids=str,
)
def test_it_is_bit_identical_however_it_was_computed(
    options: dict[str, int], pooling: Pooling
) -> None:
    alone = embedded(make_engine(), PROMPT, pooling)
    executor = FakeExecutor(options.get("num_blocks", 64))
    engine = make_engine(executor, **{k: v for k, v in options.items() if k != "num_blocks"})
    others = [engine.add_request(list(prompt), params) for prompt, params in jobs()]
    ids = [engine.add_embedding(PROMPT[:size], pooling) for size in (120, 1, 33, 120)]
    outputs = finish_all(engine)
    assert np.array_equal(outputs[ids[0]].embedding, alone)
    assert np.array_equal(outputs[ids[3]].embedding, alone)
    assert np.array_equal(outputs[ids[1]].embedding, embedded(make_engine(), PROMPT[:1], pooling))
    assert all(outputs[request_id].outputs[0].token_ids for request_id in others)
    assert engine.num_free_blocks == executor.num_blocks


def test_the_last_hidden_state_may_come_from_a_cached_prefix() -> None:
    engine = make_engine()
    vectors, cached = [], []
    for pooling in ("mean", "last", "mean"):
        request_id = engine.add_embedding(PROMPT, pooling)
        output = finish_all(engine)[request_id]
        vectors.append(output.embedding)
        cached.append(output.num_cached_tokens)
    assert cached == [0, 96, 0]
    assert np.array_equal(vectors[0], vectors[2])
    assert np.array_equal(vectors[1], embedded(make_engine(), PROMPT, "last"))


def test_a_prompt_may_fill_the_model_to_its_last_token() -> None:
    engine = make_engine(FakeExecutor(num_blocks=4), max_model_len=128)
    assert embedded(engine, [1] * 128).shape == (6,)
    with pytest.raises(InvalidRequestError, match="is more than max_model_len = 128"):
        engine.add_embedding([1] * 129, "mean")
    with pytest.raises(CapacityError):
        make_engine(FakeExecutor(num_blocks=1)).add_embedding([1] * 33, "mean")
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.check_embedding([])
    with pytest.raises(InvalidRequestError, match="pooling must be one of"):
        engine.add_embedding([1], "max")  # type: ignore[arg-type]


def test_an_aborted_one_frees_its_blocks_at_once() -> None:
    engine = make_engine(max_num_batched_tokens=16)
    request_id = engine.add_embedding(PROMPT, "mean")
    engine.step()
    assert engine.num_free_blocks < 64
    output = engine.abort(request_id)
    assert output is not None and output.embedding is None
    assert engine.num_free_blocks == 64


def test_hidden_states_that_are_no_numbers_fail_their_request_only() -> None:
    class Damaged(FakeExecutor):
        def step(self, batch):
            logits = super().step(batch)
            if len(batch.hidden):
                batch.hidden[0, 0] = np.nan
            return logits

    engine = make_engine(Damaged())
    request_id = engine.add_embedding(PROMPT, "mean")
    (other,) = [engine.add_request(list(prompt), params) for prompt, params in jobs()[:1]]
    outputs = finish_all(engine)
    assert isinstance(outputs[request_id].error, RequestFailedError)
    assert outputs[request_id].embedding is None
    assert outputs[other].error is None


def test_a_vector_of_zeros_stays_what_it_is() -> None:
    zeros = Embedding(2, "mean", normalize=True)
    zeros.read(np.zeros((2, 3), dtype=np.float32))
    assert zeros.vector is not None and not zeros.vector.any()
