"""``fuserve bench serve``: load a server as its users would, and report what they would see."""

from __future__ import annotations

import asyncio
import json as json_module
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fuserve.cli.flags import Debug, Json
from fuserve.cli.output import WorkProgress, print_facts, print_json, print_table
from fuserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from fuserve.loadgen import Percentiles, Run, ServingReport, Target, Workload


def bench_serve(
    base_url: Annotated[
        str, typer.Option("--base-url", help="Of the server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name at the server; default its first.")
    ] = None,
    api_key: Annotated[str, typer.Option("--api-key", help="Sent as a bearer token.")] = "",
    endpoint: Annotated[
        Literal["completions", "chat"],
        typer.Option("--endpoint", help="completions sends token ids where the server takes them."),
    ] = "completions",
    num_prompts: Annotated[int, typer.Option("--num-prompts", help="Requests.", min=1)] = 32,
    request_rate: Annotated[
        float,
        typer.Option("--request-rate", help="Poisson arrivals per second; inf is all at once."),
    ] = math.inf,
    max_concurrency: Annotated[
        int | None, typer.Option("--max-concurrency", help="Requests in flight at once.", min=1)
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", help="Length or range, drawn uniformly.")
    ] = "16-512",
    output_tokens: Annotated[
        str, typer.Option("--output-tokens", help="Length or range, drawn uniformly.")
    ] = "16-256",
    shared_prefix_tokens: Annotated[
        int,
        typer.Option(
            "--shared-prefix-tokens", help="That every prompt begins with, in addition.", min=0
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of lengths, prompts, arrivals.", min=0)] = 0,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0)] = 0.0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for exactly --output-tokens; for servers that know the field.",
        ),
    ] = True,
    extra_body: Annotated[
        str, typer.Option("--extra-body", help="JSON object of further fields of each request.")
    ] = "{}",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG to write (extra 'bench').")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Send a mix of requests to any OpenAI-compatible server and measure throughput and latency.

    Requests are sent when they are due, whether or not earlier ones have been answered.
    """
    from fuserve.loadgen import Target, TokenRange, Workload
    from fuserve.loadgen.client import find_model

    if not request_rate > 0:
        raise InvalidRequestError(f"--request-rate is {request_rate}; it must be above 0, or inf.")
    workload = Workload(
        num_prompts=num_prompts,
        prompt_tokens=TokenRange.parse(prompt_tokens),
        output_tokens=TokenRange.parse(output_tokens),
        shared_prefix_tokens=shared_prefix_tokens,
        request_rate=request_rate,
        seed=seed,
    )
    body = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {})}
    body |= _parse_extra_body(extra_body)
    if plot is not None:
        from fuserve.loadgen.plot import check_can_plot

        check_can_plot(plot)
    name = model or asyncio.run(find_model(base_url, api_key))
    target = Target(base_url, name, api_key, endpoint, body)
    run, has_token_prompts = _run(target, workload, max_concurrency)
    _show(target, workload, run, has_token_prompts=has_token_prompts, plot=plot, as_json=json)


def _parse_extra_body(text: str) -> dict[str, Any]:
    try:
        body = json_module.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InvalidRequestError(f"--extra-body is {text!r}; it must be a JSON object.")
    return body


def _run(target: Target, workload: Workload, max_concurrency: int | None) -> tuple[Run, bool]:
    """Drive the load; whether its prompts were token ids."""
    from fuserve.loadgen import Completer, drive, plan

    async def run() -> tuple[Run, bool]:
        async with Completer(target) as completer:
            vocabulary = await completer.vocabulary()
            result = await drive(
                completer,
                plan(workload, vocabulary),
                max_concurrency=max_concurrency,
                progress=lambda done, total: progress.update("requests", done, total),
            )
            return result, bool(vocabulary.token_ids)

    with WorkProgress() as progress:
        return asyncio.run(run())


def _show(
    target: Target,
    workload: Workload,
    run: Run,
    *,
    has_token_prompts: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    from fuserve.loadgen import summarize

    report = summarize(run)
    if plot is not None:
        from fuserve.loadgen.plot import save_plot

        save_plot(run, f"{target.model} at {target.root}: {_load(workload)}", plot)
    if as_json:
        rate = workload.request_rate
        print_json(
            {
                "base_url": target.base_url,
                "model": target.model,
                "endpoint": target.endpoint,
                "token_prompts": has_token_prompts,
                "workload": {
                    **asdict(workload),
                    "request_rate": None if math.isinf(rate) else rate,
                },
                **asdict(report),
            }
        )
    else:
        _print(target, workload, report, has_token_prompts=has_token_prompts)
    if report.num_completed == 0:
        raise InvalidRequestError(f"No request was completed: {_first_error(run)}")


def _first_error(run: Run) -> str:
    return next(answer.error for answer in run.answers if answer.error)


def _load(workload: Workload) -> str:
    """The load in a line."""
    rate = workload.request_rate
    arrivals = "all at once" if math.isinf(rate) else f"{rate:g} a second"
    prefix = workload.shared_prefix_tokens
    return (
        f"{workload.num_prompts} requests, {arrivals}, prompts of {workload.prompt_tokens}"
        f"{f' + {prefix} shared' if prefix else ''} tokens, outputs of {workload.output_tokens}"
    )


def _print(
    target: Target, workload: Workload, report: ServingReport, *, has_token_prompts: bool
) -> None:
    counted = "" if report.output_tokens_counted == "usage" else " (counted in chunks)"
    failed = ", ".join(f"{count} x {error}" for error, count in report.errors.items())
    in_tokens = "unknown" if report.prompt_tokens is None else f"{report.prompt_tokens:,}"
    print_facts(
        f"{target.model} at {target.root}",
        {
            "load": _load(workload),
            "prompts": "token ids" if has_token_prompts else "texts",
            "completed": f"{report.num_completed} of {report.num_requests} in "
            f"{report.duration_s:.2f} s, at most {report.peak_concurrency} at once",
            "failed": failed or "none",
            "tokens": f"{in_tokens} in, {report.output_tokens:,} out{counted}",
            "throughput": f"{report.requests_per_s:.2f} requests/s, "
            f"{report.output_tokens_per_s:.1f} output tokens/s",
        },
    )
    rows = [
        _row("time to first token", report.ttft_ms),
        _row("time per output token", report.tpot_ms),
        _row("time between chunks", report.itl_ms),
        _row("end to end", report.e2e_ms),
    ]
    print_table("", ["ms", "mean", "p50", "p90", "p99", "max"], rows)


def _row(name: str, latency: Percentiles | None) -> list[str]:
    if latency is None:
        return [name, *["-"] * 5]
    return [name, *(f"{value:.1f}" for value in asdict(latency).values())]
