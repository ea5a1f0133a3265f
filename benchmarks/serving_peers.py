"""How does fuserve serve many users beside llama.cpp's server, and beside static batches?

32 requests of mixed length arrive at once: prompts of 16 to 512 tokens, answers of 16 to 256. Each
contestant is a server in a process of its own, loaded by the same client over HTTP; rounds are
interleaved, each with new prompts, and medians are reported. The static batches run on fuserve's
own server. Further sections hold the server to what it promises: how a long prompt disturbs running
streams, what a shared prefix saves, and how much of the time is not spent inside the model.
Writes JSON and Markdown, and the table in docs/performance.md.

    python benchmarks/serving_peers.py --rounds 3 --write-docs
    python benchmarks/serving_peers.py --models llama-1b --sections overhead
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from llm_peers import CACHE, demo_gguf, measure_machine
from markdown_block import replace_block
from serving_cases.batches import Batching, Throughput, measure
from serving_cases.claims import measure_long_prompt, measure_overhead, measure_shared_prefix
from serving_cases.servers import RunningServer, fuserve_server, llama_server
from serving_cases.tables import to_markdown

from fuserve.loadgen import TokenRange, Workload

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs" / "performance.md"
TOKENS_PER_SLOT = 1024  # the longest prompt and answer together are 768
LOAD = Workload(32, TokenRange(16, 512), TokenRange(16, 256))
MODELS = {"smollm2-135m": "SmolLM2-135M Q4_1", "llama-1b": "Llama shape, 1.07 B, Q4_0"}


@dataclass(frozen=True)
class Contestant:
    """A server, and how requests are handed to it."""

    label: str
    engine: str  # fuserve or llama.cpp
    batching: Batching


CONTESTANTS = (
    Contestant("fuserve", "fuserve", "continuous"),
    Contestant("fuserve, static batches", "fuserve", "padded"),
    Contestant("fuserve, static batches that let sequences leave", "fuserve", "static"),
    Contestant("llama.cpp's server", "llama.cpp", "continuous"),
)


def main() -> None:
    """Measure, print, write."""
    given = parse_arguments()
    sections = given.sections.split(",")
    result: dict[str, Any] = {
        "machine": measure_machine(given.threads),
        "threads": given.threads,
        "slots": given.slots,
        "rounds": given.rounds,
        "models": [],
    }
    for name in given.models.split(","):
        model = model_file(name)
        found = {section: SECTIONS[section](model, given) for section in sections}
        result["models"].append({"name": name, "title": MODELS[name], **found})
    markdown = to_markdown(result)
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "serving_peers.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "serving_peers.md").write_text(markdown + "\n")
    if given.write_docs:
        replace_block(DOCS, "serving", markdown)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--engines", default="fuserve,llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16, help="sequences that run together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--llama-server",
        type=Path,
        default=CACHE / "bin" / "llama-server",
        help="llama.cpp's server; built if it does not exist",
    )
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCS.name}")
    return parser.parse_args()


def model_file(name: str) -> Path:
    """The GGUF file that both engines read."""
    if name == "smollm2-135m":
        return demo_gguf()
    path = CACHE / "llama-1b-Q4_0-with-tokenizer.gguf"
    if not path.exists():
        from random_gguf import write_random_gguf

        say(f"writing {path.name}")
        CACHE.mkdir(parents=True, exist_ok=True)
        write_random_gguf(HERE / "configs" / "llama-1b.json", path, "Q4_0", demo_gguf())
    return path


@contextmanager
def served(engine: str, model: Path, given: argparse.Namespace) -> Iterator[RunningServer]:
    """A contestant's server."""
    if engine == "llama.cpp":
        from llama_server_setup import prepare
        from llama_setup import LLAMA_CPP_PYTHON

        binary = prepare(given.llama_server, LLAMA_CPP_PYTHON)
        with llama_server(
            binary,
            model,
            slots=given.slots,
            tokens_per_slot=TOKENS_PER_SLOT,
            threads=given.threads,
        ) as server:
            yield server
    else:
        with fuserve(model, given, "--max-model-len", str(TOKENS_PER_SLOT)) as server:
            yield server


def fuserve(model: Path, given: argparse.Namespace, *flags: str) -> Any:
    """``fuserve serve`` with the flags that all sections share."""
    shared = ["--threads", str(given.threads), "--max-num-seqs", str(given.slots)]
    return fuserve_server(model, *shared, *flags)


def throughput(model: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contestant once per round; medians of all rounds."""
    contestants = [c for c in CONTESTANTS if c.engine in given.engines.split(",")]
    runs: dict[str, list[Throughput]] = {c.label: [] for c in contestants}
    for turn in range(given.rounds):
        load = replace(LOAD, seed=turn)  # new prompts: no cache may know them
        for contestant in contestants:
            say(f"round {turn + 1}: {contestant.label}")
            with served(contestant.engine, model, given) as server:
                runs[contestant.label].append(
                    measure(server, load, contestant.batching, given.slots)
                )
    return [{"label": label, **summary(results)} for label, results in runs.items()]


def summary(results: list[Throughput]) -> dict[str, Any]:
    """Medians over the rounds."""
    figures = ("output_tokens_per_s", "duration_s", "ttft_p50_ms", "tpot_p50_ms")
    return {
        **{name: median(getattr(result, name) for result in results) for name in figures},
        "runs": [asdict(result) for result in results],
    }


def long_prompt(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """At the pace that the server chooses by itself."""
    say("a long prompt beside running streams")
    with fuserve(model, given, "--max-model-len", "4608") as server:
        return asdict(measure_long_prompt(server))


def shared_prefix(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """With reuse, and without it."""
    say("a prefix shared by 16 prompts")
    flags = ["--max-model-len", "2048"]
    with fuserve(model, given, *flags) as server:
        reused = measure_shared_prefix(server)
    with fuserve(model, given, *flags, "--no-enable-prefix-caching") as server:
        computed = measure_shared_prefix(server)
    return {
        "reused_s": reused.seconds,
        "computed_s": computed.seconds,
        "ratio": computed.seconds / reused.seconds,
        "cached_tokens": reused.cached_tokens,
        "same_texts": reused.texts == computed.texts,
    }


def overhead(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The time outside the model at 16 streams."""
    say("time outside the model")
    with fuserve(model, given, "--max-model-len", str(TOKENS_PER_SLOT)) as server:
        return asdict(measure_overhead(server))


SECTIONS: dict[str, Callable[[Path, argparse.Namespace], Any]] = {
    "throughput": throughput,
    "long-prompt": long_prompt,
    "shared-prefix": shared_prefix,
    "overhead": overhead,
}

say = partial(print, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
