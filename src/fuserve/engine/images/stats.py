"""Figures of an image engine at work, and who wants to hear of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from fuserve.engine.images.request import ImageOutput

StepKind = Literal["prepare", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class ImageStats:
    """What the engine holds now, and what it has looked up.

    Attributes:
        num_running: requests whose steps take turns.
        num_waiting: requests that have not begun.
        prompt_queries_total: prompts that were to be encoded.
        prompt_hits_total: those that had been encoded before.
    """

    num_running: int
    num_waiting: int
    prompt_queries_total: int
    prompt_hits_total: int


class ImageObserver(Protocol):
    """Hears what the engine does, on the engine's thread: it must be quick."""

    def on_step(self, kind: StepKind, seconds: float) -> None:
        """A piece of work has been done."""

    def on_finished(self, output: ImageOutput) -> None:
        """A request has ended, in whatever way."""
