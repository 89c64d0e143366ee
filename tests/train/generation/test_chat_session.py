"""Conversations with a model: what it is asked, where it stops, what is remembered."""

import pytest

from minimind_data.chat.encoding import encode_prompt
from minimind_data.chat.template import ChatTemplate, chat_template_of
from minimind_data.errors import UserError
from minimind_train.generation import chat_session
from minimind_train.generation.chat_session import ChatSession
from minimind_train.generation.options import GenerateOptions
from minimind_train.weights.loading import open_model
from tests.helpers.chats import CHATML
from tests.helpers.runs import Said

OPTIONS = GenerateOptions(max_new_tokens=8)


@pytest.fixture
def opened(chat_base):
    return open_model(chat_base, step=None, say=Said())


@pytest.fixture
def talk(opened, chat_base):
    def talk(**options):
        return ChatSession(opened.model, opened.tokenizer, chat_template_of(chat_base), OPTIONS, **options)

    return talk


@pytest.fixture
def script(monkeypatch, opened):
    """Let the model answer what is written here, and note what it is asked."""
    asked = []

    def script(*answers):
        left = list(answers)

        def generate(_, prompt_ids, *, options, eos_id):
            asked.append((prompt_ids, options.seed, eos_id))
            return iter(opened.tokenizer.reference.encode(left.pop(0), add_special_tokens=False).ids)

        monkeypatch.setattr(chat_session, "generate", generate)
        return asked

    return script


def test_an_answer_stops_where_the_turn_ends_and_is_remembered(talk, script, opened, chat_base):
    asked = script("Two.<|im_end|>\n<|im_start|>user\nmore", "Yes<|endoftext|>")
    chat = talk(system="Be short.")
    assert "".join(chat.answer("1 + 1?")) == "Two."
    assert "".join(chat.answer("Sure?")) == "Yes"
    said = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    assert chat.messages == said
    template = chat_template_of(chat_base)
    assert asked[1][0] == encode_prompt(opened.tokenizer, template, said[:4])
    assert [seed for _, seed, _ in asked] == [42, 43]
    chat.clear()
    assert chat.messages == said[:1]


def test_what_came_before_an_answer_was_stopped_is_remembered(talk, script):
    script("One, two, three", "So")
    chat = talk()
    pieces = chat.answer("Count.")
    first = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    assert "".join(chat.answer("Go on.")) == "So"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_the_oldest_turns_are_forgotten_where_there_is_no_room(talk, script, opened, monkeypatch):
    asked = script(*["Yes."] * 9)
    chat = talk(system="Be short.")
    for number in range(3):
        list(chat.answer(f"Question {number}?"))
    room = len(asked[-1][0])
    monkeypatch.setattr(type(opened.model.config), "longest_sequence", room)
    list(chat.answer("Question 3?"))
    assert len(asked[-1][0]) <= room
    assert [m["content"] for m in chat.messages if m["role"] != "assistant"] == [
        "Be short.", "Question 1?", "Question 2?", "Question 3?",
    ]  # fmt: skip


def test_what_cannot_be_asked_leaves_the_conversation_as_it_was(talk, opened, monkeypatch):
    chat = talk()
    with pytest.raises(UserError, match="no text in this terminal's encoding"):
        chat.answer("\udc80")
    monkeypatch.setattr(type(opened.model.config), "longest_sequence", 3)
    with pytest.raises(UserError, match="shorten the prompt"):
        chat.answer("far too long")
    assert chat.messages == []


def test_the_same_seed_gives_the_same_conversation(talk):
    def said():
        chat = talk()
        return ["".join(chat.answer(text)) for text in ("a?", "b?")]

    assert said() == said()


def test_a_folder_without_a_template(whole_run):
    with pytest.raises(UserError, match=r"has no chat template, .* or leave `chat` out"):
        ChatSession.open(whole_run, OPTIONS, say=Said())


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_thinking_opens_the_block_and_no_thinking_closes_it(talk, script, opened):
    asked = script("a", "a", "a")
    for thinking in (True, False, None):
        "".join(talk(thinking=thinking).answer("1 + 1?"))
    opened_block, closed_block, usual = (opened.tokenizer.reference.decode(ids, False) for ids, _, _ in asked)
    assert opened_block.endswith("<|im_start|>assistant\n<think>\n")
    assert closed_block.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert usual == closed_block


def test_a_template_with_qwens_name_for_thinking_is_told_too(opened):
    text = "{{- enable_thinking is defined and enable_thinking and 'think' or 'answer' }}"
    ids = [
        encode_prompt(
            opened.tokenizer, ChatTemplate(text=text), [{"role": "user", "content": "?"}], thinking=t
        )
        for t in (True, False)
    ]
    assert [opened.tokenizer.reference.decode(each) for each in ids] == ["think", "answer"]


def test_tools_stand_in_the_system_turn(talk, script, opened):
    asked = script("a")
    "".join(talk(tools=[TOOL]).answer("Rain?"))
    prompt = opened.tokenizer.reference.decode(asked[0][0], skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\n# Tools")
    assert '"name": "weather"' in prompt


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tools": [TOOL]}, "the chat template knows no tools"),
        ({"thinking": True}, "reads neither open_thinking nor enable_thinking"),
    ],
)
def test_what_the_template_cannot_do_is_said_at_once(opened, options, complaint):
    with pytest.raises(UserError, match=complaint):
        ChatSession(opened.model, opened.tokenizer, ChatTemplate(text=CHATML), OPTIONS, **options)
