from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest

from fuserve.engine.async_engine import AsyncEngine
from fuserve.engine.intake import Terms
from fuserve.engine.sampling_params import SamplingParams
from fuserve.errors import (
    DeadlineError,
    EngineStoppedError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
)
from tests.engine.async_driving import GatedExecutor, Observer, prompt, read_all, running
from tests.engine.driving import make_engine, run_together
from tests.engine.fake_model import FakeExecutor

PARAMS = SamplingParams(seed=1, max_tokens=20)


def tokens_alone(number: int, params: SamplingParams = PARAMS) -> list[tuple[int, ...]]:
    (output,) = run_together(make_engine(), [(prompt(number), params)])
    return [completion.token_ids for completion in output.outputs]


def test_streams_get_their_own_tokens_piece_by_piece() -> None:
    async def main() -> None:
        async with running() as engine:
            streams = [engine.submit(prompt(i), PARAMS) for i in range(20)]
            results = await asyncio.gather(*map(read_all, streams))
        for i, (output, pieces) in enumerate(results):
            assert [completion.token_ids for completion in output.outputs] == tokens_alone(i)
            assert len(pieces) == 20
            assert tuple(t for p in pieces for t in p.token_ids) == output.outputs[0].token_ids

    asyncio.run(main())


def test_a_refused_request_is_refused_at_once() -> None:
    async def main() -> None:
        async with running() as engine:
            with pytest.raises(InvalidRequestError, match="The prompt is empty"):
                engine.submit([], PARAMS)
            stream = engine.submit([1], SamplingParams(max_tokens=500), request_id="a")
            with pytest.raises(InvalidRequestError, match="'a' is in use"):
                engine.submit([1], PARAMS, request_id="a")
            await stream.aclose()

    asyncio.run(main())


def test_submitting_does_not_wait_for_the_running_step() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        async with running(make_engine(executor)) as engine:
            first = engine.submit([1], PARAMS)
            await executor.wait_for_step()
            second = engine.submit([2], PARAMS)
            assert engine.stats().num_waiting == 1
            executor.let(100)
            await asyncio.gather(read_all(first), read_all(second))

    asyncio.run(main())


STATES = ["queued", "prefilling", "decoding", "preempted", "branching"]


@pytest.mark.parametrize("how", ["abort", "aclose", "cancel"])
@pytest.mark.parametrize("state", STATES)
def test_a_cancelled_request_gives_its_blocks_back_within_a_step(state: str, how: str) -> None:
    async def main() -> None:
        executor = GatedExecutor(num_blocks=8)
        observer = Observer()
        core = make_engine(executor, max_num_seqs=1 if state == "queued" else 4)
        async with running(core, observer=observer) as engine:
            other = engine.submit(prompt(1, 90), SamplingParams(seed=1, max_tokens=130))
            n = 3 if state == "branching" else 1
            victim = engine.submit(prompt(2, 90), SamplingParams(seed=1, n=n, max_tokens=130))
            reader = asyncio.create_task(read_all(victim))
            await executor.wait_for_step()
            num_steps = {"queued": 1, "prefilling": 2, "decoding": 6, "branching": 12}
            for _ in range(num_steps.get(state, 120)):
                executor.let(1)
                await executor.wait_for_step()
            if state == "preempted":
                assert engine.stats().num_preemptions_total > 0
            if how == "abort":
                engine.abort(victim.request_id)
            elif how == "aclose":
                await victim.aclose()
            else:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            del victim
            steps_before = len(observer.steps)
            executor.let(1)
            await observer.wait_finished()
            assert len(observer.steps) - steps_before <= 1
            assert observer.outputs[0].outputs[0].finish_reason == "abort"
            executor.let(500)
            await read_all(other)
            assert engine.stats().num_free_blocks == 8

    asyncio.run(main())


