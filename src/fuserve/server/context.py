"""What all endpoints of one server share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuserve.checkpoints import Tokenizer
from fuserve.engine.async_engine import AsyncEngine
from fuserve.server.config import ServedModel, ServerConfig
from fuserve.server.errors import ApiError
from fuserve.server.metrics import ServerMetrics
from fuserve.server.workers import Workers

_LONG_TEXT_CHARS = 8192


@dataclass(slots=True)
class ServerContext:
    """The engine, and the language model that it runs.

    Attributes:
        workers: for what would hold up the event loop.
    """

    engine: AsyncEngine
    tokenizer: Tokenizer
    model: ServedModel
    config: ServerConfig
    metrics: ServerMetrics
    workers: Workers

    def check_model(self, name: str | None) -> None:
        """Raise a 404 unless the request means the model that is served.

        Raises:
            ApiError: it names another one.
        """
        if name is not None and name not in self.model.names:
            known = ", ".join(self.model.names)
            raise ApiError(
                404,
                f"The model {name!r} does not exist. This server has: {known}.",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; raises as ``encode_all``."""
        (ids,) = await self.encode_all([text], add_special_tokens=add_special_tokens)
        return ids

    async def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text; much text is encoded beside the event loop.

        Raises:
            InvalidRequestError: one is not Unicode text.
        """

        def encode() -> list[list[int]]:
            return [
                self.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts
            ]

        if sum(map(len, texts)) < _LONG_TEXT_CHARS:
            return encode()
        return await self.workers.run(encode)
