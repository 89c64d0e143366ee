r"""The loss mask of conversations: which of their tokens are targets.

Where a template marks its answers by {% generation %}, the mask is the one of `transformers`: every token of which a character
stands inside. Most templates mark nothing. Then the mask is MiniMind's: the tokens after those that open an answer
(`<|im_start|>assistant\n`), up to and including those that close it (`<|im_end|>\n`), or up to the end where nothing closes it. They are
looked for as ids, from left to right, as MiniMind's datasets look for them. `AnswerMarks` are the ids that open and close answers; they are
found by rendering a small conversation and trying which of them single out its answers.

Ids can be relied on because they begin with a special token, which no text of a conversation can become (see `rendering`). The same search
in a conversation that is cut off gives the same mask, cut off.

Sources: MiniMind, dataset/lm_dataset.py (`generate_labels`); transformers, tokenization_utils_base.py (`assistant_masks`).
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.chat.guard import control_tokens
from minimind_data.chat.template import ChatTemplate, RenderError, render_chat
from minimind_data.dataset.format import MaskArray
from minimind_data.errors import UserError
from minimind_data.tokenizer.backends import Offsets
from minimind_data.tokenizer.loading import Tokenizer

_ASKED, _ANSWERED = ("how many apples", "and how many pears"), ("seven apples", "only nine pears")


@dataclass(frozen=True, kw_only=True)
class AnswerMarks:
    """The ids around an answer."""

    opens: tuple[int, ...]
    """Before it; no targets."""
    closes: tuple[int, ...]
    """Behind it; targets, so that a model learns to end."""


def find_answer_marks(tokenizer: Tokenizer, template: ChatTemplate) -> AnswerMarks | None:
    """Find the ids around answers; None where the template marks answers by itself.

    MiniMind's are tried first: BOS with `assistant` and a line feed, and EOS with a line feed. Then come those that the template ends a
    prompt with, and those between a question and its answer.

    Raises:
        UserError: none single out the answers.
    """
    if template.marks_generation:
        return None
    messages = [
        {"role": role, "content": text}
        for turn in zip(_ASKED, _ANSWERED, strict=True)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    try:
        text = render_chat(template, messages)
        probe = _Probe(tokenizer, text)
        prompts = [render_chat(template, messages[:1], add_generation_prompt=flag) for flag in (True, False)]
    except RenderError as error:
        raise UserError(f"{error} on a plain conversation of four turns", remedy=_REMEDY) from None
    if all(part in text for part in (*_ASKED, *_ANSWERED)):
        prompt = prompts[0].removeprefix(prompts[1]) if prompts[0].startswith(prompts[1]) else ""
        for opens, closes in itertools.product(probe.openings(prompt), probe.closings()):
            marks = AnswerMarks(opens=probe.ids(opens), closes=probe.ids(closes))
            if probe.fits(marks):
                return marks
    raise UserError(
        "the chat template sets the assistant's turns off by no special tokens of this tokenizer, so "
        "which tokens are targets cannot be told",
        remedy=_REMEDY,
    )


_REMEDY = (
    "name with `chat_template` a file with a template that has {% generation %} … {% endgeneration %} around what the assistant "
    "writes, or take another `tokenizer`"
)


class _Probe:
    """A small conversation as the template renders it."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._control = control_tokens(tokenizer)
        self._encoding = tokenizer.reference.encode(text, add_special_tokens=False)

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.reference.encode(text, add_special_tokens=False).ids)

    def openings(self, prompt: str) -> list[str]:
        """Return texts that may open the assistant's turns; all begin with a special token."""
        between = self._text.partition(_ASKED[0])[2].partition(_ANSWERED[0])[0]
        starts = sorted({place for token in self._control for place in _occurrences(between, token)})
        texts = [prompt, *(between[start:] for start in reversed(starts))]
        if (bos_id := self._tokenizer.info.bos_id) is not None:
            texts.insert(0, f"{self._tokenizer.reference.id_to_token(bos_id)}assistant\n")
        # The white space before an answer may be one token with its first word.
        texts += [text.rstrip() for text in texts]
        # What also stands between an answer and the next question opens anybody's turn.
        before_question = self._text.partition(_ANSWERED[0])[2].partition(_ASKED[1])[0]
        return [text for text in texts if text.startswith(self._control) and text not in before_question]

    def closings(self) -> list[str]:
        """Return texts that may close them: a special token each, with the white space after it."""
        eos = str(self._tokenizer.reference.id_to_token(self._tokenizer.info.eos_id))
        inside = self._text.partition(_ANSWERED[0])[2].partition(_ASKED[1])[0]
        common = _common_prefix(inside, self._text.partition(_ANSWERED[1])[2])
        texts = [f"{eos}\n"]
        for token in self._control:
            for start in _occurrences(common, token):
                rest = common[start + len(token) :]
                texts.append(token + rest[: len(rest) - len(rest.lstrip())])
        return [text for text in texts if text.startswith(self._control)]

    def fits(self, marks: AnswerMarks) -> bool:
        """Tell whether the mask that they make holds both answers, and neither question."""
        ids = np.array(self._encoding.ids, np.uint32)
        mask, _ = mask_between(ids, np.array([0, len(ids)]), marks)
        for text, is_answer in [*((text, True) for text in _ANSWERED), *((text, False) for text in _ASKED)]:
            start = self._text.index(text)
            inside = mask_of_spans(self._encoding.offsets, ((start, start + len(text)),))
            if not (inside.any() and (mask[inside > 0] == is_answer).all()):
                return False
        return True


