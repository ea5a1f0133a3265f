"""ChunkWriter: the events of a stream, with little work for each token."""

from __future__ import annotations

import json
from typing import Any


class ChunkWriter:
    """Writes events of one response; all but the choice is made once.

    Args:
        head: what every chunk holds: id, object, created, model.
        wants_usage: the stream ends with a chunk of usage; the others then hold none.
    """

    def __init__(self, head: dict[str, Any], *, wants_usage: bool) -> None:
        self._head = "data: " + json.dumps(head)[:-1]
        self._tail = "]" + (', "usage": null' if wants_usage else "") + "}\n\n"
        self.wants_usage = wants_usage

    def choice(self, choice: dict[str, Any]) -> str:
        """A chunk of one choice."""
        return f'{self._head}, "choices": [{json.dumps(choice)}{self._tail}'

    def usage(self, usage: dict[str, Any]) -> str:
        """The last chunk."""
        return f'{self._head}, "choices": [], "usage": {json.dumps(usage)}}}\n\n'
