"""``response_format`` and vLLM's ``guided_*`` fields: what an answer must look like."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fuserve.engine.guided import GuidedDecoding
from fuserve.server.errors import invalid
from fuserve.server.protocol.chat import ResponseFormat
from fuserve.server.protocol.sampling import SamplingBody


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint, and the field of the request that asked for it."""

    guided: GuidedDecoding
    param: str


def constraint_of(
    body: SamplingBody, response_format: ResponseFormat | None, forced_call: GuidedDecoding | None
) -> Constraint | None:
    """The one constraint of a request; None leaves the answer free.

    Raises:
        ApiError: several are given.
        InvalidRequestError: one is too long.
    """
    found: list[Constraint] = []
    if forced_call is not None:
        found.append(Constraint(forced_call, "tools"))
    if response_format is not None and response_format.type != "text":
        found.append(Constraint(_of_format(response_format), "response_format"))
    if body.guided_json is not None:
        given = body.guided_json
        spec = given if isinstance(given, str) else json.dumps(given)
        found.append(Constraint(GuidedDecoding("json_schema", spec), "guided_json"))
    if body.guided_regex is not None:
        found.append(Constraint(GuidedDecoding("regex", body.guided_regex), "guided_regex"))
    if body.guided_choice is not None:
        spec = json.dumps(body.guided_choice)
        found.append(Constraint(GuidedDecoding("choice", spec), "guided_choice"))
    if body.guided_grammar is not None:
        found.append(Constraint(GuidedDecoding("grammar", body.guided_grammar), "guided_grammar"))
    if len(found) > 1:
        names = " and ".join(constraint.param for constraint in found)
        raise invalid(found[1].param, f"{names} exclude each other; give one.")
    return found[0] if found else None


def _of_format(response_format: ResponseFormat) -> GuidedDecoding:
    if response_format.json_schema is None:
        return GuidedDecoding("json_object")
    return GuidedDecoding("json_schema", json.dumps(response_format.json_schema.schema_))
