"""Several steps in flight change no token, and ranks that fail end requests, not the engine."""

from __future__ import annotations

import asyncio
from functools import cache

import numpy as np
import pytest

from fuserve.engine.backoff import Backoff
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.outputs import RequestOutput
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.shared_engine import Query, SharedEngine
from fuserve.errors import RankFailedError
from tests.engine.async_driving import prompt, read_all, running
from tests.engine.driving import finish_all, make_engine, run_together
from tests.engine.fake_model import ByteCodec, FakeExecutor, repetitive_logits
from tests.engine.pipelined_jobs import JOBS
from tests.engine.pipelined_model import PipelinedFake

PARAMS = SamplingParams(seed=1, max_tokens=20)


@cache
def expected() -> list[object]:
    return results(make(FakeExecutor()))


def make(executor: FakeExecutor, num_guesses: int = 0) -> Engine:
    executor.logits_of = repetitive_logits
    return make_engine(executor, num_speculative_tokens=num_guesses)


def results(engine: Engine) -> list[object]:
    outputs: list[RequestOutput] = run_together(engine, JOBS)
    return [(output.outputs, output.prompt_logprobs) for output in outputs]


@pytest.mark.parametrize("num_in_flight", [1, 2, 4])
@pytest.mark.parametrize("num_blocks", [64, 10])
@pytest.mark.parametrize("num_guesses", [0, 4])
def test_steps_in_flight_change_no_token(
    num_in_flight: int, num_blocks: int, num_guesses: int
) -> None:
    executor = PipelinedFake(num_in_flight, num_blocks=num_blocks)
    engine = make(executor, num_guesses)
    assert results(engine) == expected()
    assert executor.most_in_flight == num_in_flight
    assert engine.num_free_blocks == num_blocks
    if num_blocks < 64:
        assert engine.stats().num_preemptions_total > 0


def test_running_sequences_are_shared_out_over_the_steps_in_flight() -> None:
    executor = PipelinedFake(2)
    engine = make_engine(executor)
    for number in range(8):
        engine.add_request(prompt(number), SamplingParams(max_tokens=60))
    finish_all(engine)
    sizes = [len(batch.tokens) for batch in executor.batches[20:40]]
    assert sizes == [4] * 20


def test_a_long_prompt_alone_fills_the_pipeline() -> None:
    executor = PipelinedFake(3)
    run_together(make_engine(executor), [(prompt(1, 240), PARAMS)])
    assert executor.most_in_flight == 3


def test_embeddings_are_the_same_with_steps_in_flight() -> None:
    vectors = []
    for executor in (FakeExecutor(), PipelinedFake(3)):
        engine = make_engine(executor)
        requests = [engine.add_embedding(prompt(i, 150), "mean") for i in range(3)]
        outputs = finish_all(engine)
        vectors.append([outputs[request_id].embedding for request_id in requests])
    assert np.array_equal(vectors[0], vectors[1])


def test_a_request_that_is_aborted_in_flight_leaves_no_trace() -> None:
    executor = PipelinedFake(3, num_blocks=20)
    engine = make(executor)
    for number in range(30):
        leaving = engine.add_request(prompt(number, 100), SamplingParams(max_tokens=50))
        for _ in range(1 + number % 5):
            engine.step()
        engine.abort(leaving)
    assert results(engine) == expected()
    assert engine.num_free_blocks == 20


def test_when_a_rank_fails_all_requests_end_with_the_reason_and_none_is_cached() -> None:
    executor = PipelinedFake(2)
    engine = make(executor)
    ids = [engine.add_request(prompt(1, 100), PARAMS) for _ in range(3)]
    for _ in range(4):
        engine.step()
    executor.fail("rank 1 was killed")
    outputs = {update.request_id: update.output for update in engine.step()}
    for request_id in ids:
        output = outputs[request_id]
        assert output is not None
        assert isinstance(output.error, RankFailedError)
        assert "rank 1 was killed" in str(output.error)
    assert engine.num_free_blocks == 64 and not engine.has_unfinished
    engine.restart()
    assert results(engine) == expected()  # nothing of the lost cache is found


def test_the_server_is_not_ready_until_the_ranks_run_again_and_then_serves() -> None:
    async def main() -> None:
        executor = PipelinedFake(2)
        executor.restarts_to_fail = 3
        async with running(make_engine(executor), backoff=Backoff(0.001, 0.01)) as engine:
            for kill in range(4):
                streams = [
                    engine.submit(prompt(i), SamplingParams(max_tokens=900)) for i in range(3)
                ]
                await anext(streams[0])
                executor.fail(f"kill {kill}")
                for output, _ in await asyncio.gather(*map(read_all, streams)):
                    assert isinstance(output.error, RankFailedError)
                    assert f"kill {kill}" in str(output.error)
                while not engine.readiness().ok:
                    with pytest.raises(RankFailedError):
                        engine.submit(prompt(0), PARAMS)
                    assert engine.health().ok
                    await asyncio.sleep(0.001)
                output, _ = await read_all(engine.submit(prompt(5), PARAMS))
                assert output.error is None
            assert executor.num_restarts == 4

    asyncio.run(main())


def test_ranks_that_die_while_nothing_runs_are_started_again() -> None:
    async def main() -> None:
        executor = PipelinedFake(2)
        async with running(make_engine(executor), backoff=Backoff(0.01)) as engine:
            executor.fail("out of memory")
            while executor.num_restarts == 0 or not engine.readiness().ok:
                await asyncio.sleep(0.001)

    asyncio.run(main())


def test_a_server_can_stop_while_its_ranks_do_not_start() -> None:
    async def main() -> None:
        executor = PipelinedFake(2)
        executor.restarts_to_fail = 1000
        async with running(make_engine(executor), backoff=Backoff(0.001, 30.0)) as engine:
            executor.fail("rank 1 was killed")
            await asyncio.sleep(0.05)
            await engine.drain(5.0)
            assert not engine.health().ok

    asyncio.run(main())


def test_a_library_user_gets_the_error_and_the_next_call_works() -> None:
    class Dying(PipelinedFake):
        def finish(self) -> object:
            if len(self.batches) == 5 and self.num_restarts == 0:
                self.fail("rank 1 was killed")
            return super().finish()

    executor = Dying(2)
    shared = SharedEngine(Engine(executor, ByteCodec(), EngineConfig(1024, 8, 64)))
    query = Query(None, prompt(1), PARAMS)
    (failed,) = shared.run([query])
    assert isinstance(failed.error, RankFailedError)
    (output,) = shared.run([query])
    assert output.error is None
    shared.close()
