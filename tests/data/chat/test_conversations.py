"""Conversations out of records: which turns are learned, what the field's forms mean, and what nothing reads."""

import json

import pytest

from minimind_data.chat.conversations import (
    Conversation,
    has_different_prompts,
    kind_shown_by,
    read_record,
)
from minimind_data.chat.messages import BadConversationError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
MORE = {"role": "user", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}


def messages_of(record, kind="sft"):
    """Return [(role, content), …] of each conversation of a record."""
    return [
        [(message["role"], message.get("content")) for message in conversation.messages]
        for conversation in read_record(record, kind).conversations
    ]


def said(*turns):
    return [(role, text) for role, text in turns]


ONE_TURN = said(("user", "q"), ("assistant", "a"))
WITH_SYSTEM = said(("system", "s"), *ONE_TURN)


@pytest.mark.parametrize(
    ("fields", "is_learned"),
    [
        ({"weight": 0}, False), ({"weight": 0.0}, False), ({"weight": 1}, True), ({"weight": 1.0}, True),
        ({"train": False}, False), ({"train": True}, True), ({"training": False}, False),
        ({"loss": False}, False), ({"loss": 0}, False), ({"loss": True}, True), ({"loss_scale": 0.0}, False),
        ({"train_on_turn": False}, False), ({"trainable": False}, False), ({"trainable": True}, True),
        ({"masked": True}, False), ({"masked": False}, True), ({"masked": None}, True),
        ({"weight": 0, "train": False, "masked": True}, False), ({"train_detail": []}, True),
    ],
)  # fmt: skip
def test_a_turn_says_whether_it_is_learned(fields, is_learned):
    record = read_record({"messages": [USER, {**ANSWER, **fields}, MORE, ANSWER]}, "sft")
    (conversation,) = record.conversations
    assert conversation.excluded_answers == (frozenset() if is_learned else {0})
    assert conversation.messages[1] == ANSWER
    assert not record.unread


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight": 0.5}, "weight of message 2 of messages is 0.5"),
        ({"train": "no"}, 'train of message 2 of messages is "no"'),
        ({"weight": 1, "masked": True}, "says both that it is learned and that it is not (weight, masked)"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
            "train_detail of message 2",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, reason):
    with pytest.raises(BadConversationError) as caught:
        read_record({"messages": [USER, {**ANSWER, **fields}]}, "sft")
    assert reason in str(caught.value)
    assert "; " in str(caught.value)


def test_an_answer_alone_that_is_not_learned_is_nothing_to_learn():
    for kind, record in (
        ("sft", {"messages": [USER, {**ANSWER, "weight": 0}]}),
        ("dpo", {"prompt": "q", "chosen": [{**ANSWER, "weight": 0}], "rejected": "b"}),
    ):
        with pytest.raises(
            BadConversationError, match="every turn of the assistant's that it is not learned"
        ):
            read_record(record, kind)


