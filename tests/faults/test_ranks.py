"""Ranks that die, hang, or never come: nobody waits for ever, nothing is left, and it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil
import pytest
from safetensors.numpy import save_file

from fuserve.engine.backoff import Backoff
from fuserve.errors import CapacityError, RankFailedError
from fuserve.parallel import local_start, rank_process
from fuserve.parallel.group_executor import GroupExecutor
from tests.engine.fake_model import VOCAB_SIZE
from tests.parallel.small_groups import (
    group_of,
    make_engine,
    resources,
    settled_resources,
    small_group,
    until,
    write_config,
)
from tests.server.serving import ChatByteCodec, RunningServer, serving

LONG: dict[str, Any] = {"model": "toy", "prompt": "hi", "max_tokens": 400, "temperature": 0}
SHORT = LONG | {"max_tokens": 5}


@contextmanager
def served_group(
    config: Path, tensor: int, pipeline: int, **timeouts: float
) -> Iterator[tuple[RunningServer, GroupExecutor]]:
    with small_group(config, tensor, pipeline, **timeouts) as loaded:
        engine = make_engine(loaded)
        codec = ChatByteCodec()
        with serving(engine, codec, max_model_len=512, backoff=Backoff(0.01, 0.05)) as server:
            yield server, group_of(loaded)


def ready(server: RunningServer) -> bool:
    return httpx2.get(f"{server.url}/ready").status_code == 200


class Load:
    """Clients that ask again and again, and note every answer."""

    def __init__(self, server: RunningServer, num_clients: int = 3) -> None:
        self.answers: list[str] = []
        self.errors: list[Exception] = []
        self._leaving = threading.Event()
        self._client = server.client()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a request was lost: it never ended"

    def _ask(self) -> None:
        while not self._leaving.is_set():
            try:
                answer = self._client.completions.create(**LONG)
                self.answers.append(answer.choices[0].text)
            except openai.APIError as error:
                self.errors.append(error)
                self._leaving.wait(0.02)


@pytest.mark.parametrize(("tensor", "pipeline", "kills"), [(2, 1, 10), (1, 2, 3)])
def test_a_worker_killed_under_load_again_and_again_is_back_each_time(
    tensor: int, pipeline: int, kills: int, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    before = settled_resources()
    with served_group(config, tensor, pipeline) as (server, executor):
        expected = server.client().completions.create(**SHORT).choices[0].text
        alive = resources()
        with Load(server) as load:
            for _ in range(kills):
                until(lambda: server.engine.stats().num_running > 0, "nobody asks")
                (worker,) = executor.process_ids
                os.kill(worker, signal.SIGKILL)
                until(lambda: not ready(server), "the death of a rank was not noticed")
                until(lambda: ready(server), "the ranks are not started again")
                assert executor.process_ids != [worker]
                answer = server.client().completions.create(**SHORT)
                assert answer.choices[0].text == expected
        assert len(set(load.answers)) <= 1  # the same question, the same answer
        killed = [e for e in load.errors if "SIGKILL" in str(e)]
        assert len(killed) >= kills
        for error in load.errors:
            assert isinstance(error, openai.InternalServerError)
            assert error.status_code == 503
            assert error.type == "server_error" and error.code == "unavailable"
        until(lambda: resources()["threads"] <= alive["threads"], "threads leak")
        now = resources()
        assert now["descriptors"] <= alive["descriptors"] + len(load._threads) + 20
        for what in ("segments", "shm", "ports"):
            assert now[what] == alive[what]
        assert len(now["ports"]) == len(before["ports"]) + 1  # the server's own
        assert len(now["children"]) == len(before["children"]) + 1
    after = resources()
    for what in ("children", "segments", "shm", "ports"):
        assert after[what] == before[what]


def test_a_stream_that_a_rank_fails_ends_with_an_error_event(tmp_path: Path) -> None:
    with served_group(write_config(tmp_path), 1, 2) as (server, executor):
        stream = server.client().completions.create(stream=True, **LONG)
        next(stream)
        os.kill(executor.process_ids[0], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="SIGKILL") as failed:
            for _ in stream:
                pass
        assert failed.value.code == "unavailable"


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_worker_that_hangs_is_killed_after_the_steps_time(
    tensor: int, pipeline: int, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    with served_group(config, tensor, pipeline, step_timeout_s=1.0) as (server, executor):
        client = server.client()
        expected = client.completions.create(**SHORT).choices[0].text
        (worker,) = executor.process_ids
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(openai.InternalServerError, match=rf"{worker}\) is stopped") as hung:
            client.completions.create(**SHORT)
        assert hung.value.status_code == 503
        until(lambda: not psutil.pid_exists(worker), "the rank that hangs is not killed")
        until(lambda: ready(server), "the ranks are not started again")
        assert client.completions.create(**SHORT).choices[0].text == expected


def test_a_worker_that_dies_while_nothing_runs_is_replaced(tmp_path: Path) -> None:
    with served_group(write_config(tmp_path), 1, 2) as (server, executor):
        (worker,) = executor.process_ids
        os.kill(worker, signal.SIGKILL)
        until(lambda: executor.process_ids not in ([], [worker]) and ready(server), "not replaced")
        server.client().completions.create(**SHORT)


def impostor(folder: Path, script: str, patch: pytest.MonkeyPatch) -> None:
    """A worker's process is a shell script instead."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    patch.setattr(rank_process.sys, "executable", str(program))


