"""``fuserve plan``: which split of a model fits which hosts, and how fast it would be."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fuserve.cli.flags import MODEL_HELP, Debug, Json
from fuserve.cli.output import note, print_json
from fuserve.cli.plan_answer import PlanAnswer
from fuserve.cli.quantities import parse_bytes, parse_rate, parse_seconds
from fuserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from fuserve.architectures import DecoderSpec
    from fuserve.planning import Machine


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
        int | None,
        typer.Option("--group-size", help="Inputs sharing a scale: 32, 64, 128; 0: per channel."),
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
    answer = PlanAnswer(model, spec, found, ceilings, network, work, wish)
    if json:
        print_json(answer.report())
    else:
        answer.show()


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