@pytest.mark.parametrize(
    ("record", "form", "turns"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "Alpaca", ONE_TURN),
        ({"instruction": "q", "input": "i", "output": "a", "system": "s"}, "Alpaca",
         said(("system", "s"), ("user", "q\ni"), ("assistant", "a"))),
        ({"instruction": "r", "output": "a", "history": [["q", "b"]]}, "Alpaca",
         said(("user", "q"), ("assistant", "b"), ("user", "r"), ("assistant", "a"))),
        ({"prompt": "q", "completion": "a"}, "prompt and completion", ONE_TURN),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt and completion", ONE_TURN),
        ({"prompt": USER, "completion": ANSWER}, "prompt and completion", ONE_TURN),
        ({"prompt": "Human: q\n\nAssistant: x", "completion": "a"}, "prompt and completion",
         said(("user", "Human: q\n\nAssistant: x"), ("assistant", "a"))),
        ({"prompt": "q", "completion": "", "answer": "a"}, "prompt and answer", ONE_TURN),
        ({"instruction": "", "query": "q", "response": "a"}, "query and response", ONE_TURN),
        ({"messages": [], "prompt": "q", "completion": "a"}, "prompt and completion", ONE_TURN),
        ({"question": "q", "answer": "a"}, "question and answer", ONE_TURN),
        ({"query": "q", "response": "a", "history": None}, "query and response", ONE_TURN),
        ({"query": "r", "response": "a", "history": [["user", "q"], ["assistant", "b"]]}, "query and response",
         said(("user", "q"), ("assistant", "b"), ("user", "r"), ("assistant", "a"))),
        ({"input": "q", "output": "a"}, "input and output", ONE_TURN),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a"}, "prompt and completion", ONE_TURN),
        ({"conversations": [], "messages": [USER, ANSWER]}, None, ONE_TURN),
        ({"messages": json.dumps([USER, ANSWER])}, None, ONE_TURN),
        ({"messages": [["Human", "q"], ["assistant", "a"]]}, "[role, text] pairs", ONE_TURN),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "turns of human and assistant", ONE_TURN),
        ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, "turns of input and output", WITH_SYSTEM),
        ({"messages": [{"role": "developer", "content": "s"}, {"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]},
         None, WITH_SYSTEM),
        ({"messages": [{"role": "User", "content": "q"}, {"role": "function", "name": "f", "content": "r"}, ANSWER]},
         None, said(("user", "q"), ("tool", "r"), ("assistant", "a"))),
        ({"system": "s", "messages": [SYSTEM, USER, ANSWER]}, None, WITH_SYSTEM),
        ({"system": "s", "messages": [{"role": "system", "content": "", "tools": []}, USER, ANSWER]}, None, WITH_SYSTEM),
    ],
)  # fmt: skip
def test_the_forms_of_conversations(record, form, turns):
    assert messages_of(record) == [turns]
    reading = read_record(record, "sft")
    assert (reading.form, reading.unread) == (form, {})


@pytest.mark.parametrize(
    ("record", "form", "before"),
    [
        ({"prompt": "q"}, None, said(("user", "q"))),
        ({"system": "s", "prompt": "q"}, None, said(("system", "s"), ("user", "q"))),
        ({"prompt": [SYSTEM, USER]}, None, said(("system", "s"), ("user", "q"))),
        ({"question": "q"}, None, said(("user", "q"))),
        ({"instruction": "q", "input": "i"}, None, said(("user", "q\ni"))),
        ({"conversations": [{"from": "human", "value": "q"}]}, None, said(("user", "q"))),
        (
            {"prompt": "r", "history": [["q", "x"]]},
            None,
            said(("user", "q"), ("assistant", "x"), ("user", "r")),
        ),
        ({"prompt": USER}, None, said(("user", "q"))),
        ({"prompt": json.dumps([USER])}, None, said(("user", "q"))),
        ({"prompt": "\n\nHuman: q\n\nAssistant:"}, None, said(("user", "q"))),
    ],
)
@pytest.mark.parametrize("as_message", [False, True])
def test_the_forms_of_prompts(record, form, before, as_message):
    sides = {"chosen": "yes", "rejected": "no"}
    if as_message:
        sides = {name: {"from": "gpt", "value": text} for name, text in sides.items()}
    reading = read_record({**record, **sides}, "dpo")
    assert messages_of({**record, **sides}, "dpo") == [
        [*before, ("assistant", "yes")],
        [*before, ("assistant", "no")],
    ]
    assert (reading.form, reading.unread) == (form, {})


def test_sides_that_are_transcripts():
    prompt = "\n\nHuman: q\n\nAssistant: x\n\nHuman: two\n\nparagraphs\n\nAssistant:"
    record = {"chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
    before = said(("user", "q"), ("assistant", "x"), ("user", "two\n\nparagraphs"))
    assert messages_of(record, "dpo") == [[*before, ("assistant", text)] for text in ("yes", "no")]
    assert read_record(record, "dpo").form == "hh-rlhf"
    with pytest.raises(BadConversationError, match="turn 3 of rejected, the user's, has no content"):
        read_record({**record, "rejected": "Human: q\n\nAssistant: x\n\nHuman:\n\nAssistant: y"}, "dpo")


def pair(*before, **fields):
    sides = {"chosen": {"content": "yes"}, "rejected": {"content": "no"}}
    return {name: [*before, {**ANSWER, **answer}] for name, answer in sides.items()} | fields


@pytest.mark.parametrize(
    ("record", "before"),
    [
        (pair(USER, prompt="q"), [USER]),
        (pair(USER, prompt=[USER]), [USER]),
        (pair(USER, prompt=[SYSTEM, USER]), [SYSTEM, USER]),
        (pair(SYSTEM, USER, prompt=[USER]), [SYSTEM, USER]),
        (pair(USER, ANSWER, MORE, prompt="r"), [USER, ANSWER, MORE]),
        (pair(USER, ANSWER, MORE, prompt="q"), [USER, ANSWER, MORE]),
        (pair(USER, prompt=""), [USER]),
        (pair(USER, system="s"), [SYSTEM, USER]),
        (pair(SYSTEM, USER, system="s"), [SYSTEM, USER]),
        (pair(ANSWER, MORE, prompt="q"), [USER, ANSWER, MORE]),
        (pair(ANSWER, MORE), [ANSWER, MORE]),
    ],
)
def test_a_prompt_beside_whole_sides_says_the_same_or_is_put_before(record, before):
    told = [(message["role"], message["content"]) for message in before]
    assert [turns[:-1] for turns in messages_of(record, "dpo")] == [told, told]


BAD = [
    ("dpo", pair(USER, prompt="other"), "prompt says something else than the turns that chosen begins with"),
    ("dpo", pair(USER, prompt=[USER, ANSWER, MORE]), "prompt says something else"),
    ("dpo", pair(USER, prompt=[SYSTEM, MORE]), "prompt says something else"),
    ("dpo", pair(SYSTEM, USER, prompt=[{"role": "system", "content": "t"}]), "prompt says something else"),
    ("dpo", pair(SYSTEM, USER, system="t"), "field 'system' and the system message of chosen say different things"),
    ("dpo", pair(USER, system=5), "system is a number, not a string"),
    ("dpo", pair(USER, history=[["x", "y"]]), "history says something else"),
    ("dpo", {"prompt": "q", "chosen": "x", "rejected": ""}, "rejected, the assistant's, has no content"),
    ("dpo", {"prompt": "q", "chosen": " \n", "rejected": "x"}, "chosen, the assistant's, has no content"),
    ("dpo", {"prompt": "", "chosen": "x", "rejected": "y"}, "prompt, the user's, has no content"),
    ("dpo", {"prompt": " ", "chosen": "x", "rejected": "y"}, "prompt, the user's, has no content"),
    ("dpo", {"prompt": [], "chosen": "x", "rejected": "y"}, "prompt, the user's, has no content"),
    ("dpo", {"chosen": "x", "rejected": "y"}, "chosen has no user's turn and the record no field 'prompt'"),
    ("dpo", {"chosen": [SYSTEM, ANSWER], "rejected": "y"}, "chosen has no user's turn and the record no field 'prompt'"),
    ("dpo", {"prompt": "q", "chosen": "x", "rejected": [{"role": "assistant", "content": "x"}]}, "chosen and rejected are the same"),
    ("dpo", {"messages": [USER, ANSWER]}, "no field 'chosen' (its fields: messages); `kind` sft reads such records"),
    ("sft", pair(USER), "(its fields: chosen, rejected); `kind` dpo reads such records"),
    ("sft", [USER, ANSWER], "the record is a list, not an object; write it as"),
    ("sft", {"messages": [["user", 5], ["assistant", "a"]]}, "message 1 of messages is a list, not an object"),
    ("sft", {"output": "a"}, "no field 'conversations' or 'messages' (its fields: output)"),
    ("sft", {"query": "", "output": "a"}, "query, the user's, has no content"),
    ("sft", {"messages": []}, "messages is an empty list"),
    ("sft", {"conversations": None, "messages": [], "conversation": {}}, "messages is an empty list"),
    ("sft", {"messages": None, "conversation": None}, "messages is null, not a list"),
    ("sft", {"text": "a"}, "`kind` pretrain reads texts"),
    ("sft", {"messages": [USER, ANSWER], "history": [["x", "y"]]}, "field 'history' beside 'messages'"),
    ("sft", {"messages": [SYSTEM, USER, ANSWER], "system": "t"}, "say different things"),
    ("sft", {"instruction": "", "output": "a"}, "instruction, the user's, has no content"),
    ("sft", {"instruction": "q", "output": " "}, "output, the assistant's, has no content"),
    ("sft", {"instruction": "q", "input": 5, "output": "a"}, "input a number, where both are strings"),
    ("sft", {"instruction": "q", "output": "a", "history": [["x", "y"], ["z", ""]]}, "pair 2 of history, the assistant's, has no content"),
    ("sft", {"instruction": "q", "output": "a", "history": [["x", "y"], ["z", "y", "x"]]}, "message 1 of history is a list, not an object"),
    ("sft", {"instruction": "q", "output": "a", "history": ["x", "y"]}, "message 1 of history is a string, not an object"),
    ("sft", {"instruction": "q", "output": "a", "history": "xy"}, "history is a string, not a list"),
    ("sft", {"instruction": "q"}, "no field 'conversations' or 'messages' (its fields: instruction)"),
    ("sft", {"messages": "[1"}, "messages is a string that is no JSON"),
    ("sft", {"messages": [USER, SYSTEM]}, "messages has no turn of the assistant's"),
    ("sft", {"messages": [{**USER, "tools": [{"name": "f"}]}, ANSWER]}, "messages has tools in a message of the user; they belong to the system's"),
    ("sft", dict.fromkeys("abcdef", 1), "(its fields: a, b, c, d, e); write it as"),
    ("sft", {"messages": [["cook", "soup"]]}, "message 1 of messages is a list, not an object"),
    ("sft", {"messages": [USER, {**ANSWER, "content": float("nan")}]}, "is NaN, which is no number, not a string"),
    ("sft", {"messages": [USER, ANSWER], "tools": [{"x": float("inf")}]}, "tools holds NaN or Infinity"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "reason"), BAD, ids=[reason[:40] for *_, reason in BAD])
def test_what_is_refused_says_why_and_what_to_do(kind, record, reason):
    with pytest.raises(BadConversationError) as caught:
        read_record(record, kind)
    assert reason in str(caught.value)
    assert "; " in str(caught.value)


def test_what_nothing_reads_is_named():
    record = {
        "id": 7, "score": float("nan"), "empty": "", "none": None, "messages": [{**USER, "weight": 1}, {**ANSWER, "name": "zoe"}],
        "conversation": [USER, ANSWER], "tools": [{"name": "f"}],
    }  # fmt: skip
    reading = read_record(record, "sft")
    assert reading.unread == {"id": 1, "score": 1, "conversation": 1, "messages[].weight": 1}
    assert reading.for_template == {"messages[].name": 1, "tools": 1}
    reading = read_record({**pair(USER), "prompt_id": "x", "messages": [USER, ANSWER]}, "dpo")
    assert reading.unread == {"prompt_id": 1, "messages": 1}


def test_sides_of_which_one_goes_on_have_different_prompts():
    whole = [USER, ANSWER, MORE, {**ANSWER, "content": "b"}]
    for chosen, rejected in ((whole, whole[:2]), (whole[:2], whole)):
        record = read_record({"chosen": chosen, "rejected": rejected}, "dpo")
        assert has_different_prompts(*record.conversations)
    record = read_record({"chosen": whole, "rejected": [*whole[:3], ANSWER]}, "dpo")
    assert not has_different_prompts(*record.conversations)


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        ([USER, ANSWER], [USER, {**ANSWER, "content": "b"}], False),
        ([USER, ANSWER], [MORE, ANSWER], True),
        ([SYSTEM, USER, ANSWER], [USER, ANSWER], True),
        ([USER, ANSWER], [USER, MORE], True),
        ([USER, ANSWER, USER, ANSWER], [USER, {**ANSWER, "content": "b"}, MORE, ANSWER], False),
        ([USER, ANSWER], [{**USER, "content": [{"type": "text", "text": "q"}]}, ANSWER], False),
    ],
)
def test_the_first_difference_between_sides_is_an_answer_or_they_have_different_prompts(
    one, other, different
):
    one, other = Conversation(messages=tuple(one)), Conversation(messages=tuple(other))
    assert has_different_prompts(one, other) == has_different_prompts(other, one) == different
    tools = [{"name": "f"}]
    same = [Conversation(messages=one.messages, tools=each) for each in (None, tools, list(tools))]
    assert has_different_prompts(same[0], same[1])
    assert not has_different_prompts(same[1], same[2])


def test_answers_are_counted():
    assert Conversation(messages=(SYSTEM, USER, ANSWER)).num_answers == 1
    assert Conversation(messages=(USER, ANSWER, MORE, ANSWER, ANSWER)).num_answers == 3


def test_beside_whole_sides_other_questions_are_not_read_and_beside_one_side_alone_they_are():
    reading = read_record(pair(USER, question="other"), "dpo")
    assert reading.unread == {"question": 1}
    sides = {"chosen": [USER, ANSWER], "rejected": "no"}
    assert messages_of({**sides, "question": "q"}, "dpo") == [
        ONE_TURN,
        said(("user", "q"), ("assistant", "no")),
    ]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["text"], None), (["prompt"], None), (["output"], None), (["chosen"], None), (["prompt", "chosen"], None),
        (["messages"], "sft"), (["id", "conversation"], "sft"), (["input", "answer"], "sft"),
        (["chosen", "rejected"], "dpo"), (["chosen", "rejected", "prompt", "messages"], "dpo"),
    ],
)  # fmt: skip
def test_fields_show_the_kind_of_a_record(names, kind):
    assert kind_shown_by(iter(names)) == kind
