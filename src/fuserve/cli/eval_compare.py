"""``fuserve eval compare``: what quantization schemes cost a model, and what they gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fuserve.cli.eval import ContextOption, StrideOption, TextOption, read_text
from fuserve.cli.eval_schemes import (
    BASE,
    OF_THE_RECIPE,
    Scheme,
    calibrated_folder,
    parse_schemes,
)
from fuserve.cli.flags import MODEL_HELP, Debug, Json, ModelFlags
from fuserve.cli.output import WorkProgress, human_bytes, note, print_json, print_table
from fuserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from fuserve.decoder import ExecutorOptions, LoadedModel

PROMPT_TOKENS, OUTPUT_TOKENS, REPEAT = 512, 32, 3
BASE_LABEL = "fp32"


@dataclass(frozen=True, slots=True)
class Compared:
    """One scheme's row: accuracy against fp32, size in memory, and speed.

    ``size_bytes`` is of all packed weights, the embedding included. ``mean_kl`` is in nats.
    """

    scheme: str
    perplexity: float
    perplexity_change: float
    mean_kl: float
    top1_agreement: float
    size_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def compare(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    schemes: Annotated[
        str,
        typer.Option(
            "--schemes",
            help="With commas: int8, int4+g128, w8a8, llm-int8, gptq, keep+kv-int8, ./a-folder, …",
        ),
    ],
    text: TextOption,
    flags: ModelFlags,
    context: ContextOption = 512,
    stride: StrideOption = 256,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write accuracy against size as a PNG.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare quantization schemes of a model with fp32: accuracy, size and speed.

    Schemes that need calibration are quantized on English prose first, and kept in the cache.
    """
    from fuserve.checkpoints import load_tokenizer
    from fuserve.cli.eval_plot import save_accuracy_plot
    from fuserve.engine.perplexity import windows_of
    from fuserve.loadgen.plot import check_can_plot

    chosen = parse_schemes(schemes)
    prose = read_text(text)
    if plot is not None:
        check_can_plot(plot)
    longest = max(context, PROMPT_TOKENS + OUTPUT_TOKENS)
    options = flags.executor_options(max_model_len=longest, max_num_seqs=4)
    base = _load(model, replace(options, **BASE))
    if base.checkpoint is None:
        raise InvalidRequestError("compare needs real weights; leave out --load-format dummy.")
    tokens = load_tokenizer(base.checkpoint).encode(prose)
    windows_of(len(tokens), context, stride)  # refuses before all the work
    note(f"{len(tokens)} tokens, windows of {context} every {stride}")
    comparison = _Comparison(base, tokens, context, stride, options.max_num_batched_tokens)
    rows = [comparison.row(scheme.label, *_quantized(model, scheme, options)) for scheme in chosen]
    rows.insert(0, comparison.base_row())
    if plot is not None:
        save_accuracy_plot(rows, f"{model} on {text.name}", plot)
    if json:
        print_json(
            {
                "model": model,
                "text": str(text),
                "text_tokens": len(tokens),
                "context": context,
                "stride": stride,
                "rows": [asdict(row) for row in rows],
            }
        )
        return
    _print(f"{model} on {text.name}, {len(tokens)} tokens", rows)


class _Comparison:
    """The base, and what is measured against it."""

    def __init__(
        self,
        base: LoadedModel,
        tokens: Sequence[int],
        context: int,
        stride: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._base = base
        self._tokens = tokens
        self._windows = {"context": context, "stride": stride, "max_num_seqs": 4}
        self._budget = max_num_batched_tokens
        self._base_perplexity = 0.0

    def row(self, label: str, model: str, options: ExecutorOptions) -> Compared:
        """Load a scheme, measure it, and let go of it."""
        from fuserve.engine.divergence import measure_divergence

        loaded = _load(model, options)
        try:
            with WorkProgress() as progress:
                result = measure_divergence(
                    self._base.executor,
                    loaded.executor,
                    self._tokens,
                    **self._windows,
                    max_num_batched_tokens=self._budget,
                    progress=lambda done, total: progress.update(label, done, total),
                )
            prefill, decode = self._speed(loaded)
        finally:
            loaded.close()
        self._base_perplexity = result.base_perplexity
        return Compared(
            scheme=label,
            perplexity=result.perplexity,
            perplexity_change=result.perplexity_change,
            mean_kl=result.mean_kl,
            top1_agreement=result.top1_agreement,
            size_bytes=loaded.report.packed_bytes,
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode,
        )

    def base_row(self) -> Compared:
        """The base beside itself, once a scheme has been measured."""
        prefill, decode = self._speed(self._base)
        size = self._base.report.packed_bytes
        return Compared(BASE_LABEL, self._base_perplexity, 0.0, 0.0, 1.0, size, prefill, decode)

    def _speed(self, loaded: LoadedModel) -> tuple[float, float]:
        """Prefill of a prompt and decode of one sequence, in tokens per second."""
        from fuserve.engine.latency import measure_latency

        result = measure_latency(
            loaded.executor,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            batches=[1],
            repeat=REPEAT,
            max_num_batched_tokens=self._budget,
        )
        return result.prefill_tokens_per_s, result.decode[0].tokens_per_s


def _quantized(model: str, scheme: Scheme, options: ExecutorOptions) -> tuple[str, ExecutorOptions]:
    """What to load for a scheme, calibrated first if it must be, and how."""
    if scheme.folder is not None:
        return str(scheme.folder), options
    if scheme.recipe is None:
        return model, replace(options, **scheme.options)
    with WorkProgress() as progress:
        folder = calibrated_folder(model, scheme, progress.update)
    kept = {name: value for name, value in scheme.options.items() if name not in OF_THE_RECIPE}
    return str(folder), replace(options, **kept)


def _load(model: str, options: ExecutorOptions) -> LoadedModel:
    from fuserve.decoder import load_model

    with WorkProgress() as progress:
        return load_model(model, options, progress.update)


def _print(title: str, rows: Sequence[Compared]) -> None:
    columns = ["", "perplexity", "change", "mean KL", "top 1", "size", "prefill/s", "decode/s"]
    cells = [
        [
            row.scheme,
            f"{row.perplexity:.3f}",
            f"{row.perplexity_change:+.2%}",
            f"{row.mean_kl:.5f}",
            f"{row.top1_agreement:.1%}",
            human_bytes(row.size_bytes),
            f"{row.prefill_tokens_per_s:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
        ]
        for row in rows
    ]
    print_table(title, columns, cells)
