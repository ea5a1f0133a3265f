"""What goes between the ranks of a group during a step, whatever carries it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import StepBatch
from fuserve.parallel.commands import Command

Floats = npt.NDArray[np.float32]


class LeaderLinks(Protocol):
    """Rank 0's. Every method raises OSError or RuntimeError if a rank cannot be reached."""

    def broadcast(self, command: Command) -> None:
        """Send a command to all other ranks."""
        ...

    def send_hidden(self, number: int, hidden: Floats) -> None:
        """Hand the hidden states of a step to the second stage  # [tokens, hidden]"""
        ...

    def receive_results(self, number: int, batch: StepBatch) -> tuple[Floats, Floats]:
        """Wait for the last stage's logits and hidden states  # [rows, vocab], [rows, hidden]"""
        ...


class WorkerLinks(Protocol):
    """Those of the other ranks."""

    def receive(self) -> Command:
        """Wait for the next command. Raises EOFError when rank 0 has gone."""
        ...

    def receive_hidden(self, number: int, num_tokens: int) -> Floats:
        """Wait for the hidden states of the stage before  # [tokens, hidden]"""
        ...

    def send_hidden(self, number: int, hidden: Floats) -> None:
        """Hand the hidden states to the next stage  # [tokens, hidden]"""
        ...

    def send_results(self, number: int, batch: StepBatch, logits: Floats) -> None:
        """Hand the logits, and ``batch.hidden``, to rank 0  # [rows, vocab]"""
        ...
