"""The routing policy as Ray Serve's request router.

Ray has a prefix-aware router of its own, ``ray.serve.llm.request_router``, but it comes with
``ray[llm]`` (vLLM, pyarrow and CUDA's libraries), and asks another process about every request.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from fuserve.server.replicas.affinity import PrefixAffinity, prefix_blocks
from fuserve.server.replicas.messages import ForwardedRequest
from fuserve.server.replicas.placements import Placements

QUEUE_LENGTH_WITHIN_S = 5.0
"""For a replica to tell Ray how many requests it has. Nothing depends on the answer, as a replica
takes any number, but after Ray's 0.1 s a busy one would be passed over."""


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray ships no types
    """Sends a request where its prompt's beginning is cached, unless that replica is busy.

    There is one door, so what it has sent and not seen end is the load of each replica. A request
    counts as soon as a replica is chosen for it: it takes a while until that one has accepted it,
    and many may be chosen for meanwhile.
    """

    queue_len_response_deadline_s = QUEUE_LENGTH_WITHIN_S
    max_queue_len_response_deadline_s = QUEUE_LENGTH_WITHIN_S

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve before the first request."""
        self._affinity: PrefixAffinity[ReplicaID] = PrefixAffinity()
        self._placements: Placements[ReplicaID] = Placements()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas by rank: the chosen one, then the others by load."""
        if not candidate_replicas:
            return []
        blocks: list[int] = []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            blocks = _blocks(pending_request)
            self._placements.remove(_id(pending_request))  # chosen for before, in vain
        loads = {
            one.replica_id: self._placements.load(one.replica_id) for one in candidate_replicas
        }
        chosen = self._affinity.choose(blocks, loads)
        if pending_request is not None:
            self._placements.place(_id(pending_request), chosen)
            self._affinity.remember(blocks, chosen)
        ranked = sorted(
            candidate_replicas, key=lambda one: (one.replica_id != chosen, loads[one.replica_id])
        )
        return [[one] for one in ranked]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, **options: Any
    ) -> RunningReplica:
        """What Ray calls around ``choose_replicas``: only here is it seen what became of a choice.

        A request that it does not return a replica for is never said to have ended.
        """
        try:
            replica = await super()._choose_replica_for_request(pending_request, **options)
        except BaseException:
            self._placements.remove(_id(pending_request))
            raise
        self._placements.place(_id(pending_request), replica.replica_id)
        return replica

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """The replica has the request."""
        self._affinity.remember(_blocks(pending_request), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request has ended, in whatever way."""
        self._placements.end(internal_request_id, replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Its cache is gone with it."""
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id)


def _blocks(pending: PendingRequest) -> list[int]:
    request = next((one for one in pending.args if isinstance(one, ForwardedRequest)), None)
    return [] if request is None else prefix_blocks(request.body)


def _id(pending: PendingRequest) -> str:
    return str(pending.metadata.internal_request_id)
