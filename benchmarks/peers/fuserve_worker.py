"""fuserve's native executor, stepped directly, as the peers are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from worker import Work, option, run

from fuserve.decoder import ExecutorOptions, load_model
from fuserve.engine.direct import FixedSlots
from fuserve.engine.latency import StepRunner

TOKEN_BUDGET = 512


class Fuserve:
    """A loaded model with a KV cache for the largest batch."""

    def __init__(self, work: Work) -> None:
        slots = FixedSlots(max(work.batches), work.prompt_tokens + work.output_tokens)
        loaded = load_model(
            work.model,
            ExecutorOptions(
                dtype="float32" if option(work.options, "dtype") == "float32" else "auto",
                max_model_len=slots.max_len,
                max_num_seqs=slots.num_slots,
                max_num_batched_tokens=TOKEN_BUDGET,
                num_threads=work.threads,
                load_format="dummy" if work.model.endswith(".json") else "auto",
            ),
        )
        slots.check_fits(loaded.executor.num_blocks)
        self.vocab_size = loaded.spec.vocab_size
        self.runner = StepRunner(loaded.executor, slots, TOKEN_BUDGET)

    def prefill(self, prompts: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], list[float]]:
        runs = [self.runner.prefill(slot, prompt) for slot, prompt in enumerate(prompts)]
        return np.array([token for token, _ in runs], dtype=np.int32), [s for _, s in runs]

    def decode(self, first: npt.NDArray[np.int32], context: int, steps: int) -> float:
        return self.runner.decode(first, context, steps)


if __name__ == "__main__":
    run(Fuserve)
