"""Conversations out of records: the fields and roles that are known, and what is wrong with a record that has others.

    {"conversations": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"messages": […], "tools": […]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}

A message may also have `reasoning_content` and `tool_calls`, a system message `tools`. Both lists may be JSON in a string, as in
MiniMind's files. A content may be a list of parts, all of them text: `[{"type": "text", "text": "…"}, …]`. Pairs for
preference learning are two conversations, or two answers to a prompt:

    {"chosen": [{"role": …}, …], "rejected": [{"role": …}, …]}
    {"prompt": "…" or [{"role": …}, …], "chosen": "…" or […], "rejected": "…" or […]}

Nothing is repaired: a record that does not fit is a bad record.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minimind_data.reporting import kind_of

ChatKind = Literal["sft", "dpo"]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Names of roles, ShareGPT's included, and the role that each means. A `function_call` holds a call where others hold text."""
MESSAGES_FIELDS = ("conversations", "messages")
SIDE_FIELDS = ("chosen", "rejected")
OTHER_FIELDS: dict[ChatKind, tuple[str, ...]] = {"sft": ("system", "tools"), "dpo": ("prompt", "tools")}
"""What a record may have besides its messages."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, and the tools that could be called."""

    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None = None

    @property
    def num_answers(self) -> int:
        """Number of turns of the assistant."""
        return sum(message["role"] == "assistant" for message in self.messages)


class BadConversationError(Exception):
    """A record is no conversation; the message says why and, after a semicolon, what to do."""


def conversations_of(record: object, kind: ChatKind) -> tuple[Conversation, ...]:
    """Return the conversation of a record (`sft`), or its chosen and its rejected one (`dpo`).

    Raises:
        BadConversationError: it is no such record.
    """
    if not isinstance(record, Mapping):
        raise BadConversationError(
            f"the record is {kind_of(record)}, not an object; write it as {_EXAMPLES[kind]}"
        )
    return (_single(record),) if kind == "sft" else _pair(record)


_EXAMPLES: dict[ChatKind, str] = {
    "sft": '{"conversations": [{"role": …, "content": …}, …]}',
    "dpo": '{"chosen": [{"role": …, "content": …}, …], "rejected": […]}',
}


def has_different_prompts(chosen: Conversation, rejected: Conversation) -> bool:
    """Tell whether the first difference between two conversations is anything but a different answer."""
    for one, other in zip(_as_texts(chosen), _as_texts(rejected), strict=False):
        if one != other:
            return not one["role"] == other["role"] == "assistant"
    return chosen.tools != rejected.tools


def text_of(content: Any) -> str:
    """Return a content as one text, its parts joined with nothing between them."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else str(content or "")


def _as_texts(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages of a conversation with each content as one text, so that messages which say the same are equal."""
    return [{**message, "content": text_of(message.get("content"))} for message in conversation.messages]


def _single(record: Mapping[str, Any]) -> Conversation:
    present = [name for name in MESSAGES_FIELDS if name in record]
    name = next((name for name in present if record[name] is not None), present[0] if present else None)
    if name is None:
        fields = ", ".join(list(record)[:5]) or "none at all"
        raise BadConversationError(
            f"no field 'conversations' or 'messages' (its fields: {fields}); write it as {_EXAMPLES['sft']}"
        )
    messages = _messages(record[name], name)
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(messages, record.get("tools"), name)


def _pair(record: Mapping[str, Any]) -> tuple[Conversation, ...]:
    sides = []
    for name in SIDE_FIELDS:
        if name not in record:
            fields = ", ".join(list(record)[:5]) or "none at all"
            raise BadConversationError(
                f"no field {name!r} (its fields: {fields}); write it as {_EXAMPLES['dpo']}"
            )
        sides.append(_conversation(_side(record, name), record.get("tools"), name))
    if sides[0].tools == sides[1].tools and _as_texts(sides[0]) == _as_texts(sides[1]):
        raise BadConversationError(
            "chosen and rejected are the same, which teaches nothing; leave the pair out"
        )
    return tuple(sides)


