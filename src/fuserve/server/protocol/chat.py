"""The body of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fuserve.engine.sampling_params import MAX_LOGPROBS
from fuserve.server.protocol.sampling import Body, SamplingBody


class TextPart(Body):
    """A piece of a message; only text is taken."""

    type: Literal["text", "refusal"]
    text: str = ""


class CalledFunction(Body):
    """A call that the model made earlier; ``arguments`` is JSON text."""

    name: str
    arguments: str = "{}"


class EarlierToolCall(Body):
    """A call in the conversation so far."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[EarlierToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role!r} needs a content")
        return self


class Function(Body):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are taken."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Which function."""

    name: str


class NamedToolChoice(Body):
    """One function that must be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    """A named schema."""

    name: str = ""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        wanted = self.type == "json_schema"
        if wanted and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type 'json_schema' needs json_schema.schema")
        return self


class ChatBody(SamplingBody):
    """Messages in, an answer or tool calls out.

    The last fields are OpenAI's and change nothing here: they are of its books, its caches, or of
    efforts that these models do not know.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    metadata: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or []]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the function {name!r} is given twice")
        return tools

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer; None goes on to the model's longest sequence."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token, None for nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None
