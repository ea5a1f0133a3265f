"""Turning chat messages into a prompt by the model's own jinja2 template.

Templates come with checkpoints, so they run in jinja2's immutable sandbox. Settings, filters and
globals are those that templates on the hub are written for (transformers' chat templating guide).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fuserve.errors import CheckpointError, InvalidRequestError

_TOOL_TEMPLATE = "tool_use"


class ChatTemplate:
    """The named templates of one model.

    Args:
        sources: template text by name; ``default``, and perhaps ``tool_use``.
        special_tokens: what templates know as ``bos_token``, ``eos_token`` and so on.
        file: where they were found, for error messages.
    """

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], file: object
    ) -> None:
        self._sources = sources
        self._special_tokens = special_tokens
        self._file = file
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def source(self) -> str:
        """The text of the template that is used with tools."""
        return self._sources.get(_TOOL_TEMPLATE) or self._sources.get("default", "")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_args: Any,
    ) -> str:
        """The prompt for the messages.

        Raises:
            InvalidRequestError: the messages are malformed, or the template refuses them.
            CheckpointError: the template itself is damaged or does what the sandbox forbids.
        """
        _check_messages(messages)
        template = self._template(_TOOL_TEMPLATE if tools else "default")
        arguments = {
            **self._special_tokens,
            **template_args,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(_plain(arguments, ""))
        except InvalidRequestError:
            raise
        except jinja2.exceptions.SecurityError as error:
            raise self._broken(f"does what the sandbox forbids ({error})") from error
        except _RefusedError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}"
            ) from error
        except Exception as error:  # a template is code: it can fail in any way
            raise InvalidRequestError(
                f"The model's chat template cannot render these messages "
                f"({type(error).__name__}: {error}). Check roles and contents of the messages."
            ) from error

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._sources:
            name = "default"
        if name not in self._sources:
            raise InvalidRequestError(
                f"The model has no default chat template, only: {', '.join(self._sources)}."
            )
        if name not in self._compiled:
            try:
                self._compiled[name] = self._environment.from_string(self._sources[name])
            except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
                raise self._broken(f"cannot be compiled ({error})") from error
        return self._compiled[name]

    def _broken(self, message: str) -> CheckpointError:
        return CheckpointError(
            f"the chat template {message}.",
            file=self._file,
            remedy="Fetch the file again, or send a plain prompt instead of messages.",
        )

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment


class _RefusedError(jinja2.TemplateError):
    """Raised by a template's own ``raise_exception``."""


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter: no HTML escapes, and Unicode as it is."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages must be a list of {'role': …, 'content': …}.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"messages[{index}] must be a mapping with a 'role' such as 'user' and a 'content'."
            )


def _plain(value: Any, where: str) -> Any:
    """A copy in plain JSON types: nothing with methods of its own reaches a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass, such as an enum
        return str.__str__(value)
    if isinstance(value, Mapping):
        prefix = where and f"{where}."
        return {str(key): _plain(item, f"{prefix}{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, where) for item in value]
    raise InvalidRequestError(
        f"{where} holds a {type(value).__name__}; chat templates take only JSON values."
    )
