"""A real server on the loopback, inside the test's process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvicorn
from openai import OpenAI

from fuserve.checkpoints import Tokenizer
from fuserve.engine.async_engine import AsyncEngine
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.sampling_params import SamplingParams
from fuserve.server.app import create_app
from fuserve.server.config import ServedModel, ServerConfig
from fuserve.server.images.context import ServedImages
from fuserve.server.lifecycle import listen
from fuserve.server.metrics import ServerMetrics
from tests.engine.fake_model import ByteCodec, FakeExecutor

WAIT_S = 60.0
"""Far more than anything takes: reaching it is a failure."""


class ChatByteCodec(ByteCodec):
    """Bytes, with a template that knows no tools."""

    chat_template_source = "{{ messages }}"


@dataclass
class RunningServer:
    """A server that takes requests.

    Attributes:
        url: without the path.
        engine: behind it.
    """

    url: str
    engine: AsyncEngine
    clients: list[OpenAI] = field(default_factory=list)

    def client(self, api_key: str = "none", **options: Any) -> OpenAI:
        """The official client, closed with the server; it does not try again by itself."""
        options.setdefault("max_retries", 0)
        client = OpenAI(base_url=f"{self.url}/v1", api_key=api_key, timeout=WAIT_S, **options)
        self.clients.append(client)
        return client


@contextmanager
def serving(
    engine: Engine,
    tokenizer: object,
    *,
    max_model_len: int = 1024,
    config: ServerConfig | None = None,
    names: Sequence[str] = ("toy",),
    images: ServedImages | None = None,
    **limits: Any,
) -> Iterator[RunningServer]:
    """Serve an engine on a free port until the block ends."""
    model = ServedModel(tuple(names), max_model_len, 1, SamplingParams())
    metrics = ServerMetrics(model.name)
    async_engine = AsyncEngine(engine, observer=metrics, **limits)
    codec = cast(Tokenizer, tokenizer)
    app = create_app(async_engine, codec, model, config or ServerConfig(), metrics, images)
    async_engine.start()
    with listen("127.0.0.1", 0) as listener:
        options = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        listener.listen(512)  # connections wait until the server takes them
        thread.start()
        running = RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", async_engine)
        try:
            yield running
        finally:
            for client in running.clients:
                client.close()
            asyncio.run(async_engine.drain(0))
            server.should_exit = True
            thread.join(WAIT_S)


@contextmanager
def serving_toy(
    executor: FakeExecutor | None = None,
    *,
    config: ServerConfig | None = None,
    max_num_seqs: int = 8,
    **limits: Any,
) -> Iterator[RunningServer]:
    """Serve the toy model."""
    codec = ChatByteCodec()
    engine = Engine(executor or FakeExecutor(), codec, EngineConfig(1024, max_num_seqs, 64))
    with serving(engine, codec, config=config, **limits) as server:
        yield server


class HeldExecutor(FakeExecutor):
    """Steps only while it is let go."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.released = threading.Event()
        self.stepping = threading.Event()

    def step(self, batch: Any) -> Any:
        self.stepping.set()
        assert self.released.wait(WAIT_S), "nobody let the executor go"
        return super().step(batch)


SERVE = [
    *(str(Path(sys.executable).with_name("fuserve")), "serve", "--model", "demo", "--port", "0"),
    *("--max-model-len", "2048", "--max-num-seqs", "2"),
]


@contextmanager
def served(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, which it prints when it is ready."""
    with subprocess.Popen([*SERVE, *flags], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if " is served at " in line:
                    yield process, line.split(" is served at ")[1].split("/v1")[0]
                    break
        finally:
            process.kill()
