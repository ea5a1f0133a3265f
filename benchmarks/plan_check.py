"""Set what ``fuserve plan`` predicts for one rank beside what the same machine measures.

``python benchmarks/plan_check.py`` takes some minutes; both sides use the same threads, and the
ceilings are measured before each model, as a shared machine drifts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from fuserve.decoder import ExecutorOptions, load_model
from fuserve.engine.latency import measure_latency
from fuserve.planning import Machine, Network, Wish, Workload, make_plan
from fuserve.planning.model import open_for_planning

CONFIGS = Path(__file__).parent / "configs"
RESULTS = Path(__file__).parent / "results" / "plan_check.json"
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 16
BATCHES = (1, 8, 16)
UNUSED = Network(latency_s=1.0, bytes_per_s=1.0)  # one rank sends nothing


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and how it is held."""

    name: str
    model: str
    options: ExecutorOptions


def _case(name: str, model: str, quantization: str | None, load_format: str = "auto") -> Case:
    options = ExecutorOptions(
        quantization=quantization,  # type: ignore[arg-type]
        quantize_embeddings=quantization is not None,
        load_format=load_format,  # type: ignore[arg-type]
        max_model_len=PROMPT_TOKENS + OUTPUT_TOKENS,
        max_num_seqs=max(BATCHES),
    )
    return Case(name, model, options)


LLAMA = str(CONFIGS / "llama-1b.json")
CASES = (
    _case("SmolLM2-135M Q4_1", "demo", None),
    _case("1.07 B int4", LLAMA, "int4", "dummy"),
    _case("1.07 B int8", LLAMA, "int8", "dummy"),
    _case("1.07 B float16", LLAMA, None, "dummy"),
)


def compare(case: Case, repeat: int) -> list[tuple[str, float, float]]:
    """(what, predicted, measured): bytes of weights and cache, then tokens a second."""
    machine = Machine.measured()
    loaded = load_model(case.model, case.options)
    try:
        result = measure_latency(
            loaded.executor,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            batches=BATCHES,
            repeat=repeat,
            max_num_batched_tokens=case.options.max_num_batched_tokens,
        )
        report = loaded.report
    finally:
        loaded.close()
    rows: list[tuple[str, float, float]] = []
    for speed in result.decode:
        work = Workload(
            PROMPT_TOKENS + OUTPUT_TOKENS,
            speed.batch,
            case.options.max_num_batched_tokens,
            PROMPT_TOKENS,
            OUTPUT_TOKENS,
        )
        plan = make_plan(
            open_for_planning(case.model),
            {case.name: case.options},
            machine,
            UNUSED,
            work,
            Wish(memory_bytes=1 << 40, hosts=1),
        ).candidates[0]
        if speed.batch == BATCHES[0]:
            rows.append(("prefill 512", plan.speed.prefill_one, result.prefill_tokens_per_s))
        rows.append((f"decode {speed.batch}", plan.speed.decode_many, speed.tokens_per_s))
        if speed.batch == max(BATCHES):
            rows.append(("weights, MB", plan.memory[0].weights / 1e6, report.packed_bytes / 1e6))
            rows.append(
                ("KV cache, MB", plan.memory[0].kv_cache / 1e6, report.kv_cache_bytes / 1e6)
            )
    return rows


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", help="cases whose name has this in it")
    arguments = parser.parse_args()
    print("| model | | predicted | measured | predicted / measured |\n|---|---|---|---|---|")
    found: dict[str, list[tuple[str, float, float]]] = {}
    for case in CASES:
        if arguments.only and arguments.only not in case.name:
            continue
        found[case.name] = compare(case, arguments.repeat)
        for what, predicted, measured in found[case.name]:
            ratio = predicted / measured
            print(f"| {case.name} | {what} | {predicted:.4g} | {measured:.4g} | {ratio:.2f} |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
