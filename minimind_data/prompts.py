"""What a model is asked: the ids of a conversation and of the beginning of the answer, and the ids at which an answer ends.

The ids are those that the same conversation has in a dataset: special tokens that somebody wrote are text, and can neither close his
turn nor open another (`rendering.py`).
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from minimind_data.chat import ChatTemplate, RenderError
from minimind_data.conversations import Conversation
from minimind_data.errors import UserError
from minimind_data.rendering import ChatSpec, renderer_of
from minimind_data.tokenizer import Tokenizer
from minimind_data.turns import control_tokens, find_marks, guard_of, normalizes_control

__all__ = ["encode_prompt", "ends_of_answers"]


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
