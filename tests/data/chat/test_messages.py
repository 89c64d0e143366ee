"""Messages out of the ways in which people write them: what a role, a content and a list may be, and what is said of others."""

import json

import pytest

from minimind_data.chat.conversations import read_record
from minimind_data.chat.messages import (
    BadConversationError,
    exchange_names,
    is_list_in_text,
    transcript_of,
)

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}


def read(*messages, **fields):
    (conversation,) = read_record({"messages": list(messages), **fields}, "sft").conversations
    return conversation


def user(**fields):
    return {**USER, **fields}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user(content=[5])], "part 1 of the content of message 1 of messages is a number, not an object"),
        ([USER, user(content=[{"type": "text", "text": "q"}, {"type": "图"}])],
         'part 2 of the content of message 2 of messages is of type "图", where text alone is learned'),
        ([user(content=[{"type": "x" * 60}])], f'is of type "{"x" * 39}, where text alone'),
        ([user(content=[{"type": "text", "text": 5}])],
         "part 1 of the content of message 1 of messages has a text that is a number, not a string"),
        ([user(content=[])], "message 1 of messages, the user's, has no content"),
        ([user(content="", tool_calls=[CALL])], "message 1 of messages, the user's, has no content"),
        ([USER, {"role": "assistant", "reasoning_content": " "}], "message 2 of messages, the assistant's, has no content"),
        ([{"content": "q"}], "message 1 of messages has the role none; known are system, developer, user, human"),
        ([user(role=5)], "message 1 of messages has the role 5; known"),
        ([user(role="作者")], 'message 1 of messages has the role "作者"; known'),
        ([user(role="x" * 60)], f'has the role "{"x" * 39}; known'),
        ([USER, {**ANSWER, "tool_calls": 5}], "tool_calls of message 2 of messages is a number, not a list of objects"),
        ([USER, {**ANSWER, "tool_calls": [json.dumps(CALL), "{"]}], "entry 2 of tool_calls of message 2 of messages is a string that is no JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_message_is_said_with_its_place(messages, reason):
    with pytest.raises(BadConversationError) as caught:
        read(*messages, ANSWER)
    assert reason in str(caught.value)


def test_parts_are_kept_as_parts_and_have_their_texts_alone():
    parts = [{"type": "text", "text": "q", "cache": True}, {"type": "text", "text": "r"}]
    conversation = read(user(content=parts), ANSWER)
    assert conversation.messages[0]["content"] == [
        {"type": "text", "text": "q"},
        {"type": "text", "text": "r"},
    ]


@pytest.mark.parametrize("calls", [[CALL], CALL, json.dumps([CALL]), [json.dumps(CALL)]])
def test_calls_and_tools_may_be_json_in_a_string_or_one_alone(calls):
    conversation = read(USER, {"role": "assistant", "tool_calls": calls}, tools=calls)
    assert conversation.messages[1] == {"role": "assistant", "tool_calls": [CALL]}
    assert conversation.tools == [CALL]


def test_tools_of_the_system_message_are_those_of_the_conversation_and_blank_ones_are_none():
    system = {"role": "system", "content": "s"}
    conversation = read({**system, "tools": json.dumps([CALL])}, USER, ANSWER)
    assert conversation.tools == [CALL]
    assert conversation.messages[0] == system
    assert read(USER, ANSWER, tools=" ").tools is None


def test_thoughts_or_calls_are_an_answer_without_content():
    for answer in ({"reasoning_content": "hm"}, {"content": "", "tool_calls": [CALL]}):
        assert read(USER, {"role": "assistant", **answer}).num_answers == 1


def test_a_role_counts_before_what_stands_in_from():
    conversation = read({**USER, "from": "gpt", "value": "x"}, ANSWER)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[0]["content"] == "q"


@pytest.mark.parametrize(
    ("value", "is_list"),
    [
        (json.dumps([USER, ANSWER]), True), (' [{"from": "human", "value": "q"}]', True),
        ("5", False), ("[5]", False), ("[]", False), ("[1] apples", False), (json.dumps(USER), False),
        ('[{"human": "q"}]', False), (json.dumps([USER, 5]), False), ([USER], False), (None, False),
    ],
)  # fmt: skip
def test_a_text_is_a_list_of_messages_only_if_all_in_it_are_messages(value, is_list):
    assert is_list_in_text(value) is is_list
    if isinstance(value, str) and not is_list:
        record = read_record({"prompt": value, "completion": value}, "sft")
        assert [message["content"] for message in record.conversations[0].messages] == [value, value]


@pytest.mark.parametrize("text", ["Human: q", "q\n\nAssistant: a", "Assistant: a\n\nHuman: q", "q"])
def test_a_text_in_which_nobody_asks_or_nobody_answers_is_no_transcript(text):
    assert transcript_of(text, "here") is None


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"human": "q", "assistant": "a"}, ("human", "assistant")),
        ({"input": "q", "output": "a", "system": "s"}, ("input", "output")),
        ({"human": "q"}, None), ({"assistant": "a"}, None), (["human", "assistant"], None), ("human", None),
        ({"role": "user", "human": "q", "assistant": "a"}, None),
        ({"from": "user", "human": "q", "assistant": "a"}, None),
    ],
)  # fmt: skip
def test_an_exchange_has_a_question_and_its_answer_and_no_role(value, names):
    assert exchange_names(value) == names


def test_a_function_call_is_an_answer_that_calls():
    conversation = read(USER, {"from": "function_call", "value": json.dumps(CALL)})
    assert conversation.messages[1] == {"role": "assistant", "tool_calls": [CALL]}


def test_what_else_an_exchange_says_is_said_of_its_answer():
    exchange = {"human": "q", "assistant": "a"}
    conversation = read({**exchange, "weight": 0, "name": "zoe"}, exchange)
    assert conversation.excluded_answers == {0}
    assert conversation.messages[:2] == (USER, {**ANSWER, "name": "zoe"})
