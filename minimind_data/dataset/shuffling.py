"""shuffle(): a dataset with the same documents in a pseudorandom order that follows from the seed alone.

The order is that of a hash of each document's number, so no list of all documents exists: the hashes fall into ranges of
about two million documents, and each range is found by going over the numbers again. So memory is bounded by these two
million documents and one shard (64 MiB of it at a time), whatever the size of the dataset: 300 MB were measured for 2.5
million documents of 1 GB, the maps' pages not counted, which the system takes back when it wants them.

The source is read twice. First from front to back, against its checksums. Then shard by shard of the result: the documents
of a shard are fetched from the memory maps in the order in which they lie there, with their masks where they have some. A pair
stays one document: chosen, then rejected.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.checked import carry_set_aside, checked_sequences
from minimind_data.dataset.format import InputEntry, Manifest, ShardEntry, TokenArray
from minimind_data.dataset.framing import document_ranges
from minimind_data.dataset.shard import Shard, mask_of
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.staging import new_folder, write_metadata
from minimind_data.dataset.writer import ShardWriter
from minimind_data.errors import UserError
from minimind_data.options import parse_size
from minimind_data.reporting import Report
from minimind_data.system import allow_open_files

_DOCUMENTS_AT_ONCE = 2**21
_NUMBERS_AT_ONCE = 2**18
_FETCH_BYTES = 64 * 2**20
_GATHER_TOKENS = 2**19
_LONG_DOCUMENT = 2**12
"""Tokens from which on a document is copied by itself: an index entry for each of its tokens would cost more."""

_GOLDEN, _MIX_1, _MIX_2 = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True, kw_only=True)
class ShuffleOptions:
    """How documents are shuffled."""

    out: Annotated[Path, "Folder to make; it must not hold anything."]
    seed: Annotated[int, "Seed of the order."] = 42
    shard_bytes: Annotated[int, "Bytes of tokens that make one shard.", parse_size] = 64 * 2**20

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, not {self.shard_bytes}")


def shuffle(
    source: Path,
    options: ShuffleOptions,
    *,
    progress: Callable[[int], Report] = lambda _: lambda _bytes, _tokens: None,
) -> Manifest:
    """Write the documents of a dataset in another order; every document stands in the result exactly once.

    Its one input is the source: its tokens end to end, with their checksum, are what every shard came from.

    Args:
        source: the dataset.
        options: the seed, and where to.
        progress: called with the bytes to be read; what it returns is told of bytes and tokens as they are done.

    Raises:
        UserError: `out` cannot be made, or the dataset cannot be shuffled.
        FormatError: the dataset is damaged.
    """
    shards = ShardSet.open(source)
    if not shards.num_documents:
        raise UserError(f"{source}: holds no document; there is nothing to shuffle")
    allow_open_files(2 * len(shards))
    manifest = shards.manifest
    num_bytes = sum(entry.bytes for entry in manifest.shards)
    with new_folder(options.out) as folder:
        report = progress(2 * num_bytes)
        digest = hashlib.sha256()
        for index in range(len(shards)):
            for tokens, _, _ in checked_sequences(shards, index, lambda done, _: report(done, 0)):
                digest.update(tokens.view(np.uint8).data)
        told = InputEntry(path=str(source), bytes=num_bytes, sha256=digest.hexdigest())
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
                    input=0,
                    input_start=0,
                    input_stop=told.bytes,
                    input_sha256=told.sha256,
                    # Where those went is not known; the first shard tells of all.
                    different_prompts=0 if number else sum(one.different_prompts for one in manifest.shards),
                    unlearned=0 if number else sum(one.unlearned for one in manifest.shards),
                    **asdict(written),
                )
            )
        made = Manifest(
            kind=manifest.kind,
            dtype=manifest.dtype,
            tokenizer=manifest.tokenizer,
            options={
                "shuffled_from": manifest.fingerprint,
                "seed": options.seed,
                "shard_bytes": options.shard_bytes,
            },
            inputs=(told,),
            shards=tuple(entries),
            empty_texts=manifest.empty_texts,
            set_aside=manifest.set_aside,
            duplicates=manifest.duplicates,
            set_aside_sha256=carry_set_aside([shards], folder),
            tokenizer_config_sha256=manifest.tokenizer_config_sha256,
        )
        write_metadata(folder, made, source)
    return made


def order(
    num_documents: int, seed: int, documents_at_once: int = _DOCUMENTS_AT_ONCE
) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of all documents in the order of their hashes; the pieces do not matter, only what they make up.

    Args:
        num_documents: of the dataset.
        seed: 0 to 2^64 - 1.
        documents_at_once: how many numbers, about, are held at a time.

    Yields:
        int64, some of the numbers 0 to num_documents - 1.
    """
    num_ranges = -(-num_documents // documents_at_once)
    for index in range(num_ranges):
        low, high = (np.uint64((bound << 64) // num_ranges - (bound > index)) for bound in (index, index + 1))
        numbers, hashes = [], []
        for first in range(0, num_documents, _NUMBERS_AT_ONCE):
            here = np.arange(first, min(first + _NUMBERS_AT_ONCE, num_documents), dtype=np.uint64)
            hashed = _hash(here, seed)
            inside = (hashed >= low) & (hashed <= high)
            numbers.append(here[inside])
            hashes.append(hashed[inside])
        # Equal hashes, one pair in 10^19, keep the order of their numbers
        yield np.concatenate(numbers)[np.argsort(np.concatenate(hashes), kind="stable")].astype(np.int64)


def _hash(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Hash document numbers, uint64 [n] to uint64 [n]: two rounds of splitmix64, keyed by the seed before each."""
    keys = _mix((np.arange(1, 3, dtype=np.uint64) * _GOLDEN) + _mix(np.full(2, seed, np.uint64) + _GOLDEN))
    return _mix(_mix((numbers + keys[0]) * _GOLDEN) ^ keys[1])


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble uint64 [n], each for itself and reversibly: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _groups(
    shards: ShardSet, options: ShuffleOptions
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, for each shard of the result, (global number of each sequence's first token, its length)."""
    max_tokens = max(1, options.shard_bytes // shards.dtype.itemsize)
    each = shards.manifest.sequences_per_document
    starts, lengths = np.empty(0, np.int64), np.empty(0, np.int64)
    for numbers in order(shards.num_documents, options.seed):
        owners = np.searchsorted(shards.document_starts, numbers, side="right") - 1
        sequences = each * (numbers - shards.document_starts[owners])[:, None] + np.arange(each)
        found = shards.sequence_spans(np.repeat(owners, each), sequences.ravel())
        starts, lengths = np.concatenate([starts, found[0]]), np.concatenate([lengths, found[1]])
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


def tokens_of(shard: Shard) -> TokenArray:
    """Return the tokens of a shard."""
    return shard.tokens


def fetch(
    shards: ShardSet,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    array_of: Callable[[Shard], NDArray[Any]] = tokens_of,
) -> NDArray[Any]:
    """Copy sequences out of the maps, in the order in which they lie there.

    Args:
        shards: the dataset.
        starts: int64 [n], the global number of each sequence's first token.
        lengths: int64 [n], its tokens.
        array_of: what is copied: the tokens of a shard, or its mask.

    Returns:
        [sum(lengths)] of the dataset's dtype (of uint8, for masks): the sequences end to end, in the order in which they were
        asked for.
    """
    fetched = np.empty(int(lengths.sum()), shards.dtype if array_of is tokens_of else np.uint8)
    places = np.cumsum(lengths) - lengths
    by_source = np.argsort(starts, kind="stable")
    owners = shards.owners(starts[by_source])
    borders = np.flatnonzero(np.diff(owners, prepend=-1, append=len(shards)))
    for begin, end in itertools.pairwise(borders):
        owner = int(owners[begin])
        documents = by_source[begin:end]
        inside = starts[documents] - shards.token_starts[owner]
        source = array_of(shards.shard(owner))
        _copy_documents(source, inside, lengths[documents], fetched, places[documents])
    return fetched


def _copy_documents(
    source: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    target: NDArray[Any],
    places: NDArray[np.int64],
) -> None:
    """Copy source[starts:starts + lengths] to target[places:…] for every document: long ones by slices, the rest by index."""
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
