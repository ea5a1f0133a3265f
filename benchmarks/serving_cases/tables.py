"""The serving benchmark's results as Markdown, with a verdict on each promise."""

from __future__ import annotations

from typing import Any

MIN_TIMES_STATIC, MIN_TIMES_PEER = 2.5, 3.0
MAX_GAP_RATIO, MIN_PREFIX_RATIO, MAX_OVERHEAD = 3.0, 5.0, 0.10
STRICT = "fuserve, static batches that let sequences leave"
NAMES = {"static": "fuserve, static batches", "peer": "llama.cpp's server"}


def to_markdown(result: dict[str, Any]) -> str:
    """The tables, with what they were measured on."""
    machine = result["machine"]
    lines = [
        "32 requests at once, prompts of 16–512 tokens, answers of 16–256; "
        f"{result['slots']} sequences run together on {result['threads']} threads "
        f"({machine.get('isa', '?')}; the machine reads {machine['read_bytes_per_s'] / 1e9:.1f} "
        f"GB/s and does {machine['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s in fp32); the client runs "
        f"on the same machine. Medians of {result['rounds']} interleaved rounds.",
    ]
    for model in result["models"]:
        if "throughput" in model:
            lines += _throughput(model["title"], model["throughput"])
    claims = [claim for model in result["models"] for claim in _claims(model)]
    if claims:
        lines += ["", "| promise | model | measured | limit | |", "|---|---|---|---|---|"]
        lines += ["| " + " | ".join(claim) + " |" for claim in claims]
    return "\n".join(lines)


def _throughput(title: str, rows: list[dict[str, Any]]) -> list[str]:
    header = [title, "output tokens/s", "all done", "first token, p50", "per token, p50"]
    lines = ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        cells = [
            row["label"],
            f"{row['output_tokens_per_s']:.0f}",
            f"{row['duration_s']:.1f} s",
            f"{row['ttft_p50_ms'] / 1e3:.2f} s",
            f"{row['tpot_p50_ms']:.1f} ms",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _claims(model: dict[str, Any]) -> list[list[str]]:
    """Rows of promise, model, figure, limit, verdict."""
    title = model["title"]
    claims = _speed_claims(title, model.get("throughput", []))
    if "long-prompt" in model:
        found = model["long-prompt"]
        claims.append(
            [
                "worst gap of streams beside a 4k-token prompt, by their own median",
                title,
                f"{found['worst_ms'] / found['beside_ms']:.2f} while it is read, "
                f"{found['ratio']:.2f} by their pace without it ({found['worst_ms']:.0f} ms; "
                f"medians {found['before_ms']:.0f} before, {found['beside_ms']:.0f} beside, "
                f"{found['after_ms']:.0f} after); read in {found['prefill_s']:.1f} s",
                f"< {MAX_GAP_RATIO:g}",
                _verdict(found["ratio"] < MAX_GAP_RATIO),
            ]
        )
    if "shared-prefix" in model:
        found = model["shared-prefix"]
        same = "the same tokens" if found["same_texts"] else "DIFFERENT tokens"
        claims.append(
            [
                "prefill time saved by a 1k-token prefix that 16 prompts share",
                title,
                f"{found['ratio']:.1f} × ({found['computed_s']:.2f} s to "
                f"{found['reused_s']:.2f} s), {same}",
                f"≥ {MIN_PREFIX_RATIO:g} ×",
                _verdict(found["ratio"] >= MIN_PREFIX_RATIO and found["same_texts"]),
            ]
        )
    if "overhead" in model:
        found = model["overhead"]
        claims.append(
            [
                "time outside the model at 16 streams, by the clock",
                title,
                f"{found['by_clock']:.1%} (in steps {found['in_steps']:.1%} of "
                f"{found['step_ms']:.1f} ms)",
                f"< {MAX_OVERHEAD:.0%}",
                _verdict(found["by_clock"] < MAX_OVERHEAD),
            ]
        )
    return claims


def _speed_claims(title: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    by_label = {row["label"]: row for row in rows}
    ours = by_label.get("fuserve")
    claims = []
    for kind, limit in (("static", MIN_TIMES_STATIC), ("peer", MIN_TIMES_PEER)):
        other = by_label.get(NAMES[kind])
        if ours is None or other is None:
            continue
        ratio = ours["output_tokens_per_s"] / other["output_tokens_per_s"]
        kept = ratio >= limit
        measured = f"{ratio:.2f} ×"
        if kind == "static" and STRICT in by_label:
            strict = ours["output_tokens_per_s"] / by_label[STRICT]["output_tokens_per_s"]
            measured += f" ({strict:.2f} × where sequences may leave)"
        if kind == "peer":
            sooner = ours["ttft_p50_ms"] <= other["ttft_p50_ms"]
            kept = kept and sooner
            measured += f", first token {'not ' if not sooner else ''}sooner"
        claims.append(
            [f"tokens/s against {NAMES[kind]}", title, measured, f"≥ {limit:g} ×", _verdict(kept)]
        )
    return claims


def _verdict(kept: bool) -> str:
    return "kept" if kept else "MISSED"
