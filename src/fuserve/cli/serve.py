"""``fuserve serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fuserve.cli.flags import MODEL_HELP, Debug, ModelFlags, ParallelFlags
from fuserve.cli.output import WorkProgress, note
from fuserve.cli.quantities import parse_bytes
from fuserve.errors import InvalidRequestError, MissingExtraError

if TYPE_CHECKING:
    from fuserve.parallel.options import ParallelOptions
    from fuserve.server.build import ServeSettings
    from fuserve.server.config import ServerConfig
    from fuserve.server.images.build import ImageSettings

_SERVER_PANEL = "Server"
_QUEUE_PANEL = "Scheduling"
_IMAGE_PANEL = "Images"
_REPLICA_PANEL = "Data parallelism"


def _server(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_SERVER_PANEL, **limits)


def _replica(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_REPLICA_PANEL, **limits)


def _image(*names: str, help: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_IMAGE_PANEL, **limits)


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


@dataclass(frozen=True, slots=True)
class ImageFlags:
    """An image model beside the language model, or alone."""

    image_model: Annotated[
        str | None,
        _image(
            "--image-model",
            metavar="MODEL",
            help="Diffusion model for /v1/images: a folder, a file, a hub id (extra 'image').",
        ),
    ] = None
    served_image_model_name: Annotated[
        list[str] | None,
        _image(
            "--served-image-model-name",
            help="What requests call the image model; may be repeated.",
        ),
    ] = None
    max_queue_image_requests: Annotated[
        int, _image("--max-queue-image-requests", help="Image requests that may wait.", min=1)
    ] = 32
    image_memory: Annotated[
        str | None,
        _image(
            "--image-memory",
            metavar="SIZE",
            help="What each process of the image model may take, such as 4GB; by default what is "
            "fastest.",
        ),
    ] = None
    image_cfg_parallel: Annotated[
        int,
        _image(
            "--image-cfg-parallel",
            help="2: the halves of guidance in processes of their own.",
            min=1,
            max=2,
        ),
    ] = 1
    image_patch_parallel: Annotated[
        int,
        _image(
            "--image-patch-parallel",
            help="Processes that make a band of each picture each.",
            min=1,
        ),
    ] = 1

    def settings(self, timeouts: Mapping[str, float]) -> ImageSettings | None:
        """As the server takes it; None where no image model is asked for.

        Args:
            timeouts: of ``ImageParallelOptions``, those that were given.
        """
        if self.image_model is None:
            return None
        from fuserve.diffusion.options import DiffusionOptions
        from fuserve.parallel.images.options import ImageParallelOptions
        from fuserve.server.images.build import ImageSettings

        memory_bytes = None
        if self.image_memory is not None:
            memory_bytes = parse_bytes("--image-memory", self.image_memory)
        return ImageSettings(
            self.image_model,
            tuple(self.served_image_model_name or (self.image_model,)),
            DiffusionOptions(memory_bytes=memory_bytes),
            ImageParallelOptions(self.image_cfg_parallel, self.image_patch_parallel, **timeouts),
            self.max_queue_image_requests,
        )


@dataclass(frozen=True, slots=True)
class ReplicaFlags:
    """How many engines are behind the door."""

    replicas: Annotated[
        int,
        _replica("--replicas", help="Copies of the model behind one door (extra 'ray').", min=1),
    ] = 1
    ray_address: Annotated[
        str | None,
        _replica(
            "--ray-address",
            metavar="ADDRESS",
            help="A Ray cluster to run them in, such as auto or HOST:6379; by default a Ray is "
            "started here and ends with the server.",
        ),
    ] = None


def serve(
    flags: ModelFlags,
    parallel: ParallelFlags,
    scheduling: SchedulingFlags,
    server: ServerFlags,
    replication: ReplicaFlags,
    image_flags: ImageFlags,
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Model whose tokenizer is used; the model's own."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a web page to try it.

    It may be a language model, an image model (--image-model), or one of each.

    SIGTERM and Ctrl-C let running requests end before the server exits.
    """
    server_modules()
    from fuserve.server.build import ServeSettings
    from fuserve.server.lifecycle import listen

    has_replicas = replication.replicas > 1 or replication.ray_address is not None
    if has_replicas and parallel.options().num_ranks > 1:
        raise InvalidRequestError(
            "a replica is one process: give either --replicas or the parallel sizes"
        )
    images = image_flags.settings(parallel.timeouts())
    if has_replicas and images is not None:
        raise InvalidRequestError(
            "replicas are copies of a language model: serve --image-model by a server of its own"
        )
    if model is None:
        if images is None:
            raise InvalidRequestError("nothing to serve: give --model, --image-model, or both")
        _serve_images(images, server, server.config(scheduling.request_timeout))
        return
    settings = ServeSettings(
        model,
        flags.executor_options(),
        tuple(server.served_model_name or (model,)),
        server.config(scheduling.request_timeout),
        tokenizer,
        max_itl_ms=scheduling.max_itl_ms,
        enable_prefix_caching=scheduling.enable_prefix_caching,
        num_speculative_tokens=scheduling.num_speculative_tokens,
        max_queue_requests=scheduling.max_queue_requests,
        max_queue_tokens=scheduling.max_queue_tokens,
        log_level=server.log_level,
    )
    with listen(server.host, server.port) as listener:
        url = _url(server.host, listener.getsockname()[1])

        def ready() -> None:
            _announce(url, settings.names[0], bool(settings.config.api_keys))

        if has_replicas:
            _serve_replicas(settings, replication, listener, server.grace_period, ready)
        else:
            options = parallel.options()
            _serve_one(settings, options, images, listener, server.grace_period, ready)


