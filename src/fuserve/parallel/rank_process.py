"""One rank as a process of this host, seen from rank 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from typing import Any

import psutil

Message = dict[str, Any]


class RankProcess:
    """A started worker process, which dies with the thread that started it.

    Args:
        rank: its number.
        descriptors: that it inherits.
        program: the module that it runs, given a pipe's descriptor.

    Attributes:
        control: the pipe to it: messages while it starts, then commands.
        pidfd: becomes readable when it dies.
        heard: the last message of each kind that has come from it.
        heard_s: when the last one came, on the monotonic clock.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, rank: int, descriptors: Sequence[int], program: str) -> None:
        self.rank = rank
        with ExitStack() as on_error:
            self.control, theirs = Pipe()
            on_error.callback(self.control.close)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", program, str(theirs.fileno())],
                    pass_fds=[theirs.fileno(), *descriptors],
                    stdin=subprocess.DEVNULL,
                    # Ctrl-C is for rank 0, which tells the others when to leave.
                    start_new_session=True,
                )
            on_error.callback(self.kill)
            self.pidfd = os.pidfd_open(self._process.pid)
            on_error.pop_all()
        self.heard: dict[str, Message] = {}
        self.heard_s = time.monotonic()

    @property
    def process_id(self) -> int:
        """As the system numbers it."""
        return self._process.pid

    def send(self, content: Mapping[str, Any]) -> None:
        """Send a message. Raises OSError if the process is gone."""
        self.control.send_bytes(json.dumps(content).encode())

    def take_message(self) -> bool:
        """Note the message that has come; False if none will ever come again."""
        try:
            message: Message = json.loads(self.control.recv_bytes())
        except (EOFError, OSError):
            return False
        self.heard[str(message["kind"])] = message
        self.heard_s = time.monotonic()
        return True

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def epitaph(self) -> str:
        """How it died, or what state it is in, for people."""
        name = f"rank {self.rank} (process {self.process_id})"
        code = self._process.poll()
        if "failed" in self.heard:
            return f"{name} has failed: {self.heard['failed']['reason']}"
        if code is None:
            with suppress(psutil.Error):
                return f"{name} is {psutil.Process(self.process_id).status()}"
            return f"{name} is gone"
        if code < 0:
            return f"{name} was killed by {signal.Signals(-code).name}"
        return f"{name} has exited with {code}"

    def kill(self) -> None:
        """End it at once, whatever it is doing, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def leave(self, timeout_s: float) -> None:
        """Wait for it to leave by itself, and kill it if it does not."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def close(self) -> None:
        """Give pipe and descriptor back."""
        self.control.close()
        os.close(self.pidfd)
