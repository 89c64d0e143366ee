"""Records that hold conversations, or pairs of them, become texts: what the readers of JSON lines and of Parquet share."""

from collections.abc import Callable

from minimind_data.blocks import BadRecord, Block, Rendered
from minimind_data.chat import RenderError
from minimind_data.conversations import (
    BadConversationError,
    Conversation,
    conversations_of,
    has_different_prompts,
)
from minimind_data.fields import RecordSpec, long_word
from minimind_data.rendering import ChatSpec, renderer_of

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
