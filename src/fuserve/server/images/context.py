"""What the image endpoints share."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.engine.images.engine import ImageEngine
from fuserve.server.config import ServerConfig
from fuserve.server.errors import ApiError
from fuserve.server.workers import Workers


@dataclass(frozen=True, slots=True)
class ServedImages:
    """An image model to be served.

    Attributes:
        engine: started by the caller.
        names: what requests may call the model; the first one is reported.
        created: when it was loaded, in seconds since the epoch.
    """

    engine: ImageEngine
    names: tuple[str, ...]
    created: int

    def context(self, config: ServerConfig, workers: Workers) -> ImageContext:
        """With what the server has."""
        return ImageContext(self.engine, self.names, self.created, config, workers)


@dataclass(frozen=True, slots=True)
class ImageContext:
    """A served image model, and what the server has.

    Attributes:
        engine, names, created: as in ``ServedImages``.
        workers: for reading and writing picture files.
    """

    engine: ImageEngine
    names: tuple[str, ...]
    created: int
    config: ServerConfig
    workers: Workers

    @property
    def name(self) -> str:
        """The name that responses carry."""
        return self.names[0]

    def check_model(self, name: str | None) -> None:
        """Raise a 404 unless the request means the model that is served.

        Raises:
            ApiError: it names another one.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"The image model {name!r} does not exist. This server has: "
                f"{', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
