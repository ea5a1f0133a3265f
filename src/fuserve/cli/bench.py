"""``fuserve bench latency``: speed of a model's step beside the machine's bounds."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuserve.cli.flags import Debug, Json, ModelFlags, ModelOption, ParallelFlags
from fuserve.cli.output import WorkProgress, human_bytes, print_facts, print_json, print_table
from fuserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from fuserve.decoder import LoadedModel
    from fuserve.engine.latency import LatencyResult


def latency(
    model: ModelOption,
    flags: ModelFlags,
    parallel: ParallelFlags,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Length of a prompt.", min=1)
    ] = 512,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", help="Tokens decoded per sequence.", min=1)
    ] = 64,
    batch: Annotated[
        str, typer.Option("--batch", help="Numbers of sequences decoded together, with commas.")
    ] = "1,8,16",
    repeat: Annotated[
        int, typer.Option("--repeat", help="Repeats; the median is reported.", min=1)
    ] = 3,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure prefill and decode tokens/s, load time and memory of a model.

    With --load-format dummy, MODEL is a config.json or its folder, and the weights are random.
    """
    from fuserve.engine.latency import measure_latency
    from fuserve.parallel.loading import load_parallel

    batches = _parse_batches(batch)
    options = flags.executor_options(
        max_model_len=prompt_tokens + output_tokens, max_num_seqs=max(batches)
    )
    with WorkProgress() as progress:
        loaded = load_parallel(model, options, parallel.options(), progress.update)
    with closing(loaded):
        if prompt_tokens + output_tokens > loaded.max_model_len:
            raise InvalidRequestError(
                f"prompt and output are {prompt_tokens + output_tokens} tokens, but the model runs "
                f"at most {loaded.max_model_len}. Give smaller --prompt-tokens or --output-tokens."
            )
        with WorkProgress() as progress:
            result = measure_latency(
                loaded.executor,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                batches=batches,
                repeat=repeat,
                max_num_batched_tokens=options.max_num_batched_tokens,
                progress=progress.update,
            )
        report = _report(model, loaded, result)
    if json:
        print_json(report)
    else:
        _print(report)


def _parse_batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise InvalidRequestError(
            f"--batch is {text!r}; it must be positive numbers with commas, such as 1,8,16."
        )
    return list(dict.fromkeys(batches))


def _report(model: str, loaded: LoadedModel, result: LatencyResult) -> dict[str, Any]:
    from fuserve.kernels.machine import measure_bandwidth, measure_fp32

    peaks = _peak_rss_bytes(loaded)  # before the machine's own measurements take memory
    loading = loaded.report
    read_bytes_per_s = measure_bandwidth(loading.num_threads)
    fp32_flop_per_s = measure_fp32(loading.num_threads)
    kv_bytes = _kv_bytes_read(loaded, result.prompt_tokens + result.output_tokens // 2)
    decode = []
    for speed in result.decode:
        step_bytes = loading.bytes_read_per_token + speed.batch * kv_bytes
        decode.append(
            {
                **asdict(speed),
                "bytes_read_per_step": step_bytes,
                "bytes_read_per_token": step_bytes / speed.batch,
                "bandwidth_fraction": step_bytes / (speed.step_ms / 1e3) / read_bytes_per_s,
            }
        )
    return {
        "model": model,
        "isa": loading.isa,
        "num_threads": loading.num_threads,
        "load_s": loading.load_s,
        "load_from_cache": loading.from_cache,
        "packed_bytes": loading.packed_bytes,
        "kv_cache_bytes": loading.kv_cache_bytes,
        "peak_rss_bytes": sum(peaks),
        "peak_rss_bytes_of_ranks": peaks,
        "machine": {
            "read_bytes_per_s": read_bytes_per_s,
            "fp32_flop_per_s": fp32_flop_per_s,
        },
        "weight_bytes_read_per_token": loading.bytes_read_per_token,
        "kv_bytes_read_per_token": kv_bytes,
        "prompt_tokens": result.prompt_tokens,
        "output_tokens": result.output_tokens,
        "prefill": {
            "tokens_per_s": result.prefill_tokens_per_s,
            "runs": result.prefill_runs,
        },
        "decode": decode,
    }


def _kv_bytes_read(loaded: LoadedModel, context: int) -> int:
    """Bytes of keys and values that one token at this context reads, over all layers."""
    from fuserve.decoder.step import BLOCK_SIZE_TOKENS

    spec = loaded.spec
    tokens_in_cache = loaded.executor.num_blocks * BLOCK_SIZE_TOKENS
    bytes_per_layer = loaded.report.kv_cache_bytes / (tokens_in_cache * spec.num_layers)
    seen = sum(min(context, layer.sliding_window or context) for layer in spec.layers)
    return round(bytes_per_layer * seen)


def _peak_rss_bytes(loaded: LoadedModel) -> list[int]:
    """The most memory that this process, and each other rank of the model, has held at once.

    Not ``getrusage``: its figure survives ``exec`` on Linux, so that a process started by a large
    one would report its parent's memory.
    """
    from fuserve.parallel.group_executor import GroupExecutor

    executor = loaded.executor
    others = executor.process_ids if isinstance(executor, GroupExecutor) else []
    if Path("/proc/self/status").exists():
        return [_high_water_bytes(process) for process in (os.getpid(), *others)]
    import resource

    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]


def _high_water_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _peak_memory(peaks: list[int]) -> str:
    total = human_bytes(sum(peaks))
    if len(peaks) == 1:
        return total
    return f"{total} in {len(peaks)} processes, {human_bytes(max(peaks))} in the largest"


def _print(report: dict[str, Any]) -> None:
    machine = report["machine"]
    cached = " (packed weights from the cache)" if report["load_from_cache"] else ""
    print_facts(
        f"{report['model']}",
        {
            "machine": f"{report['isa']}, {report['num_threads']} threads, reads "
            f"{human_bytes(machine['read_bytes_per_s'])}/s, "
            f"{machine['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s fp32",
            "load": f"{report['load_s']:.2f} s{cached}",
            "packed weights": human_bytes(report["packed_bytes"]),
            "peak memory": _peak_memory(report["peak_rss_bytes_of_ranks"]),
            "bytes read per token": f"{human_bytes(report['weight_bytes_read_per_token'])} weights"
            f" + {human_bytes(report['kv_bytes_read_per_token'])} KV cache",
        },
    )
    prefill = ["prefill", "1", f"{report['prefill']['tokens_per_s']:.1f}", "", ""]
    rows = [
        [
            "decode",
            str(row["batch"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['step_ms']:.1f}",
            f"{row['bandwidth_fraction']:.0%}",
        ]
        for row in report["decode"]
    ]
    print_table("", ["", "sequences", "tokens/s", "ms/step", "of bandwidth"], [prefill, *rows])
