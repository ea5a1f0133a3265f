"""Running the command line inside the test process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fuserve.cli.main import app

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


@pytest.fixture
def run() -> Run:
    """``run("info", "demo", stdin="...")`` -> exit code, stdout, stderr."""

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=stdin, prog_name="fuserve")

    return invoke


@pytest.fixture
def run_json(run: Run) -> RunJson:
    """Runs with ``--json``; stdout must be one JSON object and nothing else."""

    def invoke(*arguments: str, stdin: str | None = None) -> dict[str, Any]:
        result = run(*arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert isinstance(report, dict)
        return report

    return invoke
