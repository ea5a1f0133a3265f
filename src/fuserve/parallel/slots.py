"""Places in shared memory for what a stage hands on: hidden states, and logits in the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fuserve.decoder.step import StepBatch
from fuserve.errors import CapacityError
from fuserve.parallel.segment import Bytes

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SlotSizes:
    """What a slot must hold, and how many there are.

    One slot more than steps in flight: what was read last stays valid while further steps begin.

    Attributes:
        max_tokens: of a step.
        hidden_size: of the model.
        vocab_size: of the model.
        num_slots: steps whose results may exist at once.
    """

    max_tokens: int
    hidden_size: int
    vocab_size: int
    num_slots: int

    @property
    def hidden_bytes(self) -> int:
        """Of all slots for hidden states."""
        return 4 * self.num_slots * self.max_tokens * self.hidden_size

    @property
    def result_bytes(self) -> int:
        """Of all slots for results. Only rows that are asked for become memory."""
        return 4 * self.num_slots * self.max_tokens * (self.vocab_size + self.hidden_size)

    def check(self, batch: StepBatch) -> None:
        """Raise unless the step's arrays fit.

        Raises:
            CapacityError: it has more tokens than planned.
        """
        if len(batch.tokens) > self.max_tokens:
            raise CapacityError(
                f"a step of {len(batch.tokens)} tokens is more than the {self.max_tokens} that the "
                "ranks were started for; raise max_num_batched_tokens"
            )

    def hidden(self, memory: Bytes, number: int, num_tokens: int) -> Floats:
        """The hidden states of step ``number`` in the memory of a stage  # [tokens, hidden]"""
        slots = memory.view(np.float32).reshape(self.num_slots, self.max_tokens, self.hidden_size)
        view: Floats = slots[number % self.num_slots, :num_tokens]
        return view

    def results(self, memory: Bytes, number: int, batch: StepBatch) -> tuple[Floats, Floats]:
        """The logits and the hidden states that a step gives  # [rows, vocab], [rows, hidden]"""
        slot = memory.view(np.float32).reshape(self.num_slots, -1)[number % self.num_slots]
        logits, hidden = np.split(slot, [self.max_tokens * self.vocab_size])
        return (
            logits.reshape(-1, self.vocab_size)[: len(batch.logit_rows)],
            hidden.reshape(-1, self.hidden_size)[: len(batch.hidden_rows)],
        )
