r"""Conversations, and pairs of them, out of records: the fields that are known, and what is wrong with a record that has others.

    {"conversations": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"messages": […], "tools": […]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}

A message may also have `reasoning_content` and `tool_calls`, a system message `tools` (`messages` has all that a message can be).
A question and its answer may stand in fields of their own, with what stands before them in `history`:

    {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["…", "…"], …]}      Alpaca
    {"prompt": "…", "completion": "…"}      and others: `question`, `query`, `input`; `output`, `response`, `answer`

Pairs for preference learning are two conversations, or two answers to a prompt, of which all the above holds too:

    {"chosen": [{"role": …}, …], "rejected": [{"role": …}, …]}
    {"prompt": "…" or [{"role": …}, …], "chosen": "…" or {"role": …} or […], "rejected": "…" or {"role": …} or […]}
    {"chosen": "\n\nHuman: …\n\nAssistant: …", "rejected": "\n\nHuman: …\n\nAssistant: …"}      hh-rlhf

Nothing is repaired, and nothing that would change a conversation is left out in silence: a record that does not fit is a bad record,
and fields that nothing reads are counted by their names.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minimind_data.chat.messages import (
    BadConversationError,
    Turn,
    exchange_names,
    is_list_in_text,
    is_role_and_text,
    list_of_objects,
    said_by,
    text_of,
    transcript_of,
    turns_of,
)
from minimind_data.reporting import kind_of

ChatKind = Literal["sft", "dpo"]
MESSAGES_FIELDS = ("conversations", "messages", "conversation")
PROMPT_FIELDS = ("instruction", "prompt", "question", "query", "input")
"""Fields of a question, the first that says something; `input` goes on where an `instruction` ends."""
ANSWER_FIELDS = ("output", "completion", "response", "answer")
SIDE_FIELDS = ("chosen", "rejected")
BESIDE_FIELDS = ("system", "tools", "history")
"""Fields that say more about a conversation."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, and the tools that could be called."""

    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None = None
    excluded_answers: frozenset[int] = frozenset()
    """Numbers of those turns of the assistant, from 0, that are not to be learned."""

    @property
    def num_answers(self) -> int:
        """Number of turns of the assistant."""
        return sum(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class ConversationRecord:
    """What a record holds."""

    conversations: tuple[Conversation, ...]
    """One, or the chosen and the rejected."""
    form: str | None
    """What its form is called, where it is not just a list of messages, or two."""
    unread: Counter[str]
    """How often each field that nothing reads occurs in it; in a message, as `messages[].name`."""
    for_template: Counter[str]
    """How often each field occurs that only a chat template can read."""


_EXAMPLES: dict[ChatKind, str] = {
    "sft": '{"conversations": [{"role": …, "content": …}, …]}',
    "dpo": '{"chosen": [{"role": …, "content": …}, …], "rejected": […]}',
}


def read_record(record: object, kind: ChatKind) -> ConversationRecord:
    """Return the conversation of a record (`sft`), or its chosen and its rejected one (`dpo`).

    Raises:
        BadConversationError: it is no such record.
    """
    if not isinstance(record, Mapping):
        raise BadConversationError(
            f"the record is {kind_of(record)}, not an object; write it as {_EXAMPLES[kind]}"
        )
    return _Reading(record).single() if kind == "sft" else _Reading(record).pair()


def kind_shown_by(names: Iterable[str]) -> ChatKind | None:
    """Return which kind the names of a record's fields show, None where they show none."""
    there = set(names)
    if there.issuperset(SIDE_FIELDS):
        return "dpo"
    has_both = there.intersection(PROMPT_FIELDS) and there.intersection(ANSWER_FIELDS)
    return "sft" if has_both or there.intersection(MESSAGES_FIELDS) else None


def holds_messages(value: object) -> bool:
    """Tell whether a value is a list whose first entry looks like a message."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return False
    return isinstance(value[0], Mapping) and not {"role", "from"}.isdisjoint(value[0])


def has_different_prompts(chosen: Conversation, rejected: Conversation) -> bool:
    """Tell whether the first difference between two conversations is anything but a different answer."""
    one_side, other_side = _as_texts(chosen), _as_texts(rejected)
    for one, other in zip(one_side, other_side, strict=False):
        if one != other:
            return not one["role"] == other["role"] == "assistant"
    return len(one_side) != len(other_side) or chosen.tools != rejected.tools


def _as_texts(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages of a conversation with each content as one text, so that messages which say the same are equal."""
    return [{**message, "content": text_of(message.get("content"))} for message in conversation.messages]


def _says(value: object) -> bool:
    """Tell whether a field holds anything."""
    return value is not None and value not in ("", [], {}, ())


class _Reading:
    """A record while it is read: which of its fields were, and what form it has."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self._read: set[str] = set()
        self._form: str | None = None
        self._unread: Counter[str] = Counter()
        self._for_template: Counter[str] = Counter()

    def single(self) -> ConversationRecord:
        """Return the conversation."""
        name = self._messages_field()
        if name is not None:
            if _says(self._record.get("history")):
                raise BadConversationError(
                    f"field 'history' beside {name!r}; put its turns into {name!r}, or take it out"
                )
            turns = self._turns(self._take(name), name)
        else:
            turns, name = self._question_and_answer()
        turns = self._with_system(turns, name)
        return self._result(self._conversation(turns, name))

    def _messages_field(self) -> str | None:
        """Return the field of the messages: the first that holds any, else the first that holds another thing, if nothing else does."""
        present = [name for name in MESSAGES_FIELDS if name in self._record]
        filled = next((name for name in present if _says(self._record[name])), None)
        if filled is None and (present and not self._filled(ANSWER_FIELDS)):
            return next((name for name in present if self._record[name] is not None), present[0])
        return filled

    def pair(self) -> ConversationRecord:
        """Return the chosen conversation, and the rejected one."""
        for name in SIDE_FIELDS:
            if self._record.get(name) is None:
                raise BadConversationError(self._without(repr(name), "dpo"))
        sides = {name: self._side(self._take(name), name) for name in SIDE_FIELDS}
        is_whole = {name: _first_role(turns) == "user" for name, turns in sides.items()}
        prompt, prompt_name = self._prompt(only_prompt=all(is_whole.values()))
        conversations = []
        for name, turns in sides.items():
            if is_whole[name]:
                turns = _agreeing(prompt, turns, prompt_name, name)  # noqa: PLW2901 - the same turns, made whole
            elif prompt:
                turns = [*prompt, *turns]  # noqa: PLW2901
            elif not any(turn.role == "user" for turn in turns):
                raise BadConversationError(
                    f"{name} has no user's turn and the record no field 'prompt'; give it one, or all messages in {name}"
                )
            conversations.append(self._conversation(self._with_system(turns, name), name))
        chosen, rejected = conversations
        if chosen.tools == rejected.tools and _as_texts(chosen) == _as_texts(rejected):
            raise BadConversationError(
                "chosen and rejected are the same, which teaches nothing; leave the pair out"
            )
        return self._result(chosen, rejected)

    def _side(self, value: object, name: str) -> list[Turn]:
        """Return the turns of one side of a pair, which may be an answer alone."""
        if isinstance(value, Mapping):
            return self._turns([value], name)
        if isinstance(value, str) and not is_list_in_text(value):
            if (turns := transcript_of(value, name)) is not None:
                self._form = "hh-rlhf"
                return turns
            return [said_by("assistant", value, name)]
        return self._turns(value, name)

    def _prompt(self, *, only_prompt: bool) -> tuple[list[Turn], str]:
        """Return what stands before both sides of a pair, with the history before it, and the name of its field.

        Args:
            only_prompt: look at no other field than `prompt` and `history`, the sides being whole.
        """
        names = ("prompt",) if only_prompt else ("prompt", *PROMPT_FIELDS)
        name = self._filled(names)
        if name is None and not only_prompt and (field := self._filled(MESSAGES_FIELDS)):
            return [*self._history(), *self._turns(self._take(field), field)], field
        if name is None:
            if "prompt" in self._record:
                value = self._take("prompt")
                if not only_prompt and value is not None:
                    said_by("user", value, "prompt")  # raises: it holds nothing
            return self._history(), "history"
        return [*self._history(), *self._question(name)], name

    def _question_and_answer(self) -> tuple[list[Turn], str]:
        """Return the turns of a record that has a question and its answer in fields of their own, and the name of the answer's."""
        asked = self._filled(PROMPT_FIELDS) or next(
            (name for name in PROMPT_FIELDS if self._record.get(name) is not None), None
        )
        answer = self._filled(ANSWER_FIELDS) or next(
            (name for name in ANSWER_FIELDS if self._record.get(name) is not None), None
        )
        if asked is None or answer is None:
            raise BadConversationError(self._without("'conversations' or 'messages'", "sft"))
        self._form = "Alpaca" if asked == "instruction" else f"{asked} and {answer}"
        form = self._form
        turns = [*self._history(), *self._question(asked)]
        value = self._take(answer)
        if isinstance(value, str) and not is_list_in_text(value):
            turns.append(said_by("assistant", value, answer))
        else:
            turns += self._turns([value] if isinstance(value, Mapping) else value, answer)
        self._form = form
        return turns, answer

    def _question(self, name: str) -> list[Turn]:
        value = self._take(name)
        if name == "instruction" and _says(more := self._take("input")):
            if not isinstance(value, str) or not isinstance(more, str):
                raise BadConversationError(
                    f"instruction is {kind_of(value)} and input {kind_of(more)}, where both are strings; write them so"
                )
            value = f"{value}\n{more}"
        if isinstance(value, Mapping):
            return self._turns([value], name)
        if isinstance(value, str) and not is_list_in_text(value):
            is_open = value.rstrip().endswith("Assistant:")
            turns = transcript_of(value, name) if is_open else None
            return [said_by("user", value, name)] if turns is None else turns
        return self._turns(value, name)

    def _history(self) -> list[Turn]:
        """Return the turns that stood before: messages, or pairs of what was asked and answered."""
        history = self._take("history")
        if not _says(history):
            return []
        pairs = isinstance(history, Sequence) and not isinstance(history, str) and all(
            isinstance(one, Sequence) and not isinstance(one, str) and len(one) == 2
            and not is_role_and_text(one)
            for one in history
        )  # fmt: skip
        if not pairs:
            return self._turns(history, "history")
        return [
            said_by(role, text, f"pair {number} of history")
            for number, pair in enumerate(history, 1)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]

    def _turns(self, value: object, name: str) -> list[Turn]:
        turns = turns_of(value, name)
        assert isinstance(value, Sequence), "a list, or one in JSON, of which the first is a bracket"
        if (names := exchange_names(value[0])) is not None:
            self._form = f"turns of {names[0]} and {names[1]}"
        elif is_role_and_text(value[0]):
            self._form = "[role, text] pairs"
        for turn in turns:
            self._unread.update(f"{name}[].{field}" for field in turn.unread)
            self._for_template.update(f"{name}[].{field}" for field in turn.for_template)
        return turns

    def _with_system(self, turns: list[Turn], name: str) -> list[Turn]:
        """Put what the record's field `system` says before the turns."""
        system = self._take("system")
        if system is None or system == "":
            return turns
        if not isinstance(system, str):
            raise BadConversationError(f"system is {kind_of(system)}, not a string; write it as one")
        if turns[0].role != "system":
            return [Turn(message={"role": "system", "content": system}), *turns]
        if not turns[0].text.strip():
            return [Turn(message={**turns[0].message, "content": system}), *turns[1:]]
        if turns[0].text.strip() != system.strip():
            raise BadConversationError(
                f"field 'system' and the system message of {name} say different things; take one of them out"
            )
        return turns

    def _conversation(self, turns: list[Turn], where: str) -> Conversation:
        tools = self._take("tools")
        functions = None if tools is None else list_of_objects(tools, "tools")
        messages = []
        for turn in turns:
            message = dict(turn.message)
            if own := message.pop("tools", None):
                if turn.role != "system":
                    raise BadConversationError(
                        f"{where} has tools in a message of the {turn.role}; they belong to the system's"
                    )
                functions = own
            messages.append(message)
        answers = [turn for turn in turns if turn.role == "assistant"]
        if not answers:
            raise BadConversationError(
                f"{where} has no turn of the assistant's, so nothing to learn; add one, or leave the record out"
            )
        excluded = frozenset(number for number, turn in enumerate(answers) if not turn.is_learned)
        if len(excluded) == len(answers):
            raise BadConversationError(
                f"{where} says of every turn of the assistant's that it is not learned, so nothing is; leave the record out"
            )
        return Conversation(messages=tuple(messages), tools=functions or None, excluded_answers=excluded)

    def _result(self, *conversations: Conversation) -> ConversationRecord:
        if conversations[0].tools is not None and "tools" in self._read and self._record.get("tools"):
            self._for_template["tools"] += 1
        self._unread.update(
            str(name) for name, value in self._record.items() if name not in self._read and _says(value)
        )
        return ConversationRecord(
            conversations=conversations,
            form=self._form,
            unread=self._unread,
            for_template=self._for_template,
        )

    def _take(self, name: str) -> Any:
        """Return a field, None where it is missing; it is read."""
        self._read.add(name)
        return self._record.get(name)

    def _filled(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if _says(self._record.get(name))), None)

    def _without(self, missing: str, kind: ChatKind) -> str:
        some = list(self._record.items())[:5]
        fields = ", ".join(f"{name} (null)" if value is None else str(name) for name, value in some)
        shown = kind_shown_by(name for name, value in self._record.items() if value is not None)
        if shown not in (None, kind):
            remedy = f"`kind` {shown} reads such records"
        elif kind == "sft" and "text" in self._record:
            remedy = f"`kind` pretrain reads texts; or write it as {_EXAMPLES[kind]}"
        else:
            remedy = f"write it as {_EXAMPLES[kind]}"
        return f"no field {missing} (its fields: {fields or 'none at all'}); {remedy}"


def _first_role(turns: list[Turn]) -> str:
    return next((turn.role for turn in turns if turn.role != "system"), "system")


def _agreeing(prompt: list[Turn], side: list[Turn], prompt_name: str, name: str) -> list[Turn]:
    """Return a whole side of a pair, with the prompt's system message before it if it lacks one.

    Raises:
        BadConversationError: the prompt says something else.
    """

    def said(turns: Sequence[Turn]) -> list[tuple[str, str]]:
        return [(turn.role, turn.text.strip()) for turn in turns]

    def without_system(turns: list[Turn]) -> list[Turn]:
        return turns[1:] if turns and turns[0].role == "system" else turns

    def starts(whole: list[Turn], start: list[Turn]) -> bool:
        return said(whole[: len(start)]) == said(start)

    asked = without_system(prompt)
    has_system = side[0].role == "system"
    is_one_question = len(prompt) == 1 and said(prompt)[0] in said(side)
    if is_one_question or (asked is prompt and starts(without_system(side), prompt)) or starts(side, prompt):
        return side
    if not has_system and starts(side, asked):
        return [prompt[0], *side]
    raise BadConversationError(
        f"{prompt_name} says something else than the turns that {name} begins with; take out what is wrong"
    )
