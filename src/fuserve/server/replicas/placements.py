"""Which requests each replica has, as the one door knows it that sends them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

R = TypeVar("R", bound=Hashable)


class Placements(Generic[R]):
    """Requests count for a replica from when it is chosen until they have ended.

    What was never placed, such as the questions for metrics, may end too, and changes nothing.
    """

    def __init__(self) -> None:
        self._replica_of: dict[str, R] = {}
        self._loads: Counter[R] = Counter()

    def load(self, replica: R) -> int:
        """Requests that the replica has."""
        return self._loads[replica]

    def place(self, request: str, replica: R) -> None:
        """The request goes to this replica, and to no other that was chosen before."""
        self.remove(request)
        self._replica_of[request] = replica
        self._loads[replica] += 1

    def remove(self, request: str) -> None:
        """The request will not be sent anywhere."""
        if request in self._replica_of:
            self.end(request, self._replica_of[request])

    def end(self, request: str, replica: R) -> None:
        """The request has ended at this replica; it may be with another one by now."""
        if self._replica_of.get(request) != replica:
            return
        del self._replica_of[request]
        self._loads[replica] -= 1
        if not self._loads[replica]:
            del self._loads[replica]
