"""Figures of an image engine at work, and who wants to hear of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from fuserve.engine.images.request import ImageOutput

StepKind = Literal["prepare", "denoise", "cached", "decode"]
"""``cached`` is a denoising step that reused the deep part of the network."""


@dataclass(frozen=True, slots=True)
class ImageStats:
    """What the engine holds now, and what it has looked up.

    Attributes:
        num_running: requests whose steps take turns.
        num_waiting: requests that have not begun.
        num_bytes: latents, cached features and all else that the running ones hold.
        prompt_queries_total: prompts that were to be encoded.
        prompt_hits_total: those that had been encoded before.
    """

    num_running: int
    num_waiting: int
    num_bytes: int
    prompt_queries_total: int
    prompt_hits_total: int


class ImageObserver(Protocol):
    """Hears what the engine does, on the engine's thread: it must be quick."""

    def on_step(self, kind: StepKind, seconds: float) -> None:
        """A piece of work has been done."""

    def on_finished(self, output: ImageOutput) -> None:
        """A request has ended, in whatever way."""
