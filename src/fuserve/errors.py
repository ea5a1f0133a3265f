"""Every exception a user can see. Messages say what was wrong, where, and what to do."""

from __future__ import annotations


class FuserveError(Exception):
    """Base of all errors raised on purpose by fuserve."""


class ModelNotFoundError(FuserveError):
    """The model argument names no folder, file, hub id or packaged model that can be read."""


class CheckpointError(FuserveError):
    """A checkpoint is damaged, incomplete or in a form that is refused.

    Args:
        message: what is wrong.
        file: the file it was found in.
        tensor: the tensor concerned, if any.
        remedy: what the user can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        file: object | None = None,
        tensor: str | None = None,
        remedy: str | None = None,
    ) -> None:
        where = f"{file}: " if file is not None else ""
        what = f"tensor {tensor!r}: " if tensor is not None else ""
        then = f" {remedy}" if remedy else ""
        super().__init__(f"{where}{what}{message}{then}")
        self.file = file
        self.tensor = tensor
        self.remedy = remedy


class UnsupportedModelError(FuserveError):
    """The model's architecture, or a field of its config, is not supported."""


class InvalidRequestError(FuserveError, ValueError):
    """A prompt or a sampling parameter is out of range."""


class CapacityError(FuserveError):
    """The request or the model cannot fit into the memory that was planned."""


class MissingExtraError(FuserveError, ImportError):
    """An optional dependency is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}. "
            f"Install it with: pip install 'fuserve[{extra}]'"
        )


class RequestFailedError(FuserveError):
    """A request failed while it ran; the requests beside it were not affected."""


class DeadlineError(RequestFailedError):
    """A request did not end within the time it was given."""


class QueueFullError(CapacityError):
    """Too much is waiting already; the same request may be taken later.

    Args:
        message: what is full.
        retry_after_s: when to try again, from the rate at which requests have lately begun to run.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStoppedError(FuserveError):
    """The engine takes no requests: it is being stopped, or its thread has died."""


class RankFailedError(EngineStoppedError):
    """A process of a group that runs a model together has died, hangs, or has never come."""
