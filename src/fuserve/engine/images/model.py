"""What the image engine asks of a model, beside what the generation loop does."""

from __future__ import annotations

from typing import Any, Protocol

from fuserve.diffusion.image_model import ImageModel


class ServedModel(ImageModel[Any], Protocol):
    """A model that tells how much text it reads and has read, and that can rest."""

    @property
    def prompt_queries(self) -> int:
        """Prompts that were to be encoded so far."""
        ...

    @property
    def prompt_hits(self) -> int:
        """How many of them had been kept."""
        ...

    def release(self) -> None:
        """Give back the working memory; the next step takes what it needs."""
        ...

    def close(self) -> None:
        """End what belongs to the model beside this process; it cannot be used any more."""
        ...

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt that the text encoder reads."""
        ...
