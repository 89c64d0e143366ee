"""The ids of conversations: those of a dataset with what is learned of them, and those of a question that a model is asked.

A question's ids are those that the same conversation has in a dataset: special tokens that somebody wrote are text, and can neither close his
turn nor open another (`rendering.py`).
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimind_data.chat.conversations import Conversation
from minimind_data.chat.guard import control_tokens, guard_of, normalizes_control
from minimind_data.chat.marks import TurnMarks, find_marks, learned_between, overlapping
from minimind_data.chat.rendering import ChatSpec, Rendered, renderer_of
from minimind_data.chat.template import ChatTemplate, RenderError
from minimind_data.dataset.format import MaskArray
from minimind_data.errors import UserError
from minimind_data.tokenizer.backends import Ids, Offsets
from minimind_data.tokenizer.loading import Tokenizer


def encode_prompt(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[dict[str, Any]]
) -> list[int]:
    """Return the ids of a conversation and of what the assistant's next turn begins with.

    Raises:
        UserError: the template refuses the conversation, or text in it cannot be kept apart from special tokens.
    """
    spec = ChatSpec(
        kind="sft",
        template=template,
        control_tokens=control_tokens(tokenizer),
        guards_all=normalizes_control(tokenizer),
    )
    try:
        rendered = renderer_of(spec).render(Conversation(messages=tuple(messages)), asks=True)
    except RenderError as error:
        raise UserError(f"this conversation cannot be rendered: {error}") from None
    if rendered.guarded is not None:
        guarded: list[int] = guard_of(tokenizer).encode([rendered.guarded])[0].ids
        return guarded
    ids: list[int] = tokenizer.reference.encode(rendered.text, add_special_tokens=False).ids
    return ids


def ends_of_answers(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[int]:
    """Return the ids that end an answer: EOS, and the special token that the template closes the assistant's turn with."""
    ends = {tokenizer.info.eos_id}
    with contextlib.suppress(UserError):  # a template whose turns no token closes: EOS has to do
        marks = find_marks(tokenizer, template)
        if marks is not None:
            ends.add(marks.closes[0])
    return frozenset(ends)


def encode_chats(
    texts: Sequence[str],
    chats: Sequence[Rendered],
    *,
    ids: Ids,
    offsets: Offsets,
    tokenizer: Tokenizer,
    marks: TurnMarks | None,
) -> tuple[Ids, Offsets, MaskArray, int]:
    """Return the ids of conversations, and what is learned.

    Args:
        texts: the conversations as their template renders them, n of them.
        chats: the same n, with what is known of each.
        ids: uint32 [T], the ids of `texts` end to end, as though nobody but the template had written special tokens.
        offsets: int64 [n + 1], where each begins.
        tokenizer: the one that made them.
        marks: what `find_marks` found.

    Returns:
        (ids, offsets, mask uint8 [T], conversations in which an answer is not learned).

    Raises:
        UserError: special tokens cannot be encoded as text by this tokenizer.
    """
    parts = [ids[start:stop] for start, stop in itertools.pairwise(offsets)]
    guarded = [place for place, chat in enumerate(chats) if chat.guarded is not None]
    encodings: dict[int, Any] = {}
    if marks is None:
        plain = [place for place, chat in enumerate(chats) if chat.guarded is None]
        made = tokenizer.reference.encode_batch([texts[place] for place in plain], add_special_tokens=False)
        encodings = dict(zip(plain, made, strict=True))
    if guarded:
        made = guard_of(tokenizer).encode([str(chats[place].guarded) for place in guarded])
        encodings |= dict(zip(guarded, made, strict=True))
        for place in guarded:
            parts[place] = np.array(encodings[place].ids, np.uint32)
    offsets = np.cumsum([0, *map(len, parts)])
    ids = np.concatenate([*parts, np.empty(0, np.uint32)])
    wanted = np.array([chat.num_answers for chat in chats], np.int64)
    if marks is not None:
        mask, found = learned_between(ids, offsets, marks)
        return ids, offsets, mask, int(np.count_nonzero(found < wanted))
    masks = [overlapping(encodings[place].offsets, chat.spans or ()) for place, chat in enumerate(chats)]
    unlearned = sum(not mask.any() for mask in masks)
    return ids, offsets, np.concatenate([*masks, np.empty(0, np.uint8)]), unlearned
