"""OpenVINO GenAI's continuous batching pipeline on an IR with random weights.

OpenVINO's own defaults hold, such as its 8-bit KV cache. The pipeline takes token ids, so that it
needs no tokenizer here.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino
import openvino_genai
from worker import Work, run

TOKEN_BUDGET = 512
BLOCK_TOKENS = 32  # OpenVINO's on CPUs


class OpenVino:
    """A compiled model and its paged KV cache."""

    def __init__(self, work: Work) -> None:
        sequences = max(work.batches)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = TOKEN_BUDGET
        scheduler.max_num_seqs = sequences
        scheduler.enable_prefix_caching = False
        longest = work.prompt_tokens + work.output_tokens + _slack(sequences)
        scheduler.num_kv_blocks = sequences * (-(-longest // BLOCK_TOKENS) + 1)
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            work.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": work.threads}, {}
        )
        self.vocab_size = int(
            json.loads((Path(work.model) / "config.json").read_text())["vocab_size"]
        )
        self.prompts = np.zeros((0, 0), dtype=np.int32)
        self.num_requests = 0

    def prefill(self, prompts: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], list[float]]:
        self.prompts = prompts
        next_tokens, seconds = [], []
        for prompt in prompts:
            started = time.perf_counter()
            handle = self._add(prompt, max_new_tokens=1)
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            seconds.append(time.perf_counter() - started)
            next_tokens.append(handle.read_all()[0].generated_ids[0])
        return np.array(next_tokens, dtype=np.int32), seconds

    def decode(self, first: npt.NDArray[np.int32], context: int, steps: int) -> float:
        # The pipeline decodes the sequences it has while it prefills the next ones, so the first
        # of them are up to two tokens a sequence ahead when the timed part begins.
        slack = _slack(len(first))
        handles = [self._add(p, max_new_tokens=steps + slack) for p in self.prompts[: len(first)]]
        while not all(handle.can_read() for handle in handles):
            self.pipeline.step()
        started = time.perf_counter()
        for _ in range(steps):
            self.pipeline.step()
        seconds = time.perf_counter() - started
        for handle in handles:
            produced = _count_produced(handle)
            if not steps < produced < steps + slack:
                raise RuntimeError(f"a sequence decoded {produced} tokens in {steps} steps")
            handle.cancel()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return seconds

    def _add(
        self, prompt: npt.NDArray[np.int32], max_new_tokens: int
    ) -> openvino_genai.GenerationHandle:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.ignore_eos = True
        self.num_requests += 1
        tokens = openvino.Tensor(prompt[None].astype(np.int64))
        return self.pipeline.add_request(self.num_requests, tokens, config)


def _count_produced(handle: openvino_genai.GenerationHandle) -> int:
    """Tokens so far; ``read_all`` would wait for the rest."""
    produced = 0
    while handle.can_read():
        produced += sum(len(output.generated_ids) for output in handle.read().values())
    return produced


def _slack(sequences: int) -> int:
    """Tokens that the first of some sequences may be ahead of the last."""
    return 2 * sequences + 2


if __name__ == "__main__":
    run(OpenVino)
