"""``fuserve serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fuserve.cli.flags import Debug, ModelFlags, ModelOption, ParallelFlags
from fuserve.cli.output import WorkProgress, note
from fuserve.errors import InvalidRequestError, MissingExtraError

if TYPE_CHECKING:
    from fuserve.checkpoints import Tokenizer
    from fuserve.decoder import LoadedModel
    from fuserve.engine.config import EngineConfig
    from fuserve.server.config import ServerConfig

_SERVER_PANEL = "Server"
_QUEUE_PANEL = "Scheduling"


def _server(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_SERVER_PANEL, **limits)


def _queue(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_QUEUE_PANEL, **limits)


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """Where the server listens, and whom it lets in."""

    host: Annotated[str, _server("--host", help="Address to listen on; 0.0.0.0 is every one.")] = (
        "127.0.0.1"
    )
    port: Annotated[
        int, _server("--port", help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000
    served_model_name: Annotated[
        list[str] | None,
        _server("--served-model-name", help="What requests call the model; may be repeated."),
    ] = None
    api_key: Annotated[
        list[str] | None,
        _server("--api-key", help="Key that requests must bring; may be repeated."),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        _server("--cors-origin", help="Origin of web pages that may call; may be repeated."),
    ] = None
    max_body_mb: Annotated[
        float, _server("--max-body-mb", help="Largest request body in MiB.", min=0.001)
    ] = 8.0
    grace_period: Annotated[
        float,
        _server("--grace-period", help="Seconds that running requests have after SIGTERM.", min=0),
    ] = 30.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _server("--log-level", help="debug also logs health checks."),
    ] = "info"
    log_prompts: Annotated[
        bool, _server("--log-prompts", help="Write prompts and answers to the log.")
    ] = False
    otlp_endpoint: Annotated[
        str | None,
        _server(
            "--otlp-traces-endpoint",
            "--otlp-endpoint",
            metavar="URL",
            help="OpenTelemetry collector for spans (extra 'otel').",
        ),
    ] = None

    def config(self, request_timeout_s: float | None) -> ServerConfig:
        """As the server takes it.

        Raises:
            InvalidRequestError: an API key is empty.
        """
        from fuserve.server.config import MIB, ServerConfig

        if any(not key.strip() for key in self.api_key or ()):
            raise InvalidRequestError("--api-key is empty. Leave it out to let everybody in.")
        return ServerConfig(
            api_keys=tuple(self.api_key or ()),
            cors_origins=tuple(self.cors_origin or ()),
            max_body_bytes=round(self.max_body_mb * MIB),
            request_timeout_s=request_timeout_s,
            log_prompts=self.log_prompts,
            otlp_endpoint=self.otlp_endpoint,
        )


@dataclass(frozen=True, slots=True)
class SchedulingFlags:
    """How requests share the machine."""

    max_itl_ms: Annotated[
        float | None,
        _queue("--max-itl-ms", help="Longest time between tokens of a running stream.", min=0.1),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        _queue(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Reuse the KV cache of prompts that begin alike.",
        ),
    ] = True
    num_speculative_tokens: Annotated[
        int,
        _queue("--num-speculative-tokens", help="Tokens guessed ahead by prompt lookup.", min=0),
    ] = 0
    max_queue_requests: Annotated[
        int, _queue("--max-queue-requests", help="Requests that may wait.", min=1)
    ] = 64
    max_queue_tokens: Annotated[
        int, _queue("--max-queue-tokens", help="Prompt tokens that may wait.", min=1)
    ] = 65536
    request_timeout: Annotated[
        float | None,
        _queue("--request-timeout", help="Seconds after which a request ends.", min=0.001),
    ] = None

    def engine_config(
        self, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> EngineConfig:
        """As the engine takes it."""
        from fuserve.engine.config import EngineConfig

        return EngineConfig(
            max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            max_itl_ms=self.max_itl_ms,
            enable_prefix_caching=self.enable_prefix_caching,
            num_speculative_tokens=self.num_speculative_tokens,
        )


def serve(
    model: ModelOption,
    flags: ModelFlags,
    parallel: ParallelFlags,
    scheduling: SchedulingFlags,
    server: ServerFlags,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Model whose tokenizer is used; the model's own."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a web page to try it.

    SIGTERM and Ctrl-C let running requests end before the server exits.
    """
    run_server, listen, configure_logging = _server_functions()
    from fuserve.parallel.loading import load_parallel

    config = server.config(scheduling.request_timeout)
    with listen(server.host, server.port) as listener:
        options = flags.executor_options()
        with WorkProgress() as progress:
            loaded = load_parallel(model, options, parallel.options(), progress.update)
        try:
            codec = _tokenizer(loaded, tokenizer)
            engine_config = scheduling.engine_config(
                loaded.max_model_len, options.max_num_seqs, options.max_num_batched_tokens
            )
            names = tuple(server.served_model_name or (model,))
            app = _build(loaded, codec, engine_config, names, scheduling, config)
            url = _url(server.host, listener.getsockname()[1])
            configure_logging(server.log_level)
            run_server(
                app,
                listener,
                grace_s=server.grace_period,
                ready=lambda: _announce(url, names[0], bool(config.api_keys)),
            )
        finally:
            loaded.close()


def _server_functions() -> tuple[Any, Any, Any]:
    """The server's own functions.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from fuserve.server.lifecycle import listen, run_server
        from fuserve.server.logs import configure_logging
    except ImportError as error:
        if error.name is None or error.name.startswith("fuserve"):
            raise
        raise MissingExtraError(error.name, "serve", "fuserve serve") from error
    return run_server, listen, configure_logging


def _build(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    engine_config: EngineConfig,
    names: tuple[str, ...],
    scheduling: SchedulingFlags,
    config: ServerConfig,
) -> Any:
    """The application over a started engine."""
    from fuserve.engine.async_engine import AsyncEngine
    from fuserve.engine.engine import Engine
    from fuserve.engine.sampling_params import SamplingParams
    from fuserve.server.app import create_app
    from fuserve.server.config import ServedModel
    from fuserve.server.metrics import ServerMetrics

    recommended = {} if loaded.checkpoint is None else loaded.checkpoint.generation_config
    served = ServedModel(
        names,
        loaded.max_model_len,
        int(time.time()),
        SamplingParams.from_generation_config(recommended),
    )
    metrics = ServerMetrics(served.name)
    engine = AsyncEngine(
        Engine(loaded.executor, tokenizer, engine_config),
        max_queue_requests=scheduling.max_queue_requests,
        max_queue_tokens=scheduling.max_queue_tokens,
        observer=metrics,
    )
    app = create_app(engine, tokenizer, served, config, metrics)
    engine.start()
    return app


def _tokenizer(loaded: LoadedModel, name: str | None) -> Tokenizer:
    from fuserve.checkpoints import load_tokenizer, open_checkpoint

    if name is not None:
        return load_tokenizer(open_checkpoint(name))
    if loaded.checkpoint is None:
        raise InvalidRequestError(
            "a model with --load-format dummy has no tokenizer. Name a model with --tokenizer."
        )
    return load_tokenizer(loaded.checkpoint)


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if ":" in reachable and not reachable.startswith("["):
        reachable = f"[{reachable}]"
    return f"http://{reachable}:{port}"


def _announce(url: str, name: str, needs_key: bool) -> None:
    """Say what to do next."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    note(f"""\
{name} is served at {url}/v1. Try it in a browser: {url}/
Or:
  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
Ctrl-C stops it once running requests have ended.""")
