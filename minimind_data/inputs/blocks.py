"""What reading gives: a split of a source, blocks of the texts in it, and the records that make none.

`Chats` collects the conversations, or pairs of them, that the readers of JSON lines and of Parquet find. How a form is read is in
`delimited` (JSON lines, text) and `parquet`.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Protocol

from minimind_data.chat.conversations import (
    BadConversationError,
    Conversation,
    conversations_of,
    has_different_prompts,
)
from minimind_data.chat.rendering import ChatSpec, Rendered, renderer_of
from minimind_data.chat.template import RenderError
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import RecordSpec, long_word


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part [start, stop) of a source, and how to read it."""

    source: Source
    start: int
    """A byte offset; in Parquet, the number of a row group."""
    stop: int
    num_bytes: int
    """What the split weighs, for progress: bytes of the input as it is stored."""
    more: tuple[Source, ...] = ()
    """Where each file is one document: the files that share this split with the first."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that it is read from."""
        return (self.source, *self.more)

    @property
    def path(self) -> str:
        """The name of the source, for messages."""
        return self.source.name


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that makes no document."""

    line: int
    """Its number, from 1 at the first of the split: a line, a row, or a text."""
    reason: str
    """What is wrong with it and, after a semicolon, what can be done."""
    data: bytes
    """The record itself, without its end."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some of the records of a split, in order."""

    texts: list[str]
    """Those of a document end to end: one, or two of a pair."""
    empty_texts: int
    bad: list[BadRecord]
    num_bytes: int
    """How far this block went on in the input, for progress."""
    texts_each: int = 1
    """Texts of a document."""
    chats: list[Rendered] | None = None
    """More about the texts, where they are conversations."""
    different_prompts: int = 0
    """Pairs whose two conversations do not begin alike."""

    @property
    def documents(self) -> list[str]:
        """What tells documents apart: the text, or those of a pair together."""
        if self.texts_each == 1:
            return self.texts
        pairs = zip(self.texts[::2], self.texts[1::2], strict=True)
        return [f"{len(chosen)}:{chosen}{rejected}" for chosen, rejected in pairs]

    def keep(self, documents: list[int]) -> "Block":
        """Return the block with some of its documents alone, by their places in it."""
        each = self.texts_each
        places = [place * each + side for place in documents for side in range(each)]
        return replace(
            self,
            texts=[self.texts[place] for place in places],
            chats=None if self.chats is None else [self.chats[place] for place in places],
        )


class RecordReader(Protocol):
    """The records of one split. What it tells of itself holds for what was read so far."""

    @property
    def begin(self) -> int:
        """Where the first record begins, in the split's unit."""
        ...

    @property
    def end(self) -> int:
        """Where the last one ends."""
        ...

    @property
    def num_lines(self) -> int:
        """Records read, those of white space included."""
        ...

    @property
    def sha256(self) -> str:
        """Of what was read."""
        ...

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts."""
        ...


_TOO_DEEP = "its tools are nested too deep; write them flatter"


class Chats:
    """Collects conversations into blocks."""

    def __init__(self, spec: RecordSpec, chat: ChatSpec) -> None:
        self._max_word_chars = spec.max_word_chars
        self._kind = chat.kind
        self._renderer = renderer_of(chat)
        self._begin()

    def _begin(self) -> None:
        self._chats: list[Rendered] = []
        self._bad: list[BadRecord] = []
        self._different_prompts = 0

    def add(self, number: int, read: Callable[[], object], data: Callable[[], bytes]) -> None:
        """Take in a record.

        Args:
            number: of the record, from 1 at the first of the split.
            read: returns it, or raises BadConversationError.
            data: returns its bytes, to be set aside.
        """
        try:
            conversations = conversations_of(read(), self._kind)
            chats = [self._render(conversation) for conversation in conversations]
        except (BadConversationError, RenderError) as error:
            self._bad.append(BadRecord(line=number, reason=str(error), data=data()))
        except RecursionError:
            self._bad.append(BadRecord(line=number, reason=_TOO_DEEP, data=data()))
        else:
            self._chats += chats
            self._different_prompts += self._kind == "dpo" and has_different_prompts(*conversations)

    def take(self, num_bytes: int) -> Block:
        """Return what was collected, and begin anew."""
        block = Block(
            texts=[chat.text for chat in self._chats],
            empty_texts=0,
            bad=self._bad,
            num_bytes=num_bytes,
            texts_each=2 if self._kind == "dpo" else 1,
            chats=self._chats,
            different_prompts=self._different_prompts,
        )
        self._begin()
        return block

    def _render(self, conversation: Conversation) -> Rendered:
        rendered = self._renderer.render(conversation)
        try:
            rendered.text.encode()
        except UnicodeEncodeError:  # from JSON in a string
            raise BadConversationError(
                "a lone surrogate escape in its tools, which is no character; remove it"
            ) from None
        if why := long_word(rendered.text, self._max_word_chars):
            raise BadConversationError(why)
        return rendered
