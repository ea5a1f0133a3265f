"""The routing policy as Ray Serve's request router.

Ray has a prefix-aware router of its own, ``ray.serve.llm.request_router``, but it comes with
``ray[llm]`` (vLLM, pyarrow and CUDA's libraries), and asks another process about every request.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from fuserve.server.replicas.affinity import PrefixAffinity, prefix_blocks
from fuserve.server.replicas.messages import ForwardedRequest


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray ships no types
    """Sends a request where its prompt's beginning is cached, unless that replica is busy.

    There is one door, so what it has sent and not seen end is the load of each replica.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve before the first request."""
        self._affinity: PrefixAffinity[ReplicaID] = PrefixAffinity()
        self._loads: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas by rank: the chosen one, then the others by load."""
        loads = {one.replica_id: self._loads[one.replica_id] for one in candidate_replicas}
        if not loads:
            return []
        blocks: list[int] = []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            blocks = _blocks(pending_request)
        chosen = self._affinity.choose(blocks, loads)
        ranked = sorted(
            candidate_replicas, key=lambda one: (one.replica_id != chosen, loads[one.replica_id])
        )
        return [[one] for one in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """The replica has the request."""
        self._loads[replica_id] += 1
        self._affinity.remember(_blocks(pending_request), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request has ended, in whatever way."""
        self._loads[replica_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Its cache is gone with it."""
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id)


def _blocks(pending: PendingRequest) -> list[int]:
    request = next((one for one in pending.args if isinstance(one, ForwardedRequest)), None)
    return [] if request is None else prefix_blocks(request.body)
