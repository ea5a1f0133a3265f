"""What a long context adds to a decode step of the whole decoder, beside the bytes it adds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from fuserve.decoder import ExecutorOptions, LoadedModel, load_model
from fuserve.decoder.step import BLOCK_SIZE_TOKENS, Executor
from fuserve.engine.direct import Chunk, FixedSlots
from fuserve.engine.latency import StepRunner
from fuserve.kernels.machine import measure_bandwidth

from .measure import Claim, Effort, Row

CONFIG = Path(__file__).parent.parent / "configs" / "llama-1b.json"
SHORT, LONG = 128, 8192
CONTEXTS = (SHORT, 2048, LONG)
STEPS = 8
QUICK_LAYERS = 4  # what a context adds is the same in every layer
STEP_TOKENS = 512


def measure_contexts(effort: Effort, quick: bool) -> Iterator[Row | Claim]:
    """Decode steps of the 1.07 B Llama shape in int4 that end at several contexts."""
    for kv_cache_dtype in ("float16",) if quick else ("float16", "float32"):
        yield from _measure(kv_cache_dtype, effort, quick)


def _measure(kv_cache_dtype: str, effort: Effort, quick: bool) -> Iterator[Row | Claim]:
    loaded = _load(kv_cache_dtype, effort.threads, quick)
    slots = FixedSlots(1, LONG)
    slots.check_fits(loaded.executor.num_blocks)
    runner = StepRunner(loaded.executor, slots, STEP_TOKENS)
    _fill(loaded.executor)
    read_bytes_per_s = measure_bandwidth(effort.threads)
    first = np.array([1], np.int32)
    seconds: dict[int, list[float]] = {context: [] for context in CONTEXTS}
    for _ in range(effort.rounds + 1):
        for context in CONTEXTS:
            seconds[context].append(runner.decode(first, context - STEPS, STEPS) / STEPS)
    kv_bytes = loaded.report.kv_cache_bytes / (loaded.executor.num_blocks * BLOCK_SIZE_TOKENS)
    step_s = {context: median(runs[1:]) for context, runs in seconds.items()}
    for context in CONTEXTS:
        num_bytes = loaded.report.bytes_read_per_token + kv_bytes * (context - STEPS / 2)
        yield Row(
            f"decode step, int4, {kv_cache_dtype} cache",
            f"{CONFIG.stem}, {loaded.spec.num_layers} layers",
            f"context {context}",
            step_s[context],
            num_bytes / step_s[context] / 1e9,
            "GB/s",
            "memory",
            read_bytes_per_s / 1e9,
            "",
            None,
        )
    added_s = step_s[LONG] - step_s[SHORT]
    added_bytes = kv_bytes * (LONG - SHORT)
    if kv_cache_dtype == "float16":
        yield Claim(
            f"decode at context {LONG} against {SHORT}, f16 cache: bandwidth-bound share of the "
            f"added time ({loaded.spec.num_layers} layers)",
            added_bytes / read_bytes_per_s / added_s,
            0.75,
            f"{added_s * 1e3:.2f} ms and {added_bytes / 1e6:.0f} MB added a step; "
            f"{added_bytes / added_s / 1e9:.1f} of {read_bytes_per_s / 1e9:.1f} GB/s",
        )


def _load(kv_cache_dtype: str, threads: int, quick: bool) -> LoadedModel:
    config = json.loads(CONFIG.read_text())
    if quick:
        config["num_hidden_layers"] = QUICK_LAYERS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return load_model(
            str(path),
            ExecutorOptions(
                quantization="int4",
                quantize_embeddings=True,
                kv_cache_dtype="float16" if kv_cache_dtype == "float16" else "float32",
                max_model_len=LONG,
                max_num_seqs=1,
                max_num_batched_tokens=STEP_TOKENS,
                num_threads=threads,
                load_format="dummy",
            ),
        )


def _fill(executor: Executor) -> None:
    """Write every block of the cache, so that each has memory of its own to be read from.

    Every block is a sequence of its own here: what it holds does not matter, and attention over
    one block costs nothing.
    """
    slots = FixedSlots(-(-LONG // BLOCK_SIZE_TOKENS), BLOCK_SIZE_TOKENS)
    slots_per_step = STEP_TOKENS // BLOCK_SIZE_TOKENS
    tokens = np.arange(BLOCK_SIZE_TOKENS, dtype=np.int32)
    for begin in range(0, slots.num_slots, slots_per_step):
        chunks = [
            Chunk(slot, 0, tokens + slot, BLOCK_SIZE_TOKENS)
            for slot in range(begin, min(begin + slots_per_step, slots.num_slots))
        ]
        executor.step(slots.step_batch(chunks))