def test_a_dropped_stream_aborts_its_request() -> None:
    async def main() -> None:
        observer = Observer()
        executor = GatedExecutor()
        async with running(make_engine(executor), observer=observer) as engine:
            stream = engine.submit([1], PARAMS)
            await executor.wait_for_step()
            del stream
            executor.let(1)
            await observer.wait_finished()
            assert observer.outputs[0].outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_a_deadline_ends_a_request_with_an_error_and_no_other() -> None:
    now_s = [0.0]
    core = make_engine(clock=lambda: now_s[0])
    late = core.prepare(prompt(1), PARAMS, Terms(timeout_s=5))
    core.enqueue(late)
    core.enqueue(core.prepare(prompt(2), PARAMS, Terms(timeout_s=50)))
    core.step()
    now_s[0] = 6.0
    update, other = core.step()
    assert update.output is not None and isinstance(update.output.error, DeadlineError)
    assert "did not end within its 5 s" in str(update.output.error)
    assert update.output.outputs[0].finish_reason == "error"
    assert other.output is None
    assert core.stats().num_running == 1


def test_a_full_queue_turns_away_with_a_time_to_come_back() -> None:
    async def main() -> None:
        now_s = [0.0]
        executor = GatedExecutor()
        core = make_engine(executor, max_num_seqs=1)
        limits = {"max_queue_requests": 4, "max_queue_tokens": 100}
        async with running(core, clock=lambda: now_s[0], **limits) as engine:
            streams = [engine.submit(prompt(0), SamplingParams(max_tokens=2))]
            await executor.wait_for_step()
            streams += [engine.submit(prompt(i), SamplingParams(max_tokens=2)) for i in (1, 2, 3)]
            with pytest.raises(QueueFullError, match="of 90 there would be more than 100"):
                engine.submit(prompt(9, 90), PARAMS)
            streams.append(engine.submit(prompt(4), PARAMS))
            with pytest.raises(QueueFullError, match="4 requests are waiting") as full:
                engine.submit(prompt(5), PARAMS)
            assert full.value.retry_after_s == 1  # nothing is known of the rate
            for _ in range(4):  # two requests of two tokens end, at one token in five seconds
                now_s[0] += 5
                executor.let(1)
                await executor.wait_for_step()
            streams += [engine.submit(prompt(i), SamplingParams(max_tokens=2)) for i in (6, 7)]
            with pytest.raises(QueueFullError) as full:
                engine.submit(prompt(5), PARAMS)
            assert 20 <= full.value.retry_after_s <= 60
            executor.let(1000)
            await asyncio.gather(*map(read_all, streams))

    asyncio.run(main())


def test_the_rate_of_the_queue_is_not_that_of_hours_in_which_nobody_came() -> None:
    async def main() -> None:
        now_s = [0.0]
        executor = GatedExecutor()
        core = make_engine(executor, max_num_seqs=1)
        async with running(core, clock=lambda: now_s[0], max_queue_requests=2) as engine:
            for _ in range(3):  # each waits for a second, and then nobody comes for an hour
                first = engine.submit(prompt(0), SamplingParams(max_tokens=1))
                await executor.wait_for_step()
                second = engine.submit(prompt(1), SamplingParams(max_tokens=1))
                now_s[0] += 1
                executor.let(2)
                await asyncio.gather(read_all(first), read_all(second))
                await executor.wait_for_step()
                now_s[0] += 3600
            streams = [engine.submit(prompt(0), SamplingParams(max_tokens=1))]
            await executor.wait_for_step()
            streams += [engine.submit(prompt(i), SamplingParams(max_tokens=1)) for i in (1, 2)]
            with pytest.raises(QueueFullError) as full:
                engine.submit(prompt(3), PARAMS)
            assert full.value.retry_after_s <= 4
            executor.let(100)
            await asyncio.gather(*map(read_all, streams))

    asyncio.run(main())


def test_an_engine_that_hangs_beside_its_steps_is_told_by_health() -> None:
    async def main() -> None:
        now_s = [0.0]
        entered, released = threading.Event(), threading.Event()

        class Slow(Observer):
            def on_step(self, *args: object) -> None:
                entered.set()
                assert released.wait(30)

        options: dict[str, Any] = {"observer": Slow(), "clock": lambda: now_s[0]}
        async with running(stuck_after_s=10, **options) as engine:
            stream = engine.submit(prompt(1), SamplingParams(max_tokens=1))
            assert await asyncio.to_thread(entered.wait, 30)
            now_s[0] = 12.0
            assert not engine.health().ok
            released.set()
            await read_all(stream)

    asyncio.run(main())