def _serve_one(
    settings: ServeSettings,
    parallel: ParallelOptions,
    images: ImageSettings | None,
    listener: socket,
    grace_s: float,
    ready: Callable[[], None],
) -> None:
    """One engine, in this process and the ranks beside it."""
    from fuserve.parallel.loading import load_parallel
    from fuserve.server.build import build_app
    from fuserve.server.images.build import reserved_bytes
    from fuserve.server.lifecycle import run_server
    from fuserve.server.logs import configure_logging

    kept = 0 if images is None else reserved_bytes(images)
    with WorkProgress() as progress:
        loaded = load_parallel(
            settings.model, settings.options, parallel, progress.update, reserved_bytes=kept
        )
    try:
        app = build_app(loaded, settings, images)
        configure_logging(settings.log_level)
        run_server(app, app.state.served, listener, grace_s=grace_s, ready=ready)
    finally:
        loaded.close()


def _serve_images(images: ImageSettings, server: ServerFlags, config: ServerConfig) -> None:
    """An image model alone."""
    from fuserve.server.build import build_image_app
    from fuserve.server.lifecycle import listen, run_server
    from fuserve.server.logs import configure_logging

    with listen(server.host, server.port) as listener:
        url = _url(server.host, listener.getsockname()[1])
        app = build_image_app(images, config)
        configure_logging(server.log_level)

        def ready() -> None:
            _announce_images(url, images.names[0], bool(config.api_keys))

        run_server(app, app.state.served, listener, grace_s=server.grace_period, ready=ready)


def _serve_replicas(
    settings: ServeSettings,
    replication: ReplicaFlags,
    listener: socket,
    grace_s: float,
    ready: Callable[[], None],
) -> None:
    """Engines in processes of Ray's, and the door to them in this one."""
    from fuserve.checkpoints.find import find_model
    from fuserve.server.lifecycle import run_server
    from fuserve.server.logs import configure_logging
    from fuserve.server.replicas.start import replicas

    if replication.ray_address is None and settings.options.load_format != "dummy":
        find_model(settings.model)  # tells what is wrong before processes are started
    note(f"starting {replication.replicas} replicas ...")
    with replicas(settings, replication.replicas, replication.ray_address) as door:
        configure_logging(settings.log_level)
        run_server(door, door, listener, grace_s=grace_s, ready=ready)


def server_modules() -> None:
    """Import what the server needs beside the core.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import fuserve.server.build
        import fuserve.server.lifecycle  # noqa: F401
    except ImportError as error:
        if error.name is None or error.name.startswith("fuserve"):
            raise
        raise MissingExtraError(error.name, "serve", "fuserve serve") from error


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if ":" in reachable and not reachable.startswith("["):
        reachable = f"[{reachable}]"
    return f"http://{reachable}:{port}"


def _announce_images(url: str, name: str, needs_key: bool) -> None:
    note(f"""\
{name} is served at {url}/v1. Try it in a browser: {url}/
Or:
  curl {url}/v1/images/generations -H 'Content-Type: application/json'{_key(needs_key)} \\
    -d '{{"model": "{name}", "prompt": "a red circle"}}'
Ctrl-C stops it once running requests have ended.""")


def _key(needs_key: bool) -> str:
    return " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""


def _announce(url: str, name: str, needs_key: bool) -> None:
    """Say what to do next."""
    key = _key(needs_key)
    note(f"""\
{name} is served at {url}/v1. Try it in a browser: {url}/
Or:
  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
Ctrl-C stops it once running requests have ended.""")
