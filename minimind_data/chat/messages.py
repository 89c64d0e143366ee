r"""Messages out of the many ways in which people write them: roles, contents, tool calls, and whether a turn is learned.

    {"role": "user", "content": "…"}      {"from": "human", "value": "…"}      ["user", "…"]
    {"human": "…", "assistant": "…"}      two messages
    "Human: …\n\nAssistant: …"            several, in one string

A content may be a list of parts, all of them text: `[{"type": "text", "text": "…"}, …]`. A list may be JSON in a string.

Trainers have several names for a turn that is not to be learned (`weight: 0`, `train: false`, `masked: true`, …); all of them are known
here. Only answers are learned in any case, so such a field says something about an answer alone.

Nothing is repaired: what does not fit raises `BadConversationError`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind_data.files import parse_json
from minimind_data.reporting import kind_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Names of roles in small letters, and the role that each means. A `function_call` holds a call where others hold text."""

_LEARNED_BY = (
    "weight",
    "loss",
    "loss_weight",
    "loss_scale",
    "train",
    "training",
    "train_on_turn",
    "trainable",
)
"""Fields of a message that say whether its turn is learned: true or 1, false or 0."""
_MASKED_BY = ("masked",)
"""Fields that say the opposite."""
_LEARNED_IN_PARTS = ("train_detail", "training_detail")
"""Fields that say which characters of a turn are learned."""
_READ_HERE = frozenset(("role", "content", "from", "value"))

_EXCHANGES = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("human", "gpt"),
    ("human", "bot"),
    ("user", "bot"),
    ("question", "answer"),
    ("instruction", "output"),
    ("input", "output"),
    ("prompt", "response"),
    ("query", "response"),
)
"""Names of fields that together hold a question and its answer."""

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class BadConversationError(Exception):
    """A record is no conversation; the message says why and, after a semicolon, what to do."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message, and what its record says about it besides."""

    message: dict[str, Any]
    """As chat templates take it."""
    is_learned: bool = True
    """False if the record says not to learn it; whether it is an answer at all is another matter."""
    unread: tuple[str, ...] = ()
    """Fields that had no effect."""

    @property
    def role(self) -> str:
        """Its role: system, user, assistant or tool."""
        return str(self.message["role"])

    @property
    def text(self) -> str:
        """Its content as one text."""
        return text_of(self.message.get("content"))

    @property
    def for_template(self) -> Iterator[str]:
        """The fields that only a chat template may read."""
        return (name for name in self.message if name not in _READ_HERE)


def text_of(content: Any) -> str:
    """Return a content as one text, its parts joined with nothing between them."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else str(content or "")


def said_by(role: str, text: object, where: str) -> Turn:
    """Return the turn of somebody who says a text.

    Raises:
        BadConversationError: it is no text, or holds nothing.
    """
    return _turn({"role": role, "content": text}, where)


def turns_of(value: object, where: str) -> list[Turn]:
    """Return the turns of a list of messages, of exchanges or of [role, text] pairs, which may be JSON in a string.

    Args:
        value: the list.
        where: the name of its field, for messages.

    Raises:
        BadConversationError: it is no such list.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json_in(value, where)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadConversationError(f"{where} is {kind_of(value)}, not a list; write a list of messages")
    if not value:
        raise BadConversationError(f"{where} is an empty list; give it messages, or leave the record out")
    turns: list[Turn] = []
    for number, one in enumerate(value, 1):
        turns += _turns_in(one, f"message {number} of {where}")
    return turns


def is_list_in_text(value: object) -> bool:
    """Tell whether a string is a list of messages written as JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        items = parse_json(value)
    except ValueError:
        return False
    return bool(items) and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)


def transcript_of(text: str, where: str) -> list[Turn] | None:
    r"""Return the turns of a text such as `\n\nHuman: …\n\nAssistant: …`, as hh-rlhf writes them; None if it is none.

    Where nothing follows the last `Assistant:`, the text is a prompt and ends before it.

    Raises:
        BadConversationError: somebody says nothing in it.
    """
    if not text.lstrip().startswith("Human:") or "\n\nAssistant:" not in text:
        return None
    _, *pieces = _SPEAKER.split("\n\n" + text.lstrip())
    said = list(zip(pieces[::2], (piece.strip() for piece in pieces[1::2]), strict=True))
    if said[-1] == ("Assistant", ""):
        said.pop()
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        said_by(roles[speaker], words, f"turn {number} of {where}")
        for number, (speaker, words) in enumerate(said, 1)
    ]


def exchange_names(value: object) -> tuple[str, str] | None:
    """Return the names of the two fields of an object in which a question and its answer stand; None if it has no such."""
    if not isinstance(value, Mapping) or "role" in value or "from" in value:
        return None
    return next((names for names in _EXCHANGES if names[0] in value and names[1] in value), None)


def _turns_in(value: object, where: str) -> list[Turn]:
    names = exchange_names(value)
    if names is not None:
        assert isinstance(value, Mapping)
        rest = {name: field for name, field in value.items() if name not in (*names, "system")}
        system = [said_by("system", value["system"], where)] if value.get("system") else []
        question, answer = (value[name] for name in names)
        return [
            *system,
            said_by("user", question, where),
            _turn({"role": "assistant", "content": answer, **rest}, where),
        ]
    if is_role_and_text(value):
        assert isinstance(value, Sequence)
        return [said_by(value[0], value[1], where)]
    return [_turn(value, where)]


def is_role_and_text(value: object) -> bool:
    """Tell whether a value is a pair [role, text]."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(one, str) for one in value)
        and value[0].lower() in ROLES
    )


