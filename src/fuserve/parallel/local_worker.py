"""The process of a rank that ``fuserve`` has started on this host; nobody starts it by hand."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from fuserve.decoder.communicator import Communicator
from fuserve.decoder.load import open_weights
from fuserve.errors import FuserveError
from fuserve.parallel.assignment import Assignment
from fuserve.parallel.identity import identity_of
from fuserve.parallel.local_communicator import LocalCommunicator
from fuserve.parallel.local_links import HiddenSender, LocalWorkerLinks
from fuserve.parallel.rank_loop import run_rank
from fuserve.parallel.segment import Segment
from fuserve.parallel.shard_loading import CachePlan, ShardReport, load_shard

_PR_SET_PDEATHSIG = 1


def serve_as_rank(serve: Callable[[Connection], None]) -> None:
    """Serve as the rank that the parent process tells, over the pipe of the first argument.

    Args:
        serve: does what comes over the pipe, until it returns or the parent has gone.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # If the parent has died before this line, the pipe is at its end.
    with Connection(int(sys.argv[1])) as control:
        try:
            serve(control)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            sys.exit(1)  # rank 0 has gone, or has done with this group
        except Exception as error:
            reason = str(error) if isinstance(error, FuserveError) else repr(error)
            say(control, "failed", {"reason": reason})
            sys.exit(1)


def _serve(control: Connection) -> None:
    told = json.loads(control.recv_bytes())
    assignment = Assignment.from_json(told["assignment"])
    rank, layout = int(told["rank"]), assignment.layout
    os.sched_setaffinity(0, told["cpus"])
    checkpoint, weights = open_weights(assignment.model, assignment.options)
    identity = identity_of(checkpoint, weights.spec, assignment.model, socket.gethostname())
    say(control, "hello", {"identity": asdict(identity)})
    plan = CachePlan(**json.loads(control.recv_bytes())["plan"])

    def progress(stage: str, done: int, total: int) -> None:
        say(control, "progress", {"stage": stage, "done": done, "total": total})

    ends = told["ends"]
    executor = load_shard(
        checkpoint,
        weights,
        assignment.options,
        layout.shard(rank),
        plan,
        _communicator(ends, layout.tensor_rank(rank), layout.tensor_size, assignment),
        progress,
    )
    links = LocalWorkerLinks(
        control,
        assignment.sizes,
        _receiving_end(ends.get("hidden_in"), assignment.sizes.hidden_bytes),
        _hidden_sender(ends.get("hidden_out"), assignment),
        _receiving_end(ends.get("results"), assignment.sizes.result_bytes),
    )
    say(control, "ready", {"report": ShardReport.of(executor).to_json()})
    run_rank(rank, layout, executor, links)


def _communicator(
    ends: Mapping[str, Any], tensor_rank: int, tensor_size: int, assignment: Assignment
) -> Communicator | None:
    if "exchange" not in ends:
        return None
    segment = Segment(*ends["exchange"])
    return LocalCommunicator(segment.memory, tensor_rank, tensor_size, assignment.step_timeout_s)


def _receiving_end(end: Any, num_bytes: int) -> Any:
    if end is None:
        return None
    pipe, descriptor = end
    return Connection(pipe), Segment(descriptor, num_bytes).memory


def _hidden_sender(end: Any, assignment: Assignment) -> HiddenSender | None:
    if end is None:
        return None
    pipes, descriptor = end
    memory = Segment(descriptor, assignment.sizes.hidden_bytes).memory
    return HiddenSender([Connection(pipe) for pipe in pipes], memory, assignment.sizes)


def say(control: Connection, kind: str, content: Mapping[str, Any]) -> None:
    """Tell rank 0."""
    control.send_bytes(json.dumps({"kind": kind, **content}).encode())


if __name__ == "__main__":
    serve_as_rank(_serve)
