"""What ``tools`` and ``tool_choice`` mean for one request."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fuserve.engine.guided import GuidedDecoding
from fuserve.server.errors import invalid
from fuserve.server.protocol.chat import ChatBody, Function, NamedToolChoice, Tool
from fuserve.server.tools.formats import FORCED, ToolFormat
from fuserve.server.tools.grammar import grammar_of_calls
from fuserve.server.tools.parser import AnswerParser, NamedCallParser, ToolParser

_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's tools are handled.

    Attributes:
        tools: what the model is told of; None tells it nothing.
        guided: constrains the answer to calls, or its calls to strict tools' schemas.
        new_parser: makes a parser for each answer; None where the text is all content.
        keep_special_tokens: the format's marker is a special token.
        finish_reason: of an answer that ended with calls.
    """

    tools: list[dict[str, Any]] | None = None
    guided: GuidedDecoding | None = None
    new_parser: Callable[[], AnswerParser] | None = None
    keep_special_tokens: bool = False
    finish_reason: str = "tool_calls"


def plan_tools(body: ChatBody, form: ToolFormat, marker_id: int | None = None) -> ToolPlan:
    """Decide how the request's tools are told, constrained and read.

    Args:
        body: the request.
        form: how this model writes calls.
        marker_id: the token of the format's marker, if it is a special token of this model.

    Raises:
        ApiError: the choice names no tool that was given.
    """
    tools, choice = body.tools or [], body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "tool_choice needs tools.")
        return ToolPlan()
    if choice == "none":
        return ToolPlan()
    for_us = {"function": {"strict"}}
    told = [tool.model_dump(exclude_none=True, exclude=for_us) for tool in tools]
    several = body.parallel_tool_calls is not False
    if isinstance(choice, NamedToolChoice):
        function = _named(tools, choice.function.name)
        guided = GuidedDecoding("json_schema", json.dumps(_arguments(function)))
        return ToolPlan(told, guided, lambda: NamedCallParser(function.name), finish_reason="stop")
    if choice == "required":
        guided = GuidedDecoding("json_schema", json.dumps(_calls_schema(tools, several)))
        return ToolPlan(told, guided, lambda: ToolParser(FORCED))
    if body.response_format is not None and body.response_format.type != "text":
        return ToolPlan(told)  # the answer is held to that form, and is no call whatever it says
    max_calls = None if several else 1
    strict = _strict_calls(tools, form, marker_id, several=several)
    return ToolPlan(told, strict, lambda: ToolParser(form, max_calls), form.special_marker)


def _named(tools: Sequence[Tool], name: str) -> Function:
    for tool in tools:
        if tool.function.name == name:
            return tool.function
    known = ", ".join(tool.function.name for tool in tools)
    raise invalid("tool_choice", f"tool_choice names {name!r}; the tools are: {known}.")


def _arguments(function: Function) -> dict[str, Any]:
    return function.parameters or _ANY_ARGUMENTS


def _strict_calls(
    tools: Sequence[Tool], form: ToolFormat, marker_id: int | None, *, several: bool
) -> GuidedDecoding | None:
    """Holds the calls to their tools' schemas if any of these asks for it."""
    if not any(tool.function.strict for tool in tools):
        return None
    definitions: dict[str, Any] = {}
    calls = [
        _call_schema(tool.function, definitions, form.arguments, exact=bool(tool.function.strict))
        for tool in tools
    ]
    grammar = grammar_of_calls(form, calls, definitions, marker_id=marker_id, several=several)
    return GuidedDecoding("lark", grammar)


def _calls_schema(tools: Sequence[Tool], several: bool) -> dict[str, Any]:
    """A list of calls, each of one of the tools."""
    definitions: dict[str, Any] = {}
    calls = [_call_schema(tool.function, definitions) for tool in tools]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not several:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def _call_schema(
    function: Function,
    definitions: dict[str, Any],
    key: str = FORCED.arguments,
    *,
    exact: bool = True,
) -> dict[str, Any]:
    """One call; the definitions its parameters refer to move to where references find them."""
    parameters = dict(_arguments(function) if exact else _ANY_ARGUMENTS)
    for name, definition in parameters.pop("$defs", {}).items():
        if definitions.setdefault(name, definition) != definition:
            raise invalid("tools", f"two tools define $defs[{name!r}] differently; rename one.")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, key: parameters},
        "required": ["name", key],
        "additionalProperties": False,
    }