def _occurrences(text: str, token: str) -> list[int]:
    return [place for place in range(len(text)) if text.startswith(token, place)]


def _common_prefix(one: str, other: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(char for char, _ in same)


def mask_between(
    ids: NDArray[Any], offsets: Offsets, marks: AnswerMarks
) -> tuple[MaskArray, NDArray[np.int64]]:
    """Return (mask uint8 [T], number of answers in each sequence int64 [n]).

    Args:
        ids: integers [T], sequences end to end.
        offsets: int64 [n + 1], where each begins.
        marks: the ids around answers.
    """
    mask = np.zeros(len(ids), np.uint8)
    num_answers = np.zeros(len(offsets) - 1, np.int64)
    opens = _places(ids, marks.opens) + len(marks.opens)
    closes = _places(ids, marks.closes)
    first_open = first_close = 0
    for number, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        at = start
        while True:
            # A mark must lie in the sequence from its first token to its last.
            first_open += int(np.searchsorted(opens[first_open:], at + len(marks.opens)))
            if first_open == len(opens) or opens[first_open] > stop:
                break
            begin = int(opens[first_open])
            first_close += int(np.searchsorted(closes[first_close:], begin))
            end = stop
            if first_close < len(closes) and closes[first_close] + len(marks.closes) <= stop:
                end = int(closes[first_close]) + len(marks.closes)
            mask[begin:end] = 1
            num_answers[number] += 1
            at = end
    return mask, num_answers


def exclude_answers(mask: MaskArray, excluded: frozenset[int], num_answers: int) -> bool:
    """Take answers out of the mask of one conversation, in place.

    Where the mask has not every answer, it cannot be told which is which, and all of it goes: what must not be learned is not.

    Args:
        mask: uint8 [T], as `mask_between` makes it.
        excluded: numbers of the answers, from 0.
        num_answers: of the conversation.

    Returns:
        Whether every other answer is still there.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0])).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2]
    if len(starts) != num_answers:
        mask[:] = 0
        return False
    for number in excluded:
        mask[starts[number] : stops[number]] = 0
    return True


def _places(ids: NDArray[Any], run: tuple[int, ...]) -> NDArray[np.int64]:
    """Return where the ids of a run follow one another."""
    places = np.flatnonzero(ids[: max(0, len(ids) - len(run) + 1)] == run[0])
    for shift, token in enumerate(run[1:], 1):
        places = places[ids[places + shift] == token]
    return places


def mask_of_spans(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> MaskArray:
    """Return the mask of the tokens that have a character in a span; tokens and spans are in order."""
    mask = np.zeros(len(offsets), np.uint8)
    places = np.array(offsets, np.int64).reshape(-1, 2)
    for start, stop in spans:
        mask[(places[:, 0] < stop) & (places[:, 1] > start)] = 1
    return mask
