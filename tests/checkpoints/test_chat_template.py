from __future__ import annotations

import json
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fuserve.checkpoints import load_tokenizer, open_checkpoint
from fuserve.checkpoints.chat_template import ChatTemplate
from fuserve.errors import CheckpointError, InvalidRequestError

_CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": "1. Größe? 你好 👩‍👩‍👧‍👦 \u202emirror\n\n"},
        {"role": "assistant", "content": "  spaced  "},
        {"role": "user", "content": "<|im_end|> {{ messages }} {% raw %}"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "\x00\t'\"<&>"},
    ],
]
_TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"x": [1, None]}}}]

# What templates of well-known families do: loops with state, filters, tools, dates, trimming.
_TEMPLATES = [
    "{%- for m in messages %}\n    {{- '<|' + m['role'] + '|>' + m['content'] | trim }}\n"
    "{%- endfor %}\n{{ bos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content }}\n  {% endfor %}x",
    "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ dict(a=1) | tojson }}",
    "{% if tools is not none %}{{ tools[0].function.name }}{% endif %}"
    "{{ strftime_now('%Y') }}{{ extra | default('none') }}{{ eos_token }}",
    "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n"
    "{% endfor %}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{% for m in messages %}{{ f(m.content.split()[-1:]) }}"
    "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
]


def _template(text: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, {"bos_token": "<s>", "eos_token": "</s>"}, "model.gguf")


def _user(content: object = "hi") -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("chat", _CHATS)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_the_demo_template_renders_as_in_transformers(
    demo_tokenizer, transformers_demo_tokenizer, chat, generation_prompt
):
    theirs = transformers_demo_tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=generation_prompt
    )
    ours = demo_tokenizer.apply_chat_template(chat, add_generation_prompt=generation_prompt)
    assert ours == theirs


@pytest.mark.parametrize("text", _TEMPLATES)
@pytest.mark.parametrize("tools", [None, _TOOLS])
def test_templates_render_as_in_transformers(text, tools):
    for chat in _CHATS[1:]:
        (theirs,), _ = render_jinja_template(
            [chat], tools=tools, chat_template=text, add_generation_prompt=True,
            extra="é", bos_token="<s>", eos_token="</s>",
        )  # fmt: skip
        assert _template(text).render(chat, tools=tools, extra="é") == theirs


def test_todays_date_is_at_hand():
    assert _template("{{ strftime_now('%Y') }}").render(_user()) == str(datetime.now().year)


def test_a_template_that_refuses_the_messages_passes_on_its_words():
    text = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="refuses these messages: roles must alternate"):
        _template(text).render(_user())


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(99999999) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(text):
    with pytest.raises((CheckpointError, InvalidRequestError)):
        _template(text).render(_user())


def test_a_forbidden_act_names_the_file():
    with pytest.raises(CheckpointError, match=r"model\.gguf: the chat template does what"):
        _template("{{ ().__class__.__bases__ }}").render(_user())


@pytest.mark.parametrize("text", ["{% if %}", "{{ x", "{% nonsense %}", "{{ 1 | nofilter }}"])
def test_a_broken_template_names_the_file_and_a_way_on(text):
    with pytest.raises(CheckpointError, match=r"model\.gguf.*cannot be compiled.*plain prompt"):
        _template(text).render(_user())


def test_contents_that_a_template_cannot_join_are_the_requests_fault():
    with pytest.raises(InvalidRequestError, match="TypeError"):
        _template("{{ 'x' + messages[0].content }}").render(_user(None))


@pytest.mark.parametrize(
    "messages", ["hi", {"role": "user"}, [3], [{"content": "x"}], [{"role": 3, "content": "x"}]]
)
def test_malformed_messages_are_refused(messages):
    with pytest.raises(InvalidRequestError, match="messages"):
        _template("{{ messages }}").render(messages)


def test_objects_with_methods_do_not_reach_a_template(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"^messages\.content holds a PosixPath"):
        _template("{{ messages[0].content.unlink() }}").render(_user(tmp_path))


def test_the_callers_messages_are_left_as_they_were():
    chat = _user(["a"])
    _template("{{ messages[0].content }}").render(chat)
    assert chat == _user(["a"])


def test_the_template_for_tools_is_taken_when_there_are_tools():
    both = ChatTemplate({"default": "plain", "tool_use": "tools"}, {}, "f")
    assert both.render(_user()) == "plain"
    assert both.render(_user(), tools=_TOOLS) == "tools"


def test_a_model_without_a_template_says_so(write_folder, tensors):
    import tokenizers

    folder = write_folder(tensors)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(open_checkpoint(folder))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template(_user())


@pytest.mark.parametrize("where", ["jinja", "config", "named"])
def test_a_folders_template_is_found_wherever_it_is_kept(write_folder, tensors, where):
    import tokenizers

    folder = write_folder(tensors)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {"bos_token": {"content": "<s>"}}
    if where == "jinja":
        (folder / "chat_template.jinja").write_text("{{ bos_token }}你", encoding="utf-8")
        settings["chat_template"] = "never this"
    elif where == "config":
        settings["chat_template"] = "{{ bos_token }}你"
    else:
        settings["chat_template"] = [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "{{ bos_token }}你"},
        ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(open_checkpoint(folder)).apply_chat_template(_user()) == "<s>你"
