"""What does guessing ahead gain where a text repeats itself, and what does it lose on prose?

The same requests with and without guesses, in turns, one engine at a time; the tokens are checked
to be equal. Also measures what a further token adds to a step, which ``engine/speculation.py``
takes as given.

    python benchmarks/speculation.py --model demo --repeat 3
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from fuserve.checkpoints import Tokenizer, load_tokenizer
from fuserve.decoder import ExecutorOptions, LoadedModel, load_model
from fuserve.engine.config import EngineConfig
from fuserve.engine.direct import Chunk, FixedSlots
from fuserve.engine.engine import Engine
from fuserve.engine.outputs import RequestOutput
from fuserve.engine.sampling_params import SamplingParams

PASSAGE = (Path(__file__).parent.parent / "tests" / "data" / "prose.txt").read_text()[:1500]
LIST = ", ".join(f"item {number}: apples and pears" for number in range(1, 25))
PROMPTS = {
    "quoting a passage": f"{PASSAGE}\n\n{PASSAGE}\n\n{PASSAGE[:100]}",
    "counting in a list": f"{LIST}, item",
    "prose": "The lighthouse keeper found an old map in the",
}
NUM_GUESSES = 8
CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Run:
    """A request's output and its decode speed."""

    output: RequestOutput
    tokens_per_s: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=200)
    given = parser.parse_args()
    options = ExecutorOptions(max_model_len=2048, max_num_seqs=16)
    model = load_model(given.model, options)
    assert model.checkpoint is not None
    tokenizer = load_tokenizer(model.checkpoint)
    costs = token_costs(model, given.repeat)
    print("time of a step by its tokens: " + ", ".join(f"{n}: {c:.2f}" for n, c in costs.items()))
    for name, prompt in PROMPTS.items():
        for temperature in (0.0, 0.7):
            params = SamplingParams(
                temperature=temperature, seed=1, max_tokens=given.max_tokens, ignore_eos=True
            )
            compare(name, model, tokenizer, prompt, params, given.repeat)


def compare(
    name: str,
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    repeat: int,
) -> None:
    """One line: tokens/s without and with guesses."""
    runs: dict[int, list[Run]] = {0: [], NUM_GUESSES: []}
    for _ in range(repeat):
        for num_guesses, done in runs.items():
            done.append(complete(model, tokenizer, prompt, params, num_guesses))
    plain, guessed = (median(run.tokens_per_s for run in done) for done in runs.values())
    output = runs[NUM_GUESSES][0].output
    assert output.outputs == runs[0][0].output.outputs, "guessing has changed the tokens"
    print(
        f"{name}, temperature {params.temperature:g}: {plain:.0f} tokens/s, with guesses "
        f"{guessed:.0f} ({guessed / plain - 1:+.0%}; {output.num_accepted_tokens} of "
        f"{output.num_draft_tokens} right)"
    )


def complete(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    num_guesses: int,
) -> Run:
    """Complete once, on an engine of its own."""
    config = EngineConfig(model.max_model_len, num_speculative_tokens=num_guesses)
    engine = Engine(model.executor, tokenizer, config)
    engine.add_request(tokenizer.encode(prompt), params)
    while True:
        for update in engine.step():
            if update.output is not None:
                decode_s = update.output.timings.decode_s
                assert decode_s is not None
                return Run(update.output, (update.output.num_generated_tokens - 1) / decode_s)


def token_costs(model: LoadedModel, repeat: int) -> dict[int, float]:
    """Median time of a step of n tokens of one sequence with logits for each; 1 token is 1."""
    slots = FixedSlots(1, CONTEXT + 16)
    tokens = np.arange(CONTEXT + 16, dtype=np.int32)
    model.executor.step(slots.step_batch([Chunk(0, 0, tokens[:CONTEXT], CONTEXT)]))
    seconds: dict[int, list[float]] = {1: [], 2: [], 3: [], 5: [], 9: []}
    for _ in range(20 * repeat):
        for count, times in seconds.items():
            batch = slots.step_batch([Chunk(0, CONTEXT, tokens[CONTEXT:][:count], 0)])
            started = time.perf_counter()
            model.executor.step(batch)
            times.append(time.perf_counter() - started)
    return {count: median(times) / median(seconds[1]) for count, times in seconds.items()}


if __name__ == "__main__":
    main()