async def healthy(engine: AsyncEngine) -> None:
    while not engine.health().ok:
        await asyncio.sleep(0)


def test_an_idle_engine_is_healthy_however_long_it_is_idle() -> None:
    async def main() -> None:
        now_s = [0.0]
        async with running(stuck_after_s=10, clock=lambda: now_s[0]) as engine:
            await read_all(engine.submit(prompt(1), SamplingParams(max_tokens=1)))
            now_s[0] = 1e6
            await asyncio.wait_for(healthy(engine), 30)

    asyncio.run(main())


def test_a_prompt_longer_than_the_queue_may_hold_is_taken_when_nothing_waits() -> None:
    async def main() -> None:
        async with running(max_queue_tokens=10) as engine:
            output, _ = await read_all(engine.submit(prompt(1, 100), PARAMS))
            assert output.num_generated_tokens == 20

    asyncio.run(main())


def test_500_requests_at_once_are_all_answered_and_nothing_is_mixed_or_leaked() -> None:
    async def main() -> None:
        async with running(max_queue_requests=64) as engine:
            turned_away = 0

            async def client(number: int) -> None:
                nonlocal turned_away
                await asyncio.sleep(0)
                try:
                    stream = engine.submit(prompt(number), PARAMS, client=f"key-{number % 7}")
                except QueueFullError as full:
                    assert full.retry_after_s >= 1
                    turned_away += 1
                    return
                output, _ = await read_all(stream)
                assert output.outputs[0].token_ids == tokens_alone(number)[0]

            await asyncio.gather(*(client(number) for number in range(500)))
            stats = engine.stats()
            assert turned_away > 0
            assert stats.num_running == stats.num_waiting == stats.num_waiting_tokens == 0
            assert stats.num_free_blocks == stats.num_blocks
            assert engine._thread._mailboxes == {}

    asyncio.run(main())


def test_200_clients_that_leave_at_random_moments_leave_nothing_behind() -> None:
    random_ = random.Random(0)

    async def main() -> None:
        core = make_engine(FakeExecutor(num_blocks=24), max_num_seqs=6)
        async with running(core, max_queue_requests=1000) as engine:

            async def client(number: int) -> None:
                params = SamplingParams(seed=number, max_tokens=30, n=random_.choice([1, 1, 3]))
                stream = engine.submit(prompt(number, random_.randrange(2, 120)), params)
                stays = random_.randrange(40)
                async for _ in stream:
                    stays -= 1
                    if stays <= 0:
                        await stream.aclose()

            tasks = [asyncio.create_task(client(number)) for number in range(200)]
            for task in random_.sample(tasks, 60):
                for _ in range(random_.randrange(20)):
                    await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            output, _ = await read_all(engine.submit(prompt(3), PARAMS))
            assert output.outputs[0].token_ids == tokens_alone(3)[0]
            stats = engine.stats()
            assert stats.num_running == stats.num_waiting == 0
            assert stats.num_free_blocks == 24
            assert engine._thread._mailboxes == {}

    asyncio.run(main())


def test_draining_lets_running_requests_end_and_takes_no_more() -> None:
    async def main() -> None:
        async with running() as engine:
            stream = engine.submit(prompt(1), PARAMS)
            drained = asyncio.create_task(engine.drain(30))
            await asyncio.sleep(0)
            with pytest.raises(EngineStoppedError, match="takes no more"):
                engine.submit(prompt(2), PARAMS)
            output, _ = await read_all(stream)
            assert output.outputs[0].token_ids == tokens_alone(1)[0]
            await drained
            assert not engine.health().ok

    asyncio.run(main())


def test_draining_aborts_what_does_not_end_in_time() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        async with running(make_engine(executor)) as engine:
            streams = [engine.submit(prompt(i), PARAMS) for i in range(10)]
            await executor.wait_for_step()
            drained = asyncio.create_task(engine.drain(0))
            executor.let(1000)
            for output, _ in await asyncio.gather(*map(read_all, streams)):
                assert output.outputs[0].finish_reason in ("abort", "length")
            await drained

    asyncio.run(main())


