"""What ``fuserve plan`` answers, as JSON and for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fuserve.cli.output import human_bytes, print_facts, print_table

if TYPE_CHECKING:
    from fuserve.architectures import DecoderSpec
    from fuserve.planning import Candidate, Machine, Network, Plan, Wish, Workload

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """A plan, and all that it was asked for."""

    model: str
    spec: DecoderSpec
    found: Plan
    machine: Machine
    network: Network
    work: Workload
    wish: Wish

    def report(self) -> dict[str, Any]:
        """For ``--json``."""
        from fuserve.architectures import num_parameters

        return {
            "model": self.model,
            "parameters": num_parameters(self.spec),
            "machine": asdict(self.machine),
            "network": asdict(self.network),
            "workload": asdict(self.work),
            "hosts": self.wish.hosts,
            "memory_bytes": self.wish.memory_bytes,
            "schemes": {name: asdict(fit) for name, fit in self.found.fits.items()},
            "candidates": [_candidate(one) for one in self.found.candidates],
        }

    def show(self) -> None:
        """Print it for people."""
        from fuserve.architectures import num_parameters

        found, machine, network = self.found, self.machine, self.network
        work, wish, spec = self.work, self.wish, self.spec
        print_facts(
            self.model,
            {
                "model": f"{spec.family}: {num_parameters(spec) / 1e9:.4g} G parameters, "
                f"{spec.num_layers} layers, hidden {spec.hidden_size}",
                "hosts": f"{wish.hosts} x {human_bytes(wish.memory_bytes)}, a rank on each",
                "each host": f"{machine.num_threads} threads read "
                f"{human_bytes(machine.read_bytes_per_s)}/s and do "
                f"{machine.fp32_flop_per_s / 1e9:.0f} GFLOP/s fp32, "
                f"{machine.int8_op_per_s / 1e9:.0f} GOP/s int8, "
                f"{machine.int4_op_per_s / 1e9:.0f} GOP/s int4",
                "network": f"{human_bytes(network.bytes_per_s)}/s one way, "
                f"{network.latency_s * 1e6:.4g} us",
                "memory is for": f"{work.max_num_seqs} sequences of {work.max_model_len} tokens, "
                f"steps of {work.max_num_batched_tokens}",
                "speeds are of": f"a prompt of {work.prompt_tokens} tokens, and decoding at a "
                f"context of {work.decode_context}",
                "weights": ", ".join(
                    f"{name} {human_bytes(fit.weight_bytes)} "
                    + (f"(from {fit.min_hosts} hosts on)" if fit.min_hosts else "(never fits)")
                    for name, fit in found.fits.items()
                ),
            },
        )
        print_table(
            "",
            [
                *("scheme", "TP", "PP", "copies", "memory", "prefill", "decode, 1"),
                *(f"decode, {work.max_num_seqs}", "all copies"),
            ],
            [_row(one) for one in found.candidates[:_SHOWN]],
        )
        hidden = len(found.candidates) - _SHOWN
        print(
            "Tokens/s; memory of the fullest rank."
            + (f" {hidden} slower splits fit too (--json has them)." if hidden > 0 else "")
        )
        quickest = max(found.candidates, key=lambda one: one.speed.decode_one)
        print(
            f"One stream is fastest with {quickest.scheme}, TP {quickest.layout.tensor} x PP "
            f"{quickest.layout.pipeline}: {quickest.speed.decode_one:.4g} tokens/s."
        )
        _print_arithmetic(found.candidates[0])


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "scheme": one.scheme,
        "tensor_parallel": one.layout.tensor,
        "pipeline_parallel": one.layout.pipeline,
        "replicas": one.replicas,
        "tokens_per_s": one.tokens_per_s,
        "speed": asdict(one.speed),
        "stages": [
            {"num_layers": stage.num_layers, "memory": asdict(memory) | {"total": memory.total}}
            for stage, memory in zip(one.stages, one.memory, strict=True)
        ],
    }


def _row(one: Candidate) -> list[str]:
    return [
        one.scheme,
        str(one.layout.tensor),
        str(one.layout.pipeline),
        str(one.replicas),
        human_bytes(max(memory.total for memory in one.memory)),
        f"{one.speed.prefill_one:.4g}",
        f"{one.speed.decode_one:.4g}",
        f"{one.speed.decode_many:.4g}",
        f"{one.tokens_per_s:.4g}",
    ]


def _print_arithmetic(one: Candidate) -> None:
    """How the figures of the first line came about, of the stages that differ."""
    print(f"\nThe first line: {one.scheme}, TP {one.layout.tensor} x PP {one.layout.pipeline}.")
    fullest = max(range(len(one.memory)), key=lambda index: one.memory[index].total)
    memory = one.memory[fullest]
    print(
        f"Memory of a rank of stage {fullest + 1} ({one.stages[fullest].num_layers} layers): "
        f"weights {human_bytes(memory.weights)} + KV cache {human_bytes(memory.kv_cache)} + "
        f"activations {human_bytes(memory.activations)} + process {human_bytes(memory.process)} = "
        f"{human_bytes(memory.total)}"
    )
    for name, stages in one.speed.steps.items():
        times = [sum(term.seconds for term in terms) for terms in stages]
        slowest = times.index(max(times))
        which = f", slowest stage ({slowest + 1} of {len(stages)})" if len(stages) > 1 else ""
        print(f"{name}{which}: {times[slowest] * 1e3:.4g} ms")
        for term in stages[slowest]:
            print(f"  {term.seconds * 1e3:>9.4g} ms  {term.name}: {term.formula}")
    for line in one.speed.sums:
        print(line)
