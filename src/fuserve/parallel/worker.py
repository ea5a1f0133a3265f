"""One rank of a group that ``torchrun`` starts: ``torchrun … -m fuserve.parallel.worker``.

All ranks are given what ``fuserve serve`` takes. Rank 0 becomes that command; the others take what
they need from rank 0, and of their own arguments only the model, which may lie elsewhere on each
host.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from fuserve.errors import FuserveError, MissingExtraError
from fuserve.parallel.torchrun import num_restarts, started_by_torchrun, torchrun_rank

_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0


def main() -> None:
    """Run as the rank that torchrun's variables say."""
    if not started_by_torchrun():
        sys.exit("fuserve.parallel.worker is started by torchrun; docs/parallel.md shows how.")
    if num_restarts() > 0:  # torchrun itself does not wait
        time.sleep(min(_FIRST_DELAY_S * 2 ** (num_restarts() - 1), _LONGEST_DELAY_S))
    if torchrun_rank() == 0:
        os.execv(sys.executable, [sys.executable, "-m", "fuserve", "serve", *sys.argv[1:]])
    parser = argparse.ArgumentParser(prog="fuserve.parallel.worker")
    parser.add_argument("--model", "-m", required=True)
    arguments, _ = parser.parse_known_args()
    # torchrun passes on what it is sent. Rank 0 lets requests end, and then says when to leave.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        from fuserve.parallel.torch_start import serve_rank
    except ImportError as error:
        raise MissingExtraError("torch", "torch", "a group over several hosts") from error
    try:
        serve_rank(arguments.model)
    except (FuserveError, RuntimeError) as error:
        sys.exit(f"rank {torchrun_rank()}: {error}")


if __name__ == "__main__":
    main()
