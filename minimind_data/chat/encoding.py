"""The ids of conversations with their loss masks, for a dataset; and the ids of a prompt, for a model that is asked.

A prompt's ids are those that the same conversation has in a dataset: special tokens that somebody wrote are text there too, and can
neither close his turn nor open another (see `rendering`).
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimind_data.chat.conversations import ChatKind, Conversation
from minimind_data.chat.guard import guarded_tokenizer
from minimind_data.chat.loss_mask import (
    AnswerMarks,
    exclude_answers,
    find_answer_marks,
    mask_between,
    mask_of_spans,
)
from minimind_data.chat.rendering import RenderedConversation, RenderSpec, renderer_of
from minimind_data.chat.template import THINKING_NAMES, ChatTemplate, RenderError, names_read_by
from minimind_data.dataset.format import MaskArray
from minimind_data.errors import UserError
from minimind_data.tokenizer.backends import Ids, Offsets
from minimind_data.tokenizer.loading import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ChatEncoding:
    """How the conversations of a dataset become tokens and a loss mask."""

    kind: ChatKind
    """Conversations, or pairs of them."""
    rendering: RenderSpec
    """How each becomes a text."""
    marks: AnswerMarks | None
    """The ids around answers, which the mask is made from; None where the chat template marks answers itself."""


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    thinking: bool | None = None,
) -> list[int]:
    """Return the ids of a conversation and of what the assistant's next turn begins with.

    Args:
        tokenizer: the model's.
        template: of the chat.
        messages: so far.
        tools: JSON schemas of functions that the assistant may call.
        thinking: whether the assistant's next turn begins with reasoning; None leaves that to the template.

    Raises:
        UserError: the template refuses the conversation, knows no tools or no such choice, or text in it cannot be kept apart from
            special tokens.
    """
    names = names_read_by(template)
    if tools and "tools" not in names:
        raise UserError("the chat template knows no tools", remedy="leave `tools` out", option="tools")
    if thinking is not None and names.isdisjoint(THINKING_NAMES):
        raise UserError(
            f"the chat template reads neither {' nor '.join(THINKING_NAMES)}, so it cannot be told whether to think",
            remedy="leave `thinking` out",
            option="thinking",
        )
    renderer = renderer_of(RenderSpec.of(tokenizer, template, thinking=thinking))
    try:
        conversation = Conversation(messages=tuple(messages), tools=list(tools) if tools else None)
        rendered = renderer.render(conversation, add_generation_prompt=True)
    except RenderError as error:
        raise UserError(f"this conversation cannot be rendered: {error}") from None
    if rendered.guarded is not None:
        guarded: list[int] = guarded_tokenizer(tokenizer).encode([rendered.guarded])[0].ids
        return guarded
    ids: list[int] = tokenizer.reference.encode(rendered.text, add_special_tokens=False).ids
    return ids


def ends_of_answers(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[int]:
    """Return the ids that end an answer: EOS, and the special token with which the template closes the assistant's turn."""
    ends = {tokenizer.info.eos_id}
    with contextlib.suppress(UserError):  # a template that closes turns with no token: EOS must do
        marks = find_answer_marks(tokenizer, template)
        if marks is not None:
            ends.add(marks.closes[0])
    return frozenset(ends)


def encode_conversations(
    conversations: Sequence[RenderedConversation],
    *,
    ids: Ids,
    offsets: Offsets,
    tokenizer: Tokenizer,
    marks: AnswerMarks | None,
) -> tuple[Ids, Offsets, MaskArray, int]:
    """Return the ids of conversations, and which of them are targets.

    Args:
        conversations: n of them.
        ids: uint32 [T], the ids of their texts end to end, as though nobody but the template had written special tokens.
        offsets: int64 [n + 1], where each begins.
        tokenizer: the one that made them.
        marks: of `ChatEncoding`.

    Returns:
        (ids, offsets, loss mask uint8 [T], number of conversations with an answer that the mask misses).

    Raises:
        UserError: special tokens cannot be encoded as text by this tokenizer.
    """
    parts = [ids[start:stop] for start, stop in itertools.pairwise(offsets)]
    guarded = [place for place, one in enumerate(conversations) if one.guarded is not None]
    encodings: dict[int, Any] = {}
    if marks is None:
        plain = [place for place, one in enumerate(conversations) if one.guarded is None]
        texts = [conversations[place].text for place in plain]
        batch = tokenizer.reference.encode_batch(texts, add_special_tokens=False)
        encodings = dict(zip(plain, batch, strict=True))
    if guarded:
        batch = guarded_tokenizer(tokenizer).encode([str(conversations[place].guarded) for place in guarded])
        encodings |= dict(zip(guarded, batch, strict=True))
        for place in guarded:
            parts[place] = np.array(encodings[place].ids, np.uint32)
    offsets = np.cumsum([0, *map(len, parts)])
    ids = np.concatenate([*parts, np.empty(0, np.uint32)])
    num_answers = np.array([one.num_answers for one in conversations], np.int64)
    if marks is not None:
        mask, num_masked = mask_between(ids, offsets, marks)
        is_missed = num_masked < num_answers
        for place, one in enumerate(conversations):
            if one.excluded_answers:
                own = mask[offsets[place] : offsets[place + 1]]
                is_missed[place] |= not exclude_answers(own, one.excluded_answers, one.num_answers)
        return ids, offsets, mask, int(np.count_nonzero(is_missed))
    masks = [
        mask_of_spans(encodings[place].offsets, one.spans or ()) for place, one in enumerate(conversations)
    ]
    without = sum(not mask.any() for mask in masks)
    return ids, offsets, np.concatenate([*masks, np.empty(0, np.uint8)]), without
