"""A group whose ranks ``torchrun`` has started, on any hosts; they speak ``torch.distributed``."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from fuserve.architectures import DecoderSpec
from fuserve.checkpoints import Checkpoint
from fuserve.decoder.communicator import Communicator
from fuserve.decoder.load import open_weights
from fuserve.decoder.packing import Progress
from fuserve.decoder.weights import DecoderWeights
from fuserve.errors import FuserveError, InvalidRequestError, RankFailedError
from fuserve.kernels.exchange import segment_bytes
from fuserve.kernels.memory import available_memory
from fuserve.parallel.assignment import Assignment
from fuserve.parallel.attendance import Attendance
from fuserve.parallel.identity import RankIdentity, check_identities, identity_of
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.local_communicator import EXCHANGE_FLOATS, LocalCommunicator
from fuserve.parallel.placement import threads_of_ranks
from fuserve.parallel.rank_loop import run_rank
from fuserve.parallel.rendezvous import join_group, plain
from fuserve.parallel.running import RunningRanks
from fuserve.parallel.segment import Segment
from fuserve.parallel.shard_loading import CachePlan, ShardReport, load_shard, plan_ranks
from fuserve.parallel.torch_communicator import TorchCommunicator
from fuserve.parallel.torch_links import TorchControl, TorchLinks
from fuserve.parallel.torchrun import local_ranks, torchrun_rank, torchrun_size

_log = logging.getLogger("fuserve.parallel")

_JOIN_TIMEOUT_S = 300.0
"""Of ranks other than 0, which is told how long that may take."""
_STEP_TIMEOUT_S = 3600.0
"""Of ranks other than 0, which notices first: it is told how long a step may take."""
_FLUSH_S = 1.0
"""For clients to be told before this process leaves."""


class TorchStart:
    """Rank 0's start; see ``StartRanks``. The other ranks call ``serve_rank``.

    A second start ends this process: ``torchrun`` then starts all ranks again.

    Args:
        checkpoint: the model's; None for dummy weights.
        weights: the model's.
        assignment: what all ranks are told.
        join_timeout_s: how long to wait for ranks to come, and then for one that says nothing while
            it loads its part.
        reserved_bytes: as of ``load_parallel``.

    Attributes:
        plan: of the KV cache, from the memory of all hosts.

    Raises:
        RankFailedError: a rank does not come, has another model or version, or cannot open its own.
        InvalidRequestError: torchrun has started another number of ranks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        weights: DecoderWeights,
        assignment: Assignment,
        join_timeout_s: float,
        reserved_bytes: int = 0,
    ) -> None:
        if assignment.layout.num_ranks != torchrun_size():
            raise InvalidRequestError(
                f"tensor_parallel_size x pipeline_parallel_size is {assignment.layout.num_ranks}, "
                f"but torchrun has started {torchrun_size()} ranks"
            )
        control = join_control(assignment.step_timeout_s, join_timeout_s)
        self._checkpoint = checkpoint
        self._weights = weights
        self._assignment = assignment
        self._control = control
        self._control.share({"assignment": assignment.to_json()})
        hello = _hello(checkpoint, weights.spec, assignment.model, reserved_bytes)
        hellos = self._control.exchange(hello)
        _check(hellos)
        self.plan = _plan(weights, assignment, hellos)
        self._control.share({"plan": self.plan.to_json()})
        self._has_started = False

    def __call__(
        self, on_failure: Callable[[RankFailedError], None], progress: Progress | None
    ) -> RunningRanks:
        """Load rank 0's part, and wait for the others to have loaded theirs."""
        if self._has_started:
            _log.error("Leaving, so that torchrun starts all ranks again.")
            time.sleep(_FLUSH_S)
            os._exit(1)
        self._has_started = True
        shard = _Shard(self._checkpoint, self._weights, self._assignment, self.plan, self._control)
        own, reports = shard.load(progress)
        resources = ExitStack()
        resources.callback(own.close)
        links = TorchLinks(self._assignment.layout, self._assignment.sizes, self._control)
        return RunningRanks(TorchGroup(self._control, on_failure), links, own, reports, resources)


class TorchGroup:
    """The other ranks; see ``RankGroup``. Only steps show whether they live.

    Args:
        control: to them.
        on_failure: as of ``StartRanks``.
    """

    def __init__(
        self, control: TorchControl, on_failure: Callable[[RankFailedError], None]
    ) -> None:
        self.failure: RankFailedError | None = None
        self._control = control
        self._on_failure = on_failure

    @property
    def process_ids(self) -> list[int]:
        """None: torchrun has started them."""
        return []

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A part of a step; what goes wrong in it is a rank's failure."""
        try:
            yield
        except Exception as error:
            self.failure = RankFailedError(f"a rank does not answer: {plain(error)}")
            threading.Thread(target=self._on_failure, args=[self.failure]).start()
            raise self.failure from error

    def close(self, *, leave_s: float = 0.0) -> None:
        """Leave the group, once the others have been told to, or if they have failed."""
        if self.failure is None:
            self._control.finish()
            dist.destroy_process_group()


def join_control(step_timeout_s: float, join_timeout_s: float) -> TorchControl:
    """Join the group; see ``join_group``."""
    store = join_group(step_timeout_s, join_timeout_s)
    return TorchControl(Attendance(store, join_timeout_s), join_timeout_s)


