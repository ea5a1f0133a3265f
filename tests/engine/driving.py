"""Runs engines over the fake model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.outputs import Piece, RequestOutput
from fuserve.engine.sampling_params import SamplingParams
from tests.engine.fake_model import ByteCodec, FakeExecutor, Logits

Job = tuple[Sequence[int], SamplingParams]


def make_engine(
    executor: FakeExecutor | None = None,
    *,
    max_model_len: int = 1024,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    num_speculative_tokens: int = 0,
    enable_prefix_caching: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    config = EngineConfig(
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        num_speculative_tokens=num_speculative_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
    return Engine(executor or FakeExecutor(), ByteCodec(), config, clock=clock)


def finish_all(engine: Engine, max_steps: int = 5000) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished:
            return outputs
        for update in engine.step():
            if update.output is not None:
                outputs[update.request_id] = update.output
    raise AssertionError("the engine does not come to an end")


def run_together(engine: Engine, jobs: Sequence[Job]) -> list[RequestOutput]:
    ids = [engine.add_request(list(prompt), params) for prompt, params in jobs]
    outputs = finish_all(engine)
    return [outputs[request_id] for request_id in ids]


def ask(
    question: str, params: SamplingParams, logits_of: object = None
) -> tuple[RequestOutput, list[Piece]]:
    """One question; the output and all pieces."""
    executor = FakeExecutor(logits_of=logits_of) if callable(logits_of) else FakeExecutor()
    engine = make_engine(executor)
    engine.add_request(ByteCodec().encode(question), params, prompt=question)
    pieces: list[Piece] = []
    while True:
        for update in engine.step():
            pieces += update.pieces
            if update.output is not None:
                return update.output, pieces


__all__ = ["Job", "Logits", "ask", "finish_all", "make_engine", "run_together"]
