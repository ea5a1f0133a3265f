"""``fuserve plan``: which split of a model fits which hosts, and how fast it would be."""

from __future__ import annotations

import json as json_format
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fuserve.cli.flags import MODEL_HELP, Debug, Json
from fuserve.cli.output import human_bytes, note, print_facts, print_json, print_table
from fuserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from fuserve.architectures import DecoderSpec
    from fuserve.planning import Candidate, Machine, Network, Plan, Wish, Workload

_SHOWN = 10
_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECOND_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def plan(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} A config.json alone will do.")],
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="What fuserve may take on each host, such as 16GB."),
    ] = None,
    hosts: Annotated[int, typer.Option("--hosts", help="Hosts, a rank on each.", min=1)] = 1,
    bandwidth: Annotated[
        str,
        typer.Option("--bandwidth", help="Between hosts, one way, such as 10Gbit/s or 1.2GB/s."),
    ] = "10Gbit/s",
    latency: Annotated[
        str, typer.Option("--latency", help="Of an empty message between hosts, such as 50us.")
    ] = "50us",
    machine: Annotated[
        Path | None,
        typer.Option(
            "--machine",
            metavar="FILE",
            help="What fuserve doctor --json printed on such a host; by default this machine is "
            "measured.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads to measure with.", min=1)
    ] = None,
    quantization: Annotated[
        Literal["int8", "int4", "llm-int8", "w8a8"] | None,
        typer.Option(
            "--quantization", "-q", metavar="SCHEME", help="Try only int8, int4, llm-int8 or w8a8."
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Inputs that share a scale: 32, 64, 128.")
    ] = None,
    quantize_embeddings: Annotated[
        bool,
        typer.Option("--quantize-embeddings", help="Quantize the embedding and the head too."),
    ] = False,
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "float16", "int8", "int4"],
        typer.Option("--kv-cache-dtype", metavar="TYPE", help="As of fuserve serve."),
    ] = "auto",
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option("--tensor-parallel-size", "--tensor-parallel", help="Try only this.", min=1),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--pipeline-parallel-size", "--pipeline-parallel", help="Try only this.", min=1
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            help="Tokens of the longest sequence; the model's, at most 4096.",
            min=1,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", help="Sequences that run together.", min=1)
    ] = 16,
    max_num_batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", help="Token budget of a step.", min=1)
    ] = 512,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Length of the prompt that is timed.", min=1)
    ] = 512,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", help="Tokens decoded after it.", min=1)
    ] = 64,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Plan a model over hosts: what fits, how fast it would run, and the arithmetic of it.

    Speeds are computed from the machine's measured ceilings; nothing is loaded.
    """
    from fuserve.planning import Network, Wish, Workload, make_plan
    from fuserve.planning.model import open_for_planning, schemes_of

    weights = open_for_planning(model)
    spec = weights.spec
    work = Workload(
        _model_len(spec, max_model_len, prompt_tokens + output_tokens),
        max_num_seqs,
        max_num_batched_tokens,
        prompt_tokens,
        output_tokens,
    )
    wish = Wish(
        parse_bytes("--memory", memory) if memory is not None else _free_memory(),
        hosts,
        tensor_parallel_size,
        pipeline_parallel_size,
    )
    network = Network(parse_seconds("--latency", latency), parse_rate("--bandwidth", bandwidth))
    schemes = schemes_of(weights, quantization, group_size, quantize_embeddings, kv_cache_dtype)
    ceilings = _machine(machine, threads)
    found = make_plan(weights, schemes, ceilings, network, work, wish)
    if json:
        print_json(_report(model, spec, found, ceilings, network, work, wish))
    else:
        _print(model, spec, found, ceilings, network, work, wish)


def parse_bytes(option: str, text: str) -> int:
    """``16GB`` -> 16 000 000 000; units are decimal, ``GiB`` is binary.

    Raises:
        InvalidRequestError: it is no size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    value = _number(match[1]) if match else None
    if match is None or value is None:
        raise InvalidRequestError(f"{option} is {text!r}; it must be a size, such as 16GB.")
    unit = match[2].lower()
    scale = 1 << 10 * "kmgt".index(unit) + 10 if match[3] and unit else _BYTE_UNITS[unit]
    return round(value * scale)


def parse_rate(option: str, text: str) -> float:
    """``10Gbit/s`` or ``1.25GB/s`` -> bytes a second.

    Raises:
        InvalidRequestError: it is no rate.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([kKmMgGtT]?)(bit|bps|B)(/s|ps)?\s*", text)
    value = _number(match[1]) if match else None
    if match is None or value is None:
        raise InvalidRequestError(
            f"{option} is {text!r}; it must be a rate, such as 10Gbit/s or 1.25GB/s."
        )
    return value * _BYTE_UNITS[match[2].lower()] / (1 if match[3] == "B" else 8)


def parse_seconds(option: str, text: str) -> float:
    """``50us`` -> 5e-5.

    Raises:
        InvalidRequestError: it is no time.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*(s|ms|us|ns)\s*", text)
    value = _number(match[1]) if match else None
    if match is None or value is None:
        raise InvalidRequestError(f"{option} is {text!r}; it must be a time, such as 50us.")
    return value * _SECOND_UNITS[match[2]]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value > 0 else None


def _model_len(spec: DecoderSpec, wanted: int | None, needed: int) -> int:
    length = wanted or min(spec.max_position, 4096)
    if length > spec.max_position:
        raise InvalidRequestError(
            f"--max-model-len {length} is beyond the {spec.max_position} positions of the model"
        )
    if needed > length:
        raise InvalidRequestError(
            f"prompt and output are {needed} tokens, but a sequence has at most {length}. Give "
            "smaller --prompt-tokens or --output-tokens, or a larger --max-model-len."
        )
    return length


def _free_memory() -> int:
    from fuserve.kernels.memory import available_memory

    return available_memory()


def _machine(file: Path | None, threads: int | None) -> Machine:
    from fuserve.planning import Machine

    if file is None:
        note("measuring this machine ...")
        return Machine.measured(threads)
    try:
        report = json_format.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"--machine {file}: cannot be read ({error})") from error
    if not isinstance(report, dict):
        raise InvalidRequestError(f"--machine {file}: expected a JSON object")
    return Machine.from_report(report)


def _report(
    model: str,
    spec: DecoderSpec,
    found: Plan,
    machine: Machine,
    network: Network,
    work: Workload,
    wish: Wish,
) -> dict[str, Any]:
    from dataclasses import asdict

    from fuserve.architectures import num_parameters

    return {
        "model": model,
        "parameters": num_parameters(spec),
        "machine": asdict(machine),
        "network": asdict(network),
        "workload": asdict(work),
        "hosts": wish.hosts,
        "memory_bytes": wish.memory_bytes,
        "schemes": {name: asdict(fit) for name, fit in found.fits.items()},
        "candidates": [_candidate(one) for one in found.candidates],
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    from dataclasses import asdict

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


def _print(
    model: str,
    spec: DecoderSpec,
    found: Plan,
    machine: Machine,
    network: Network,
    work: Workload,
    wish: Wish,
) -> None:
    from fuserve.architectures import num_parameters

    print_facts(
        model,
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
            "memory is for": f"{work.max_num_seqs} sequences of {work.max_model_len} tokens, steps "
            f"of {work.max_num_batched_tokens}",
            "speeds are of": f"a prompt of {work.prompt_tokens} tokens, and decoding at a context "
            f"of {work.decode_context}",
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
