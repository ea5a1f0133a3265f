"""What is known of one HTTP request: for its log line, its metrics and its span."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import cast

from starlette.types import Scope

from fuserve.engine.outputs import RequestOutput

_STATE_KEY = "fuserve.facts"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class RequestFacts:
    """Filled in while a request is handled; what does not apply stays None.

    Attributes:
        request_id: the client's ``X-Request-Id``, or drawn.
        client: whose API key it brought, as a number and not the key; "" without keys.
        prompt, answers: texts, kept only for ``log_prompts``.
    """

    request_id: str
    client: str = ""
    engine_request_id: str | None = None
    model: str | None = None
    streams: bool | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    queue_s: float | None = None
    time_to_first_token_s: float | None = None
    error: str | None = None
    prompt: str | None = None
    answers: list[str] | None = None

    def note_output(self, output: RequestOutput, *, keep_texts: bool) -> None:
        """Add what a finished request tells; several prompts of one request add up."""
        timings = output.timings
        self.prompt_tokens = (self.prompt_tokens or 0) + output.num_prompt_tokens
        self.cached_tokens = (self.cached_tokens or 0) + output.num_cached_tokens
        self.completion_tokens = (self.completion_tokens or 0) + output.num_generated_tokens
        if self.time_to_first_token_s is None:
            self.time_to_first_token_s = timings.time_to_first_token_s
            if timings.scheduled_s is not None:
                self.queue_s = timings.scheduled_s - timings.arrival_s
        if output.outputs:
            self.finish_reason = output.outputs[0].finish_reason
        if keep_texts:
            self.answers = (self.answers or []) + [each.text for each in output.outputs]


def begin_facts(scope: Scope, given_id: str | None) -> RequestFacts:
    """The facts of a request that has just come; a malformed id is replaced."""
    usable = given_id is not None and _REQUEST_ID.fullmatch(given_id) is not None
    facts = RequestFacts(cast(str, given_id) if usable else uuid.uuid4().hex)
    scope.setdefault("state", {})[_STATE_KEY] = facts
    return facts


def facts_of(scope: Scope) -> RequestFacts:
    """The facts of the request that is being handled."""
    return cast(RequestFacts, scope["state"][_STATE_KEY])
