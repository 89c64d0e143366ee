"""Documents as they are stored, BOS + ids + EOS: out of the ids of texts, and out of documents of other projects.

Everything works on whole blocks of documents: tokens end to end, and the length of each. Documents of other projects may have a BOS or an
EOS already, and ids that no vocabulary of ours has; those of texts were just encoded, and have neither.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import TokenArray, TokenDtype, TokenizerInfo, numpy_dtype
from minimind_data.errors import UserError

BLOCK_TOKENS = 2**21
"""Tokens that are handled at a time; what a conversion holds in memory is a small multiple of it."""
MAX_DOCUMENT_TOKENS = 2**26
"""A longer document is refused: it would have to be held whole, and is most likely a wrong separator."""


@dataclass(frozen=True, kw_only=True)
class Framed:
    """Documents in our form, and what had to be done to them."""

    tokens: TokenArray
    """[sum(lengths)] of the dataset's dtype, little-endian."""
    lengths: NDArray[np.int64]
    bos_added: int
    eos_added: int
    empty: int
    """Documents without any token between BOS and EOS; they are left out, as empty texts are."""


def frame_documents(
    tokens: NDArray[Any], lengths: NDArray[np.int64], info: TokenizerInfo, dtype: TokenDtype
) -> Framed:
    """Give every document exactly the BOS and EOS that it lacks.

    A first token that is BOS and a last one that is EOS are kept as the frame. Where BOS and EOS are the same token, one
    lone token is a frame of nothing.

    Args:
        tokens: [sum(lengths)] of any integer dtype: the documents end to end, ids checked before.
        lengths: int64 [n], tokens of each; 0 is allowed.
        info: whose BOS and EOS.
        dtype: of the result.
    """
    stops = np.cumsum(lengths)
    starts = stops - lengths
    has_bos, has_eos = np.zeros(len(lengths), bool), np.zeros(len(lengths), bool)
    some = np.flatnonzero(lengths)
    has_bos[some] = tokens[starts[some]] == info.bos_id
    has_eos[some] = tokens[stops[some] - 1] == info.eos_id
    has_eos &= ~(has_bos & (lengths == 1))
    inner = lengths - has_bos - has_eos
    kept = inner > 0
    if kept.all() and has_bos.all() and has_eos.all():
        return Framed(
            tokens=tokens.astype(numpy_dtype(dtype), copy=False),
            lengths=lengths,
            bos_added=0,
            eos_added=0,
            empty=0,
        )
    from_here = np.repeat(kept, lengths)
    from_here[starts[has_bos]] = False
    from_here[stops[has_eos] - 1] = False
    new_lengths = inner[kept] + 2
    new_stops = np.cumsum(new_lengths)
    framed = np.empty(int(new_lengths.sum()), numpy_dtype(dtype))
    to_here = np.ones(len(framed), bool)
    to_here[new_stops - new_lengths] = False
    to_here[new_stops - 1] = False
    framed[to_here] = tokens[from_here]
    framed[new_stops - new_lengths] = info.bos_id
    framed[new_stops - 1] = info.eos_id
    return Framed(
        tokens=framed,
        lengths=new_lengths,
        bos_added=int((kept & ~has_bos).sum()),
        eos_added=int((kept & ~has_eos).sum()),
        empty=int((~kept).sum()),
    )


def frame_texts(
    ids: NDArray[np.uint32], offsets: NDArray[np.int64], info: TokenizerInfo, dtype: TokenDtype
) -> tuple[TokenArray, NDArray[np.int64]]:
    """Put BOS before and EOS behind every text of a batch; nothing is looked at, so this is quicker than `frame_documents`.

    Args:
        ids: uint32 [T], the texts' ids end to end.
        offsets: int64 [n + 1], where each text begins.
        info: for BOS and EOS.
        dtype: of the result.

    Returns:
        (tokens [T + 2n] of `dtype`, lengths int64 [n] of the documents with BOS and EOS).
    """
    num_texts = len(offsets) - 1
    tokens = np.empty(len(ids) + 2 * num_texts, numpy_dtype(dtype))
    bos_places = offsets[:-1] + 2 * np.arange(num_texts)
    eos_places = offsets[1:] + 2 * np.arange(num_texts) + 1
    is_text = np.ones(len(tokens), np.bool_)
    is_text[bos_places] = False
    is_text[eos_places] = False
    tokens[is_text] = ids
    tokens[bos_places] = info.bos_id
    tokens[eos_places] = info.eos_id
    return tokens, np.diff(offsets) + 2


def check_ids(tokens: NDArray[Any], vocab_size: int, where: Callable[[int], str]) -> None:
    """Check that every id belongs to the vocabulary.

    Args:
        tokens: integers of any dtype.
        vocab_size: the largest id plus one.
        where: says, for a number of these tokens, which file and place that is.

    Raises:
        UserError: an id is negative or too large; the sentence names the first.
    """
    if not len(tokens) or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
        return
    first = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise UserError(
        f"{where(first)} is {int(tokens[first])}, where the tokenizer has ids 0 to {vocab_size - 1}",
        remedy="name with `tokenizer` the one that made these ids, and with `source_format` the format "
        "that they are in",
        option="tokenizer",
    )


def document_ranges(lengths: NDArray[np.int64], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of documents that hold at most `max_tokens` tokens; a longer document stands alone."""
    stops = np.cumsum(lengths)
    first, done = 0, 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(stops, done + max_tokens, side="right")))
        yield first, last
        first, done = last, int(stops[last - 1])


def check_lengths(lengths: NDArray[np.int64], where: str) -> None:
    """Check that every document can be held in memory.

    Raises:
        UserError: one cannot.
    """
    if len(lengths) and int(lengths.max()) > MAX_DOCUMENT_TOKENS:
        raise UserError(
            f"{where}: a document of {int(lengths.max()):,} tokens, where {MAX_DOCUMENT_TOKENS:,} can be held; "
            "look whether its documents are marked as this format wants, or cut it into shorter ones"
        )
