"""Does a server stay as it was after many minutes of every kind of use?

Users stream answers, share prefixes, leave in the middle, ask for JSON, embeddings and impossible
things, and now and then come in a crowd. First the KV cache, which grows when it is first used, is
filled; then resident memory, threads and descriptors are sampled, and the slope of memory is fitted
after a warm-up. Prints a line for each thing that must not change, writes JSON, and exits with 1 if
one did.

    python benchmarks/soak.py
    python benchmarks/soak.py --minutes 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
from serving_cases.servers import RunningServer, fuserve_server
from serving_cases.users import Crowd, fill_cache, run_users
from serving_cases.watch import Sample, Verdict, judge, take_sample, watch

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP_SHARE = 1 / 3  # the caches are full and every code path has been taken by then
SAMPLES = 900
DRAIN_S, POLL_S = 30.0, 0.1


def main() -> int:
    """Soak, judge, write."""
    given = parse_arguments()
    flags = ["--max-num-seqs", "8", "--max-model-len", "768", "--log-level", "error"]
    with fuserve_server(given.model, *flags) as server:
        samples, idle, crowd = asyncio.run(soak(server, given.minutes * 60, given.seed))
        verdicts = [*judge(samples, given.minutes * 60 * WARM_UP_SHARE, idle)]
        verdicts += judge_server(server, crowd)
        if crowd.failures:
            print(server.log_tail(), file=sys.stderr)
    report = to_report(given, samples, crowd, verdicts)
    RESULTS.mkdir(exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in report.items()]
    (RESULTS / "soak.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{sum(crowd.outcomes.values())} visits in {given.minutes:g} minutes", flush=True)
    print("\n".join(str(verdict) for verdict in verdicts))
    return 0 if all(verdict.kept for verdict in verdicts) else 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


async def soak(
    server: RunningServer, seconds: float, seed: int
) -> tuple[list[Sample], Sample, Crowd]:
    """Samples under load, one after it, and what came of the visits."""
    await fill_cache(server)
    process = psutil.Process(server.process.pid)
    samples: list[Sample] = []
    watching = asyncio.create_task(watch(process, samples, seconds / SAMPLES))
    await asyncio.sleep(0)  # the first sample is from before the users
    try:
        crowd = await run_users(server, seconds, seed)
    finally:
        watching.cancel()
    return samples, await _when_idle(process, samples[0]), crowd


async def _when_idle(process: psutil.Process, first: Sample) -> Sample:
    """The process once it has noticed that everybody left, or after a while."""
    waited_s = 0.0
    while True:
        idle = take_sample(process, waited_s)
        if idle.num_fds <= first.num_fds or waited_s > DRAIN_S:
            return idle
        await asyncio.sleep(POLL_S)
        waited_s += POLL_S


def judge_server(server: RunningServer, crowd: Crowd) -> list[Verdict]:
    """Nothing is left in the engine, and no visit ended as it should not."""
    metrics = server.metrics()
    left = {
        name: metrics["fuserve:" + name, ""]
        for name in ("num_requests_running", "num_requests_waiting")
    }
    failures = crowd.failures
    return [
        Verdict("nothing is left in the engine", not any(left.values()), str(left)),
        Verdict("every visit ended as it should", not failures, str(failures or "all")),
    ]


def to_report(
    given: argparse.Namespace, samples: list[Sample], crowd: Crowd, verdicts: list[Verdict]
) -> dict[str, Any]:
    """For JSON."""
    return {
        "model": given.model,
        "minutes": given.minutes,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "visits": {f"{kind}: {how}": count for (kind, how), count in crowd.outcomes.items()},
        **{
            f"samples.{field.name}": [getattr(sample, field.name) for sample in samples]
            for field in fields(Sample)
        },
    }


if __name__ == "__main__":
    sys.exit(main())
