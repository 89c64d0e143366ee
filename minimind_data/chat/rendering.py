"""From conversations to texts in which the special tokens that people wrote are told apart from those that the template wrote.

A template joins what people wrote with tokens that open and close turns. Where somebody wrote `<|im_end|>` himself, the joined
text does not show whose it is, and an encoder would take it for a token: a user could close his turn and open one of the
assistant's. So a conversation in which that could be is rendered twice: as it is, and with the characters that special
tokens are made of replaced, one for one, by characters that no text holds (`guard.Disguise`). A special token of the second
rendering is the template's own; one that the first has beside it was written by somebody, in whatever pieces it came and wherever the
template put them. Both renderings must be the same but for the replacement. If they are not, the template looks at those characters;
then the two cannot be told apart, and the record is a bad one.

Templates do look at some texts, such as `</think>`. What stands in a template as a constant is left as it is wherever it occurs,
unless a piece of a special token could come of it.

That finds what somebody wrote, not what a template makes of it: `&lt;|im_end|&gt;` is no token before `striptags`. So at last the special
tokens of the result must be those of a harmless twin (`twins`), or the record is a bad one.

**Which tokens are guarded**: those that tokenizer.json marks as `special`, and BOS, EOS and PAD. In MiniMind's vocabulary these
open and close turns and documents. Its other added tokens, `<think>`, `<tool_call>` and their like, are not: answers are full of
them, and what stands between them stays inside its turn.

The result has the characters of the template's own special tokens replaced, not those of people's (`RenderedConversation.guarded`).
Encoded by a tokenizer that calls special tokens so (`guard.GuardedTokenizer`), text is text and tokens are tokens, and merges at the
borders are what they always are. Where nobody wrote a special token, the text as it is gives the same ids, and that is taken, unless
the tokenizer looks for its special tokens in what its normalizer made of the text: there `＜|im_end|＞` is one to it.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Self

from minimind_data.chat.conversations import Conversation
from minimind_data.chat.guard import THOUGHTS, Disguise, control_tokens, normalizes_control
from minimind_data.chat.sandbox import SPAN_CLOSES, SPAN_OPENS
from minimind_data.chat.template import (
    THINKING_NAMES,
    ChatTemplate,
    Message,
    RenderError,
    render_chat,
    with_arguments_parsed,
    with_parts_joined,
)
from minimind_data.chat.twins import Twins
from minimind_data.hashing import belongs_to_share
from minimind_data.options import KnowsPassed, as_paths
from minimind_data.reporting import counted
from minimind_data.tokenizer.loading import Tokenizer

_EMPTY_THINK = "<think>\n\n</think>\n\n"
_MAX_SHAPES = 10_000
"""Of conversations whose special tokens are remembered."""
_SPAN_MARKS = re.compile(f"([{SPAN_OPENS}{SPAN_CLOSES}])")


def parse_share(text: str | float) -> float:
    """Read a number from 0 to 1.

    Raises:
        ValueError: the text is no such number.
    """
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{text!r} is no share; write a number from 0 to 1, such as 0.2")
    return share


def parse_date(text: str) -> str:
    """Read a date.

    Raises:
        ValueError: the text is none.
    """
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f"{text!r} is no date; write one as YYYY-MM-DD") from None


@dataclass(frozen=True, kw_only=True)
class ChatOptions(KnowsPassed):
    """What can be said of how conversations become texts, besides what their tokenizer says."""

    chat_template: Annotated[Path | None, "File with the chat template, in place of the tokenizer's own."] = (
        None
    )
    allow_special_in_content: Annotated[
        bool, "Let special tokens in messages open and close turns, as MiniMind does."
    ] = False
    empty_think_ratio: Annotated[
        float,
        "Share of the conversations, chosen by a hash of their text, that keep empty <think> blocks.",
        parse_share,
    ] = 1.0
    chat_date: Annotated[
        str | None, "Date (YYYY-MM-DD) for a chat template that writes today's date.", parse_date
    ] = None

    def __post_init__(self) -> None:
        as_paths(self, "chat_template")
        parse_share(self.empty_think_ratio)
        if self.chat_date is not None:
            parse_date(self.chat_date)

    @property
    def shaping(self) -> dict[str, Any]:
        """What of this decides the bytes of a dataset, besides the template."""
        return {
            name: getattr(self, name)
            for name in ("allow_special_in_content", "empty_think_ratio", "chat_date")
        }


@dataclass(frozen=True, kw_only=True)
class RenderSpec:
    """What decides the text of a conversation: all that a `Renderer` is made from."""

    template: ChatTemplate
    control_tokens: tuple[str, ...]
    """The special tokens that only the template may write; empty if anybody may."""
    guards_all: bool = False
    """Whether other characters may become special tokens too, so that any text may hide one."""
    empty_think_ratio: float = 1.0
    """Share of the texts that keep empty <think> blocks."""
    today: str | None = None
    """The date for templates that write today's, YYYY-MM-DD."""
    thinking: bool | None = None
    """Whether the assistant's next turn is to begin with reasoning; None leaves that to the template."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        options: ChatOptions | None = None,
        *,
        thinking: bool | None = None,
    ) -> Self:
        """Return how a tokenizer and its template render; without options, as a question to a model is rendered."""
        options = options or ChatOptions()
        return cls(
            template=template,
            control_tokens=() if options.allow_special_in_content else control_tokens(tokenizer),
            guards_all=normalizes_control(tokenizer),
            empty_think_ratio=options.empty_think_ratio,
            today=options.chat_date,
            thinking=thinking,
        )


@dataclass(frozen=True, kw_only=True)
class RenderedConversation:
    """A conversation as one text."""

    text: str
    guarded: str | None
    """The same with the template's special tokens in disguise, if somebody else wrote some; see this module's docstring."""
    spans: tuple[tuple[int, int], ...] | None
    """What is learned, [start, stop) in characters; None if the template does not mark what the assistant wrote."""
    num_answers: int
    """Turns of the assistant's."""
    excluded_answers: frozenset[int] = frozenset()
    """Numbers of those that are not to be learned, from 0."""


