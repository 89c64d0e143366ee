"""Streams of ids with a separator between documents: nanoGPT's .bin, llm.c's and modded-nanogpt's with a header. `formats` has the layouts."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.framing import check_ids, check_lengths
from minimind_data.dataset.staging import durable_file
from minimind_data.errors import UserError
from minimind_data.interchange.batch import Batch, ForeignFormat, Part, ReadOptions, Source, place, read_array


@dataclass(frozen=True, kw_only=True)
class StreamHeader:
    """The header of a stream of tokens; nanoGPT has none."""

    magic: int
    version: int
    token_bytes: int
    """Bytes of an id, an unsigned integer."""

    NUM_BYTES = 1024

    def pack(self, num_tokens: int) -> bytes:
        """Return the header of a file that holds this many tokens."""
        return struct.pack("<3i", self.magic, self.version, num_tokens).ljust(self.NUM_BYTES, b"\0")


STREAM_HEADERS: dict[str, StreamHeader] = {
    "llmc": StreamHeader(magic=20240520, version=1, token_bytes=2),
    "llmc-llama3": StreamHeader(magic=20240801, version=7, token_bytes=4),
}

MAX_STREAM_TOKENS = 2**31 - 1

STREAMS = ("nanogpt", *STREAM_HEADERS)


def read_stream(source: Source, options: ReadOptions) -> Iterator[Batch]:
    """Cut the files, one stream of tokens, at the separator; it may stand before, behind or between documents.

    A document that goes on in the next file belongs to the file in which it begins. Nothing between two separators is no
    document: it may be the end of one and the beginning of the next.
    """
    header = STREAM_HEADERS.get(source.format)
    dtype = f"<u{header.token_bytes if header else 2}"
    item = np.dtype(dtype).itemsize
    open_document = _OpenDocument(source)
    for number, path in enumerate(source.token_files):
        offset, num_tokens = _stream_extent(path, header, item)
        found = 0
        with path.open("rb") as file:
            for first in range(0, num_tokens, options.block_tokens):
                count = min(options.block_tokens, num_tokens - first)
                block = read_array(file, path, dtype, offset + first * item, count)
                check_ids(block, options.vocab_size, place(path, first))
                cuts = np.flatnonzero(block == options.separator_id)
                found += len(cuts)
                byte = offset + first * item
                if len(cuts) and open_document.is_of_a_file_before(number):
                    yield open_document.end(block[: cuts[0]])
                    block, byte = block[cuts[0] + 1 :], byte + (int(cuts[0]) + 1) * item
                    cuts = cuts[1:] - cuts[0] - 1
                if len(cuts):
                    last = int(cuts[-1]) + 1
                    start, tokens = open_document.take(number, byte, block[:last])
                    is_separator = tokens == options.separator_id
                    lengths = np.diff(np.flatnonzero(is_separator), prepend=-1) - 1
                    stop = byte + last * item
                    yield Batch(
                        input=number,
                        start=start,
                        stop=stop,
                        num_bytes=stop - start,
                        tokens=tokens[~is_separator],
                        lengths=lengths[lengths > 0],
                    )
                    block, byte = block[last:], stop
                open_document.add(number, byte, block)
        if number == 0 and not found and num_tokens:
            raise UserError(
                f"{path}: the id {options.separator_id}, at which documents are cut, stands nowhere in it; "
                "say with --separator-id which id does that here"
            )
    if open_document.num_tokens:
        yield open_document.end(np.empty(0, dtype))


class _OpenDocument:
    """The tokens since the last separator: a document whose end has not come yet."""

    def __init__(self, source: Source) -> None:
        self._files = source.token_files
        self._pieces: list[NDArray[Any]] = []
        self._input = self._start = 0
        self.num_tokens = 0

    def is_of_a_file_before(self, number: int) -> bool:
        return bool(self.num_tokens) and self._input != number

    def add(self, number: int, byte: int, tokens: NDArray[Any]) -> None:
        """Go on with tokens that begin at this byte of the file with this number."""
        if not self.num_tokens:
            self._input, self._start = number, byte
        if len(tokens):
            self._pieces.append(tokens.copy())  # not a view that keeps its whole block
            self.num_tokens += len(tokens)
        check_lengths(np.array([self.num_tokens]), str(self._files[number]))

    def take(self, number: int, byte: int, tokens: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """Return the byte where this document began, and all tokens from there on, these being the last."""
        self.add(number, byte, tokens)
        start, joined = self._start, np.concatenate([*self._pieces, tokens[:0]])
        self._pieces, self.num_tokens = [], 0
        return start, joined

    def end(self, tokens: NDArray[Any]) -> Batch:
        """Return the document, these being its last tokens, as one that goes to the end of its file."""
        number = self._input
        start, document = self.take(number, 0, tokens)
        stop = self._files[number].stat().st_size
        return Batch(
            input=number,
            start=start,
            stop=stop,
            num_bytes=stop - start,
            tokens=document,
            lengths=np.array([len(document)]),
        )


def _stream_extent(path: Path, header: StreamHeader | None, item: int) -> tuple[int, int]:
    """Return (byte of the first token, number of tokens)."""
    size = path.stat().st_size
    if header is None:
        if size % item:
            raise UserError(
                f"{path}: {size:,} bytes are no whole number of {item}-byte ids; name another --from"
            )
        return 0, size // item
    with path.open("rb") as file:
        magic, version, num_tokens = (
            int(number) for number in read_array(file, path, "<i4", 0, header.NUM_BYTES // 4)[:3]
        )
    if (magic, version) != (header.magic, header.version):
        raise UserError(
            f"{path}: begins with {magic}, {version}, where this format has {header.magic}, {header.version}; name another --from"
        )
    wanted = header.NUM_BYTES + num_tokens * item
    if size != wanted:
        raise UserError(
            f"{path}: {size:,} bytes, where its header speaks of {num_tokens:,} tokens, {wanted:,} bytes; copy it again"
        )
    return header.NUM_BYTES, num_tokens


def write_stream(kind: ForeignFormat, path: Path, part: Part) -> int:
    """Write a stream; nanoGPT's goes without BOS, so EOS divides; llm.c's without EOS, so BOS stands before each document.

    Returns:
        How many documents hold the dividing id inside, and will be cut there.
    """
    header = STREAM_HEADERS.get(kind)
    token_bytes = header.token_bytes if header else 2
    info = part.shards.manifest.tokenizer
    if token_bytes < part.shards.dtype.itemsize:
        raise UserError(
            f"{part.shards.folder}: its vocabulary of {info.vocab_size:,} entries does not fit the {token_bytes}-byte ids of {kind}; "
            "take --to llmc-llama3 or another format"
        )
    num_tokens = part.num_tokens - part.num_documents
    if header and num_tokens > MAX_STREAM_TOKENS:
        raise UserError(
            f"{path.name}: {num_tokens:,} tokens, where a file of this format can say {MAX_STREAM_TOKENS:,}; leave out --one-file"
        )
    divider = info.bos_id if header else info.eos_id
    divided = 0
    with durable_file(path) as file:
        if header:
            file.write(header.pack(num_tokens))
        for tokens, lengths in part.documents():
            stops = np.cumsum(lengths)
            kept = np.ones(len(tokens), bool)
            kept[stops - 1 if header else stops - lengths] = False
            left = tokens[kept]
            # Count the dividers in each document: one is its own, more are inside
            documents = np.searchsorted(
                stops - np.arange(1, len(stops) + 1), np.flatnonzero(left == divider), "right"
            )
            divided += int((np.bincount(documents, minlength=len(lengths)) > 1).sum())
            file.write(left.astype(f"<u{token_bytes}").tobytes())
    return divided
