"""Framing: documents become BOS + ids + EOS, as they are stored; where the tokenizer has no BOS, ids + EOS.

The functions work on blocks of documents: their tokens end to end, and the length of each document. Documents from other projects may
have a BOS or EOS already, and ids outside the vocabulary; the ids of a text that was just encoded have neither.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import TokenArray, TokenDtype, TokenizerInfo, numpy_dtype
from minimind_data.errors import UserError

BLOCK_TOKENS = 2**21
"""Tokens that are handled at a time; a conversion holds a small multiple of them in memory."""
MAX_DOCUMENT_TOKENS = 2**26
"""Longer documents are refused: each has to fit into memory, and most likely the separator is a wrong one."""


@dataclass(frozen=True, kw_only=True)
class Framed:
    """Documents with BOS and EOS, and how many of them came without."""

    tokens: TokenArray
    """[sum(lengths)] of the dataset's dtype, little-endian."""
    lengths: NDArray[np.int64]
    """int64 [documents], with BOS and EOS."""
    bos_added: int
    eos_added: int
    empty: int
    """Documents without a token besides BOS and EOS, which are left out as empty texts are."""


def frame_documents(
    tokens: NDArray[Any], lengths: NDArray[np.int64], info: TokenizerInfo, dtype: TokenDtype
) -> Framed:
    """Add BOS and EOS to documents that lack them.

    A BOS that comes first and an EOS that comes last are left as they are. Where BOS and EOS are the same token, a document of that one
    token counts as empty.

    Args:
        tokens: [sum(lengths)] of any integer dtype: the documents end to end, their ids already checked.
        lengths: int64 [n], the number of tokens of each; 0 is allowed.
        info: has the ids of BOS and EOS.
        dtype: of the result.
    """
    stops = np.cumsum(lengths)
    starts = stops - lengths
    has_bos, has_eos = np.zeros(len(lengths), bool), np.zeros(len(lengths), bool)
    some = np.flatnonzero(lengths)
    if info.bos_id is not None:
        has_bos[some] = tokens[starts[some]] == info.bos_id
    has_eos[some] = tokens[stops[some] - 1] == info.eos_id
    inner = lengths - has_bos - has_eos  # -1 for one token that is both
    nonempty = inner > 0
    lacks_bos = nonempty & ~has_bos & (info.bos_id is not None)
    lacks_eos = nonempty & ~has_eos
    if nonempty.all() and not lacks_bos.any() and not lacks_eos.any():
        return Framed(
            tokens=tokens.astype(numpy_dtype(dtype), copy=False),
            lengths=lengths,
            bos_added=0,
            eos_added=0,
            empty=0,
        )
    from_here = np.repeat(nonempty, lengths)
    from_here[starts[has_bos]] = False
    from_here[stops[has_eos] - 1] = False
    new_lengths = inner[nonempty] + _frame_tokens(info)
    new_stops = np.cumsum(new_lengths)
    framed = np.empty(int(new_lengths.sum()), numpy_dtype(dtype))
    to_here = np.ones(len(framed), bool)
    to_here[new_stops - 1] = False
    framed[new_stops - 1] = info.eos_id
    if info.bos_id is not None:
        to_here[new_stops - new_lengths] = False
        framed[new_stops - new_lengths] = info.bos_id
    framed[to_here] = tokens[from_here]
    return Framed(
        tokens=framed,
        lengths=new_lengths,
        bos_added=int(lacks_bos.sum()),
        eos_added=int(lacks_eos.sum()),
        empty=int((~nonempty).sum()),
    )


def frame_texts(
    ids: NDArray[np.uint32], offsets: NDArray[np.int64], info: TokenizerInfo, dtype: TokenDtype
) -> tuple[TokenArray, NDArray[np.int64]]:
    """Put BOS before and EOS after every text of a batch, whatever its ids are; this is faster than `frame_documents`.

    Args:
        ids: uint32 [T], the ids of the texts end to end.
        offsets: int64 [n + 1], where each text begins in `ids`, and T.
        info: has the ids of BOS and EOS.
        dtype: of the result.

    Returns:
        (tokens [T + 2n] of `dtype`, [T + n] without BOS; lengths int64 [n] of the documents with BOS and EOS).
    """
    lengths = np.diff(offsets) + _frame_tokens(info)
    stops = np.cumsum(lengths)
    tokens = np.empty(len(ids) + _frame_tokens(info) * len(lengths), numpy_dtype(dtype))
    is_text = np.ones(len(tokens), np.bool_)
    is_text[stops - 1] = False
    tokens[stops - 1] = info.eos_id
    if info.bos_id is not None:
        is_text[stops - lengths] = False
        tokens[stops - lengths] = info.bos_id
    tokens[is_text] = ids
    return tokens, lengths


def _frame_tokens(info: TokenizerInfo) -> int:
    """Return how many tokens of a document are not of its text."""
    return 1 if info.bos_id is None else 2


def check_ids(tokens: NDArray[Any], vocab_size: int, where: Callable[[int], str]) -> None:
    """Check that every id belongs to the vocabulary.

    Args:
        tokens: integers of any dtype.
        vocab_size: the largest id plus one.
        where: names the file and the place of a token, by its index in `tokens`.

    Raises:
        UserError: an id is negative or too large; the message names the first one.
    """
    if not len(tokens) or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
        return
    first = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise UserError(
        f"{where(first)} is {int(tokens[first])}, where the tokenizer has ids 0 to {vocab_size - 1}",
        remedy="pass with `tokenizer` the one that made these ids, and with `source_format` the format of the file",
        option="tokenizer",
    )


def document_ranges(lengths: NDArray[np.int64], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of documents with at most `max_tokens` tokens together; a longer document is a range of its own."""
    stops = np.cumsum(lengths)
    first, done = 0, 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(stops, done + max_tokens, side="right")))
        yield first, last
        first, done = last, int(stops[last - 1])


def check_lengths(lengths: NDArray[np.int64], where: str) -> None:
    """Check that every document is short enough to be held in memory.

    Args:
        lengths: int64 [n], tokens of each.
        where: the file, for the error.

    Raises:
        UserError: a document is too long.
    """
    if len(lengths) and int(lengths.max()) > MAX_DOCUMENT_TOKENS:
        raise UserError(
            f"a document of {int(lengths.max()):,} tokens, where at most {MAX_DOCUMENT_TOKENS:,} are allowed",
            where=where,
            remedy="check that its documents are separated as this format requires, or cut it into shorter ones",
        )
