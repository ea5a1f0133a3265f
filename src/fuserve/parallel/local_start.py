"""Starting a group on one host: as processes of ours that share memory."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

from fuserve.checkpoints import Checkpoint
from fuserve.decoder.packing import Progress
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import RankFailedError
from fuserve.parallel.assignment import Assignment
from fuserve.parallel.identity import RankIdentity, check_identities, identity_of
from fuserve.parallel.local_group import LocalGroup
from fuserve.parallel.options import ParallelOptions
from fuserve.parallel.placement import Cpus, on_cpus, place_ranks
from fuserve.parallel.rank_process import Message
from fuserve.parallel.running import RunningRanks
from fuserve.parallel.shard_loading import CachePlan, ShardReport, load_shard
from fuserve.parallel.wiring import Wiring


class LocalStart:
    """See ``StartRanks``.

    Args:
        checkpoint: the model's; None for dummy weights.
        weights: the model's, of which rank 0 reads its part.
        assignment: what all ranks are told.
        plan: of the KV cache.
        options: how long ranks may take.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        weights: DecoderWeights,
        assignment: Assignment,
        plan: CachePlan,
        options: ParallelOptions,
    ) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._assignment = assignment
        self._plan = plan
        self._options = options

    def __call__(
        self, on_failure: Callable[[RankFailedError], None], progress: Progress | None
    ) -> RunningRanks:
        """Start all ranks."""
        layout, sizes = self._assignment.layout, self._assignment.sizes
        places = place_ranks(layout.num_ranks)
        with ExitStack() as resources:
            wiring = Wiring(layout, sizes)
            resources.callback(wiring.close)
            communicator = wiring.leader_communicator(self._assignment.step_timeout_s)
            if communicator is not None:
                resources.callback(communicator.close)

            def failed(error: RankFailedError) -> None:
                if communicator is not None:
                    communicator.abort()
                on_failure(error)

            group = LocalGroup(
                "fuserve.parallel.local_worker",
                wiring.descriptors(),
                step_timeout_s=self._options.step_timeout_s,
                join_timeout_s=self._options.join_timeout_s,
                on_failure=failed,
            )
            resources.callback(group.close)
            wiring.release()
            self._agree(group, wiring, places)
            with on_cpus(places[0]):
                own = load_shard(
                    self._checkpoint,
                    self._weights,
                    self._assignment.options,
                    layout.shard(0),
                    self._plan,
                    communicator,
                    progress,
                )
            resources.callback(own.close)
            ready = group.hear("ready", _teller(progress))
            links = wiring.leader_links([process.control for process in group.processes])
            resources.callback(links.close)
            reports = [ShardReport.from_json(message["report"]) for message in ready.values()]
            return RunningRanks(
                group, links, own, [ShardReport.of(own), *reports], resources.pop_all()
            )

    def _agree(self, group: LocalGroup, wiring: Wiring, places: list[Cpus]) -> None:
        """Tell the ranks who they are, and see that they have the same model."""
        assignment = self._assignment.to_json()
        ranks = [process.rank for process in group.processes]
        group.tell(
            {
                rank: {
                    "rank": rank,
                    "assignment": assignment,
                    "cpus": sorted(places[rank]),
                    "ends": wiring.ends(rank),
                }
                for rank in ranks
            },
        )
        hellos = group.hear("hello")
        own = identity_of(
            self._checkpoint, self._weights.spec, self._assignment.model, socket.gethostname()
        )
        others = {rank: RankIdentity(**hello["identity"]) for rank, hello in hellos.items()}
        check_identities({0: own, **others})
        group.tell({rank: {"plan": self._plan.to_json()} for rank in ranks})


def _teller(progress: Progress | None) -> Callable[[Message], None] | None:
    if progress is None:
        return None
    return lambda message: progress(message["stage"], message["done"], message["total"])
