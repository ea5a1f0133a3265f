"""Set what ``fuserve plan`` predicts for one rank beside what the same machine measures.

``python benchmarks/plan_check.py`` takes some minutes. Both sides use the same threads. Ceilings
and models take turns in rounds, and the best of each counts: on a machine that others use, what is
slower tells of them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fuserve.decoder import ExecutorOptions, load_model
from fuserve.engine.latency import measure_latency
from fuserve.planning import Machine, Network, Wish, Workload, make_plan
from fuserve.planning.model import open_for_planning

CONFIGS = Path(__file__).parent / "configs"
RESULTS = Path(__file__).parent / "results" / "plan_check.json"
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 16
BATCHES = (1, 8)
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


Figures = dict[str, float]


def measure(case: Case) -> Figures:
    """Tokens a second, and bytes of weights and cache in MB."""
    loaded = load_model(case.model, case.options)
    try:
        result = measure_latency(
            loaded.executor,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            batches=BATCHES,
            repeat=1,
            max_num_batched_tokens=case.options.max_num_batched_tokens,
        )
        report = loaded.report
    finally:
        loaded.close()
    return {
        "prefill": result.prefill_tokens_per_s,
        **{f"decode {speed.batch}": speed.tokens_per_s for speed in result.decode},
        "weights, MB": report.packed_bytes / 1e6,
        "KV cache, MB": report.kv_cache_bytes / 1e6,
    }


def predict(case: Case, machine: Machine) -> Figures:
    """The same figures from the plan of one rank."""
    figures: Figures = {}
    for batch in BATCHES:
        budget = case.options.max_num_batched_tokens
        longest = PROMPT_TOKENS + OUTPUT_TOKENS
        work = Workload(longest, batch, budget, PROMPT_TOKENS, OUTPUT_TOKENS)
        plan = make_plan(
            open_for_planning(case.model),
            {case.name: case.options},
            machine,
            UNUSED,
            work,
            Wish(memory_bytes=1 << 40, hosts=1),
        ).candidates[0]
        figures.setdefault("prefill", plan.speed.prefill_one)
        figures[f"decode {batch}"] = plan.speed.decode_many
        figures["weights, MB"] = plan.memory[0].weights / 1e6
        figures["KV cache, MB"] = plan.memory[0].kv_cache / 1e6
    return figures


def best_machine(machines: list[Machine]) -> Machine:
    """The best of each ceiling."""
    names = [field.name for field in fields(Machine)]
    return Machine(*(max(getattr(one, name) for one in machines) for name in names))


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="after which nothing is measured again"
    )
    parser.add_argument("--only", nargs="*", help="cases whose names have one of these in them")
    arguments = parser.parse_args()
    cases = [
        case
        for case in CASES
        if arguments.only is None or any(part in case.name for part in arguments.only)
    ]
    machines: list[Machine] = []
    began = time.monotonic()
    measured: dict[str, list[Figures]] = {case.name: [] for case in cases}
    for _ in range(arguments.rounds):
        for case in cases:
            if measured[case.name] and time.monotonic() - began > arguments.seconds:
                continue
            machines.append(Machine.measured())
            measured[case.name].append(measure(case))
    machine = best_machine(machines)
    print(
        f"{machine.num_threads} threads read {machine.read_bytes_per_s / 1e9:.3g} GB/s and do "
        f"{machine.fp32_flop_per_s / 1e9:.3g} GFLOP/s fp32, {machine.int8_op_per_s / 1e9:.3g} "
        f"GOP/s int8, {machine.int4_op_per_s / 1e9:.3g} GOP/s int4.\n"
    )
    print("| model | | predicted | measured | predicted / measured |\n|---|---|---|---|---|")
    report: dict[str, object] = {"machine": asdict(machine)}
    for case in cases:
        predicted = predict(case, machine)
        best = {what: max(one[what] for one in measured[case.name]) for what in predicted}
        report[case.name] = {"predicted": predicted, "measured": best}
        for what, value in predicted.items():
            ratio = value / best[what]
            print(f"| {case.name} | {what} | {value:.4g} | {best[what]:.4g} | {ratio:.2f} |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
