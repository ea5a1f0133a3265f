"""A rank that joins a group and then does not load its part; started by test_two_hosts."""

from __future__ import annotations

import os
import signal
import sys

from fuserve.decoder.load import open_weights
from fuserve.parallel.assignment import Assignment
from fuserve.parallel.torch_start import _hello, join_control


def main(model: str, how: str) -> None:
    control = join_control(30.0, 60.0)
    assignment = Assignment.from_json(control.share(None)["assignment"])
    checkpoint, weights = open_weights(model, assignment.options)
    control.exchange(_hello(checkpoint, weights.spec, model))
    control.share(None)  # the plan
    if how == "dies":
        os._exit(1)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
