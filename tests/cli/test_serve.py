"""``fuserve serve`` refuses what cannot work before the model is loaded."""

from __future__ import annotations

import socket

from tests.cli.conftest import Run


def test_a_port_that_is_taken_is_told_at_once(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--model", "/no/such/model", "--port", str(port))
    assert result.exit_code == 2
    assert f"port {port}" in result.stderr


def test_an_empty_key_is_refused(run: Run) -> None:
    result = run("serve", "--model", "/no/such/model", "--port", "0", "--api-key", " ")
    assert result.exit_code == 2
    assert "--api-key" in result.stderr


def test_a_model_that_is_not_there_is_one_line(run: Run) -> None:
    result = run("serve", "--model", "/no/such/model", "--port", "0")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_replicas_of_several_processes_are_refused(run: Run) -> None:
    result = run("serve", "--model", "demo", "--port", "0", "--replicas", "2", "-tp", "2")
    assert result.exit_code == 2
    assert "either --replicas or the parallel sizes" in result.stderr


def test_help_lists_vllms_flags(run: Run) -> None:
    text = run("serve", "--help").stdout
    for flag in ("--host", "--port", "--api-key", "--served-model-name", "--max-num-seqs"):
        assert flag in text
