"""What the server serves, and within which limits. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.engine.sampling_params import SamplingParams

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as clients see it.

    Attributes:
        names: what a request may call it; the first one is reported.
        max_model_len: tokens of the longest sequence, prompt and output.
        created: when it was loaded, in seconds since the epoch.
        default_params: sampling where a request says nothing.
    """

    names: tuple[str, ...]
    max_model_len: int
    created: int
    default_params: SamplingParams

    @property
    def name(self) -> str:
        """The name that responses carry."""
        return self.names[0]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Limits and habits of the server.

    Attributes:
        api_keys: a request must bring one of them; none leaves the door open.
        cors_origins: web pages that may call from other origins; "*" is all. None by default.
        max_body_bytes: larger request bodies are refused with 413.
        request_timeout_s: a request that takes longer ends with 504; None is no limit.
        log_prompts: write prompts and answers to the log.
        otlp_endpoint: where a span of each request goes (OTLP over HTTP); None sends none.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * MIB
    request_timeout_s: float | None = None
    log_prompts: bool = False
    otlp_endpoint: str | None = None