def _side(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the messages of one side of a pair, the prompt's before them if they are an answer alone."""
    side, prompt = record[name], record.get("prompt")
    messages = [{"role": "assistant", "content": side}] if isinstance(side, str) else _messages(side, name)
    if any(message["role"] == "user" for message in messages):
        return messages
    if prompt is None:
        raise BadConversationError(
            f"{name} has no user's turn and the record no field 'prompt'; give it one, or all messages in {name}"
        )
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
    return before + messages


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadConversationError(f"{where} is {kind_of(value)}, not a list; write a list of messages")
    if not value:
        raise BadConversationError(f"{where} is an empty list; give it messages, or leave the record out")
    return [_message(one, f"message {number} of {where}") for number, one in enumerate(value, 1)]


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadConversationError(
            f'{where} is {kind_of(value)}, not an object; write it as {{"role": …, "content": …}}'
        )
    message = {name: field for name, field in value.items() if field is not None}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in message and ours not in message:
            message[ours] = message.pop(theirs)
    _name_role(message, where)
    for name in ("tools", "tool_calls"):
        if name in message:
            message[name] = _list_of_objects(message[name], f"{name} of {where}")
    _check_texts(message, where)
    role = message["role"]
    if role in ("user", "assistant") and not _says_something(message):
        raise BadConversationError(
            f"{where}, the {role}'s, has no content; write some, or leave the record out"
        )
    return message


def _check_texts(message: dict[str, Any], where: str) -> None:
    """Check that content and reasoning are texts; the content may also be parts that are texts."""
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _parts(content, f"content of {where}")
    for name in ("content", "reasoning_content"):
        value = message.get(name, "")
        if not isinstance(value, str) and not (name == "content" and isinstance(value, list)):
            raise BadConversationError(
                f"{name} of {where} is {kind_of(value)}, not a string; write it as one"
            )


def _parts(content: list[Any], where: str) -> list[dict[str, str]] | str:
    """Return the parts of a content, all of them text; "" if there are none."""
    parts = []
    for number, part in enumerate(content, 1):
        here = f"part {number} of the {where}"
        if not isinstance(part, Mapping):
            raise BadConversationError(
                f'{here} is {kind_of(part)}, not an object; write it as {{"type": "text", "text": …}}'
            )
        if part.get("type") != "text":
            kind = json.dumps(part.get("type"), ensure_ascii=False, default=repr)[:40]
            raise BadConversationError(
                f"{here} is of type {kind}, where text alone is learned; take it out, or leave the record out"
            )
        if not isinstance(part.get("text"), str):
            raise BadConversationError(
                f"{here} has a text that is {kind_of(part.get('text'))}, not a string; write it as one"
            )
        parts.append({"type": "text", "text": part["text"]})
    return parts or ""


def _name_role(message: dict[str, Any], where: str) -> None:
    """Replace the name of a message's role by the role that it means."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        name = "none" if role is None else json.dumps(role, ensure_ascii=False)[:40]
        raise BadConversationError(f"{where} has the role {name}; known are {', '.join(ROLES)}")
    message["role"] = ROLES[role]
    if role == "function_call":
        message["tool_calls"] = message.pop("content", None)


def _says_something(message: Mapping[str, Any]) -> bool:
    if text_of(message.get("content")).strip():
        return True
    if message["role"] == "user":
        return False
    return bool(message.get("tool_calls") or str(message.get("reasoning_content", "")).strip())


def _list_of_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a list of objects; it may be JSON in a string, a list of such strings, or one object alone."""
    if isinstance(value, str):
        if not value.strip():
            return []
        value = _json(value, where)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        value = [
            _json(one, f"entry {number} of {where}") if isinstance(one, str) else one
            for number, one in enumerate(value, 1)
        ]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadConversationError(f"{where} is {kind_of(value)}, not a list of objects; write it as one")
    return value


def _json(value: str, where: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadConversationError(f"{where} is a string that is no JSON ({error}); mend it") from None


def _conversation(messages: list[dict[str, Any]], tools: Any, where: str) -> Conversation:
    functions = None if tools is None else _list_of_objects(tools, "tools")
    for message in messages:
        if own := message.pop("tools", None):
            if message["role"] != "system":
                raise BadConversationError(
                    f"{where} has tools in a message of the {message['role']}; they belong to the system's"
                )
            functions = own
    conversation = Conversation(messages=tuple(messages), tools=functions or None)
    if not conversation.num_answers:
        raise BadConversationError(
            f"{where} has no turn of the assistant's, so nothing to learn; add one, or leave the record out"
        )
    return conversation
