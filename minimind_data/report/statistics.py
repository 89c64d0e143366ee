"""stats(): what a dataset holds, and what each layout of windows would waste.

Lengths and waste follow from the indexes alone, which are read shard by shard; characters from one pass over the tokens that only counts
how often each id occurs. So memory holds one block of a shard, the counts by id, and the distinct document lengths, which are at most
sqrt(2N) for N tokens. No text is decoded, unless the vocabulary is not byte-level: then the characters are
estimated from a sample of documents, and the result says so.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.shard import Shard
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.reporting import Progress, no_progress
from minimind_data.tokenizer.loading import Tokenizer
from minimind_data.tokenizer.token_bytes import token_bytes_of
from minimind_data.windows.base import Layout
from minimind_data.windows.bin_packing import best_fit

DEFAULT_SEQ_LENS = (340, 512, 1024, 2048)
SAMPLED_DOCUMENTS = 1000
"""Documents that are decoded where characters cannot be counted."""
_BLOCK = 2**18
"""How many tokens or sequences are processed at a time."""
_SHORT = 2**16
"""Lengths below this are counted in an array, longer ones by sorting."""
_PERCENTILES = (5, 25, 50, 75, 95, 99)
_MAX_BINS = 48


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How many documents have which length."""

    tokens: NDArray[np.int64]
    """The lengths that occur, BOS and EOS included, ascending: int64 [K]."""
    documents: NDArray[np.int64]
    """Documents of each, or of a dataset of pairs the conversations: int64 [K]."""

    def percentile(self, percent: float) -> int:
        """Return the smallest length that at least this percentage of the documents does not exceed."""
        below = np.cumsum(self.documents)
        return int(self.tokens[np.searchsorted(below, below[-1] * percent / 100)])

    def bins(self) -> list[dict[str, int]]:
        """Return the histogram for people: `from`, `to` (both included), `documents`, `tokens` of each bin.

        Bins are nearly equally wide in the logarithm of the length, and as narrow as possible with at most `_MAX_BINS` of them.
        """
        first, last = int(self.tokens[0]), int(self.tokens[-1])
        edges = np.array([first, last + 1], np.int64)
        for steps_per_doubling in (32, 16, 8, 4, 2, 1):
            steps = np.arange(steps_per_doubling * (last.bit_length() + 1) + 1)
            edges = np.unique(np.round(2.0 ** (steps / steps_per_doubling)).astype(np.int64))
            edges = edges[
                np.searchsorted(edges, first, "right") - 1 : np.searchsorted(edges, last, "right") + 1
            ]
            if len(edges) - 1 <= _MAX_BINS:
                break
        places = np.searchsorted(self.tokens, edges)
        documents = np.concatenate([[0], np.cumsum(self.documents)])[places]
        tokens = np.concatenate([[0], np.cumsum(self.documents * self.tokens)])[places]
        return [
            {
                "from": int(edges[i]),
                "to": int(edges[i + 1]) - 1,
                "documents": int(documents[i + 1] - documents[i]),
                "tokens": int(tokens[i + 1] - tokens[i]),
            }
            for i in range(len(edges) - 1)
        ]