def serve_rank(model: str) -> None:
    """Be one of the ranks other than 0, until rank 0 leaves.

    Args:
        model: of this host; the files must be the same as rank 0's.

    Raises:
        RankFailedError: a rank has another model or version, or cannot load its part.
        RuntimeError: rank 0 has gone.
    """
    control = join_control(_STEP_TIMEOUT_S, _JOIN_TIMEOUT_S)
    assignment = Assignment.from_json(control.share(None)["assignment"])
    try:
        checkpoint, weights = open_weights(model, assignment.options)
    except FuserveError as error:
        control.exchange({"error": str(error)})
        raise
    hellos = control.exchange(_hello(checkpoint, weights.spec, model))
    _check(hellos)
    plan = CachePlan(**control.share(None)["plan"])
    executor, _ = _Shard(checkpoint, weights, assignment, plan, control).load(None)
    links = TorchLinks(assignment.layout, assignment.sizes, control)
    run_rank(torchrun_rank(), assignment.layout, executor, links)
    executor.close()
    dist.destroy_process_group()


class _Shard:
    """Loads this rank's part at the same time as all others do."""

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        weights: DecoderWeights,
        assignment: Assignment,
        plan: CachePlan,
        control: TorchControl,
    ) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._assignment = assignment
        self._plan = plan
        self._control = control

    def load(self, progress: Progress | None) -> tuple[Any, list[ShardReport]]:
        """The executor, and what each rank holds.

        Raises:
            RankFailedError: some rank could not load its part.
        """
        layout, options = self._assignment.layout, self._assignment.options
        num_threads = threads_of_ranks(local_ranks(), options.num_threads)
        communicator = _communicator(layout, self._control, self._assignment.step_timeout_s)

        def told(stage: str, done: int, total: int) -> None:
            self._control.attendance.beat()
            if progress is not None:
                progress(stage, done, total)

        try:
            executor = load_shard(
                self._checkpoint,
                self._weights,
                replace(options, num_threads=num_threads),
                layout.shard(torchrun_rank()),
                self._plan,
                communicator,
                told,
            )
        except FuserveError as error:
            self._control.exchange({"error": str(error)})
            raise
        answers = self._control.exchange({"report": ShardReport.of(executor).to_json()})
        _check_errors(answers)
        return executor, [ShardReport.from_json(answer["report"]) for answer in answers]


def _hello(
    checkpoint: Checkpoint | None, spec: DecoderSpec, model: str, reserved_bytes: int = 0
) -> dict[str, Any]:
    host = socket.gethostname()
    return {
        "identity": asdict(identity_of(checkpoint, spec, model, host)),
        "host": _host_key(),
        "available_bytes": max(0, available_memory() - reserved_bytes),
    }


def _host_key() -> str:
    """The same for processes that can share memory: of one boot, and one view of processes."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _check(hellos: Sequence[Mapping[str, Any]]) -> None:
    _check_errors(hellos)
    check_identities({rank: RankIdentity(**hello["identity"]) for rank, hello in enumerate(hellos)})


def _check_errors(answers: Sequence[Mapping[str, Any]]) -> None:
    errors = [f"rank {n}: {a['error']}" for n, a in enumerate(answers) if "error" in a]
    if errors:
        raise RankFailedError("; ".join(errors))


def _plan(
    weights: DecoderWeights, assignment: Assignment, hellos: Sequence[Mapping[str, Any]]
) -> CachePlan:
    """What every host can afford."""
    hosts: dict[str, list[int]] = {}
    for rank, hello in enumerate(hellos):
        hosts.setdefault(hello["host"], []).append(rank)
    plans = [
        plan_ranks(
            weights,
            assignment.options,
            assignment.layout,
            ranks,
            min(hellos[rank]["available_bytes"] for rank in ranks),
        )
        for ranks in hosts.values()
    ]
    return min(plans, key=lambda plan: (plan.num_blocks, plan.max_model_len))


def _communicator(
    layout: GroupLayout, control: TorchControl, timeout_s: float
) -> Communicator | None:
    """Shared memory where all ranks of the stage are on one host, and torch where they are not."""
    size = layout.tensor_size
    if size == 1:
        return None
    rank = torchrun_rank()
    segment = None
    if layout.tensor_rank(rank) == 0:
        segment = Segment.create(segment_bytes(size, EXCHANGE_FLOATS))
    # All ranks take part in making each group.
    groups = [dist.new_group(list(layout.ranks_of(s))) for s in range(layout.num_stages)]
    places = control.exchange(
        {
            "host": _host_key(),
            "process": os.getpid(),
            "segment": None if segment is None else segment.descriptor,
        }
    )
    stage = layout.stage(rank)
    mates = [places[mate] for mate in layout.ranks_of(stage)]
    if len({mate["host"] for mate in mates}) > 1:
        return TorchCommunicator(layout.ranks_of(stage), groups[stage])
    if segment is None:
        leader = mates[0]
        segment = Segment.of_process(
            leader["process"], leader["segment"], segment_bytes(size, EXCHANGE_FLOATS)
        )
    return LocalCommunicator(segment.memory, layout.tensor_rank(rank), size, timeout_s)
