"""The grammar of an answer whose calls, where the model makes any, fit their tools' schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fuserve.server.tools.formats import ToolFormat

_BLANKS = r"[ \n\r\t]{1,32}"
_PLAIN = r"[ \n\r\t]*[^ \n\r\t{\[](.|\n)*"


def grammar_of_calls(
    form: ToolFormat,
    calls: Sequence[dict[str, Any]],
    definitions: dict[str, Any],
    *,
    marker_id: int | None,
    several: bool,
) -> str:
    """Free text, in which the format's marker can be followed by nothing but a call.

    Args:
        form: how the model writes calls.
        calls: a JSON schema of the whole call for each tool.
        definitions: ``$defs`` that the schemas refer to.
        marker_id: the token of a marker that is a special token; None where the model has none.
        several: more than one call may be made.

    Returns: a grammar in llguidance's dialect of Lark.
    """
    schema: dict[str, Any] = {"anyOf": list(calls), "x-guidance": {"whitespace_pattern": _BLANKS}}
    if definitions:
        schema["$defs"] = definitions
    rules = [f"one: %json {json.dumps(schema)}", f"BLANKS: /{_BLANKS}/"]
    # An answer that is a call if it begins like one must be told from text by its first character.
    text = "(PLAIN | BLANKS)?" if form.bare else "TEXT"
    rules.append(f"PLAIN: /{_PLAIN}/" if form.bare else r"TEXT: /(.|\n)*/")
    if not form.special_marker:
        # Lazy: the first marker ends the text before it, so no text can contain one.
        rules.append(f"head[lazy]: {text} {json.dumps(form.begin)}")
    elif marker_id is not None:
        rules.append(f"head: {text} <[{marker_id}]>")
    if form.end:
        rules.append(f"marked: head BLANKS? one BLANKS? {json.dumps(form.end)}")
        answers = [f"marked{'*' if several else '?'} {text}"]
    else:
        rules += _unmarked(several)
        answers = [text]
        if form.bare:
            answers.append("BLANKS? calls")
        if marker_id is not None:
            answers.append("head BLANKS? calls")
    return "\n".join(["%llguidance {}", f"start: {' | '.join(answers)}", *rules])


def _unmarked(several: bool) -> list[str]:
    """Calls to the answer's end: one, or a list of them, or one after the other."""
    more = "(BLANKS? /[,;]/ BLANKS? one)*" if several else ""
    return [
        f"some: one {more} BLANKS?",
        'calls: some | "[" BLANKS? some "]" BLANKS?',
    ]
