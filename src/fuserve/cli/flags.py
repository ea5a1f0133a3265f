"""Flags that several commands share, each written once.

Typer has no groups of options. A command here takes a dataclass of flags as one parameter, and
``expand_flags`` lays the dataclass's fields out as options of the command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from fuserve import SamplingParams
    from fuserve.decoder.options import ExecutorOptions
    from fuserve.parallel.options import ParallelOptions

MODEL_HELP = "A folder, a .gguf file, a hub id, or 'demo'."
_MODEL_PANEL = "Model"
_PARALLEL_PANEL = "Several processes"
_SAMPLING_PANEL = "Sampling"
DEBUG_KEY = "fuserve.debug"


def _model(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_MODEL_PANEL, **limits)


def _parallel(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PARALLEL_PANEL, **limits)


def _sampling(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_SAMPLING_PANEL, **limits)


def _remember_debug(context: typer.Context, value: bool) -> bool:
    context.meta[DEBUG_KEY] = value
    return value


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; messages go to stderr.")
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show the traceback of an error.",
        callback=_remember_debug,
        is_eager=True,
    ),
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """How a model is held in memory and run; the names are vLLM's where it has them."""

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _model(
            "--dtype",
            metavar="TYPE",
            help="Of weights that are not quantized: auto (as stored), float32, bfloat16, float16.",
        ),
    ] = "auto"
    quantization: Annotated[
        Literal[
            "int8",
            "int4",
            "llm-int8",
            "w8a8",
            "w8a8-static",
            "smoothquant",
            "smoothquant-static",
            "gptq",
            "gptq-int8",
            "awq",
            "awq-int8",
        ]
        | None,
        _model(
            "--quantization",
            "-q",
            metavar="SCHEME",
            help="Round to nearest while loading: int8, int4, llm-int8 or w8a8.",
        ),
    ] = None
    group_size: Annotated[
        int | None,
        _model("--group-size", help="Inputs sharing a scale: 32, 64, 128; 0: per channel."),
    ] = None
    symmetric: Annotated[bool, _model("--symmetric", help="int4 without zero points.")] = False
    quantize_embeddings: Annotated[
        bool, _model("--quantize-embeddings", help="Quantize the embedding and the head too.")
    ] = False
    quantize_layers: Annotated[
        list[str] | None,
        _model(
            "--quantize-layers",
            metavar="PATTERN=SCHEME",
            help="An exception, such as layers.1.down=int8 or '*.o=keep'; may be repeated.",
        ),
    ] = None
    outlier_threshold: Annotated[
        float | None,
        _model("--outlier-threshold", help="Magnitude that llm-int8 keeps in float; 6.", min=0.0),
    ] = None
    activations: Annotated[
        Literal["auto", "int8", "float"],
        _model("--activations", help="Arithmetic on quantized weights; float is weight-only."),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "float16", "int8", "int4"],
        _model(
            "--kv-cache-dtype",
            "--kv-dtype",
            metavar="TYPE",
            help="auto, float32, float16, int8 or int4.",
        ),
    ] = "auto"
    max_model_len: Annotated[
        int | None, _model("--max-model-len", help="Tokens of the longest sequence.", min=1)
    ] = None
    max_num_seqs: Annotated[
        int | None, _model("--max-num-seqs", help="Sequences that run together.", min=1)
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, _model("--max-num-batched-tokens", help="Token budget of a step.", min=1)
    ] = None
    kv_cache_bytes: Annotated[
        int | None,
        _model("--kv-cache-bytes", help="Memory for the KV cache; planned by default.", min=1),
    ] = None
    threads: Annotated[
        int | None, _model("--threads", help="Threads; by default what the machine allows.", min=1)
    ] = None
    load_format: Annotated[
        Literal["auto", "dummy"],
        _model("--load-format", help="dummy draws random weights from a config.json alone."),
    ] = "auto"
    executor: Annotated[
        Literal["native", "reference"],
        _model("--executor", help="reference is plain torch (extra 'torch')."),
    ] = "native"
    rank_invariant: Annotated[
        bool,
        _model("--rank-invariant", help="The same bits over 1, 2 and 4 tensor-parallel processes."),
    ] = False
    device: Annotated[str, _model("--device", help="Device of the reference executor.")] = "cpu"

    def keywords(self) -> dict[str, Any]:
        """The flags as keywords of ``ExecutorOptions`` and ``LLM``; those not given are absent."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["num_threads"] = values.pop("threads")
        if self.quantize_layers is not None:
            values["quantize_layers"] = tuple(self.quantize_layers)
        return {name: value for name, value in values.items() if value is not None}

    def executor_options(self, **defaults: Any) -> ExecutorOptions:
        """``ExecutorOptions`` of these flags; ``defaults`` stand in for flags not given."""
        from fuserve.decoder.options import ExecutorOptions

        return ExecutorOptions(**{**defaults, **self.keywords()})


@dataclass(frozen=True, slots=True)
class ParallelFlags:
    """How many processes a model is spread over."""

    tensor_parallel_size: Annotated[
        int,
        _parallel(
            "--tensor-parallel-size",
            "--tensor-parallel",
            "-tp",
            help="Processes that share each layer.",
            min=1,
        ),
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        _parallel(
            "--pipeline-parallel-size",
            "--pipeline-parallel",
            "-pp",
            help="Stages of consecutive layers, each in processes of its own.",
            min=1,
        ),
    ] = 1
    balance: Annotated[
        Literal["bytes", "measured"],
        _parallel("--balance", help="Stages of equal bytes, or of equal time as measured."),
    ] = "bytes"
    step_timeout: Annotated[
        float | None,
        _parallel(
            "--step-timeout", help="Seconds after which a step has a process that hangs.", min=0.1
        ),
    ] = None
    join_timeout: Annotated[
        float | None,
        _parallel(
            "--join-timeout", help="Seconds that a starting process may say nothing.", min=0.1
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """The flags as keywords of ``ParallelOptions`` and ``LLM``; those not given are absent."""
        names = [field.name for field in fields(self) if not field.name.endswith("_timeout")]
        return {name: getattr(self, name) for name in names} | self.timeouts()

    def timeouts(self) -> dict[str, float]:
        """``step_timeout_s`` and ``join_timeout_s``, those that were given."""
        values = {"step_timeout_s": self.step_timeout, "join_timeout_s": self.join_timeout}
        return {name: value for name, value in values.items() if value is not None}

    def options(self) -> ParallelOptions:
        """``ParallelOptions`` of these flags."""
        from fuserve.parallel.options import ParallelOptions

        return ParallelOptions(**self.keywords())


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """How the next token is chosen."""

    max_tokens: Annotated[
        int, _sampling("--max-tokens", "-n", help="Longest answer in tokens.", min=1)
    ] = 256
    temperature: Annotated[
        float | None, _sampling("--temperature", "-t", help="0 takes the likeliest token.", min=0.0)
    ] = None
    top_k: Annotated[
        int | None, _sampling("--top-k", help="Draw among the k likeliest tokens.")
    ] = None
    top_p: Annotated[
        float | None, _sampling("--top-p", help="Draw among the likeliest tokens of this mass.")
    ] = None
    min_p: Annotated[
        float | None,
        _sampling("--min-p", help="Drop tokens below this share of the likeliest one."),
    ] = None
    repetition_penalty: Annotated[
        float | None, _sampling("--repetition-penalty", help="Above 1 discourages repetition.")
    ] = None
    presence_penalty: Annotated[
        float | None, _sampling("--presence-penalty", help="Subtracted once a token has appeared.")
    ] = None
    frequency_penalty: Annotated[
        float | None, _sampling("--frequency-penalty", help="Subtracted per appearance.")
    ] = None
    stop: Annotated[
        list[str] | None, _sampling("--stop", help="Text that ends the answer; may be repeated.")
    ] = None
    seed: Annotated[int | None, _sampling("--seed", help="Makes the draw repeatable.")] = None
    ignore_eos: Annotated[
        bool, _sampling("--ignore-eos", help="Go on where the model would end.")
    ] = False

    def keywords(self) -> dict[str, Any]:
        """The flags as keywords of ``SamplingParams``; those not given are absent."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def params(self, defaults: SamplingParams | None = None) -> SamplingParams:
        """``SamplingParams`` of these flags; ``defaults``, the model's own, stand in for others.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        from fuserve import SamplingParams

        return replace(defaults or SamplingParams(), **self.keywords())


def expand_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a function whose parameters are the fields of ``command``'s dataclasses.

    Args:
        command: a function; each parameter annotated with a dataclass of ``Annotated`` fields is
            replaced by those fields, the others stay as they are.
    """
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters.extend(_field_parameters(groups[name]))
        else:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            )

    def run(**given: Any) -> None:
        built = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **built)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
