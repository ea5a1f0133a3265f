"""Do chats stream on while eight pictures of two sizes are painted by the same server?

Streams run alone for a while, then beside eight requests for pictures that arrive at once, then
the pictures alone. Printed are the gaps between tokens of a stream (median, 99th percentile, the
largest), what the streams cost the pictures, how evenly pictures of one size got on, and how soon
memory is free when everybody who waits for a picture leaves. Writes JSON and Markdown.

    python benchmarks/images_beside_text.py --write-docs
    python benchmarks/images_beside_text.py --image-model FOLDER --sides 256 512 --steps 4
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from markdown_block import replace_block
from serving_cases.batches import GREEDY
from serving_cases.painters import (
    IMAGE_MODEL,
    Painting,
    Picture,
    paint,
    paint_all,
    seconds_until_free,
)
from serving_cases.servers import RunningServer, fuserve_server

from fuserve.loadgen import Answer, Completer, PlannedRequest, Target, Vocabulary
from fuserve.loadgen.client import clock_s

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "performance.md"
RESULTS = HERE / "results"
NUM_PICTURES = 8
PROMPT_TOKENS, ANSWER_TOKENS = 32, 192
SKIPPED_TOKENS = 4  # the first ones tell of the prompt
MIB = 1 << 20


@dataclass(frozen=True)
class Gaps:
    """Between two tokens of a stream, in ms."""

    median_ms: float
    p99_ms: float
    max_ms: float
    tokens_per_s: float

    @classmethod
    def of(cls, answers: Sequence[Answer], begin_s: float, end_s: float) -> Gaps:
        """Of what lies between two times."""
        gaps = [
            late - early
            for answer in answers
            for early, late in pairwise(answer.chunk_s[SKIPPED_TOKENS:])
            if early >= begin_s and late <= end_s
        ]
        median, p99, largest = np.quantile(np.array(gaps) * 1e3, [0.5, 0.99, 1.0])
        return cls(float(median), float(p99), float(largest), len(gaps) / (end_s - begin_s))


@dataclass(frozen=True)
class Result:
    """All figures of a run."""

    streams: int
    sides: tuple[int, int]
    steps: int
    cache_interval: int
    alone: Gaps
    beside: Gaps
    painting_alone_s: float
    painting_beside_s: float
    most_uneven: float
    small_before_large: bool
    free_after_s: float
    kept_mib: float


def main() -> None:
    """Measure, print, write."""
    given = parse_arguments()
    flags = ["--max-num-seqs", "8", "--max-model-len", "512", "--log-level", "error"]
    flags += ["--image-model", given.image_model, "--served-image-model-name", IMAGE_MODEL]
    with fuserve_server(given.model, *flags) as server:
        result = asyncio.run(measure(server, given))
    markdown = to_markdown(result)
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "images_beside_text.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    if given.write_docs:
        replace_block(DOCS, "images-beside-text", markdown)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--image-model", default="demo-diffusion")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of streams alone")
    parser.add_argument("--sides", type=int, nargs=2, default=(64, 128), help="in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cache-interval", type=int, default=1)
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCS.name}")
    return parser.parse_args()


async def measure(server: RunningServer, given: argparse.Namespace) -> Result:
    """Streams alone, pictures alone, both, and pictures that nobody waits for."""
    pictures = [
        Picture(given.sides[number % 2], given.steps, number, given.cache_interval)
        for number in range(NUM_PICTURES)
    ]
    async with Completer(Target(server.base_url, server.model, body=GREEDY)) as completer:
        vocabulary = await completer.vocabulary()
        await paint_all(server, [Picture(side, 2, 0, given.cache_interval) for side in given.sides])
        process = psutil.Process(server.process.pid)

        alone = Streams(completer, vocabulary, given.streams)
        async with asyncio.TaskGroup() as group:
            chatting = group.create_task(alone.run())
            await asyncio.sleep(given.seconds)
            alone.stop()
            await chatting
        painted = await paint_all(server, pictures)

        beside = Streams(completer, vocabulary, given.streams)
        async with asyncio.TaskGroup() as group:
            chatting = group.create_task(beside.run())
            await beside.all_stream()
            painted_beside = await paint_all(server, pictures)
            beside.stop()
            await chatting
        rss = process.memory_info().rss
        await asyncio.gather(*(paint(server, picture, leave_after=2) for picture in pictures))
        free_after_s = await seconds_until_free(server)
        kept = process.memory_info().rss - rss
    begin_s = min(each.begun_s for each in painted_beside)
    end_s = max(each.done_s or 0.0 for each in painted_beside)
    return Result(
        given.streams,
        tuple(given.sides),
        given.steps,
        given.cache_interval,
        Gaps.of(alone.answers, alone.begun_s, alone.ended_s),
        Gaps.of(beside.answers, begin_s, end_s),
        duration_s(painted),
        duration_s(painted_beside),
        most_uneven(painted_beside),
        small_before_large(painted_beside),
        free_after_s,
        kept / MIB,
    )


class Streams:
    """Some users who chat without a pause: an answer has ended, the next one begins."""

    def __init__(self, completer: Completer, vocabulary: Vocabulary, count: int) -> None:
        self._completer, self._vocabulary, self._count = completer, vocabulary, count
        self._tasks: list[asyncio.Task[None]] = []
        self._open: dict[int, Answer] = {}
        self.answers: list[Answer] = []
        self.begun_s = self.ended_s = 0.0

    async def run(self) -> None:
        """Until ``stop`` is called."""
        self.begun_s = clock_s()
        self._tasks = [asyncio.create_task(self._chat(user)) for user in range(self._count)]
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        self.answers += self._open.values()

    async def all_stream(self) -> None:
        """Wait until every user has had some tokens."""
        while len(self._open) < self._count or not all(
            len(answer.chunk_s) > 2 * SKIPPED_TOKENS for answer in self._open.values()
        ):
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        """Everybody leaves."""
        self.ended_s = clock_s()
        for task in self._tasks:
            task.cancel()

    async def _chat(self, user: int) -> None:
        turn = 0
        while True:
            tokens = self._vocabulary.draw(np.random.default_rng([user, turn]), PROMPT_TOKENS)
            request = PlannedRequest(0.0, self._vocabulary.prompt(tokens), ANSWER_TOKENS)

            def note(answer: Answer) -> None:
                self._open[user] = answer

            answer = await self._completer.complete(request, clock_s(), note)
            if answer.error:
                raise SystemExit(f"a chat failed: {answer.error}")
            self.answers.append(answer)
            self._open.pop(user, None)
            turn += 1


def duration_s(paintings: Sequence[Painting]) -> float:
    """From the first request to the last picture."""
    begun_s = min(each.begun_s for each in paintings)
    return max(each.done_s or 0.0 for each in paintings) - begun_s


def most_uneven(paintings: Sequence[Painting]) -> float:
    """The largest difference of progress between pictures of one size, while all were painted."""
    worst = 0.0
    for side in {each.picture.side for each in paintings}:
        equals = [each for each in paintings if each.picture.side == side]
        until_s = min(each.done_s or 0.0 for each in equals)
        times = [at_s for each in equals for at_s in each.step_s if at_s < until_s]
        for at_s in times:
            shares = [each.progress(at_s) for each in equals]
            worst = max(worst, max(shares) - min(shares))
    return worst


def small_before_large(paintings: Sequence[Painting]) -> bool:
    """Every small picture was done before the first large one."""
    small = min(each.picture.side for each in paintings)
    done = {True: [0.0], False: [0.0]}
    for each in paintings:
        done[each.picture.side == small].append(each.done_s or 0.0)
    return max(done[True]) < min(done[False][1:])


def to_markdown(result: Result) -> str:
    """A table, and a line of what else was seen."""
    small, large = result.sides
    rows = [
        f"| gaps between tokens of {result.streams} streams | median | 99 % | largest | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for name, gaps in (("text alone", result.alone), ("beside eight pictures", result.beside)):
        figures = f"{gaps.median_ms:.1f} ms | {gaps.p99_ms:.1f} ms | {gaps.max_ms:.1f} ms"
        rows.append(f"| {name} | {figures} | {gaps.tokens_per_s:.0f} |")
    order = "were all done before" if result.small_before_large else "were not all done before"
    cached = f", cache interval {result.cache_interval}" if result.cache_interval > 1 else ""
    rows += [
        "",
        f"Four pictures of {small}² and four of {large}² pixels, {result.steps} steps{cached}, "
        f"took {result.painting_alone_s:.1f} s alone and {result.painting_beside_s:.1f} s beside "
        f"the streams; the small ones {order} the first large one. Pictures of one size were "
        f"at most {result.most_uneven:.0%} of their steps apart. When everybody left in the "
        f"middle, their memory was free after {result.free_after_s:.2f} s ({result.kept_mib:+.0f} "
        "MiB resident).",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
