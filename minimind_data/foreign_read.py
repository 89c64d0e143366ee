"""Documents out of the formats that `foreign.py` describes, block by block.

Files are read from front to back in blocks of bounded size, so memory does not grow with them. Ids are held against the
vocabulary as they come; the documents keep whatever frame they have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_data.foreign import STREAM_HEADERS, Source, StreamHeader
from minimind_data.format import INDEX_HEADER_BYTES, INDEX_MAGIC, INDEX_VERSION
from minimind_data.framing import BLOCK_TOKENS, check_ids, check_lengths, document_ranges

_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MEGATRON_FLOATS = {6: "float64", 7: "float32"}
_INDEX_BLOCK = 2**17
"""Documents whose index entries are read at a time."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some whole documents of one file."""

    input: int
    """Which of the source's token files they begin in."""
    start: int
    """First byte of that file that they were made of."""
    stop: int
    """The byte after the last."""
    num_bytes: int
    """How far this batch went on in the file, for progress."""
    tokens: NDArray[Any]
    """[sum(lengths)] integers of the source's own dtype, ids checked."""
    lengths: NDArray[np.int64]
    """[documents]"""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader must know beside the files."""

    vocab_size: int
    separator_id: int
    """The id at which streams are cut into documents."""
    column: str
    """Name of the column of ids in Arrow and Parquet tables."""
    block_tokens: int = BLOCK_TOKENS
    """Tokens of a batch, about; a document is never divided."""


def read(source: Source, options: ReadOptions) -> Iterator[Batch]:
    """Read all documents of a source in order.

    Raises:
        UserError: a file is damaged or not of this format, or an id is not in the vocabulary.
    """
    if source.format in {"hf", "parquet"}:
        from minimind_data.foreign_arrow import read_tables  # noqa: PLC0415 - pyarrow takes a while to load

        return (
            Batch(
                input=number,
                start=0,
                stop=source.token_files[number].stat().st_size,
                num_bytes=num_bytes,
                tokens=tokens,
                lengths=lengths,
            )
            for number, num_bytes, tokens, lengths in read_tables(
                source.token_files, options.column, options.vocab_size, options.block_tokens
            )
        )
    if source.format == "megatron":
        return _read_megatron(source, options)
    if source.format == "datatrove":
        return _read_datatrove(source, options)
    return _read_stream(source, options)


def _read_array(file: BinaryIO, path: Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """Read `count` numbers from the byte `offset` on."""
    file.seek(offset)
    array = np.fromfile(file, dtype, count)
    if len(array) != count:
        raise UserError(
            f"{path}: ends at byte {offset + array.nbytes:,} in the middle of its data; copy it again"
        )
    return array


def _documents(
    path: Path, number: int, options: ReadOptions, *, dtype: str, stops: NDArray[np.int64], first_token: int
) -> Iterator[Batch]:
    """Read consecutive documents that end at the tokens `stops` of a file without a header."""
    item = np.dtype(dtype).itemsize
    lengths = np.diff(stops, prepend=first_token)
    check_lengths(lengths, str(path))
    with path.open("rb") as file:
        for first, last in document_ranges(lengths, options.block_tokens):
            start = int(stops[first] - lengths[first])
            stop = int(stops[last - 1])
            tokens = _read_array(file, path, dtype, start * item, stop - start)
            check_ids(tokens, options.vocab_size, _place(path, start))
            yield Batch(
                input=number,
                start=start * item,
                stop=stop * item,
                num_bytes=(stop - start) * item,
                tokens=tokens,
                lengths=lengths[first:last],
            )


def _place(path: Path, first_token: int) -> Callable[[int], str]:
    """Return what says, of a token of a block, where in the file it stands."""
    return lambda index: f"{path}: token {first_token + index:,}"


def _read_megatron(source: Source, options: ReadOptions) -> Iterator[Batch]:
    for number, (path, index_path) in enumerate(zip(source.token_files, source.side_files, strict=True)):
        with index_path.open("rb") as index:
            dtype, num_sequences, num_documents = _megatron_header(index, index_path)
            item = np.dtype(dtype).itemsize
            size = path.stat().st_size
            following = 0  # the byte and the sequence that the next document must begin with
            sequence = 0
            for first in range(0, num_documents, _INDEX_BLOCK):
                count = min(_INDEX_BLOCK, num_documents - first)
                at = INDEX_HEADER_BYTES + 12 * num_sequences + 8 * first
                starts = _read_array(index, index_path, "<i8", at, count + 1)
                last_sequence = num_sequences if first + count == num_documents else int(starts[-1])
                if (
                    int(starts[0]) != sequence
                    or int(starts[-1]) != last_sequence
                    or (np.diff(starts) < 0).any()
                    or last_sequence > num_sequences
                ):
                    raise UserError(
                        f"{index_path}: its documents {first:,} to {first + count:,} do not follow one another from sequence {sequence:,} "
                        f"to {last_sequence:,} of {num_sequences:,}; it is damaged, or was not finalized: make it again"
                    )
                ends, following = _megatron_ends(
                    index, index_path, starts, num_sequences=num_sequences, following=following, item=item
                )
                yield from _documents(
                    path,
                    number,
                    options,
                    dtype=dtype,
                    stops=ends[1:] // item,
                    first_token=int(ends[0]) // item,
                )
                sequence = last_sequence
            if following != size:
                raise UserError(
                    f"{path}: {size:,} bytes, where its index speaks of {following:,}; copy both files again"
                )


def _megatron_header(index: BinaryIO, path: Path) -> tuple[str, int, int]:
    """Return (numpy dtype, sequences, documents), after checking the size of the file."""
    header = index.read(INDEX_HEADER_BYTES)
    if len(header) < INDEX_HEADER_BYTES or not header.startswith(INDEX_MAGIC):
        raise UserError(
            f"{path}: no Megatron index (it should begin with {INDEX_MAGIC!r}); name another --from"
        )
    version, num_sequences, num_starts = (
        int.from_bytes(header[start:stop], "little") for start, stop in ((9, 17), (18, 26), (26, 34))
    )
    code = header[17]
    if code in _MEGATRON_FLOATS:
        raise UserError(f"{path}: its numbers are {_MEGATRON_FLOATS[code]}, which are no token ids")
    if version != INDEX_VERSION or code not in _MEGATRON_DTYPES or num_starts < 1:
        raise UserError(
            f"{path}: version {version}, dtype code {code}, {num_starts} document starts; "
            f"known are version {INDEX_VERSION} and dtype codes {sorted(_MEGATRON_DTYPES)}"
        )
    wanted = INDEX_HEADER_BYTES + 12 * num_sequences + 8 * num_starts
    size = path.stat().st_size
    if num_sequences and size == wanted + num_sequences:
        raise UserError(
            f"{path}: a multimodal index (a mode for each sequence at its end), whose .bin holds more than text; "
            "only text can be taken over"
        )
    if size != wanted:
        raise UserError(f"{path}: {size:,} bytes, where its header wants {wanted:,}; copy it again")
    return _MEGATRON_DTYPES[code], num_sequences, num_starts - 1


def _megatron_ends(
    index: BinaryIO, path: Path, starts: NDArray[np.int64], *, num_sequences: int, following: int, item: int
) -> tuple[NDArray[np.int64], int]:
    """Find the bytes between documents.

    Args:
        index: the open index.
        path: for errors.
        starts: int64 [n + 1], the sequence at which each document starts, and the one after the last.
        num_sequences: of the whole index.
        following: the byte at which the first of these sequences must begin.
        item: bytes of a token.

    Returns:
        (int64 [n + 1], the byte at which each document starts, and the one after the last; that last byte).
    """
    ends = np.empty(len(starts), np.int64)
    ends[starts == starts[0]] = following
    # A document may have any number of sequences: go through them in pieces, noting the borders that fall into each.
    for first in range(int(starts[0]), int(starts[-1]), _INDEX_BLOCK):
        count = min(_INDEX_BLOCK, int(starts[-1]) - first)
        lengths = _read_array(index, path, "<i4", INDEX_HEADER_BYTES + 4 * first, count).astype(np.int64)
        offsets_at = INDEX_HEADER_BYTES + 4 * num_sequences + 8 * first
        offsets = _read_array(index, path, "<i8", offsets_at, count)
        stops = following + np.cumsum(lengths * item)
        if (lengths < 0).any() or not np.array_equal(offsets, stops - lengths * item):
            raise UserError(
                f"{path}: its sequences {first:,} to {first + count:,} do not stand end to end in the .bin; "
                "write the dataset again with Megatron's IndexedDatasetBuilder"
            )
        following = int(stops[-1])
        low, high = np.searchsorted(starts, [first, first + count], side="right")
        ends[low:high] = stops[starts[low:high] - first - 1]
    return ends, following


def _read_datatrove(source: Source, options: ReadOptions) -> Iterator[Batch]:
    for number, (path, index_path) in enumerate(zip(source.token_files, source.side_files, strict=True)):
        if path.with_name(f"{path.name}.loss").exists():
            raise UserError(
                f"{path}.loss: a loss mask, which would be lost; move it away if the tokens alone are what you want"
            )
        size, index_size = path.stat().st_size, index_path.stat().st_size
        num_documents, left_over = divmod(index_size, 8)
        if left_over:
            raise UserError(
                f"{index_path}: {index_size:,} bytes are no list of 8-byte numbers; copy it again"
            )
        if not num_documents:
            if size:
                raise UserError(f"{path}: {size:,} bytes, but no document in its index; make it again")
            continue
        with index_path.open("rb") as index:
            num_tokens = int(_read_array(index, index_path, "<u8", index_size - 8, 1)[0])
            dtype = _datatrove_dtype(path, size, num_tokens)
            done = 0
            for first in range(0, num_documents, _INDEX_BLOCK):
                count = min(_INDEX_BLOCK, num_documents - first)
                stops = _read_array(index, index_path, "<u8", 8 * first, count).astype(np.int64)
                if (np.diff(stops, prepend=done) < 0).any() or int(stops[-1]) > num_tokens:
                    raise UserError(
                        f"{index_path}: the ends of documents {first:,} to {first + count:,} do not grow from {done:,}; "
                        "it is damaged: make it again"
                    )
                yield from _documents(path, number, options, dtype=dtype, stops=stops, first_token=done)
                done = int(stops[-1])


def _datatrove_dtype(path: Path, size: int, num_tokens: int) -> str:
    """Return the dtype of the ids, which the metadata names and the sizes must bear out."""
    token_bytes = size // num_tokens if num_tokens else 2
    if num_tokens * token_bytes != size or token_bytes not in {2, 4}:
        raise UserError(
            f"{path}: {size:,} bytes do not hold the {num_tokens:,} tokens of its index in 2 or 4 bytes each; copy both files again"
        )
    try:
        first_line = path.with_name(f"{path.name}.metadata").read_text().partition("\n")[0]
    except FileNotFoundError:
        return f"<u{token_bytes}"
    stated = first_line.rpartition("|")[2].strip()
    if num_tokens and stated.isdecimal() and int(stated) != token_bytes:
        raise UserError(
            f"{path}.metadata: says {stated} bytes a token, where the file and its index say {token_bytes}; find out which is right"
        )
    return f"<u{token_bytes}"


def _read_stream(source: Source, options: ReadOptions) -> Iterator[Batch]:
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
                block = _read_array(file, path, dtype, offset + first * item, count)
                check_ids(block, options.vocab_size, _place(path, first))
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
            int(number) for number in _read_array(file, path, "<i4", 0, header.NUM_BYTES // 4)[:3]
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
