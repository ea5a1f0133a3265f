"""Whose turn it is: by priority, then by what each client has had, then first come first served."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from fuserve.engine.sequence import Sequence

_by_rank = attrgetter("rank")
Turn = tuple[int, int, tuple[int, int, int]]


class FairShare:
    """What each client has had, in tokens computed for it.

    This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
    (2024): the client that has had the least comes next, and one that comes back from a pause
    starts level with those that stayed, so that nobody saves up a claim by being idle.
    """

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._unfinished: dict[str, int] = {}  # sequences of each active client

    def enter(self, client: str) -> None:
        """A sequence of the client begins to wait."""
        if client not in self._unfinished:
            self._unfinished[client] = 0
            floor = self._floor(besides=client)
            self._served[client] = max(self._served.get(client, 0), floor)
        self._unfinished[client] += 1

    def leave(self, client: str) -> None:
        """A sequence of the client has ended."""
        self._unfinished[client] -= 1
        if self._unfinished[client] == 0:
            del self._unfinished[client]
            # Who is behind everybody active would be lifted up anyway: forget it.
            floor = self._floor()
            self._served = {
                name: served
                for name, served in self._served.items()
                if name in self._unfinished or (self._unfinished and served > floor)
            }

    def charge(self, client: str, num_tokens: int) -> None:
        """Tokens were computed for a sequence of the client."""
        self._served[client] += num_tokens

    def served(self, client: str) -> int:
        """What the client has had."""
        return self._served[client]

    def turn(self, sequence: Sequence) -> Turn:
        """Sorts sequences: the lowest comes next."""
        return (sequence.rank[0], self._served[sequence.client], sequence.rank)

    def _floor(self, besides: str | None = None) -> int:
        active = [self._served[name] for name in self._unfinished if name != besides]
        return min(active, default=0)


class FairQueue:
    """Waiting sequences: a line for each client and priority, each by rank."""

    def __init__(self, share: FairShare) -> None:
        self._share = share
        self._lines: dict[tuple[int, str], list[Sequence]] = {}

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into its client's line."""
        line = self._lines.setdefault((sequence.rank[0], sequence.client), [])
        insort(line, sequence, key=_by_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        key = (sequence.rank[0], sequence.client)
        line = self._lines[key]
        line.remove(sequence)
        if not line:
            del self._lines[key]

    def first(self) -> Sequence | None:
        """Whose turn it is; None if nobody waits."""
        heads = (line[0] for line in self._lines.values())
        return min(heads, key=self._share.turn, default=None)
