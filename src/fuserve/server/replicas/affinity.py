"""Which replica a request goes to: where its prompt's beginning is cached, unless that is busy."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

BLOCK_CHARS = 128
"""Text that is compared at once, some 32 tokens: a block of the KV cache."""

MOST_BLOCKS = 200_000
"""Blocks that are remembered: 25 MB of text; the longest unused are forgotten first."""

SLACK = 4
"""Requests that a replica may have beyond the least loaded one and still be preferred."""

R = TypeVar("R", bound=Hashable)


class PrefixAffinity(Generic[R]):
    """Remembers which replica has seen which beginnings of prompts.

    Args:
        most_blocks: how many are remembered.
        slack: see ``SLACK``.
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS, slack: int = SLACK) -> None:
        self._seen: OrderedDict[int, R] = OrderedDict()
        self._most_blocks = most_blocks
        self._slack = slack

    def choose(self, blocks: Sequence[int], loads: Mapping[R, int]) -> R:
        """The replica for a prompt.

        The one that has seen most of its beginning, unless it has ``slack`` requests more than the
        least loaded; else the least loaded.

        Args:
            blocks: of ``prefix_blocks``.
            loads: requests that each replica has; not empty.
        """
        least = min(loads, key=loads.__getitem__)
        for block in reversed(blocks):
            replica = self._seen.get(block)
            if replica is not None and replica in loads:
                return replica if loads[replica] <= loads[least] + self._slack else least
        return least

    def remember(self, blocks: Sequence[int], replica: R) -> None:
        """The replica has the prompt now."""
        for block in blocks:
            self._seen[block] = replica
            self._seen.move_to_end(block)
        while len(self._seen) > self._most_blocks:
            self._seen.popitem(last=False)

    def forget(self, replica: R) -> None:
        """The replica and its cache are gone."""
        for block in [block for block, owner in self._seen.items() if owner == replica]:
            del self._seen[block]


def prefix_blocks(body: bytes) -> list[int]:
    """A hash for each whole block of a request's prompt, of the block and all before it.

    Two requests have as many first hashes in common as blocks of their prompts are the same. What
    is no request for a completion has none.
    """
    try:
        request = json.loads(body)
    except ValueError:
        return []
    text = _prompt(request) if isinstance(request, dict) else ""
    blocks, before = [], 0
    for start in range(0, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        before = hash((before, text[start : start + BLOCK_CHARS]))
        blocks.append(before)
    return blocks


def _prompt(request: Mapping[str, Any]) -> str:
    """The prompt as text that begins alike where prompts begin alike; tools stand before it."""
    prompt = request.get("messages", request.get("prompt"))
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        return ""
    # The last bracket is cut off, as a longer conversation goes on there.
    return json.dumps([request.get("tools"), prompt])[:-2]
