"""The results of reading a split: blocks of texts, and the records that make none.

`ConversationCollector` collects the conversations, or pairs of them, that the readers of JSON lines and of Parquet find.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from minimind_data.chat.conversations import Conversation, has_different_prompts, read_record
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.messages import BadConversationError, text_of
from minimind_data.chat.rendering import RenderedConversation, renderer_of
from minimind_data.chat.template import RenderError
from minimind_data.inputs.spec import RecordSpec, lone_surrogate, long_word


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that makes no document."""

    line: int
    """Its number, from 1 at the first of the split: a line, a row, or a text."""
    reason: str
    """What is wrong with it and, after a semicolon, what to do."""
    data: bytes
    """The record itself, without its end."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some of the records of a split, in order."""

    texts: list[str]
    """One for each document, or two for each pair."""
    empty_texts: int
    bad: list[BadRecord]
    num_bytes: int
    """Bytes of the input that were read for it, for progress."""
    texts_each: int = 1
    """Texts of a document."""
    conversations: list[RenderedConversation] | None = None
    """What the texts were rendered from, where they are conversations; as many as texts."""
    different_prompts: int = 0
    """Pairs whose two conversations have different prompts."""
    unread: Counter[str] = field(default_factory=Counter)
    """How often each field occurs in its records that nothing reads."""
    forms: Counter[str] = field(default_factory=Counter)
    """How many records have a form that is called by a name, such as Alpaca."""

    @property
    def documents(self) -> list[str]:
        """A text for each document that is equal only if the documents are: its own, or those of a pair together."""
        if self.texts_each == 1:
            return self.texts
        pairs = zip(self.texts[::2], self.texts[1::2], strict=True)
        return [f"{len(chosen)}:{chosen}{rejected}" for chosen, rejected in pairs]

    def keep(self, documents: list[int]) -> "Block":
        """Return the block with only some of its documents, by their places in it."""
        each = self.texts_each
        places = [place * each + side for place in documents for side in range(each)]
        return replace(
            self,
            texts=[self.texts[place] for place in places],
            conversations=None
            if self.conversations is None
            else [self.conversations[place] for place in places],
        )


_TOO_DEEP = "its tools are nested too deep; write them flatter"


class ConversationCollector:
    """Collects conversations into blocks."""

    def __init__(self, spec: RecordSpec, chat: ChatEncoding) -> None:
        self._max_word_chars = spec.max_word_chars
        self._kind = chat.kind
        self._template = chat.rendering.template
        self._renderer = renderer_of(chat.rendering)
        self._begin()

    def _begin(self) -> None:
        self._rendered: list[RenderedConversation] = []
        self._bad: list[BadRecord] = []
        self._different_prompts = 0
        self._unread: Counter[str] = Counter()
        self._forms: Counter[str] = Counter()

    def add(self, number: int, read: Callable[[], object], data: Callable[[], bytes]) -> None:
        """Add a record.

        Args:
            number: of the record, from 1 at the first of the split.
            read: returns it, or raises BadConversationError.
            data: returns its bytes, for a bad record.
        """
        try:
            record = read_record(read(), self._kind)
            rendered = [self._render(conversation) for conversation in record.conversations]
        except (BadConversationError, RenderError) as error:
            self._bad.append(BadRecord(line=number, reason=str(error), data=data()))
        except RecursionError:
            self._bad.append(BadRecord(line=number, reason=_TOO_DEEP, data=data()))
        else:
            self._rendered += rendered
            self._different_prompts += self._kind == "dpo" and has_different_prompts(*record.conversations)
            self._unread.update(record.unread)
            for name, count in record.for_template.items():
                if not self._template.reads(name.rpartition(".")[2]):
                    self._unread[name] += count
            if record.form is not None:
                self._forms[record.form] += 1

    def take(self, num_bytes: int) -> Block:
        """Return what was collected as a block, and begin the next one."""
        block = Block(
            texts=[one.text for one in self._rendered],
            empty_texts=0,
            bad=self._bad,
            num_bytes=num_bytes,
            texts_each=2 if self._kind == "dpo" else 1,
            conversations=self._rendered,
            different_prompts=self._different_prompts,
            unread=self._unread,
            forms=self._forms,
        )
        self._begin()
        return block

    def _render(self, conversation: Conversation) -> RenderedConversation:
        rendered = self._renderer.render(conversation)
        _refuse_lost_system(conversation, rendered.text)
        if why := lone_surrogate(rendered.text, "the text that the chat template makes of it"):
            raise BadConversationError(why)
        if why := long_word(rendered.text, self._max_word_chars):
            raise BadConversationError(why)
        return rendered


def _refuse_lost_system(conversation: Conversation, text: str) -> None:
    """Refuse a conversation with several system messages of which the chat template writes only the first.

    Raises:
        BadConversationError: it is one.
    """
    systems = [message for message in conversation.messages if message["role"] == "system"]
    for message in systems[1:]:
        if text_of(message.get("content")).strip() not in text:
            raise BadConversationError(
                "it has more than one system message, and the chat template leaves one out; put what they say into the first"
            )