class FailingExecutor(FakeExecutor):
    """Fails every step that one of the victims, named by their first tokens, takes part in."""

    def __init__(self, *victims: int) -> None:
        super().__init__()
        self.victims = victims
        self.num_failures = 0

    def step(self, batch: Any) -> Any:
        for s, table in enumerate(batch.block_tables):
            start = batch.query_starts[s]
            first = batch.tokens[start] if batch.positions[start] == 0 else self._cache[table[0], 0]
            if first in self.victims and batch.positions[start] >= 10:
                self.num_failures += 1
                raise RuntimeError("injected")
        return super().step(batch)


@pytest.mark.parametrize("victims", [[2], [1, 3], [0, 1, 2, 3, 4]])
def test_a_step_that_fails_ends_only_the_requests_that_make_it_fail(victims: list[int]) -> None:
    async def main() -> None:
        executor = FailingExecutor(*victims)
        async with running(make_engine(executor)) as engine:
            streams = [engine.submit(prompt(i), PARAMS) for i in range(5)]
            for i, (output, _) in enumerate(await asyncio.gather(*map(read_all, streams))):
                if i in victims:
                    assert isinstance(output.error, RequestFailedError)
                    assert output.request_id in str(output.error)
                    assert "injected" in str(output.error)
                else:
                    assert output.outputs[0].token_ids == tokens_alone(i)[0]
            assert executor.num_failures >= len(victims)
            assert engine.health().ok
            output, _ = await read_all(engine.submit(prompt(9), PARAMS))
            assert output.outputs[0].token_ids == tokens_alone(9)[0]
            assert engine.stats().num_free_blocks == 64

    asyncio.run(main())


def test_a_failure_of_the_engine_itself_ends_what_runs_and_the_engine_goes_on() -> None:
    async def main() -> None:
        core = make_engine()
        async with running(core) as engine:
            healthy = core._scheduler.schedule
            core._scheduler.schedule = None  # type: ignore[assignment]
            output, _ = await read_all(engine.submit(prompt(1), PARAMS))
            assert isinstance(output.error, RequestFailedError)
            core._scheduler.schedule = healthy  # type: ignore[method-assign]
            output, _ = await read_all(engine.submit(prompt(1), PARAMS))
            assert output.outputs[0].token_ids == tokens_alone(1)[0]
            assert engine.health().ok

    asyncio.run(main())


def test_a_dead_thread_is_told_to_all_who_wait_and_all_who_come() -> None:
    async def main() -> None:
        class Fatal(Observer):
            def on_step(self, *args: object) -> None:
                raise KeyboardInterrupt

        engine = AsyncEngine(make_engine(), observer=Fatal())
        assert not engine.health().ok
        engine.start()
        with pytest.raises(EngineStoppedError, match="thread has died: KeyboardInterrupt"):
            await read_all(engine.submit(prompt(1), SamplingParams(max_tokens=500)))
        assert engine.health().reason.startswith("The engine's thread has died")
        with pytest.raises(EngineStoppedError):
            engine.submit(prompt(1), PARAMS)
        await engine.drain(1)

    asyncio.run(main())


def test_a_step_that_does_not_end_is_told_by_health() -> None:
    async def main() -> None:
        now_s = [0.0]
        executor = GatedExecutor()
        core = make_engine(executor)
        async with running(core, stuck_after_s=10, clock=lambda: now_s[0]) as engine:
            stream = engine.submit(prompt(1), SamplingParams(max_tokens=2))
            await executor.wait_for_step()
            assert engine.health().ok
            now_s[0] = 12.0
            assert engine.health().reason == "The engine has been in one step for 12 s."
            executor.let(10)
            await read_all(stream)
            assert engine.health().ok

    asyncio.run(main())


def test_the_observer_hears_of_steps_and_ends() -> None:
    async def main() -> None:
        observer = Observer()
        async with running(observer=observer) as engine:
            await read_all(engine.submit(prompt(1, 100), SamplingParams(seed=1, max_tokens=5)))
        assert [step.kind for step, _ in observer.steps] == ["prefill"] * 2 + ["decode"] * 4
        assert [step.num_prefill_tokens for step, _ in observer.steps[:2]] == [64, 36]
        assert observer.steps[-1][1].generation_tokens_total == 5
        assert observer.steps[-1][1].prompt_tokens_total == 100
        assert [output.num_generated_tokens for output in observer.outputs] == [5]

    asyncio.run(main())
