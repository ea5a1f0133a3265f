"""llama.cpp, through llama-cpp-python's low-level API: one llama_batch over many sequences."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from worker import Work, run

UBATCH_TOKENS = 512  # llama.cpp's default


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user_data: Any) -> None:
    """Drop llama.cpp's log."""


class LlamaCpp:
    """A model and a context with one KV-cache stream per sequence."""

    def __init__(self, work: Work) -> None:
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            work.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {work.model}")
        sequences = max(work.batches)
        params = llama_cpp.llama_context_default_params()
        # Each sequence's share of the context is padded to 256 cells.
        per_sequence = -(-(work.prompt_tokens + work.output_tokens) // 256) * 256
        params.n_ctx = sequences * per_sequence
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = UBATCH_TOKENS
        params.n_threads = params.n_threads_batch = work.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self.batch = llama_cpp.llama_batch_init(UBATCH_TOKENS, 0, 1)

    def prefill(self, prompts: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], list[float]]:
        next_tokens, seconds = [], []
        for sequence, prompt in enumerate(prompts):
            llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
            started = time.perf_counter()
            for begin in range(0, len(prompt), UBATCH_TOKENS):
                part = prompt[begin : begin + UBATCH_TOKENS]
                is_last = begin + len(part) == len(prompt)
                self._fill(
                    [
                        (int(token), begin + i, sequence, is_last and i == len(part) - 1)
                        for i, token in enumerate(part)
                    ]
                )
            next_tokens.append(self._argmax(len(part) - 1))
            seconds.append(time.perf_counter() - started)
        return np.array(next_tokens, dtype=np.int32), seconds

    def decode(self, first: npt.NDArray[np.int32], context: int, steps: int) -> float:
        for sequence in range(len(first)):
            llama_cpp.llama_memory_seq_rm(self.memory, sequence, context, -1)
        tokens = first.tolist()
        started = time.perf_counter()
        for position in range(context, context + steps):
            self._fill([(token, position, s, True) for s, token in enumerate(tokens)])
            tokens = [self._argmax(row) for row in range(len(tokens))]
        return time.perf_counter() - started

    def _fill(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run one batch of (token, position, sequence, wants logits)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants_logits
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


if __name__ == "__main__":
    run(LlamaCpp)
