"""shuffle(): the same documents in a pseudorandom order that follows from the seed alone.

Document i of the result is document `Permutation(n, seed, 0)[i]` of the source. The permutation is computed index by index, each index
once, so the work grows linearly with the number of documents and there is never a list of all of them.

The source is read twice. The first pass goes from front to back and checks the checksums. The second reads from memory maps in the order
of the result, a million documents at a time: the permutation gives their numbers, the indexes give their positions and lengths, and from
these the borders of the new shards follow. The tokens of a shard, and its loss mask where there is one, are copied 64 MiB at a time, in
the order in which they lie in the source. A pair stays one document: chosen, then rejected.

So the memory holds the positions of a million documents, those of one shard, and 64 MiB of tokens, whether the dataset has 10^6
documents or 10^9. The pages of the maps come on top of that; the system takes them back when it needs them.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.checked_reading import carry_set_aside, checked_sequences
from minimind_data.dataset.format import InputEntry, Manifest, ShardEntry, ShardOrigin, TokenArray, check_name
from minimind_data.dataset.framing import document_ranges
from minimind_data.dataset.shard import Shard, mask_of
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.staging import new_folder, write_metadata
from minimind_data.dataset.writer import ShardWriter
from minimind_data.errors import UserError
from minimind_data.options import as_paths, parse_size
from minimind_data.permutation import MAX_SEED, Permutation
from minimind_data.reporting import Progress, no_progress
from minimind_data.system import allow_open_files

ORDER_VERSION = 2
"""How the order follows from the seed; it is in the manifest. Version 1, which is in none, sorted the documents by hashes of their numbers."""

_DOCUMENTS_AT_ONCE = 2**20
_FETCH_BYTES = 64 * 2**20
_GATHER_TOKENS = 2**19
_LONG_DOCUMENT = 2**12
"""Documents of at least so many tokens are copied one by one: an index entry for each of their tokens would cost more."""


@dataclass(frozen=True, kw_only=True)
class ShuffleOptions:
    """How documents are shuffled."""

    out: Annotated[Path, "Folder to write, new or empty."]
    seed: Annotated[int, "Seed of the order."] = 42
    shard_bytes: Annotated[int, "Bytes of tokens in one shard.", parse_size] = 64 * 2**20

    def __post_init__(self) -> None:
        as_paths(self, "out")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"`seed` must be from 0 to 2^64 - 1, not {self.seed}")
        if self.shard_bytes < 1:
            raise ValueError(f"`shard_bytes` must be at least 1, not {self.shard_bytes}")


def shuffle(
    source: Path | str,
    options: ShuffleOptions,
    *,
    progress: Progress = no_progress,
) -> Manifest:
    """Write the documents of a dataset in another order, every document exactly once.

    The new manifest has one input, the source as a whole: the size and the checksum of its tokens end to end.

    Args:
        source: the folder of the dataset.
        options: the seed, and the folder of the result.
        progress: shows the bytes that are read, each of them twice, and the tokens that are written.

    Returns:
        The manifest of the result.

    Raises:
        UserError: `out` cannot be written to, or the dataset has no documents.
        FormatError: the dataset is damaged.
    """
    source = Path(source)
    shards = ShardSet.open(source)
    check_name(str(source))
    if not shards.num_documents:
        raise UserError("has no documents, so there is nothing to shuffle", where=source)
    allow_open_files(2 * len(shards))
    manifest = shards.manifest
    num_bytes = manifest.num_bytes
    with new_folder(options.out) as folder, progress("shuffle", 2 * num_bytes) as report:
        digest = hashlib.sha256()
        for index in range(len(shards)):
            for tokens, _, _ in checked_sequences(shards, index, lambda done, _: report(done, 0)):
                digest.update(tokens.view(np.uint8).data)
        dataset = InputEntry(path=str(source), bytes=num_bytes, sha256=digest.hexdigest())
        whole_source = ShardOrigin(input=0, input_start=0, input_stop=num_bytes, input_sha256=dataset.sha256)
        entries = []
        for number, (starts, lengths) in enumerate(_groups(shards, options)):
            with ShardWriter(
                folder,
                f"shuffled-{number:05d}",
                manifest.dtype,
                sequences_per_document=manifest.sequences_per_document,
                masked=manifest.has_masks,
            ) as writer:
                for first, last in document_ranges(lengths, _FETCH_BYTES // shards.dtype.itemsize):
                    spans = starts[first:last], lengths[first:last]
                    tokens = fetch(shards, *spans)
                    masks = fetch(shards, *spans, mask_of) if manifest.has_masks else None
                    writer.append(tokens, lengths[first:last], masks)
                    report(tokens.nbytes, len(tokens))
                written = writer.commit()
            entries.append(
                ShardEntry(
                    name=f"shuffled-{number:05d}",
                    written=written,
                    # Which shard the doubtful conversations went to is not known, so the first one counts them all.
                    origin=replace(
                        whole_source,
                        different_prompts=0 if number else manifest.different_prompts,
                        unlearned=0 if number else manifest.unlearned,
                        unread={} if number else manifest.unread,
                        forms={} if number else manifest.forms,
                    ),
                )
            )
        result = Manifest(
            kind=manifest.kind,
            dtype=manifest.dtype,
            tokenizer=manifest.tokenizer,
            options={
                "shuffled_from": manifest.fingerprint,
                "seed": options.seed,
                "order_version": ORDER_VERSION,
                "shard_bytes": options.shard_bytes,
            },
            inputs=(dataset,),
            shards=tuple(entries),
            empty_texts=manifest.empty_texts,
            set_aside=manifest.set_aside,
            duplicates=manifest.duplicates,
            set_aside_sha256=carry_set_aside([shards], folder),
            tokenizer_config_sha256=manifest.tokenizer_config_sha256,
        )
        write_metadata(folder, result, source)
    return result


def order(
    num_documents: int, seed: int, documents_at_once: int = _DOCUMENTS_AT_ONCE
) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of all documents in the order of the result, piece by piece.

    Args:
        num_documents: of the dataset.
        seed: 0 to 2^64 - 1.
        documents_at_once: how many numbers a piece has; the order does not depend on it.

    Yields:
        int64, at most `documents_at_once` of the numbers 0 to num_documents - 1.
    """
    permutation = Permutation(num_documents, seed, 0)
    for first in range(0, num_documents, documents_at_once):
        yield permutation[np.arange(first, min(first + documents_at_once, num_documents))]