@dataclass(frozen=True, kw_only=True)
class Waste:
    """What one layout at one window length does to a dataset. Windows are the shifted ones: inputs and targets."""

    layout: Layout
    seq_len: int
    windows: int
    padding: int
    """Input positions of all windows that hold PAD."""
    padding_share: float
    """Padding divided by all input positions."""
    padded_windows: int
    """Windows with any padding."""
    unused_tokens: int
    """Tokens that stand in no window: `Windows.unused_tokens`; all of them where there is no window."""
    unused_share: float
    """Unused tokens divided by all tokens."""
    cut_documents: int
    """Documents that a window border cuts in two, or whose end is cut off."""
    cut_share: float
    """Cut documents divided by all documents."""
    windows_per_document: float
    """How many windows a document is spread over, on average."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text behind the tokens, without the BOS and EOS of documents."""

    tokens: int
    characters: int
    bytes: int
    """Bytes of the text in UTF-8."""
    characters_per_token: float
    bytes_per_token: float
    estimated_from_documents: int | None
    """None where characters and bytes are counted exactly; else how many documents were decoded to estimate them."""
    ids_used: int
    """Entries of the vocabulary that occur."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The result of `stats`."""

    shards: ShardSet
    lengths: Lengths
    text: Text
    waste: tuple[Waste, ...]
    """By window length, then by layout."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as one object for JSON."""
        manifest = self.shards.manifest
        lengths = self.lengths
        return {
            "kind": manifest.kind,
            "documents": manifest.num_documents,
            "tokens": manifest.num_tokens,
            "shards": len(manifest.shards),
            "bytes": manifest.num_bytes,
            "vocab_size": manifest.tokenizer.vocab_size,
            "fingerprint": manifest.fingerprint,
            "learned_tokens": self.shards.count_learned(),
            "text": asdict(self.text),
            "lengths": {
                "shortest": int(lengths.tokens[0]),
                "longest": int(lengths.tokens[-1]),
                "mean": float(lengths.documents @ lengths.tokens / lengths.documents.sum()),
                "percentiles": {str(percent): lengths.percentile(percent) for percent in _PERCENTILES},
                "histogram": lengths.bins(),
            },
            "layouts": [asdict(waste) for waste in self.waste],
        }


def stats(
    shards: ShardSet,
    tokenizer: Tokenizer,
    seq_lens: Sequence[int] = DEFAULT_SEQ_LENS,
    progress: Progress = no_progress,
) -> Stats:
    """Describe a dataset.

    Args:
        shards: the dataset.
        tokenizer: the one that made it.
        seq_lens: window lengths to lay over it, in tokens of `input_ids`.
        progress: shows the bytes of the `.bin` files that are read.

    Raises:
        FormatError: an index contradicts itself or its shard.
        UserError: a window length below 2, a dataset without documents, or a token outside the vocabulary.
    """
    lengths, waste = measure_lengths(shards, seq_lens)
    text = count_text(shards, tokenizer, progress)
    return Stats(shards=shards, lengths=lengths, text=text, waste=waste)


def measure_lengths(shards: ShardSet, seq_lens: Sequence[int]) -> tuple[Lengths, tuple[Waste, ...]]:
    """Return document lengths and the waste of every layout at every window length, from the indexes alone.

    Raises:
        UserError: a window length below 2, or a dataset without documents.
    """
    first = "a token" if shards.manifest.tokenizer.bos_id is None else "BOS"
    for seq_len in seq_lens:
        if seq_len < 2:
            raise UserError(
                f"`seq_len` {seq_len}: a window holds {first} and EOS at least, so take 2 or more",
                option="seq_len",
            )
    if not shards.num_documents:
        raise UserError("holds no document, so there is nothing to describe", where=shards.folder)
    counts: dict[int, int] = {}
    borders = {seq_len: _Borders(seq_len) for seq_len in seq_lens}
    for lengths in _length_blocks(shards):
        for length, count in _distinct(lengths):
            counts[length] = counts.get(length, 0) + count
        stops = np.cumsum(lengths)
        for border in borders.values():
            border.add(lengths, stops)
    distinct = sorted(counts)
    by_length = Lengths(
        tokens=np.array(distinct, np.int64), documents=np.array([counts[n] for n in distinct], np.int64)
    )
    if shards.manifest.kind == "dpo":  # a window is a pair, and has two rows
        waste = (_pad(by_length, border) for border in borders.values())
        return by_length, tuple(replace(one, windows=shards.num_documents) for one in waste)
    return by_length, tuple(of(by_length, border) for border in borders.values() for of in _WASTE_BY_LAYOUT)


def _length_blocks(shards: ShardSet) -> Iterator[NDArray[np.int64]]:
    for _, shard in _mapped_shards(shards):
        shard.refuse_wrong_index(shards.folder)
        for start in range(0, len(shard.lengths), _BLOCK):
            yield shard.lengths[start : start + _BLOCK].astype(np.int64)


