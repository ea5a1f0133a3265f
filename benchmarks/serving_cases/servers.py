"""Servers in processes of their own, started for a measurement and stopped after it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx2
from prometheus_client.parser import text_string_to_metric_families

START_S = 300.0  # packing the weights of a large model included
STOP_S = 60.0
POLL_S = 0.05
LOG_TAIL_BYTES = 4000


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    base_url: str
    model: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def log_tail(self) -> str:
        """The end of what it has printed; its place in the file is the server's own."""
        end = os.fstat(self.log.fileno()).st_size
        tail = os.pread(self.log.fileno(), LOG_TAIL_BYTES, max(end - LOG_TAIL_BYTES, 0))
        return tail.decode(errors="replace")

    def metrics(self) -> dict[tuple[str, str], float]:
        """All samples of ``/metrics`` by name and, where there is one, the label ``kind``."""
        text = httpx2.get(f"{self.base_url}/metrics", timeout=30).text
        samples: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "le" not in sample.labels:
                    samples[sample.name, sample.labels.get("kind", "")] = sample.value
        return samples


@contextmanager
def fuserve_server(model: Path | str, *flags: str) -> Iterator[RunningServer]:
    """``fuserve serve`` of this environment."""
    command = [str(Path(sys.executable).parent / "fuserve"), "serve", "--model", str(model)]
    with _serving([*command, "--served-model-name", "bench", *flags], "/ready") as server:
        yield server


@contextmanager
def llama_server(
    binary: Path, model: Path, *, slots: int, tokens_per_slot: int, threads: int
) -> Iterator[RunningServer]:
    """llama.cpp's own server: continuous batching over ``slots``, all else as it comes."""
    command = [str(binary), "--model", str(model), "--alias", "bench", "--no-ui"]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * tokens_per_slot)]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    with _serving(command, "/health") as server:
        yield server


@contextmanager
def _serving(command: Sequence[str], ready_path: str) -> Iterator[RunningServer]:
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log
        )
        server = RunningServer(f"http://127.0.0.1:{port}", "bench", process, log)
        try:
            if not _answers(server, ready_path):
                raise SystemExit(f"{server.log_tail()}\n{command[0]} did not start")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(server: RunningServer, path: str) -> bool:
    """Wait until the server is ready; False if it ends or takes too long."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and server.process.poll() is None:
        try:
            if httpx2.get(server.base_url + path, timeout=5).status_code == httpx2.codes.OK:
                return True
        except httpx2.TransportError:
            pass
        time.sleep(POLL_S)
    return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
