"""A tiny OpenAI-compatible server on loopback, whose answers a test writes and holds back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WAIT_S = 30.0  # a test that waits longer than this has failed
CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

Reply = Callable[[dict[str, Any]], Iterator[str]]
"""The pieces of text for a request's body; each may be held back by the test."""


def count_up(body: dict[str, Any]) -> Iterator[str]:
    """As many words as were asked for."""
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or 3
    yield from (f" word{i}" for i in range(limit))


@dataclass
class FakeOpenAI:
    """What the server says, and what it was asked.

    Args:
        reply: the pieces of each answer.
        sends_usage: whether a stream ends with the numbers of tokens.
        tokenizes: path and field of the tokenizing endpoint, if there is one.
        takes_token_ids: whether a prompt may be token ids.
        refuse: for a body, the status and message of an error; None answers it.
        api_key: without which the models are not listed.
        static: the playground's folder: ``index.html`` at ``/``.
    """

    reply: Reply = count_up
    sends_usage: bool = True
    tokenizes: tuple[str, str] | None = ("/tokenize", "prompt")
    takes_token_ids: bool = True
    refuse: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None
    fails_in_stream: str = ""
    api_key: str = ""
    static: Path | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def serving(self) -> Iterator[FakeOpenAI]:
        """Serve on a free port until the block ends."""
        server = _Server(("127.0.0.1", 0), _Handler)
        server.fake = self
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    fake: FakeOpenAI


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        fake = self.server.fake
        if self.path == "/v1/models" and fake.api_key not in self.headers.get("authorization", ""):
            self._error(401, "Incorrect API key provided.")
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
        elif fake.static is not None:
            self._file(fake.static, self.path)
        else:
            self._error(404, "no such path")

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if fake.tokenizes is not None and self.path == fake.tokenizes[0]:
            text = body.get(fake.tokenizes[1], "")
            self._json(200, {"tokens": list(range(100, 100 + len(text.split())))})
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            fake.bodies.append(body)
            fake.headers.append({name.lower(): value for name, value in self.headers.items()})
            self._complete(body)
        else:
            self._error(404, "no such path")

    def _complete(self, body: dict[str, Any]) -> None:
        fake = self.server.fake
        refusal = fake.refuse(body)
        if isinstance(body.get("prompt"), list) and not fake.takes_token_ids:
            refusal = (400, "prompt must be a string")
        if refusal is not None:
            self._error(*refusal)
            return
        self._begin(200, "text/event-stream", chunked=True)
        try:
            num_pieces = 0
            for piece in fake.reply(body):
                self._event(self._choice(piece, None))
                num_pieces += 1
            if fake.fails_in_stream:
                self._event({"error": {"message": fake.fails_in_stream, "type": "server_error"}})
                self._chunk(b"")
                return
            self._event(self._choice("", "stop"))
            if fake.sends_usage:
                usage = {"prompt_tokens": _prompt_length(body), "completion_tokens": num_pieces}
                self._event({"choices": [], "usage": usage})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            fake.disconnected.set()
            self.close_connection = True

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        if "chat" in self.path:
            delta = {"content": text} if text else {}
            choice: dict[str, Any] = {"index": 0, "delta": delta}
        else:
            choice = {"index": 0, "text": text}
        return {"choices": [{**choice, "finish_reason": finish_reason}], "usage": None}

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _begin(self, status: int, content_type: str, length: int = 0, *, chunked: bool) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        if chunked:
            self.send_header("transfer-encoding", "chunked")
        else:
            self.send_header("content-length", str(length))
        self.end_headers()

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._begin(status, "application/json", len(data), chunked=False)
        self.wfile.write(data)

    def _error(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._json(status, {"error": {"message": message, "type": kind, "code": None}})

    def _file(self, folder: Path, path: str) -> None:
        file = folder / (path.removeprefix("/") or "index.html")
        if not file.is_file():
            self._error(404, "no such file")
            return
        data = file.read_bytes()
        self._begin(200, CONTENT_TYPES[file.suffix], len(data), chunked=False)
        self.wfile.write(data)


def _prompt_length(body: dict[str, Any]) -> int:
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    return len(prompt) if isinstance(prompt, list) else len(prompt.split())
