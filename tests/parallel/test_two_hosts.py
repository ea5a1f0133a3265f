"""A group that torchrun starts on two hosts, which are two addresses of the loopback here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from fuserve import LLM, SamplingParams
from fuserve.checkpoints import load_tokenizer, open_checkpoint
from tests.parallel.small_groups import until, write_config

pytest.importorskip("torch")

Hosts = list[subprocess.Popen[bytes]]
PROMPT = "The capital of France is"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def two_hosts(
    commands: Sequence[Sequence[str]], logs: Path, *, agents: bool, apart: bool = False
) -> Iterator[Hosts]:
    """What runs on each host: under an agent of torchrun's, or as a rank with its variables.

    Hosts that are ``apart`` do not see each other's processes, as real ones do not.
    """
    port = free_port()
    hosts: Hosts = []
    for number, command in enumerate(commands):
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        launcher = [
            *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *("--max-restarts=3", "--monitor-interval=0.1", "--rdzv-backend=c10d"),
            *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=fuserve"),
            f"--local-addr=127.0.0.{number + 1}",
        ]
        if not agents:
            launcher = []
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            environment |= {"TORCHELASTIC_RUN_ID": "fuserve"}
        with (logs / f"host{number}.log").open("wb") as log:
            namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
            line = [*(namespace if apart and number else []), sys.executable, *launcher, *command]
            hosts.append(
                subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
    try:
        yield hosts
    finally:
        for host in hosts:
            if host.poll() is None:
                for process in psutil.Process(host.pid).children(recursive=True):
                    process.kill()
                host.kill()
                host.wait()


def log_of(logs: Path, host: int) -> str:
    return (logs / f"host{host}.log").read_text(errors="replace")


def complete(url: str, **fields: Any) -> httpx2.Response:
    body = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 12} | fields
    return httpx2.post(f"{url}/v1/completions", json=body, timeout=60)


def ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready").status_code == 200
    except httpx2.TransportError:
        return False


def test_two_hosts_answer_as_one_and_come_back_when_a_rank_is_killed(tmp_path: Path) -> None:
    with LLM("demo", max_model_len=512, num_threads=1) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=12)
        (alone,) = llm.generate(PROMPT, greedy)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    worker = [
        *("-m", "fuserve.parallel.worker", "--model", "demo", "--pipeline-parallel-size", "2"),
        *("--max-model-len", "512", "--threads", "1", "--port", str(port)),
    ]
    with two_hosts([worker, worker], tmp_path, agents=True) as agents:
        until(lambda: ready(url), "the group does not start: " + log_of(tmp_path, 0))
        assert complete(url).json()["choices"][0]["text"] == alone.outputs[0].text
        with httpx2.stream(
            "POST",
            f"{url}/v1/completions",
            json={"model": "demo", "prompt": PROMPT, "max_tokens": 480, "stream": True}
            | {"temperature": 0, "ignore_eos": True},
            timeout=60,
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            (rank,) = psutil.Process(agents[1].pid).children()
            os.kill(rank.pid, signal.SIGKILL)
            assert any('"code": "unavailable"' in line for line in lines)
        assert not ready(url)
        until(lambda: ready(url), "the group does not come back")
        assert complete(url).json()["choices"][0]["text"] == alone.outputs[0].text


def test_a_host_with_another_model_is_named(tmp_path: Path) -> None:
    commands = []
    for number, layers in enumerate((4, 5)):
        folder = tmp_path / f"model{number}"
        folder.mkdir()
        write_config(folder, num_hidden_layers=layers)
        commands.append(
            [
                *("-m", "fuserve.parallel.worker", "--load-format", "dummy"),
                *("--model", str(folder), "--tokenizer", "demo", "-pp", "2", "--port", "0"),
            ]
        )
    with two_hosts(commands, tmp_path, agents=False) as hosts:
        for number, host in enumerate(hosts):
            assert host.wait(60) != 0
            assert "model1) has model files " in log_of(tmp_path, number)


def test_a_host_that_does_not_come_or_goes_while_it_loads_is_named(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    worker = [
        *("-m", "fuserve.parallel.worker", "--load-format", "dummy", "--model", config),
        *("--tokenizer", "demo", "-pp", "2", "--port", "0", "--join-timeout"),
    ]
    absent = ["-m", "tests.parallel.absent_rank", config]
    # Long enough for the second one to start; both wait at the same time.
    with (
        two_hosts([[*worker, "12"], [*absent, "hangs"]], made(tmp_path / "1"), agents=False) as one,
        two_hosts([[*worker, "12"], [*absent, "dies"]], made(tmp_path / "2"), agents=False) as two,
    ):
        for hosts, logs in ((one, tmp_path / "1"), (two, tmp_path / "2")):
            assert hosts[0].wait(90) == 2
            assert "error: rank 1 has said nothing for 12 s" in log_of(logs, 0)
    never = ["-c", "input()"]
    with two_hosts([[*worker, "0.5"], never], made(tmp_path / "3"), agents=False) as hosts:
        assert hosts[0].wait(60) == 2
        assert "error: ranks [1] have not joined" in log_of(tmp_path / "3", 0)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_sums_steps_and_bands_go_between_hosts(tmp_path: Path) -> None:
    command = ["-m", "tests.parallel.torch_ranks"]
    with two_hosts([command, command], tmp_path, agents=False) as hosts:
        for number, host in enumerate(hosts):
            assert host.wait(180) == 0, log_of(tmp_path, number)
            assert f"rank {number} is content" in log_of(tmp_path, number)


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_that_share_layers_answer_alike_through_memory_and_through_torch(
    apart: bool, tmp_path: Path
) -> None:
    if apart and subprocess.run(["unshare", "--pid", "--fork", "true"]).returncode != 0:
        pytest.skip("process namespaces are not allowed here")
    config = str(write_config(tmp_path, vocab_size=49152))
    with LLM(config, load_format="dummy", max_model_len=256, num_threads=1) as llm:
        (alone,) = llm.generate(
            [7, 8, 9], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        )
    port = free_port()
    worker = [
        *("-m", "fuserve.parallel.worker", "--model", config, "--load-format", "dummy"),
        *("--tokenizer", "demo", "--served-model-name", "demo", "-tp", "2"),
        *("--max-model-len", "256", "--threads", "1", "--port", str(port)),
    ]
    url = f"http://127.0.0.1:{port}"
    with two_hosts([worker, worker], tmp_path, agents=False, apart=apart) as hosts:
        until(lambda: ready(url), "the group does not start: " + log_of(tmp_path, 1))
        answer = complete(url, prompt=[7, 8, 9], ignore_eos=True).json()
        (choice,) = answer["choices"]
        assert choice["text"] == tokenizer_text(alone.outputs[0].token_ids)
        hosts[0].send_signal(signal.SIGTERM)
        assert [host.wait(60) for host in hosts] == [0, 0]


def tokenizer_text(ids: Sequence[int]) -> str:
    return load_tokenizer(open_checkpoint("demo")).decode(list(ids))
