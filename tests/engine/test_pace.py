"""Prompts beside running streams get what the measured cost of steps leaves them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from fuserve.engine.block_manager import BlockManager
from fuserve.engine.pace import MIXED_STEP_RATIO, UNFELT_S, Pace
from fuserve.engine.scheduler import Scheduler
from fuserve.engine.sequence import Sequence
from fuserve.engine.step_cost import StepCost, StepLoad


@dataclass
class Machine:
    """What a step takes, with a little noise."""

    step_ms: float = 4.0
    decode_ms: float = 0.5
    context_ms: float = 0.1  # a thousand tokens
    prefill_ms: float = 0.4
    pairs_ms: float = 0.1  # a thousand pairs
    reads_ms: float = 0.2  # a thousand tokens before a chunk of several tokens

    def seconds(self, load: StepLoad, random_: random.Random) -> float:
        exact = (
            self.step_ms
            + self.decode_ms * (load.num_decode_tokens + load.num_lone_tokens)
            + self.context_ms * (load.num_context_tokens + load.num_lone_context) / 1000
            + self.prefill_ms * (load.num_prefill_tokens - load.num_lone_tokens)
            + self.pairs_ms * load.num_prefill_pairs / 1000
            + self.reads_ms * load.num_prefill_reads / 1000
        )
        return exact * random_.uniform(0.97, 1.03) / 1000

    def chunk_ms(self, start: int, num_tokens: int) -> float:
        """What a prompt's next tokens add."""
        if num_tokens == 1:
            return self.decode_ms + self.context_ms * start / 1000
        pairs = num_tokens * (start + num_tokens / 2) / 1000
        reads_ms = self.reads_ms * start / 1000
        return self.prefill_ms * num_tokens + self.pairs_ms * pairs + reads_ms

    def steps_needed(self, length: int, room_ms: float) -> int:
        """Steps of one who knows all costs and adds so much to each of them."""
        start = num_steps = 0
        while start < length:
            n = 1
            while n < 512 and self.chunk_ms(start, n + 1) <= room_ms:
                n += 1
            start, num_steps = start + n, num_steps + 1
        return num_steps


class Served:
    """A scheduler over a machine: streams decode, then a long prompt comes."""

    def __init__(self, machine: Machine, max_itl_s: float | None = None) -> None:
        self.machine = machine
        self.cost = StepCost()
        self.scheduler = Scheduler(
            BlockManager(2000),
            max_num_seqs=16,
            max_num_batched_tokens=512,
            pace=Pace(self.cost, max_itl_s),
        )
        self.steps: list[tuple[StepLoad, float]] = []
        self._random = random.Random(0)
        self._arrivals = 0

    def add(self, num_prompt: int) -> Sequence:
        self._arrivals += 1
        sequence = Sequence((0, self._arrivals, 0), [self._arrivals] * num_prompt, num_prompt)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        seconds = self.machine.seconds(schedule.load, self._random)
        self.cost.observe(schedule.load, seconds)
        self.steps.append((schedule.load, seconds))
        self.scheduler.advance(schedule.chunks)
        for chunk in schedule.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(0)

    def run(self, num_streams: int, long_prompt: int) -> list[float]:
        """Seconds of the steps while the long prompt is read."""
        for _ in range(num_streams):
            self.add(40)
        for _ in range(50 if num_streams else 0):
            self.step()
        long = self.add(long_prompt)
        begin = len(self.steps)
        while len(long.tokens) == long_prompt:
            self.step()
        self.scheduler.finish(long)
        return [seconds for _, seconds in self.steps[begin:]]


@pytest.mark.parametrize("num_streams", [1, 8, 15])
@pytest.mark.parametrize(
    "machine",
    [
        Machine(),
        Machine(40, 0.5, 0.5, 6, 1.3, 0),
        Machine(4, 0.01, 0, 0.01, 0, 0),
        Machine(3, 0.3, 1.2, 0.45, 0.3, 1.5),  # SmolLM2-135M in four bits on two cores
    ],
)
def test_streams_keep_flowing_while_a_long_prompt_is_read(
    machine: Machine, num_streams: int
) -> None:
    served = Served(machine)
    steps_s = served.run(num_streams, 4000)
    contexts = range(90, 90 + len(steps_s))  # the streams' own, which grow
    alone_ms = [
        machine.step_ms + num_streams * (machine.decode_ms + machine.context_ms * tokens / 1000)
        for tokens in contexts
    ]
    for step_s, ms in zip(steps_s, alone_ms, strict=True):
        assert step_s < max(2.5 * ms / 1000, 1.25 * UNFELT_S)
    needed = machine.steps_needed(4000, (MIXED_STEP_RATIO - 1) * alone_ms[0])
    assert len(steps_s) < 1.3 * needed + 60, "too slow a pace"


@pytest.mark.parametrize("max_itl_s", [0.015, 0.03, 0.1])
def test_a_limit_in_seconds_holds_and_is_used(max_itl_s: float) -> None:
    steps_s = Served(Machine(), max_itl_s).run(8, 4000)
    assert max(steps_s) < 1.15 * max_itl_s
    mixed = sorted(steps_s)[len(steps_s) // 4 :]
    assert sum(mixed) / len(mixed) > 0.85 * max_itl_s


def test_a_limit_that_decoding_alone_breaks_does_not_stop_prompts() -> None:
    served = Served(Machine(), max_itl_s=0.001)
    assert len(served.run(8, 300)) < 1000


def test_the_pace_follows_a_machine_that_slows_down() -> None:
    served = Served(Machine(), max_itl_s=0.05)
    served.run(8, 1000)
    served.machine = Machine(8, 1, 0.2, 0.8, 0.2)
    steps_s = served.run(2, 4000)
    assert max(steps_s[10:]) < 1.2 * 0.05


def test_without_running_streams_a_prompt_gets_the_whole_budget() -> None:
    served = Served(Machine())
    steps_s = served.run(0, 4000)
    assert [load.num_prefill_tokens for load, _ in served.steps[-len(steps_s) :][:-1]] == [512] * 7


def test_decoding_is_measured_alone_from_time_to_time() -> None:
    served = Served(Machine())
    served.run(8, 6000)
    kinds = [load.num_prefill_tokens > 0 for load, _ in served.steps[51:-1]]
    assert not all(kinds) and sum(kinds) > 0.95 * len(kinds)


def test_the_cost_of_a_chunk_and_the_chunk_of_a_cost_agree() -> None:
    cost = StepCost()
    random_ = random.Random(1)
    machine = Machine()
    for _ in range(200):
        n, start = random_.randrange(2, 512), random_.randrange(4000)
        load = StepLoad(0, 0, n, n * (2 * start + n) // 2, start)
        cost.observe(load, machine.seconds(load, random_))
    assert cost.chunk_tokens(cost.chunk_seconds(1000, 100) + 1e-9, 1000) in (99, 100)
    exact_ms = 0.4 * 100 + 0.1 * 105 + 1.5
    assert cost.chunk_seconds(1000, 100) == pytest.approx(exact_ms * 1e-3, rel=0.2)
    assert cost.chunk_tokens(0, 0) == 0


def test_the_ratio_is_below_three() -> None:
    assert MIXED_STEP_RATIO < 3
