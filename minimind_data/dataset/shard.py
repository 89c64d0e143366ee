"""Shard: the files of one shard, mapped into memory and compared with the manifest."""

import contextlib
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import (
    INDEX_HEADER_BYTES,
    REMAKE,
    FormatError,
    IndexHeader,
    MaskArray,
    ShardEntry,
    TokenArray,
    TokenDtype,
    numpy_dtype,
)
from minimind_data.errors import UserError
from minimind_data.files import MORE_FILES, is_out_of_files
from minimind_data.reporting import counted

_HAS_WILLNEED = hasattr(mmap, "MADV_WILLNEED")
_INDEX_BLOCK = 2**20
"""Sequences whose entries in the index are compared at a time."""
# A map needs no open file; before Python 3.13 it keeps one all the same.
_NO_FILE: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


@contextlib.contextmanager
def _opened(path: Path, expected_bytes: int) -> Iterator[int]:
    """Open a file, which must have the size that the manifest says."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise FormatError("missing", where=path, remedy=REMAKE) from None
    except OSError as error:
        if is_out_of_files(error):
            raise UserError(f"cannot be opened ({error.strerror})", where=path, remedy=MORE_FILES) from None
        raise FormatError(
            f"cannot be opened ({error.strerror})", where=path, remedy=f"mend that, or {REMAKE}"
        ) from None
    try:
        size = os.fstat(descriptor).st_size
        if size != expected_bytes:
            what = f"{size:,} bytes, where the manifest says {expected_bytes:,}"
            raise FormatError(what, where=path, remedy=REMAKE)
        yield descriptor
    finally:
        os.close(descriptor)


def _map(descriptor: int) -> mmap.mmap:
    """Map a whole file, which must not be empty, read-only."""
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ, **_NO_FILE)


class Shard:
    """One shard in memory maps. Opening it reads the header of its index, its first token and its last.

    Attributes:
        entry: what the manifest says of it.
        tokens: uint16 or int32 [tokens], the sequences end to end.
        ends: its first and its last token; None where it has no tokens.
        mask: uint8 [tokens], the loss mask, 1 where a token is learned; None in pre-training, where all tokens are.
        index: uint8, the whole `.idx` file; the next three attributes are views of it.
        lengths: int32 [sequences], the number of tokens of each sequence.
        offsets: int64 [sequences], the byte offset of each sequence in the `.bin` file.
        document_starts: int64 [documents + 1], the sequence at which each document starts.

    Raises:
        FormatError: a file is missing, has another size than the manifest says, or a wrong header.
    """

    def __init__(self, folder: Path, entry: ShardEntry, dtype: TokenDtype) -> None:
        self.entry = entry
        expected = IndexHeader(
            dtype=dtype, num_sequences=entry.written.sequences, num_documents=entry.written.documents
        )
        index_path = folder / f"{entry.name}.idx"
        # These few bytes are read from the file and not from the map: a page fault makes the system read up to megabytes around it.
        with _opened(index_path, expected.file_bytes) as descriptor:
            header = IndexHeader.unpack(os.pread(descriptor, INDEX_HEADER_BYTES, 0), index_path)
            if header != expected:
                raise FormatError(
                    f"its header says {header}, where the manifest says {expected}",
                    where=index_path,
                    remedy=REMAKE,
                )
            self.index: NDArray[np.uint8] = np.frombuffer(_map(descriptor), np.uint8)
        lengths_stop = INDEX_HEADER_BYTES + 4 * entry.written.sequences
        offsets_stop = lengths_stop + 8 * entry.written.sequences
        self.lengths: NDArray[np.int32] = self.index[INDEX_HEADER_BYTES:lengths_stop].view("<i4")
        self.offsets: NDArray[np.int64] = self.index[lengths_stop:offsets_stop].view("<i8")
        self.document_starts: NDArray[np.int64] = self.index[offsets_stop:].view("<i8")
        self.ends: tuple[int, int] | None = None
        self._map: mmap.mmap | None = None
        self.tokens: TokenArray = np.empty(0, numpy_dtype(dtype))
        with _opened(folder / f"{entry.name}.bin", entry.written.bytes) as descriptor:
            if entry.written.bytes:
                size = self.tokens.itemsize
                first, last = (os.pread(descriptor, size, place) for place in (0, entry.written.bytes - size))
                begin, end = np.frombuffer(first + last, self.tokens.dtype).tolist()
                self.ends = begin, end
                self._map = _map(descriptor)
                self.tokens = np.frombuffer(self._map, self.tokens.dtype)
        self.mask: MaskArray | None = None
        self._mask_map: mmap.mmap | None = None
        if entry.written.mask_sha256:
            with _opened(folder / f"{entry.name}.mask", entry.written.tokens) as descriptor:
                self._mask_map = _map(descriptor)
                self.mask = np.frombuffer(self._mask_map, np.uint8)

    def __repr__(self) -> str:
        written = self.entry.written
        return f"Shard({self.entry.name!r}: {counted(written.documents, 'document')}, {counted(written.tokens, 'token')})"

    def index_problem(self) -> str:
        """Read the whole index and return a clause on what it contradicts, or an empty string; a checksum does not say that it is right."""
        written, item = self.entry.written, self.tokens.itemsize
        num_bytes = 0
        for first in range(0, written.sequences, _INDEX_BLOCK):
            lengths = self.lengths[first : first + _INDEX_BLOCK].astype(np.int64)
            stops = num_bytes + item * np.cumsum(lengths)
            if (lengths < 0).any() or (
                self.offsets[first : first + _INDEX_BLOCK] != stops - item * lengths
            ).any():
                return "its sequences do not lie end to end"
            num_bytes = int(stops[-1])
        if num_bytes != written.bytes:
            return f"its sequences have {num_bytes:,} bytes, and the shard {written.bytes:,}"
        starts = self.document_starts
        if starts[0] != 0 or starts[-1] != written.sequences or (starts[1:] < starts[:-1]).any():
            return "its documents are not made of its sequences"
        return ""

    def refuse_wrong_index(self, folder: Path) -> None:
        """Refuse an index that contradicts itself or its shard, for whoever reads all of it; `folder` is that of the shard.

        Raises:
            FormatError: it does.
        """
        if problem := self.index_problem():
            raise FormatError(problem, where=folder / f"{self.entry.name}.idx", remedy=REMAKE)

    def will_need(self, start: int, stop: int) -> None:
        """Tell the system that the tokens [start, stop) will be read soon; it returns at once and reads them in the background."""
        for memory_map, size in ((self._map, self.tokens.itemsize), (self._mask_map, 1)):
            if memory_map is None or not _HAS_WILLNEED:
                continue
            begin = start * size // mmap.PAGESIZE * mmap.PAGESIZE
            length = min(stop * size, len(memory_map)) - begin
            if length > 0:
                memory_map.madvise(mmap.MADV_WILLNEED, begin, length)

    def sequence_of(self, token: int) -> int:
        """Return the number of the sequence that the token at this offset of the shard belongs to."""
        return int(np.searchsorted(self.offsets, token * self.tokens.itemsize, side="right")) - 1


def mask_of(shard: Shard) -> MaskArray:
    """Return the loss mask of a shard that has one."""
    assert shard.mask is not None, shard.entry.name
    return shard.mask
