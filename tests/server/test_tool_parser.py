"""Tool calls are found in what models write, however the text is cut into pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuserve.server.tools.formats import (
    FORCED,
    HERMES,
    LLAMA3,
    MISTRAL,
    ToolFormat,
    format_of_template,
)
from fuserve.server.tools.parser import AnswerParser, NamedCallParser, ToolParser

ARGUMENTS = {"city": 'Paris "{[', "days": [1, {"deep": "]}"}], "text": "a\\b,c: é"}
CALL = {"name": "weather", "arguments": ARGUMENTS}
OTHER = {"name": "time", "arguments": {}}


@dataclass
class Heard:
    content: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def hear(parser: AnswerParser, pieces: list[str]) -> Heard:
    heard = Heard()
    for parsed in [*(parser.push(piece) for piece in pieces), parser.flush()]:
        heard.content += parsed.content
        for delta in parsed.calls:
            if delta.name is not None:
                assert delta.index == len(heard.names)
                assert delta.id is not None
                heard.names.append(delta.name)
                heard.ids.append(delta.id)
                heard.arguments.append("")
            heard.arguments[delta.index] += delta.arguments
    return heard


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[begin:end] for begin, end in pairwise(ends)]


def hermes(call: object) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def parameters(call: dict[str, object]) -> str:
    return json.dumps({"name": call["name"], "parameters": call["arguments"]})


WRITTEN = [
    (HERMES, f"Let me look.\n{hermes(CALL)}\n{hermes(OTHER)}", "Let me look."),
    (MISTRAL, f"[TOOL_CALLS][{json.dumps(CALL)}, {json.dumps(OTHER)}]", ""),
    (LLAMA3, f"{parameters(CALL)}; {parameters(OTHER)}", ""),
    (LLAMA3, f"<|python_tag|>{parameters(CALL)};{parameters(OTHER)}", ""),
    (FORCED, json.dumps([CALL, OTHER], indent=1), ""),
]


@pytest.mark.parametrize(("form", "text", "content"), WRITTEN)
@given(places=st.lists(st.integers(0, 10_000), max_size=12))
def test_calls_are_the_same_however_the_text_is_cut(
    form: ToolFormat, text: str, content: str, places: list[int]
) -> None:
    heard = hear(ToolParser(form), cut(text, places))
    assert heard.names == ["weather", "time"]
    assert [json.loads(arguments) for arguments in heard.arguments] == [ARGUMENTS, {}]
    assert heard.content.strip() == content
    assert len(set(heard.ids)) == 2


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA3])
@given(places=st.lists(st.integers(0, 1000), max_size=6))
def test_a_text_without_calls_is_content_to_the_letter(form: ToolFormat, places: list[int]) -> None:
    text = " If a < b, write [a, {b}] and <tool_ca"
    heard = hear(ToolParser(form), cut(text, places))
    assert (heard.content, heard.names) == (text, [])


def test_arguments_come_before_the_call_has_ended() -> None:
    parser = ToolParser(HERMES)
    parser.push('<tool_call>{"name": "weather", "arguments": {"ci')
    parsed = parser.push('ty": "Par')
    assert [delta.arguments for delta in parsed.calls] == ['ty": "Par']


def test_arguments_before_the_name_are_not_lost() -> None:
    text = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
    heard = hear(ToolParser(HERMES), list(text))
    assert (heard.names, heard.arguments) == (["f"], ['{"a": 1}'])


def test_arguments_written_as_text_are_unpacked() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    heard = hear(ToolParser(HERMES), list(text))
    assert heard.arguments == ['{"a": 1}']


def test_an_object_that_names_no_function_is_content() -> None:
    heard = hear(ToolParser(LLAMA3), list('{"answer": 42}'))
    assert (heard.content, heard.names) == ('{"answer": 42}', [])


def test_an_answer_cut_off_within_a_call_keeps_what_was_told() -> None:
    heard = hear(ToolParser(HERMES), ['<tool_call>{"name": "f", "arguments": {"a": '])
    assert (heard.names, heard.arguments, heard.content) == (["f"], ['{"a": '], "")


def test_text_after_a_call_is_content() -> None:
    heard = hear(ToolParser(HERMES), [f"{hermes(CALL)} Done."])
    assert (heard.names, heard.content.strip()) == (["weather"], "Done.")


def test_a_named_function_gets_the_whole_answer() -> None:
    heard = hear(NamedCallParser("f"), ['{"a"', ": 1}"])
    assert (heard.names, heard.arguments) == (["f"], ['{"a": 1}'])


def test_mistral_gets_ids_of_nine_letters() -> None:
    heard = hear(ToolParser(MISTRAL), [f"[TOOL_CALLS][{json.dumps(CALL)}]"])
    assert len(heard.ids[0]) == 9
    assert heard.ids[0].isalnum()


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("... <tool_call> ...", HERMES),
        ("... [TOOL_CALLS] ...", MISTRAL),
        ("... <|python_tag|> ...", LLAMA3),
        ("{{ messages }}", HERMES),
    ],
)
def test_the_template_tells_the_format(template: str, form: ToolFormat) -> None:
    assert format_of_template(template) is form


@given(places=st.lists(st.integers(0, 400), max_size=8))
@example(places=[5])  # between the last word and the space before the call
def test_where_one_call_is_wanted_the_others_are_dropped(places: list[int]) -> None:
    text = f"First {hermes(CALL)}\n{hermes(OTHER)} and more"
    heard = hear(ToolParser(HERMES, max_calls=1), cut(text, places))
    assert (heard.names, heard.content) == (["weather"], "First ")
    assert json.loads(heard.arguments[0]) == ARGUMENTS
