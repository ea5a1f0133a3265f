"""How families of models write a tool call. Each format is a row of data; ``parser`` reads them.

======== ====================================================== =====================
format   what the model writes                                  seen in the template
======== ====================================================== =====================
hermes   ``<tool_call>{"name": .., "arguments": ..}</tool_call>`` ``<tool_call>``
mistral  ``[TOOL_CALLS][{"name": .., "arguments": ..}, ..]``      ``[TOOL_CALLS]``
llama3   ``{"name": .., "parameters": ..}``                       ``<|python_tag|>`` or the example
======== ====================================================== =====================
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        name: what the format is called.
        begin: marker before a call, "" for none.
        end: marker behind a call, "" for none.
        arguments: the member of a call that holds its arguments.
        bare: an answer that begins with "{" or "[" is a call without its marker.
        special_marker: the marker is a special token, so such tokens must be kept in the text.
        short_ids: the template wants ids of nine letters and digits.
    """

    name: str
    begin: str
    end: str = ""
    arguments: str = "arguments"
    bare: bool = False
    special_marker: bool = False
    short_ids: bool = False


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", special_marker=True, short_ids=True)
LLAMA3 = ToolFormat(
    "llama3", "<|python_tag|>", arguments="parameters", bare=True, special_marker=True
)
FORCED = ToolFormat("forced", "", bare=True)
"""A JSON list of calls and nothing else: what ``tool_choice: required`` is constrained to."""


def format_of_template(template: str) -> ToolFormat:
    """The format that a chat template teaches its model; Hermes' where it teaches none."""
    if HERMES.begin in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    if LLAMA3.begin in template or '{"name": function name, "parameters"' in template:
        return LLAMA3
    return HERMES
