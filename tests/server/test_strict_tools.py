"""Calls of strict tools fit their schemas, and the model may as well not call."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from fuserve.checkpoints.tokenizer import SpecialTokens, Tokenizer
from fuserve.engine.guided import GuideCompiler
from fuserve.server.protocol.chat import ChatBody
from fuserve.server.tools.choice import plan_tools
from fuserve.server.tools.formats import HERMES, LLAMA3, MISTRAL, ToolFormat
from fuserve.server.tools.parser import ToolParser
from tests.server.serving import RunningServer

EOS = "</s>"
MARKERS = (MISTRAL.begin, LLAMA3.begin)


def tool(name: str, strict: bool | None, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


WEATHER = tool("weather", True, city={"enum": ["Paris", "Rome"]})
CLOCK = tool("clock", None, zone={"type": "string"})
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]

PARIS = '{"name": "weather", "%s": {"city": "Paris"}}'
OSLO = '{"name": "weather", "%s": {"city": "Oslo"}}'
LOOSE = '{"name": "clock", "%s": {"anything": [1]}}'

GOOD = {
    HERMES: [
        "Hello <tool_cal",
        "<tool_call>\n{paris}\n</tool_call>",
        "I look.\n<tool_call>{paris}</tool_call>\n<tool_call>\n{loose}\n</tool_call> Done.",
    ],
    MISTRAL: [
        "Hello [x]",
        "[TOOL_CALLS][{paris}]",
        "[TOOL_CALLS] {paris}",
        "[TOOL_CALLS][{paris}, {loose}]",
    ],
    LLAMA3: [
        "Hello {paris}",
        " {paris}",
        "{paris}; {loose}",
        "<|python_tag|>{paris}",
        "Well. <|python_tag|>[{loose}]",
    ],
}
BAD = {
    HERMES: [
        "<tool_call>\n{oslo}\n</tool_call>",
        "<tool_call>what?</tool_call>",
        "<tool_call>{paris}</tool_call> <tool_call>{oslo}</tool_call>",
    ],
    MISTRAL: ["[TOOL_CALLS][{oslo}]", "[TOOL_CALLS]Hello", "[TOOL_CALLS][{paris}] and more"],
    LLAMA3: ["{oslo}", "<|python_tag|>{oslo}", "<|python_tag|>print(1)", "[1]"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, the special markers, and an end."""
    vocabulary = [*MARKERS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate(vocabulary)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in (*MARKERS, EOS)])
    ends = frozenset({vocabulary.index(EOS)})
    special = SpecialTokens(None, ends, {})
    return Tokenizer(backend, vocab_size=len(vocabulary), special=special, chat_template=None)


def written(text: str, form: ToolFormat) -> str:
    calls = {"paris": PARIS, "oslo": OSLO, "loose": LOOSE}
    for name, call in calls.items():
        text = text.replace("{" + name + "}", call % form.arguments)
    return text


def allowed(tokenizer: Tokenizer, form: ToolFormat, text: str, **body: Any) -> bool:
    """Whether the model may answer so."""
    request = ChatBody(messages=MESSAGES, tools=[WEATHER, CLOCK], **body)
    marker_id = tokenizer.special_token_id(form.begin) if form.special_marker else None
    plan = plan_tools(request, form, marker_id)
    assert plan.guided is not None
    constraint = GuideCompiler(tokenizer, tokenizer.vocab_size).constraint(plan.guided)
    for token in tokenizer.encode(written(text, form), add_special_tokens=False):
        if not constraint.allowed()[token // 32] >> (token % 32) & 1:
            return False
        constraint.advance(token)
    (end,) = tokenizer.eos_token_ids
    return bool(constraint.allowed()[end // 32] >> (end % 32) & 1)


@pytest.mark.parametrize(("form", "text"), [(f, t) for f, texts in GOOD.items() for t in texts])
def test_words_and_fitting_calls_are_allowed(
    tokenizer: Tokenizer, form: ToolFormat, text: str
) -> None:
    assert allowed(tokenizer, form, text)
    parser = ToolParser(form)
    calls = parser.push(written(text, form)).calls + parser.flush().calls
    num_named = sum(call.name is not None for call in calls)
    assert num_named == (0 if text.startswith("Hello") else text.count("{"))


@pytest.mark.parametrize(("form", "text"), [(f, t) for f, texts in BAD.items() for t in texts])
def test_other_calls_are_not(tokenizer: Tokenizer, form: ToolFormat, text: str) -> None:
    assert not allowed(tokenizer, form, text)


@pytest.mark.parametrize("form", [MISTRAL, LLAMA3], ids=lambda form: form.name)
def test_one_call_at_a_time_can_be_asked_for(tokenizer: Tokenizer, form: ToolFormat) -> None:
    two = f"{form.begin}[{{paris}}, {{loose}}]"
    assert allowed(tokenizer, form, two)
    assert not allowed(tokenizer, form, two, parallel_tool_calls=False)


def test_tools_that_are_not_strict_leave_the_answer_free() -> None:
    assert plan_tools(ChatBody(messages=MESSAGES, tools=[CLOCK]), HERMES).guided is None


def test_a_strict_tool_leaves_the_model_its_words(demo: RunningServer) -> None:
    client = demo.client()

    def answer(strict: bool) -> Any:
        return (
            client.chat.completions.create(
                model="demo",
                messages=MESSAGES,
                tools=[{**WEATHER, "function": {**WEATHER["function"], "strict": strict}}],
                max_tokens=24,
                temperature=0,
            )
            .choices[0]
            .message
        )

    assert answer(True).content == answer(False).content
