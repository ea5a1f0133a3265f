"""OpenRequests: the requests that have not ended, and whose sequences are whose."""

from __future__ import annotations

import math

from fuserve.engine.generation import Generation
from fuserve.engine.request import Request
from fuserve.engine.sequence import Sequence
from fuserve.errors import InvalidRequestError


class OpenRequests:
    """Data only: what is done with a request is the engine's.

    Attributes:
        num_queued: requests that have not begun.
        num_queued_tokens: their prompts' tokens.
    """

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        # Which completion a sequence belongs to; None where its prompt is embedded.
        self._owners: dict[Sequence, tuple[Request, Generation | None]] = {}
        self._next_deadline_s = math.inf  # none is earlier
        self.num_queued = 0
        self.num_queued_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> Request | None:
        """The request of this id; None if it is unknown or has ended."""
        return self._requests.get(request_id)

    def all(self) -> list[Request]:
        """All of them, in the order of their arrival."""
        return list(self._requests.values())

    def owner(self, sequence: Sequence) -> tuple[Request, Generation | None]:
        """Whose sequence it is; there is no completion where a prompt is embedded."""
        return self._owners[sequence]

    def add(self, request: Request) -> None:
        """Take in a request that has not begun.

        Raises:
            InvalidRequestError: its id is in use.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"The request id {request.request_id!r} is in use.")
        self._requests[request.request_id] = request
        self.num_queued += 1
        self.num_queued_tokens += len(request.prompt_token_ids)
        if request.deadline_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)
        if request.reader is not None:
            self._owners[request.reader] = (request, None)
        for generation in request.generations:
            self._owners[generation.sequence] = (request, generation)

    def begin(self, request: Request, now_s: float) -> None:
        """Its first tokens are in a step."""
        self._unqueue(request)
        request.scheduled_s = now_s

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        del self._owners[sequence]

    def remove(self, request: Request) -> None:
        """Forget a request that has ended, and whose sequences have been released."""
        if not request.has_begun:
            self._unqueue(request)
        del self._requests[request.request_id]

    def expired(self, now_s: float) -> list[Request]:
        """Those whose time is over."""
        if now_s < self._next_deadline_s:
            return []
        deadlines = [(r.deadline_s, r) for r in self.all() if r.deadline_s is not None]
        later = [deadline_s for deadline_s, _ in deadlines if deadline_s > now_s]
        self._next_deadline_s = min(later, default=math.inf)
        return [request for deadline_s, request in deadlines if deadline_s <= now_s]

    def _unqueue(self, request: Request) -> None:
        self.num_queued -= 1
        self.num_queued_tokens -= len(request.prompt_token_ids)