def start_and_stop(config: Path, tensor: int, pipeline: int, **timeouts: float) -> None:
    with small_group(config, tensor, pipeline, **timeouts):
        pass


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exec sleep 1000", r"rank 1 .*sleeping.*has not joined"),
        ("exit 3", r"rank 1 .*exited with 3"),
    ],
)
def test_a_rank_that_never_joins_is_named_and_nothing_is_left(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    before = settled_resources()
    impostor(tmp_path, script, monkeypatch)
    with pytest.raises(RankFailedError, match=message) as failed:  # the error keeps its frames
        start_and_stop(config, 2, 1, join_timeout_s=0.5)
    assert resources() == before, failed


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_a_rank_that_cannot_be_started_leaves_nothing(
    tensor: int, pipeline: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    before = settled_resources()
    monkeypatch.setattr(rank_process.sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(RankFailedError, match=r"could not be started.*nothing") as failed:
        start_and_stop(config, tensor, pipeline)
    assert resources() == before, failed


def test_a_rank_0_that_cannot_load_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_shard(*_: object) -> None:
        raise CapacityError("no room")

    config = write_config(tmp_path)
    before = settled_resources()
    monkeypatch.setattr(local_start, "load_shard", load_shard)
    with pytest.raises(CapacityError, match="no room") as failed:
        start_and_stop(config, 2, 2)
    assert resources() == before, failed


def test_what_a_group_has_goes_with_it_though_its_last_error_is_kept(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    before = settled_resources()
    with small_group(config, 2, 2) as loaded:
        executor = group_of(loaded)
        os.kill(executor.process_ids[0], signal.SIGKILL)
        until(lambda: executor.failure is not None, "the death of a rank was not noticed")
        with pytest.raises(RankFailedError, match="SIGKILL") as failed:
            executor.copy_blocks([(0, 1)])
    assert resources() == before, failed


def test_a_rank_that_does_not_come_back_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    with served_group(config, 1, 2, join_timeout_s=5.0) as (server, executor):
        with monkeypatch.context() as patch:
            impostor(tmp_path, "exit 3", patch)
            os.kill(executor.process_ids[0], signal.SIGKILL)
            until(lambda: not ready(server), "the death of a rank was not noticed")
            with pytest.raises(openai.InternalServerError) as refused:
                server.client().completions.create(**SHORT)
            assert refused.value.status_code == 503
            assert refused.value.response.headers["retry-after"] == "1"
            assert httpx2.get(f"{server.url}/health").status_code == 200
        until(lambda: ready(server), "the ranks are not started again")
        server.client().completions.create(**SHORT)


PARENT = """
import sys, time
from pathlib import Path
from tests.parallel.small_groups import group_of, small_group
with small_group(Path(sys.argv[1]), 2, 2) as loaded:
    print(*group_of(loaded).process_ids, flush=True)
    time.sleep(1000)
"""


def test_workers_die_with_their_parent_even_when_they_are_stopped(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command = [sys.executable, "-c", PARENT, str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 3
        os.kill(workers[0], signal.SIGSTOP)
        parent.kill()
    for worker in workers:
        until(lambda worker=worker: not psutil.pid_exists(worker), "a worker outlives its parent")


SPLIT = """
import resource, sys
from fuserve.decoder.options import ExecutorOptions
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.sampling_params import SamplingParams
from fuserve.parallel.loading import load_parallel
from fuserve.parallel.options import ParallelOptions
from tests.engine.driving import run_together
limit, num_stages = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
options = ExecutorOptions(max_model_len=128, max_num_seqs=1, num_threads=1)
loaded = load_parallel(sys.argv[1], options, ParallelOptions(1, num_stages))
engine = Engine(loaded.executor, None, EngineConfig(128))
(output,) = run_together(engine, [([1, 2, 3], SamplingParams(temperature=0, max_tokens=4))])
print(len(output.outputs[0].token_ids), "tokens")
loaded.close()
"""


def write_checkpoint(folder: Path) -> int:
    """A checkpoint of random float32 weights, and its bytes."""
    write_config(folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=20)
    # 20 layers of one and the same weights are as large as any.
    layer = {
        "input_layernorm": (512,),
        "post_attention_layernorm": (512,),
        **{f"self_attn.{name}_proj": (512, 512) for name in "qkvo"},
        "mlp.gate_proj": (2048, 512),
        "mlp.up_proj": (2048, 512),
        "mlp.down_proj": (512, 2048),
    }
    dice = np.random.default_rng(0)
    drawn = {name: 0.02 * dice.standard_normal(shape, np.float32) for name, shape in layer.items()}
    tensors = {
        f"model.layers.{i}.{name}.weight": array.copy()
        for i in range(20)
        for name, array in drawn.items()
    }
    for name, shape in {
        "model.embed_tokens": (VOCAB_SIZE, 512),
        "lm_head": (VOCAB_SIZE, 512),
        "model.norm": (512,),
    }.items():
        tensors[f"{name}.weight"] = 0.02 * dice.standard_normal(shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size


def test_a_checkpoint_larger_than_a_ranks_memory_runs_when_it_is_split(tmp_path: Path) -> None:
    limit = write_checkpoint(tmp_path) * 9 // 10

    def run(num_stages: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SPLIT, str(tmp_path), str(limit), str(num_stages)]
        environment = os.environ | {"FUSERVE_CACHE": "/dev/null"}  # packed weights in memory
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    alone, split = run(1), run(2)
    assert "MemoryError" in alone.stderr
    assert split.stdout == "4 tokens\n", split.stderr
