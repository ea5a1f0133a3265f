"""Groups of processes over a tiny model of random weights, whose tokens are bytes."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from fuserve.decoder.load import LoadedModel
from fuserve.decoder.options import ExecutorOptions
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.parallel.group_executor import GroupExecutor
from fuserve.parallel.loading import load_parallel
from fuserve.parallel.options import ParallelOptions
from tests.engine.fake_model import VOCAB_SIZE, ByteCodec

MAX_MODEL_LEN = 512


def write_config(folder: Path, **fields: Any) -> Path:
    """The config of a small Llama."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config | fields))
    return path


@contextmanager
def small_group(
    config: Path, tensor: int = 1, pipeline: int = 1, **timeouts: float
) -> Iterator[LoadedModel]:
    """The tiny model over so many ranks, of one thread each."""
    options = ExecutorOptions(
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_threads=1,
    )
    loaded = load_parallel(str(config), options, ParallelOptions(tensor, pipeline, **timeouts))
    try:
        yield loaded
    finally:
        loaded.close()


def make_engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded.executor, ByteCodec(), EngineConfig(MAX_MODEL_LEN, 8, 64))


def group_of(loaded: LoadedModel) -> GroupExecutor:
    assert isinstance(loaded.executor, GroupExecutor)
    return loaded.executor


def resources() -> dict[str, Any]:
    """What must not grow: processes, descriptors, shared memory, and ports that they listen on."""
    me = psutil.Process()
    maps = Path("/proc/self/maps").read_text()
    return {
        "children": sorted(child.pid for child in me.children(recursive=True)),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": me.num_threads(),
        "segments": maps.count("memfd:fuserve"),
        "ports": sorted(
            connection.laddr.port
            for process in (me, *me.children(recursive=True))
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ),
        "shm": sorted(os.listdir("/dev/shm")),
    }


def settled_resources() -> dict[str, Any]:
    """The same, once what earlier tests have left behind has ended."""
    gc.collect()
    seen, since_s = resources(), time.monotonic()
    while time.monotonic() - since_s < 0.25:
        time.sleep(0.05)
        if (now := resources()) != seen:
            seen, since_s = now, time.monotonic()
    return seen


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Wait for another process."""

    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)
