"""Special tokens as text: those that somebody wrote in a conversation can neither close its turn nor open another.

`Disguise` replaces the characters that special tokens are made of by characters that no text holds, so that two renderings can be
compared (see `rendering`). `GuardedTokenizer` encodes the result: it is the same tokenizer, but its special tokens have their names in that
disguise. All that special tokens do to the text around them, they do there too.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import Tokenizer

_FIRST_STAND_IN = 0x10F000
"""First of the characters that stand for others; of a private use area that no script, and hardly any program, uses."""
THOUGHTS = {"<think>", "</think>"}


class Disguise:
    """Characters in place of those that special tokens are made of.

    Args:
        tokens: the special tokens.
        constants: texts in the template, which keep their characters where that is safe.

    Attributes:
        signs: finds what `hide` would replace.
        words: what stands in special tokens between their signs, such as im_end.
    """

    def __init__(self, tokens: tuple[str, ...], constants: frozenset[str] = frozenset()) -> None:
        alphabet = sorted(set("".join(tokens)))
        self._hidden = {ord(char): chr(_FIRST_STAND_IN + place) for place, char in enumerate(alphabet)}
        self._shown = {_FIRST_STAND_IN + place: char for place, char in enumerate(alphabet)}
        self._tokens = re.compile(_any_of(tokens))
        self.words = {re.sub(r"^\W+|\W+$", "", token) for token in tokens}
        # The first character of a token is enough to see one that begins in a text. All characters are needed only if the
        # template itself begins tokens that a text may continue, as in '<|' + name + '|>'.
        begins = tuple({token[:length] for token in tokens for length in range(1, len(token))})
        continued = any(self._tokens.sub("", constant).endswith(begins) for constant in constants)
        replaced = {token[0] for token in tokens}
        if continued:
            replaced |= {char for char in alphabet if not char.isspace() and char not in '"\\'}
        self._table = {ord(char): self._hidden[ord(char)] for char in replaced}
        self.signs = re.compile(f"[{re.escape(''.join(sorted(replaced)))}]")
        kept = [
            text
            for text in constants | THOUGHTS
            if self.signs.search(text) and not self._could_build(text, tokens)
        ]
        self._kept = re.compile(f"({_any_of(kept)})")

    @staticmethod
    def _could_build(text: str, tokens: tuple[str, ...]) -> bool:
        """Tell whether this text with others around it could become a special token."""
        return any(
            token in text
            or text in token
            or any(text.endswith(token[:n]) or text.startswith(token[-n:]) for n in range(1, len(token)))
            for token in tokens
        )

    def hide(self, value: Any) -> Any:
        """Replace the characters of special tokens in all strings of a JSON value, names of fields included."""
        if isinstance(value, str):
            parts = self._kept.split(value)
            parts[::2] = [part.translate(self._table) for part in parts[::2]]
            return "".join(parts)
        if isinstance(value, Mapping):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def blank(self, text: str, *, has_thoughts: bool) -> str:
        """Replace all characters of a text but white space; an answer's marks of thoughts and the like may stay, as in `hide`."""
        parts = self._kept.split(text) if has_thoughts else [text]
        parts[::2] = [re.sub(r"\S", "x", part) for part in parts[::2]]
        return "".join(parts)

    def show(self, text: str) -> str:
        """Undo `hide`."""
        return text.translate(self._shown)

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return where special tokens are in a text."""
        return [match.span() for match in self._tokens.finditer(text)]

    def tokens(self, text: str) -> list[str]:
        """Return the special tokens in a text."""
        return self._tokens.findall(text)

    def disguised(self, text: str, places: list[tuple[int, int]]) -> str:
        """Replace every character of these places."""
        parts: list[str] = []
        done = 0
        for start, stop in places:
            parts += [text[done:start], text[start:stop].translate(self._hidden)]
            done = stop
        return "".join([*parts, text[done:]])

    def name(self, token: str) -> str:
        """Return the name of a special token in a disguised text."""
        return token.translate(self._hidden)


def _any_of(texts: tuple[str, ...] | list[str]) -> str:
    """Return a pattern that matches any of these texts, the longest first, or nothing if there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def control_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the special tokens that open and close turns and documents: those marked as special, and BOS, EOS and PAD."""
    frame = set(tokenizer.info.special_ids)
    added = tokenizer.reference.get_added_tokens_decoder()
    return tuple(token.content for token_id, token in added.items() if token.special or token_id in frame)


def normalizes_control(tokenizer: Tokenizer) -> bool:
    """Tell whether a normalizer may turn other characters into such tokens, as full-width ones."""
    control = control_tokens(tokenizer)
    added = tokenizer.reference.get_added_tokens_decoder().values()
    return tokenizer.reference.normalizer is not None and any(
        token.normalized for token in added if token.content in control
    )


class GuardedTokenizer:
    """A tokenizer for which special tokens have other names, so that their own names are text to it.

    Raises:
        UserError: the tokenizer cannot be given other names for them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        control = control_tokens(tokenizer)
        disguise = Disguise(control)
        names = {token: disguise.name(token) for token in control}
        content = json.loads(tokenizer.json)
        for added in content["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
        _rename(content["model"], names)
        content["post_processor"] = None
        self._control_ids = {tokenizer.reference.token_to_id(token): names[token] for token in control}
        self._names = tuple(names.values())
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            raise UserError(_CANNOT_GUARD.format(error)) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        changed = [
            name
            for token_id, name in self._control_ids.items()
            if self._tokenizer.token_to_id(name) != token_id
        ]
        if changed:
            raise UserError(_CANNOT_GUARD.format("its special tokens would get other ids"))

    def encode(self, texts: list[str]) -> list[Any]:
        """Return the encodings of disguised texts.

        Raises:
            UserError: text came out as a special token.
        """
        encodings: list[Any] = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            num_control = sum(token_id in self._control_ids for token_id in encoding.ids)
            if num_control != sum(map(text.count, self._names)):
                raise UserError(_CANNOT_GUARD.format("its merges make special tokens of plain text"))
        return encodings


_CANNOT_GUARD = (
    "a conversation holds special tokens as text, which this tokenizer cannot encode as such ({}); take them out, or pass "
    "`allow_special_in_content`"
)


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens of a model other names, and leave out the merges that would make them out of text."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if "".join(pair) not in names]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


@functools.lru_cache(maxsize=1)
def guarded_tokenizer(tokenizer: Tokenizer) -> GuardedTokenizer:
    """Return the guarded form of a tokenizer, made once per process."""
    return GuardedTokenizer(tokenizer)