def _turn(value: object, where: str) -> Turn:
    if not isinstance(value, Mapping):
        raise BadConversationError(
            f'{where} is {kind_of(value)}, not an object; write it as {{"role": …, "content": …}}'
        )
    message = {name: field for name, field in value.items() if field is not None}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in message and ours not in message:
            message[ours] = message.pop(theirs)
    _name_role(message, where)
    is_learned, flags = _take_learned(message, where)
    for name in ("tools", "tool_calls"):
        if name in message:
            message[name] = list_of_objects(message[name], f"{name} of {where}")
    _check_texts(message, where)
    role = message["role"]
    if role in ("user", "assistant") and not _says_something(message):
        raise BadConversationError(
            f"{where}, the {role}'s, has no content; write some, or leave the record out"
        )
    # That a question is learned has no effect here; that it is not learned is so in any case.
    idle = flags if is_learned and role != "assistant" else []
    return Turn(message=message, is_learned=is_learned, unread=tuple(idle))


def _take_learned(message: dict[str, Any], where: str) -> tuple[bool, list[str]]:
    """Take the fields that say whether a turn is learned out of a message; return (what they say, their names)."""
    says: dict[str, bool] = {}
    for name in (*_LEARNED_BY, *_MASKED_BY):
        if name not in message:
            continue
        value = message.pop(name)
        if value not in (0, 1):
            raise BadConversationError(
                f"{name} of {where} is {json.dumps(value, ensure_ascii=False, default=repr)[:40]}, where a turn is learned or is "
                "not; write true or 1, or false or 0"
            )
        says[name] = bool(value) != (name in _MASKED_BY)
    if len(set(says.values())) > 1:
        raise BadConversationError(
            f"{where} says both that it is learned and that it is not ({', '.join(says)}); take out what is wrong"
        )
    for name in _LEARNED_IN_PARTS:
        if message.pop(name, None):
            raise BadConversationError(
                f"{name} of {where} has parts of a turn learned, where a turn is learned whole or not at all; say train true or "
                "false, or leave the record out"
            )
    return all(says.values()), list(says)


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
    name = message.get("role")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        shown = "none" if name is None else json.dumps(name, ensure_ascii=False, default=repr)[:40]
        raise BadConversationError(f"{where} has the role {shown}; known are {', '.join(ROLES)}")
    message["role"] = role
    if str(name).lower() == "function_call":
        message["tool_calls"] = message.pop("content", None)


def _says_something(message: Mapping[str, Any]) -> bool:
    if text_of(message.get("content")).strip():
        return True
    if message["role"] == "user":
        return False
    return bool(message.get("tool_calls") or str(message.get("reasoning_content", "")).strip())


def list_of_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a list of objects; it may be JSON in a string, a list of such strings, or one object alone.

    Raises:
        BadConversationError: it is none, or holds what JSON has no form for.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        value = json_in(value, where)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        value = [
            json_in(one, f"entry {number} of {where}") if isinstance(one, str) else one
            for number, one in enumerate(value, 1)
        ]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadConversationError(f"{where} is {kind_of(value)}, not a list of objects; write it as one")
    if _holds_no_number(value):
        raise BadConversationError(
            f"{where} holds NaN or Infinity, which JSON has no form for; write null, or a number"
        )
    return value


def _holds_no_number(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(map(_holds_no_number, value))


def json_in(value: str, where: str) -> Any:
    """Return what a string of JSON holds.

    Raises:
        BadConversationError: it is no JSON.
    """
    try:
        return parse_json(value)
    except ValueError as error:
        raise BadConversationError(f"{where} is a string that is no JSON ({error}); mend it") from None
