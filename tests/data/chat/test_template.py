"""Chat templates: rendered as transformers renders them, sandboxed, found where a tokenizer keeps them."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from minimind_data.chat.template import (
    ChatTemplate,
    RenderError,
    chat_template_of,
    render_chat,
    roles_in_parts,
)
from minimind_data.errors import UserError
from minimind_data.tokenizer.places import SHIPPED
from tests.helpers.chats import PLAIN, TEMPLATES, make_tokenizer

SYSTEM = {"role": "system", "content": "Be brief. 简短些。\n"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the <b>weather</b>, 天气",
            "parameters": {"type": "object"},
        },
    }
]
CALL = [
    {
        "id": "1",
        "type": "function",
        "function": {"name": "weather", "arguments": {"place": "北京", "days": 2.0}},
    }
]
CONVERSATIONS = {
    "one turn": PLAIN[:2],
    "several turns": PLAIN,
    "system": [SYSTEM, *PLAIN],
    "thoughts in content": [PLAIN[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA bird."}],
    "thoughts apart": [
        PLAIN[0],
        {"role": "assistant", "content": "A bird.", "reasoning_content": "\nhm "},
        PLAIN[2],
    ],
    "tools": [
        SYSTEM,
        {"role": "user", "content": "and tomorrow?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": CALL},
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "tool", "content": "and more"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": '{"a": 1}'}]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "Blue."},
    ],
}
OWN = "own"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {OWN: SHIPPED["default"]} | {kind: make_tokenizer(root / kind, kind) for kind in TEMPLATES}


@pytest.fixture(scope="module")
def theirs(folders):
    return {kind: PreTrainedTokenizerFast.from_pretrained(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind", [OWN, *TEMPLATES])
def test_texts_are_those_of_transformers(folders, theirs, kind, conversation, prompt, tools):
    messages = CONVERSATIONS[conversation]
    template = chat_template_of(folders[kind])

    def ours():
        return render_chat(template, messages, tools=tools, add_generation_prompt=prompt)

    try:
        wanted = theirs[kind].apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
    except Exception:  # noqa: BLE001 - a template that does not know tools, or minds who speaks
        with pytest.raises(RenderError):
            ours()
    else:
        assert ours() == wanted


def in_parts(messages):
    """Return messages whose contents are cut in two, but for the odd ones that have none."""
    return [
        {**one, "content": [{"type": "text", "text": part} for part in (one["content"][:2], one["content"][2:])]}
        if one.get("content")
        else one
        for one in messages
    ]  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind", [OWN, *TEMPLATES])
def test_parts_are_joined_unless_the_template_takes_them(folders, theirs, kind, conversation, tools):
    template, messages = chat_template_of(folders[kind]), CONVERSATIONS[conversation]
    try:
        joined = render_chat(template, messages, tools=tools)
    except RenderError:
        with pytest.raises(RenderError):
            render_chat(template, in_parts(messages), tools=tools)
        return
    if kind == "parts":
        joined = theirs[kind].apply_chat_template(in_parts(messages), tools=tools, tokenize=False)
    assert render_chat(template, in_parts(messages), tools=tools) == joined


def test_parts_are_told_role_by_role():
    roles = {kind: roles_in_parts(ChatTemplate(text=text)) for kind, text in TEMPLATES.items()}
    assert roles.pop("parts") == {"system", "user", "assistant", "tool"}
    assert set(roles.values()) == {frozenset()}
    text = TEMPLATES["parts"].replace("message.content is string", "message.role != 'user'")
    assert roles_in_parts(ChatTemplate(text=text)) == set()  # it takes no text of a user
    text = TEMPLATES["parts"].replace("is string", "is string or message.role != 'user'")
    assert roles_in_parts(ChatTemplate(text=text)) == {"user"}
    strict = "{%- if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["parts"]
    assert roles_in_parts(ChatTemplate(text=strict)) == {"user", "assistant", "tool"}
    listed = TEMPLATES["chatml"].replace("(message.content or '')", "message.content | string")
    assert roles_in_parts(ChatTemplate(text=listed)) == set()  # written down as a list


def test_the_default_template_has_turns_like_minimind(folders):
    template = chat_template_of("default")
    assert render_chat(template, PLAIN[:2], add_generation_prompt=True) == (
        "<|im_start|>user\nWhat is an owl?<|im_end|>\n<|im_start|>assistant\nA bird that hunts at night.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with pytest.raises(RenderError, match="no such role: cook"):
        render_chat(template, [{"role": "cook", "content": "soup"}])


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ namespace(_a=1) }}",
        "{{ dict.__mro__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 + messages }}",
        "{{ raise_exception('not this') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path, text):
    template = chat_template_of(make_tokenizer(tmp_path, "chatml", text))
    try:
        made = render_chat(template, PLAIN)
    except RenderError:
        return
    assert "class" not in made


def test_the_template_of_a_folder(tmp_path):
    folder = make_tokenizer(tmp_path / "a", "chatml")
    assert chat_template_of(folder).text == TEMPLATES["chatml"]
    assert chat_template_of(folder / "tokenizer.json") == chat_template_of(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert chat_template_of(folder).text == "{{ messages[0].content }}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    both = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": both}))
    assert chat_template_of(folder).text == "b"
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_template_of(folder) is None
    assert chat_template_of(tmp_path) is None


def test_what_is_no_template_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer_config\.json: its chat template is no Jinja \(line 2: "):
        chat_template_of(make_tokenizer(tmp_path / "a", "chatml", "a\n{% if %}"))
    with pytest.raises(UserError, match="no such file; `chat_template` takes a file"):
        chat_template_of(None, tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(UserError, match="latin: no UTF-8"):
        chat_template_of(None, tmp_path / "latin")


def test_what_a_template_is_handed_on_as_reads_the_same(folders, tmp_path):
    for kind, folder in folders.items():
        template = chat_template_of(folder)
        there = tmp_path / kind
        there.mkdir()
        (there / "tokenizer_config.json").write_text(template.config_json, "utf-8")
        assert chat_template_of(there) == template


def test_a_template_that_is_nested_too_deeply_is_a_sentence(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ " + "[" * 3000}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: its chat template is nested too deeply"):
        chat_template_of(tmp_path)
