"""Whose step comes next: fair by work, not by the number of steps."""

from __future__ import annotations

from collections.abc import Iterable

from fuserve.engine.fair_queue import FairShare
from fuserve.engine.images.request import ImageRequest


class Turns:
    """The client that has had the least comes next, and of its requests the one that has.

    A step of a large picture counts as much more than one of a small picture as it has pixels, so
    small pictures are not held up by large ones. Who comes later starts level with those that are
    there: a stream of new requests cannot hold up an old one.
    """

    def __init__(self) -> None:
        self._clients = FairShare()
        self._requests = FairShare()

    def arrive(self, request: ImageRequest) -> None:
        """A request begins to wait."""
        self._clients.enter(request.client)

    def begin(self, request: ImageRequest) -> None:
        """A request that waited takes part in the turns."""
        self._requests.enter(request.request_id)

    def leave(self, request: ImageRequest, *, has_begun: bool) -> None:
        """A request has ended."""
        self._clients.leave(request.client)
        if has_begun:
            self._requests.leave(request.request_id)

    def charge(self, request: ImageRequest, work: int) -> None:
        """Work was done for a request that takes part."""
        self._clients.charge(request.client, work)
        self._requests.charge(request.request_id, work)

    def next_to_begin(self, waiting: Iterable[ImageRequest]) -> ImageRequest:
        """Who of those that wait, in the order of their arrival, comes first."""
        return min(waiting, key=lambda request: self._clients.served(request.client))

    def next_to_step(self, running: Iterable[ImageRequest]) -> ImageRequest:
        """Who of those that take part comes next."""
        return min(
            running,
            key=lambda request: (
                self._clients.served(request.client),
                self._requests.served(request.request_id),
            ),
        )
