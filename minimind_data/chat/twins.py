"""Harmless twins of conversations: of the same shape, but saying nothing.

A chat template may write special tokens for what a conversation is: for each turn, for tools, where a field is there. It must not write
them for what somebody says in it, in whatever way: by undoing an escape, by joining what stands in two fields, by looking for a word.
So the special tokens of a conversation must be those of its twin (`rendering` compares them).

The shape of a conversation has its roles, the names of fields that the template reads, and of all else only what kind of value it is and
whether it is empty. Many conversations have one shape, and one twin (`of_shape`). Where a template minds how long texts are or which lines
they have, a twin like the conversation itself is asked too (`like`): with another letter for each letter.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from minimind_data.chat.guard import Disguise
from minimind_data.chat.messages import ROLES
from minimind_data.chat.template import REASONING_NAMES, ChatTemplate, Message

Shape = str | bool | tuple[Any, ...] | None
"""Of a value: whether a text says something, is blank or empty, whether a number is 0, the names in an object and the shapes in it."""

_NAMES = frozenset(
    ("role", "content", "type", "text", "name", "id", "tool_calls", "tool_call_id", "function", "arguments", "tools", "parameters",
     "description", "properties", "required", *REASONING_NAMES)
)  # fmt: skip
"""Names of fields that any conversation may have."""
_PLAIN = ("role", "content")
"""Names of fields that most messages have."""
_ROLES = frozenset(ROLES.values())
_TYPES = frozenset(
    ("function", "text", "object", "array", "string", "number", "integer", "boolean", "null")
)  # fmt: skip
"""Values of `type` that stay: of tools, of parts of a content, of schemas."""


class Twins:
    """Makes the twins of conversations.

    Args:
        disguise: of the special tokens.
        template: whose constants say which names of fields are read.
    """

    def __init__(self, disguise: Disguise, template: ChatTemplate) -> None:
        self._disguise = disguise
        read = {name for name in template.constants if name.isidentifier()}
        self._names = _NAMES | (read - disguise.words)

    def hidden(self, message: Message) -> Message:
        """Hide what a message says, and the names of fields that the template does not read; its role is ours."""
        hide = self._disguise.hide
        hidden = {
            (name if name in self._names else hide(name)): value if name == "role" else hide(value)
            for name, value in message.items()
        }
        if isinstance(message.get("content"), list):
            hidden["content"] = [{**part, "text": hide(part["text"])} for part in message["content"]]
        return hidden

    def shape(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[Shape, ...]:
        """Return the shapes of the messages, and last that of the tools."""
        return (*map(self._shape_of_message, messages), self._shape(tools))

    def of_shape(self, shape: tuple[Shape, ...]) -> tuple[list[Message], list[Any] | None]:
        """Return the messages and tools of the twin that all conversations of a shape have."""
        *messages, tools = map(_value, shape)
        return messages, tools

    def like(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[list[Message], list[Any] | None]:
        """Return the messages and tools of a twin that is as long as the conversation, and has its lines."""
        twins = [self._blank(message, has_thoughts=message["role"] == "assistant") for message in messages]
        return twins, self._blank(tools)

    def _shape_of_message(self, message: Message) -> Shape:
        content = message.get("content")
        if len(message) == len(_PLAIN) and type(content) is str:  # as most are
            return message["role"], self._shape(content)
        return self._shape(message)

    def _shape(self, value: Any) -> Shape:
        if isinstance(value, str):
            return "" if not value else " " if value.isspace() else "x"
        if isinstance(value, Mapping):
            twins = value if value.keys() <= self._names else self._named(value)
            return "{", *[
                (twin, item if _stays(name, item) else self._shape(item))
                for twin, (name, item) in zip(twins, value.items(), strict=True)
            ]
        if isinstance(value, list | tuple):
            return "[", *map(self._shape, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return "1" if value else "0"
        return value if value is None or isinstance(value, bool) else "x"

    def _blank(self, value: Any, *, has_thoughts: bool = False) -> Any:
        if isinstance(value, str):
            return self._disguise.blank(value, has_thoughts=has_thoughts)
        if isinstance(value, Mapping):
            return {
                twin: item if _stays(name, item) else self._blank(item, has_thoughts=has_thoughts)
                for twin, (name, item) in zip(self._named(value), value.items(), strict=True)
            }
        if isinstance(value, list | tuple):
            return [self._blank(item, has_thoughts=has_thoughts) for item in value]
        return _value(self._shape(value))

    def _named(self, value: Mapping[str, Any]) -> list[str]:
        """Return the names of the fields of a twin: those that are read, and numbers for the others."""
        numbers = itertools.count()
        return [name if name in self._names else f"x{next(numbers)}" for name in value]


def _stays(name: str, item: object) -> bool:
    """Tell whether a field is the same in a twin: the role of a message is ours."""
    known = _ROLES if name == "role" else _TYPES if name == "type" else ()
    return isinstance(item, str) and item in known


def _value(shape: Shape) -> Any:
    """Return the smallest value of a shape."""
    if not isinstance(shape, tuple):
        return {"0": 0, "1": 1}.get(shape, shape) if isinstance(shape, str) else shape
    kind, *items = shape
    if kind not in ("{", "["):
        return dict(zip(_PLAIN, shape, strict=True))
    return {name: _value(item) for name, item in items} if kind == "{" else [_value(item) for item in items]