class Renderer:
    """Renders conversations."""

    def __init__(self, spec: RenderSpec) -> None:
        self._spec = spec
        self._disguise = (
            Disguise(spec.control_tokens, spec.template.constants) if spec.control_tokens else None
        )
        self._twins = None if self._disguise is None else Twins(self._disguise, spec.template)
        self._expected: dict[tuple[Any, ...], list[str] | None] = {}
        self._has_spans = spec.template.marks_generation
        self._variables = {} if spec.thinking is None else dict.fromkeys(THINKING_NAMES, spec.thinking)
        self._now: Callable[[], datetime] = datetime.now
        if spec.today is not None:
            midnight = datetime.combine(date.fromisoformat(spec.today), time())
            self._now = lambda: midnight

    def render(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> RenderedConversation:
        """Render a conversation.

        Args:
            conversation: the messages and tools.
            add_generation_prompt: end with what the assistant's next turn begins with.

        Raises:
            RenderError: the template fails, or what it wrote cannot be told apart from what others wrote.
        """
        template, tools = self._spec.template, conversation.tools
        messages = with_arguments_parsed(template, with_parts_joined(template, conversation.messages))
        if self._has_spans and _is_said(_SPAN_MARKS, messages, tools):
            raise RenderError("it holds U+FDD0 or U+FDD1, which are no characters; remove them")
        text, spans, marks = self._text(messages, tools, add_generation_prompt)
        guarded = None
        disguise = self._disguise
        if disguise is not None and (self._spec.guards_all or _is_said(disguise.signs, messages, tools)):
            guarded, own = self._guarded(
                disguise, text, messages, tools, add_generation_prompt=add_generation_prompt
            )
            self._check_tokens(own + marks, messages, tools, add_generation_prompt)
        elif disguise is not None:
            self._check_tokens(disguise.tokens(text) + marks, messages, tools, add_generation_prompt)
        excluded = conversation.excluded_answers
        if spans is not None and excluded:
            if len(spans) != conversation.num_answers:
                raise RenderError(
                    f"the chat template marks {counted(len(spans), 'piece')} of text in {counted(conversation.num_answers, 'answer')}, so "
                    "which of them is not to be learned cannot be told; name another template with `chat_template`"
                )
            spans = tuple(span for number, span in enumerate(spans) if number not in excluded)
        return RenderedConversation(
            text=text,
            guarded=guarded,
            spans=spans,
            num_answers=conversation.num_answers,
            excluded_answers=excluded,
        )

    def _guarded(
        self,
        disguise: Disguise,
        text: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> tuple[str | None, list[str]]:
        """Return (the text with the template's own special tokens in disguise, None if all of them are its own; these tokens)."""
        assert self._twins is not None
        try:
            hidden, _, _ = self._text(
                [self._twins.hidden(message) for message in messages],
                disguise.hide(tools),
                add_generation_prompt,
            )
        except RenderError:
            hidden = ""
        if disguise.show(hidden) != text:
            raise RenderError(
                "the chat template looks at the signs of special tokens in it, so what is the template's cannot be told from "
                "what is the text's; take such signs out, or pass `allow_special_in_content`"
            )
        own = disguise.places(hidden)
        tokens = [hidden[start:stop] for start, stop in own]
        if own == disguise.places(text) and not self._spec.guards_all:
            return None, tokens
        return disguise.disguised(text, own), tokens

    def _check_tokens(
        self,
        tokens: list[str],
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> None:
        """Check that the template writes the special tokens that it writes for a harmless conversation of the same shape.

        Raises:
            RenderError: it does not, so what somebody says opens or closes a turn.
        """
        assert self._twins is not None
        shape = (self._twins.shape(messages, tools), add_generation_prompt)
        if shape not in self._expected:
            if len(self._expected) >= _MAX_SHAPES:
                self._expected.clear()
            twin = self._twins.of_shape(shape[0])
            self._expected[shape] = self._tokens_of(*twin, add_generation_prompt)
        if not (
            self._is_same(tokens, self._expected[shape])
            or self._is_same(
                tokens, self._tokens_of(*self._twins.like(messages, tools), add_generation_prompt)
            )
        ):
            raise RenderError(
                "what it says, or how it names fields, makes special tokens in the chat template, so it could open or close a turn; "
                "leave it out, name another template with `chat_template`, or pass `allow_special_in_content`"
            )

    def _tokens_of(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> list[str] | None:
        """Return the special tokens in a rendered conversation, then the marks of spans; None if the template refuses it."""
        assert self._disguise is not None
        try:
            text, _, marks = self._text(messages, tools, add_generation_prompt)
        except RenderError:
            return None
        return self._disguise.tokens(text) + marks

    def _is_same(self, tokens: list[str], expected: list[str] | None) -> bool:
        if expected is not None and self._spec.empty_think_ratio < 1:  # some texts have lost theirs
            tokens, expected = (
                [token for token in each if token not in THOUGHTS] for each in (tokens, expected)
            )
        return tokens == expected

    def _text(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> tuple[str, tuple[tuple[int, int], ...] | None, list[str]]:
        """Return (the text, the spans of it that the template marks as the assistant's, if it marks any, their marks)."""
        text = render_chat(
            self._spec.template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            now=self._now,
            mark_generation=self._has_spans,
            **self._variables,
        )
        if self._spec.empty_think_ratio < 1 and _EMPTY_THINK in text:
            undisguised = self._disguise.show(text) if self._disguise else text
            if not belongs_to_share(undisguised, self._spec.empty_think_ratio, b"empty think"):
                text = text.replace(_EMPTY_THINK, "")
        if not self._has_spans:
            return text, None, []
        return *_without_span_marks(text), _SPAN_MARKS.findall(text)


def _is_said(
    pattern: re.Pattern[str], messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> bool:
    """Tell whether a pattern matches anywhere in what people wrote: not in roles, nor in the name `content`."""
    return _holds(pattern, tools) or any(
        _holds(pattern, value) or (name != "content" and pattern.search(name) is not None)
        for message in messages
        for name, value in message.items()
        if name != "role"
    )


def _holds(pattern: re.Pattern[str], value: Any) -> bool:
    """Tell whether a pattern matches in any string of a JSON value, names of fields included."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(_holds(pattern, name) or _holds(pattern, item) for name, item in value.items())
    return isinstance(value, list | tuple) and any(_holds(pattern, item) for item in value)


def _without_span_marks(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text without the marks, and the spans [start, stop) that were between them."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    place = start = depth = 0
    for piece in _SPAN_MARKS.split(marked):
        if piece == SPAN_OPENS:
            start = place if not depth else start
            depth += 1
        elif piece == SPAN_CLOSES:
            depth -= 1
            if not depth:
                spans.append((start, place))
        else:
            parts.append(piece)
            place += len(piece)
    return "".join(parts), tuple(spans)


@functools.lru_cache(maxsize=2)
def renderer_of(spec: RenderSpec) -> Renderer:
    """Return the renderer of a specification, made once per process."""
    return Renderer(spec)