def _mapped_shards(shards: ShardSet) -> Iterator[tuple[int, Shard]]:
    """Yield (index among all shards, shard) for those that have documents, each mapped only while it is used."""
    entries = enumerate(shards.manifest.shards)
    return ((index, shards.open_shard(index)) for index, entry in entries if entry.written.sequences)


def _distinct(lengths: NDArray[np.int64]) -> Iterable[tuple[int, int]]:
    short = np.bincount(lengths[lengths < _SHORT])
    values = np.flatnonzero(short)
    yield from zip(values.tolist(), short[values].tolist(), strict=True)
    long, counts = np.unique(lengths[lengths >= _SHORT], return_counts=True)
    yield from zip(long.tolist(), counts.tolist(), strict=True)


class _Borders:
    """Counts, block by block, which documents lie across the borders of windows that follow each other without a gap."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.cut_documents = 0
        self.parts = 0
        self._tokens = 0

    def add(self, lengths: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """Count the next documents: their lengths and the cumulative sums of these, both int64 [B]."""
        into_window = self._tokens % self.seq_len
        last_windows = (stops + (into_window - 1)) // self.seq_len
        boundaries = last_windows - (stops - lengths + into_window) // self.seq_len
        self.cut_documents += int(np.count_nonzero(boundaries))
        self.parts += int(boundaries.sum()) + len(lengths)
        self._tokens += int(stops[-1])


def _concat(lengths: Lengths, borders: _Borders) -> Waste:
    """A border at every multiple of the length; see `ConcatWindows`."""
    num_tokens = int(lengths.documents @ lengths.tokens)
    num_documents = int(lengths.documents.sum())
    windows = (num_tokens - 1) // borders.seq_len
    unused = num_tokens - 1 - windows * borders.seq_len if windows else num_tokens
    return Waste(
        layout="concat",
        seq_len=borders.seq_len,
        windows=windows,
        padding=0,
        padding_share=0.0,
        padded_windows=0,
        unused_tokens=unused,
        unused_share=unused / num_tokens,
        cut_documents=borders.cut_documents,
        cut_share=borders.cut_documents / num_documents,
        windows_per_document=borders.parts / num_documents,
    )


def _pad(lengths: Lengths, borders: _Borders) -> Waste:
    """A window for every document, cut at L + 1 tokens; see `PadWindows`."""
    seq_len, tokens, documents = borders.seq_len, lengths.tokens, lengths.documents
    num_documents = int(documents.sum())
    padding = int(documents @ np.maximum(seq_len - tokens, 0))
    unused = int(documents @ np.maximum(tokens - (seq_len + 1), 0))
    cut = int(documents[tokens > seq_len + 1].sum())
    return Waste(
        layout="pad",
        seq_len=seq_len,
        windows=num_documents,
        padding=padding,
        padding_share=padding / (num_documents * seq_len),
        padded_windows=int(documents[tokens < seq_len].sum()),
        unused_tokens=unused,
        unused_share=unused / int(documents @ tokens),
        cut_documents=cut,
        cut_share=cut / num_documents,
        windows_per_document=1.0,
    )


def _pack(lengths: Lengths, borders: _Borders) -> Waste:
    """Windows of L + 1 tokens filled with whole documents, longer ones cut; see `PackWindows`."""
    seq_len, tokens, documents = borders.seq_len, lengths.tokens, lengths.documents
    width = seq_len + 1
    num_documents = int(documents.sum())
    histogram = np.zeros(width + 1, np.int64)
    np.add.at(histogram, np.minimum(tokens, width), documents)
    packing = best_fit(histogram)
    padding = packing.padding(seq_len)
    unused = int(documents @ np.maximum(tokens - width, 0))
    cut = int(documents[tokens > width].sum())
    return Waste(
        layout="pack",
        seq_len=seq_len,
        windows=packing.num_windows,
        padding=int(packing.windows @ padding),
        padding_share=int(packing.windows @ padding) / (packing.num_windows * seq_len),
        padded_windows=int(packing.windows[padding > 0].sum()),
        unused_tokens=unused,
        unused_share=unused / int(documents @ tokens),
        cut_documents=cut,
        cut_share=cut / num_documents,
        windows_per_document=1.0,
    )


# One function for each layout: its waste, from the lengths and from how documents lie over the borders of windows in a row.
_WASTE_BY_LAYOUT: tuple[Callable[[Lengths, _Borders], Waste], ...] = (_concat, _pad, _pack)


def count_text(shards: ShardSet, tokenizer: Tokenizer, progress: Progress = no_progress) -> Text:
    """Count the characters and bytes behind the tokens of a dataset.

    Args:
        shards: the dataset.
        tokenizer: the one that made it.
        progress: shows the bytes of the `.bin` files that are read.

    Raises:
        FormatError: a token outside the vocabulary.
    """
    info = tokenizer.info
    counts = np.zeros(info.vocab_size, np.int64)
    frames = np.zeros(info.vocab_size, np.int64)
    with progress("count", shards.manifest.num_bytes) as report:
        for index, shard in _mapped_shards(shards):
            for start in range(0, len(shard.tokens), _BLOCK):
                block = shard.tokens[start : start + _BLOCK]
                shards.check_tokens(block[None], np.array([int(shards.token_starts[index]) + start]))
                counts += np.bincount(block, minlength=info.vocab_size)
                report(block.nbytes, 0)
            if not shards.manifest.has_masks:  # conversations have no frame
                if info.bos_id is not None:
                    frames[info.bos_id] += _count_at(shard, "first", info.bos_id)
                frames[info.eos_id] += _count_at(shard, "last", info.eos_id)
    num_tokens = int((counts - frames).sum())
    token_bytes = token_bytes_of(tokenizer)
    sampled = None
    if token_bytes.is_exact:
        characters = int((counts - frames) @ token_bytes.num_characters)
        num_bytes = int((counts - frames) @ token_bytes.num_bytes)
    else:
        sampled, sample_tokens, *sizes = _decode_sample(shards, tokenizer)
        characters, num_bytes = (round(size * num_tokens / max(1, sample_tokens)) for size in sizes)
    return Text(
        tokens=num_tokens,
        characters=characters,
        bytes=num_bytes,
        characters_per_token=characters / max(1, num_tokens),
        bytes_per_token=num_bytes / max(1, num_tokens),
        estimated_from_documents=sampled,
        ids_used=int(np.count_nonzero(counts)),
    )


def _count_at(shard: Shard, place: Literal["first", "last"], token_id: int) -> int:
    """Count the sequences of a shard whose first or last token is this one."""
    count = 0
    for start in range(0, len(shard.lengths), _BLOCK):
        at = shard.offsets[start : start + _BLOCK] // shard.tokens.itemsize
        if place == "last":
            at = at + shard.lengths[start : start + _BLOCK] - 1
        count += int(np.count_nonzero(shard.tokens[at] == token_id))
    return count


def _decode_sample(shards: ShardSet, tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    """Decode documents spread evenly over the dataset; return (documents, tokens, characters, UTF-8 bytes)."""
    info = tokenizer.info
    last = int(shards.sequence_starts[-1]) - 1
    chosen = np.unique(np.linspace(0, last, SAMPLED_DOCUMENTS).round().astype(np.int64))
    owners = np.searchsorted(shards.sequence_starts, chosen, side="right") - 1
    starts, lengths = shards.sequence_spans(owners, chosen - shards.sequence_starts[owners])
    tokens = characters = num_bytes = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        ids = shards.slice(start, start + length).tolist()
        if not shards.manifest.has_masks:
            ids = ids[ids[0] == info.bos_id : len(ids) - (ids[-1] == info.eos_id)]
        text = tokenizer.decode(ids)
        tokens += len(ids)
        characters += len(text)
        num_bytes += len(text.encode())
    return len(chosen), tokens, characters, num_bytes
