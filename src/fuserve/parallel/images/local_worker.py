"""The process of a rank that ``fuserve`` has started on this host; nobody starts it by hand."""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Connection

from fuserve.parallel.images.assignment import ImageAssignment
from fuserve.parallel.images.commands import Command, decode
from fuserve.parallel.images.rank_model import RankModel, run_rank
from fuserve.parallel.images.wiring import BANDS, HALVES, joined
from fuserve.parallel.local_worker import say, serve_as_rank


def serve(control: Connection) -> None:
    """Be the rank that the messages of rank 0 say, until it says stop."""
    told = json.loads(control.recv_bytes())
    assignment = ImageAssignment.from_json(told["assignment"])
    os.sched_setaffinity(0, told["cpus"])
    rank, timeout_s = int(told["rank"]), assignment.parallel.step_timeout_s
    bands, halves = (joined(told["ends"], use, rank, timeout_s) for use in (BANDS, HALVES))
    model = RankModel(assignment, bands, halves)
    say(control, "ready", {})

    def receive() -> Command:
        return decode(control.recv_bytes())

    run_rank(model, receive)


if __name__ == "__main__":
    serve_as_rank(serve)
