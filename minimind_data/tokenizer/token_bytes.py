"""The bytes that each token stands for, so that text can be counted and shown without decoding it.

In a byte-level vocabulary every token is a string of bytes, and the text of a document is those strings end to end. So the
number of bytes of any tokens is a sum over a table. The number of characters is too: each character has exactly one byte in UTF-8
that is no continuation byte (0b10xxxxxx), wherever the tokens cut it.

Source of the byte alphabet: GPT-2's encoder.py (`bytes_to_unicode`), as Hugging Face's `ByteLevel` uses it; of how a token
outside that alphabet is decoded: `tokenizers`, pre_tokenizers/byte_level.rs (`decode_chain`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minimind_data.tokenizer.loading import Tokenizer

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "▁"
"""Stands for a space in SentencePiece's vocabularies."""


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each of the 256 characters that byte-level vocabularies are written in."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """The bytes of every token of a vocabulary."""

    byte_strings: tuple[bytes, ...]
    """By id; empty for an id that no token has. A token may begin or end inside a character."""
    special: frozenset[int]
    """Ids of the added tokens, whose bytes are their names."""
    is_exact: bool
    """Whether the text of tokens is these bytes end to end. Otherwise they are good enough to show, but not to count."""

    @property
    def num_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each token: int64 [V]."""
        return np.array([len(token) for token in self.byte_strings], np.int64)

    @property
    def num_characters(self) -> NDArray[np.int64]:
        """Characters that begin in each token, so that whole texts add up exactly: int64 [V]."""
        return np.array([sum(byte & 0xC0 != 0x80 for byte in token) for token in self.byte_strings], np.int64)


def token_bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    """Return the bytes of every token of a tokenizer."""
    decoder = json.loads(tokenizer.json).get("decoder")
    is_exact = _is_byte_level(decoder)
    decoder_json = json.dumps(decoder, ensure_ascii=False)
    shows_spaces = _WORD_START in decoder_json or "Metaspace" in decoder_json
    byte_strings = [b""] * tokenizer.info.vocab_size
    for token, token_id in tokenizer.reference.get_vocab(with_added_tokens=False).items():
        byte_strings[token_id] = (
            _byte_level_bytes(token) if is_exact else _other_bytes(token, shows_spaces=shows_spaces)
        )
    added = tokenizer.reference.get_added_tokens_decoder()
    for token_id, added_token in added.items():
        byte_strings[token_id] = added_token.content.encode()
    return TokenBytes(byte_strings=tuple(byte_strings), special=frozenset(added), is_exact=is_exact)


def _is_byte_level(decoder: dict[str, object] | None) -> bool:
    if not decoder:
        return False
    if decoder["type"] == "Sequence":
        parts = decoder["decoders"]
        assert isinstance(parts, list)
        return [part["type"] for part in parts if part["type"] != "Fuse"] == ["ByteLevel"]
    return decoder["type"] == "ByteLevel"


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


def _other_bytes(token: str, *, shows_spaces: bool) -> bytes:
    if byte := _BYTE_FALLBACK.fullmatch(token):
        return bytes.fromhex(byte[1])
    return (token.replace(_WORD_START, " ") if shows_spaces else token).encode()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Consecutive tokens that are shown together, because only together they are whole characters."""

    first: int
    """Position of the first token."""
    count: int
    text: str
    broken: bool
    """Whether it is one token whose bytes make no whole character here, as where the rest was cut off; the text has them as \\xNN."""


def cells_of(ids: Sequence[int], byte_strings: Sequence[bytes]) -> list[Cell]:
    """Group tokens into the smallest runs that are whole characters.

    Args:
        ids: the tokens of a window.
        byte_strings: of `TokenBytes`.
    """
    cells: list[Cell] = []
    first = 0
    while first < len(ids):
        count, text = _whole_run(ids, first, byte_strings)
        broken = not count
        if broken:
            count, text = 1, byte_strings[ids[first]].decode(errors="backslashreplace")
        cells.append(Cell(first=first, count=count, text=text, broken=broken))
        first += count
    return cells


def _whole_run(ids: Sequence[int], first: int, byte_strings: Sequence[bytes]) -> tuple[int, str]:
    """Return (number of tokens, text) of the shortest run from `first` on that is whole characters; (0, "") where none is."""
    pending = b""
    for count in range(1, len(ids) - first + 1):
        pending += byte_strings[ids[first + count - 1]]
        try:
            return count, pending.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                break
    return 0, ""
