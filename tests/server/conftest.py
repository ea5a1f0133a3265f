"""Servers that the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuserve.checkpoints import load_tokenizer
from fuserve.decoder import ExecutorOptions, load_model
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from tests.server.serving import RunningServer, serving, serving_toy

MAX_MODEL_LEN = 1024


@pytest.fixture(scope="session")
def demo() -> Iterator[RunningServer]:
    """The demo model, which answers in English."""
    loaded = load_model("demo", ExecutorOptions(max_model_len=MAX_MODEL_LEN, max_num_seqs=8))
    assert loaded.checkpoint is not None
    tokenizer = load_tokenizer(loaded.checkpoint)
    engine = Engine(loaded.executor, tokenizer, EngineConfig(MAX_MODEL_LEN, 8, 256))
    with serving(engine, tokenizer, max_model_len=MAX_MODEL_LEN, names=["demo", "smol"]) as server:
        yield server
    loaded.close()


@pytest.fixture(scope="module")
def toy() -> Iterator[RunningServer]:
    """A model of random bytes, quick and without an end."""
    with serving_toy() as server:
        yield server
