"""``fuserve generate``: one prompt, one streamed answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fuserve.cli.answer import Answer, recommended_params, stream_answer
from fuserve.cli.flags import (
    Debug,
    Json,
    ModelFlags,
    ModelOption,
    ParallelFlags,
    SamplingFlags,
)
from fuserve.cli.output import WorkProgress, note, print_json
from fuserve.errors import InvalidRequestError


def generate(
    model: ModelOption,
    flags: ModelFlags,
    parallel: ParallelFlags,
    sampling: SamplingFlags,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; stdin by default.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="System message; implies --chat.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Complete a prompt and stream the answer to stdout."""
    from fuserve import LLM

    text = _prompt(prompt)
    sampling.params()  # refuses what is out of range before the model is loaded
    with WorkProgress() as progress:
        llm = LLM(model, **flags.keywords(), **parallel.keywords(), progress=progress.update)
    answer = Answer()
    with llm:
        params = sampling.params(recommended_params(llm))
        for delta in stream_answer(llm, _request(text, chat, system), params, answer):
            if not json:
                print(delta, end="", flush=True)
    if json:
        print_json({"model": model, "prompt": text, **answer.report()})
    else:
        print()
        note(answer.speed())


def _prompt(given: str | None) -> str:
    if given is not None:
        return given
    if sys.stdin.isatty():
        note("reading the prompt from the keyboard; end it with Ctrl-D")
    text = sys.stdin.read()
    if not text.strip():
        raise InvalidRequestError("the prompt is empty. Give it as an argument or on stdin.")
    return text


def _request(text: str, chat: bool, system: str | None) -> str | list[dict[str, str]]:
    if system is not None:
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return [{"role": "user", "content": text}] if chat else text
