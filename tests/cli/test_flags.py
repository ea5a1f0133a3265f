"""Flags reach the options that they are named after."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fuserve.cli.flags import ModelFlags, SamplingFlags, expand_flags
from fuserve.decoder.options import ExecutorOptions


def test_every_option_of_the_executor_has_a_flag() -> None:
    flags = {name for name in ModelFlags(threads=1, max_model_len=1).keywords()} | {
        field.name for field in fields(ModelFlags)
    }
    options = {field.name for field in fields(ExecutorOptions)}
    assert options <= flags


def test_flags_that_are_not_given_leave_the_defaults_alone() -> None:
    assert ModelFlags().executor_options() == ExecutorOptions()


def test_a_command_s_own_defaults_yield_to_flags() -> None:
    options = ModelFlags(max_num_seqs=3).executor_options(max_num_seqs=9, max_model_len=99)
    assert (options.max_num_seqs, options.max_model_len) == (3, 99)


def test_dataclasses_of_flags_become_options_of_the_command() -> None:
    seen: list[object] = []

    def command(
        name: Annotated[str, typer.Argument()], flags: ModelFlags, sampling: SamplingFlags
    ) -> None:
        seen.extend([name, flags, sampling])

    app = typer.Typer()
    app.command()(expand_flags(command))
    arguments = ["x", "--quantization", "int4", "--threads", "2", "--stop", "a", "--stop", "b"]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    assert seen == [
        "x",
        ModelFlags(quantization="int4", threads=2),
        SamplingFlags(stop=["a", "b"]),
    ]


@pytest.mark.parametrize("name", ["--kv-cache-dtype", "--kv-dtype"])
def test_the_type_of_the_cache_has_vllms_name_and_a_short_one(name: str) -> None:
    seen: list[ModelFlags] = []

    def command(flags: ModelFlags) -> None:
        seen.append(flags)

    app = typer.Typer()
    app.command()(expand_flags(command))
    result = CliRunner().invoke(app, [name, "int8"])
    assert result.exit_code == 0, result.output
    assert seen == [ModelFlags(kv_cache_dtype="int8")]


def test_a_value_out_of_its_choices_is_a_usage_error() -> None:
    def command(flags: ModelFlags) -> None:
        raise AssertionError("not reached")

    app = typer.Typer()
    app.command()(expand_flags(command))
    result = CliRunner().invoke(app, ["--quantization", "int3"])
    assert result.exit_code == 2
    assert "int3" in result.output
