"""``fuserve eval perplexity``: how well a model predicts a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fuserve.cli.flags import Debug, Json, ModelFlags, ModelOption
from fuserve.cli.output import WorkProgress, note, print_facts, print_json
from fuserve.errors import InvalidRequestError

TextOption = Annotated[Path, typer.Option("--text", help="A UTF-8 text file.")]
ContextOption = Annotated[int, typer.Option("--context", help="Tokens of a window.", min=2)]
StrideOption = Annotated[
    int, typer.Option("--stride", help="Tokens between beginnings of windows.", min=1)
]


def perplexity(
    model: ModelOption,
    text: TextOption,
    flags: ModelFlags,
    context: ContextOption = 512,
    stride: StrideOption = 256,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model's perplexity on a text, by strided windows."""
    from fuserve.checkpoints import load_tokenizer
    from fuserve.decoder import load_model
    from fuserve.engine.perplexity import check_window_sizes, measure_perplexity

    check_window_sizes(context, stride)
    prose = read_text(text)
    options = flags.executor_options(max_model_len=context, max_num_seqs=4)
    with WorkProgress() as progress:
        loaded = load_model(model, options, progress.update)
    if loaded.checkpoint is None:
        raise InvalidRequestError(
            "perplexity needs a tokenizer and real weights; leave out --load-format dummy."
        )
    if context > loaded.max_model_len:
        raise InvalidRequestError(
            f"--context is {context}, but the model runs at most {loaded.max_model_len} tokens."
        )
    tokens = load_tokenizer(loaded.checkpoint).encode(prose)
    note(f"{len(tokens)} tokens, windows of {context} every {stride}")
    with WorkProgress() as progress:
        result = measure_perplexity(
            loaded.executor,
            tokens,
            context=context,
            stride=stride,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            progress=lambda done, total: progress.update("windows", done, total),
        )
    tokens_per_s = result.computed_tokens / result.seconds
    if json:
        print_json(
            {
                "model": model,
                "text": str(text),
                "context": context,
                "stride": stride,
                "quantization": options.quantization,
                **asdict(result),
                "tokens_per_s": tokens_per_s,
            }
        )
        return
    print_facts(
        f"Perplexity of {model} on {text.name}",
        {
            "perplexity": f"{result.perplexity:.4f}",
            "tokens scored": f"{result.scored_tokens} of {result.text_tokens}",
            "windows": f"{result.windows} of {context}, every {stride}",
            "time": f"{result.seconds:.1f} s ({tokens_per_s:.0f} tokens/s)",
        },
    )


def read_text(path: Path) -> str:
    """The text to measure on; an InvalidRequestError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"{path}: cannot be read as UTF-8 text ({error}). Give --text a readable text file."
        ) from error