def _groups(
    shards: ShardSet, options: ShuffleOptions
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, for each shard of the result, (global number of each sequence's first token, its length)."""
    max_tokens = max(1, options.shard_bytes // shards.dtype.itemsize)
    each = shards.manifest.sequences_per_document
    starts, lengths = np.empty(0, np.int64), np.empty(0, np.int64)
    for numbers in order(shards.num_documents, options.seed):
        more_starts, more_lengths = _spans(shards, numbers)
        starts, lengths = np.concatenate([starts, more_starts]), np.concatenate([lengths, more_lengths])
        if not len(lengths):
            continue
        groups = [
            (each * first, each * last)
            for first, last in document_ranges(lengths.reshape(-1, each).sum(axis=1), max_tokens)
        ]
        for first, last in groups[:-1]:
            yield starts[first:last], lengths[first:last]
        starts, lengths = starts[groups[-1][0] :], lengths[groups[-1][0] :]
    yield starts, lengths


def _spans(shards: ShardSet, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (global number of its first token, length) of every sequence of these documents, in their order."""
    each = shards.manifest.sequences_per_document
    by_source = np.argsort(numbers)  # the indexes are read from front to back
    documents = numbers[by_source]
    owners = np.searchsorted(shards.document_starts, documents, side="right") - 1
    sequences = each * (documents - shards.document_starts[owners])[:, None] + np.arange(each)
    spans = shards.sequence_spans(np.repeat(owners, each), sequences.ravel())
    places = np.empty_like(by_source)
    places[by_source] = np.arange(len(numbers))
    starts, lengths = (span.reshape(-1, each)[places].ravel() for span in spans)
    return starts, lengths


def tokens_of(shard: Shard) -> TokenArray:
    """Return the tokens of a shard."""
    return shard.tokens


def fetch(
    shards: ShardSet,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    array_of: Callable[[Shard], NDArray[Any]] = tokens_of,
) -> NDArray[Any]:
    """Copy sequences out of the memory maps, which are read from front to back.

    Args:
        shards: the dataset.
        starts: int64 [n], the global number of each sequence's first token.
        lengths: int64 [n], its tokens.
        array_of: returns what is copied from a shard: its tokens, or its loss mask.

    Returns:
        [sum(lengths)] of the dataset's dtype, of uint8 for masks: the sequences end to end, in the order of `starts`.
    """
    target = np.empty(int(lengths.sum()), shards.dtype if array_of is tokens_of else np.uint8)
    places = np.cumsum(lengths) - lengths
    by_source = np.argsort(starts, kind="stable")
    owners = shards.owners(starts[by_source])
    borders = np.flatnonzero(np.diff(owners, prepend=-1, append=len(shards)))
    for begin, end in itertools.pairwise(borders):
        owner = int(owners[begin])
        documents = by_source[begin:end]
        inside = starts[documents] - shards.token_starts[owner]
        source = array_of(shards.shard(owner))
        _copy_documents(source, inside, lengths[documents], target, places[documents])
    return target


def _copy_documents(
    source: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    target: NDArray[Any],
    places: NDArray[np.int64],
) -> None:
    """Copy source[starts:starts + lengths] to target[places:…] for every document: long ones by slices, the others by index."""
    is_long = lengths >= _LONG_DOCUMENT
    for start, length, place in zip(starts[is_long], lengths[is_long], places[is_long], strict=True):
        target[place : place + length] = source[start : start + length]
    starts, lengths, places = starts[~is_long], lengths[~is_long], places[~is_long]
    for first, last in document_ranges(lengths, _GATHER_TOKENS):
        here = lengths[first:last]
        inside = np.arange(int(here.sum())) - np.repeat(np.cumsum(here) - here, here)
        target[np.repeat(places[first:last], here) + inside] = source[
            np.repeat(starts[first:last], here) + inside
        ]
