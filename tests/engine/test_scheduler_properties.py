"""Whatever the order of events: no block leaked or owned twice, no budget broken, no starving."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fuserve.decoder.step import BLOCK_SIZE_TOKENS
from tests.engine.workload import NUM_BLOCKS, Workload


class Events(RuleBasedStateMachine):
    """``Workload.step`` checks the promises; at the end everything must come to its end."""

    @initialize(
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 80),
        retain=st.booleans(),
        num_in_flight=st.sampled_from([1, 1, 2, 3]),
    )
    def start(self, max_num_seqs: int, budget: int, retain: bool, num_in_flight: int) -> None:
        self.work = Workload(max_num_seqs, budget, retain=retain, num_in_flight=num_in_flight)

    @rule(
        num_prompt=st.integers(1, NUM_BLOCKS * BLOCK_SIZE_TOKENS - 1),
        num_output=st.integers(1, 120),
        n=st.integers(1, 4),
        text=st.integers(1, 2),
        client=st.sampled_from(["ann", "bob"]),
        priority=st.integers(0, 1),
    )
    def add(
        self, num_prompt: int, num_output: int, n: int, text: int, client: str, priority: int
    ) -> None:
        self.work.add(num_prompt, num_output, n, text=text, client=client, priority=priority)

    @precondition(lambda self: self.work.alive)
    @rule(which=st.integers(0, 20), failed=st.booleans())
    def abort(self, which: int, failed: bool) -> None:
        self.work.abort(which, failed=failed)
        self.work.check_blocks()

    @precondition(lambda self: self.work.alive)
    @rule(times=st.integers(1, 40), num_drafts=st.integers(0, 5), num_right=st.integers(0, 5))
    def step(self, times: int, num_drafts: int, num_right: int) -> None:
        for _ in range(times):
            self.work.step(num_drafts, num_right)

    def teardown(self) -> None:
        if hasattr(self, "work"):
            self.work.drain()


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
