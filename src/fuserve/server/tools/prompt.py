"""Messages in the form that chat templates take, tools included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fuserve.server.errors import invalid
from fuserve.server.protocol.chat import EarlierToolCall, Message


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain messages: the content is text, and arguments of calls are objects.

    Raises:
        ApiError: the arguments of an earlier call are not JSON.
    """
    return [_plain(number, message) for number, message in enumerate(messages)]


def describe_tools(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Tell of the tools in the system message, for templates that know no tools.

    The form is Hermes', which most models have seen.
    """
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You may call functions to help the user. Their signatures:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call one, write only this, with its name and arguments as JSON:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _plain(number: int, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        where = f"messages[{number}].tool_calls"
        plain["tool_calls"] = [
            _plain_call(f"{where}[{index}]", call) for index, call in enumerate(message.tool_calls)
        ]
    return plain


def _plain_call(where: str, call: EarlierToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        param = f"{where}.function.arguments"
        raise invalid(param, f"{param} is not JSON: {error}.") from error
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}
