"""The cache's memory is made real a little at a time, before it is needed."""

from __future__ import annotations

from collections.abc import Iterable

from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.touch_ahead import TouchAhead
from tests.engine.driving import finish_all
from tests.engine.fake_model import ByteCodec, FakeExecutor


class Recorder(FakeExecutor):
    """Remembers what was copied."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.copied: list[tuple[int, int]] = []

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        pairs = list(pairs)
        self.copied += pairs
        super().copy_blocks(pairs)


def test_one_block_is_touched_after_each_step_and_none_twice() -> None:
    executor = Recorder(num_blocks=10)
    ahead = TouchAhead(executor, num_ahead=3)
    for num_used in (0, 2, 2, 2, 2, 6, 6, 6, 6, 9, 9, 10, 10):
        ahead.after_step(num_used)
    assert [target for _, target in executor.copied] == [2, 3, 4, 6, 7, 8, 9]


def test_answers_are_those_of_a_cache_that_is_not_touched() -> None:
    config = EngineConfig(1024, 4, 64)
    executor, plain = Recorder(num_blocks=64), Engine(FakeExecutor(), ByteCodec(), config)
    plain._touch_ahead = TouchAhead(Recorder(1), 0)
    assert ask(Engine(executor, ByteCodec(), config)) == ask(plain)
    assert executor.copied


def ask(engine: Engine) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0, max_tokens=150)
    ids = [engine.add_request([number] * 40, params) for number in range(3)]
    outputs = finish_all(engine)
    return [outputs[request_id].outputs[0].token_ids for request_id in ids]
