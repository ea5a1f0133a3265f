"""transformers in fp32: eager PyTorch with its default attention and dynamic cache.

The weights are random, from a config.json; its speed does not depend on them.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from worker import Work, run


class Transformers:
    """A model and the cache of the sequences that were prefilled last."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads)
        config = AutoConfig.from_pretrained(work.model)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.eval()
        self.vocab_size = int(self.model.config.vocab_size)
        self.prompts = np.zeros((0, 0), dtype=np.int32)

    @torch.inference_mode()
    def prefill(self, prompts: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], list[float]]:
        self.prompts = prompts
        next_tokens, seconds = [], []
        for prompt in prompts:
            started = time.perf_counter()
            tokens, _ = self._fill(prompt[None])
            next_tokens.append(int(tokens[0, 0]))
            seconds.append(time.perf_counter() - started)
        return np.array(next_tokens, dtype=np.int32), seconds

    @torch.inference_mode()
    def decode(self, first: npt.NDArray[np.int32], context: int, steps: int) -> float:
        # A cache of transformers is one tensor per layer for the whole batch, so each batch size
        # fills its own, outside the timed part.
        tokens, cache = self._fill(self.prompts[: len(first)])
        started = time.perf_counter()
        for _ in range(steps):
            output = self.model(tokens, past_key_values=cache, use_cache=True)
            tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        return time.perf_counter() - started

    def _fill(self, prompts: npt.NDArray[np.int32]) -> tuple[torch.Tensor, DynamicCache]:
        cache = DynamicCache(config=self.model.config)
        tokens = torch.from_numpy(prompts.astype(np.int64))
        output = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(dim=-1, keepdim=True), cache


if __name__ == "__main__":
    run(Transformers)
