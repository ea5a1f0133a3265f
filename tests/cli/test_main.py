"""Help, errors and start-up of the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import Run

COMMANDS = [
    ["generate"],
    ["chat"],
    ["info"],
    ["doctor"],
    ["bench", "latency"],
    ["eval", "perplexity"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example: fuserve " + " ".join(command) in result.stdout
    assert "--json" in result.stdout


def test_a_wrong_model_is_one_line_on_stderr_and_exit_code_2(run: Run) -> None:
    result = run("info", "/no/such/model", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "/no/such/model" in result.stderr
    assert result.stderr.count("\n") == 1


def test_debug_shows_where_an_error_came_from(run: Run) -> None:
    result = run("info", "/no/such/model", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "find_model" in result.stderr


def test_help_starts_without_numpy_and_without_the_native_core() -> None:
    code = (
        "import sys\n"
        "from fuserve.cli.main import main\n"
        "sys.argv = ['fuserve', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'numpy', 'tokenizers', 'torch', 'fuserve.kernels', 'fuserve.decoder'}\n"
        "print('loaded:', sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_bug_is_not_dressed_up_as_a_user_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: str) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr("fuserve.checkpoints.open_checkpoint", broken)
    result = run("info", "demo")
    assert isinstance(result.exception, ZeroDivisionError)
