"""`megatron`: Megatron-LM's IndexedDataset, a pair NAME.bin and NAME.idx, little-endian.

`dataset.format` has the layout, which is that of our shards. Theirs also has the dtype codes 1 uint8, 2 int8, 3 int16, 5 int64 (6 and 7 are
floating point), several sequences in a document, and, where it is multimodal, one more byte for each sequence at the end of the index.

Source: Megatron-LM megatron/core/datasets/indexed_dataset.py (`DType`, `_IndexWriter`, `_IndexReader`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import INDEX_HEADER_BYTES, INDEX_MAGIC, INDEX_VERSION, IndexHeader
from minimind_data.dataset.staging import durable_file, place_file
from minimind_data.errors import UserError
from minimind_data.interchange.base import (
    INDEX_BLOCK,
    Batch,
    Part,
    ReadOptions,
    TokenFiles,
    TokenFormat,
    WriteOptions,
    read_array,
    read_documents,
)

_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}


class Megatron(TokenFormat):
    """Leaves nothing out: our shards have this format, so they are linked, unless several go into one file."""

    name = "megatron"
    suffix = ".bin"
    index_needed = ", an .idx beside every .bin"
    options = frozenset({"copy"})

    def recognizes(self, path: Path, start: bytes) -> bool:
        """See `TokenFormat.recognizes`; an index is recognized, and a .bin beside one."""
        return start.startswith(INDEX_MAGIC) or (
            path.suffix == self.suffix and _starts_with_magic(path.with_suffix(".idx"))
        )

    def file_of(self, source: Path) -> Path:
        """Accept the .bin, the .idx, or the name of both without suffix, as Megatron's own tools have it."""
        stem = source.with_suffix("") if source.suffix in {".bin", ".idx"} else source
        return stem.with_name(f"{stem.name}.bin")

    def index_of(self, path: Path) -> Path:
        """Return the .idx."""
        return path.with_suffix(".idx")

    def read(self, files: TokenFiles, options: ReadOptions) -> Iterator[Batch]:
        """See `TokenFormat.read`."""
        for number, (path, index_path) in enumerate(zip(files.token_files, files.index_files, strict=True)):
            with index_path.open("rb") as index:
                dtype, num_sequences, num_documents = _header(index, index_path)
                item = np.dtype(dtype).itemsize
                size = path.stat().st_size
                following = 0  # the byte and the sequence that the next document must begin with
                sequence = 0
                for first in range(0, num_documents, INDEX_BLOCK):
                    count = min(INDEX_BLOCK, num_documents - first)
                    at = INDEX_HEADER_BYTES + 12 * num_sequences + 8 * first
                    starts = read_array(index, index_path, "<i8", at, count + 1)
                    last_sequence = num_sequences if first + count == num_documents else int(starts[-1])
                    if (
                        int(starts[0]) != sequence
                        or int(starts[-1]) != last_sequence
                        or (np.diff(starts) < 0).any()
                        or last_sequence > num_sequences
                    ):
                        raise UserError(
                            f"its documents {first:,} to {first + count:,} do not follow one another from sequence "
                            f"{sequence:,} to {last_sequence:,} of {num_sequences:,}",
                            where=index_path,
                            remedy="it is damaged, or was not finalized: make it again",
                        )
                    ends, following = _ends(
                        index, index_path, starts, num_sequences=num_sequences, following=following, item=item
                    )
                    yield from read_documents(
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
                        f"{size:,} bytes, where its index says {following:,}",
                        where=path,
                        remedy="copy both files again",
                    )

    def write(self, folder: Path, part: Part, options: WriteOptions) -> int:
        """See `TokenFormat.write`."""
        if len(part.members) == 1:
            _place_shard(folder, part, copy=options.copy)
        else:
            _write_pair(folder, part)
        return 0


def _starts_with_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(INDEX_MAGIC)) == INDEX_MAGIC
    except FileNotFoundError:
        return False


def _header(index: BinaryIO, path: Path) -> tuple[str, int, int]:
    """Return (numpy dtype, sequences, documents), after checking the size of the file."""
    header = index.read(INDEX_HEADER_BYTES)
    if len(header) < INDEX_HEADER_BYTES or not header.startswith(INDEX_MAGIC):
        raise UserError(
            f"no Megatron index (it should begin with {INDEX_MAGIC!r})",
            where=path,
            remedy="name another `source_format`",
        )
    version, num_sequences, num_starts = (
        int.from_bytes(header[start:stop], "little") for start, stop in ((9, 17), (18, 26), (26, 34))
    )
    code = header[17]
    if code in _FLOATS:
        raise UserError(f"its numbers are {_FLOATS[code]}, which are no token ids", where=path)
    if version != INDEX_VERSION or code not in _DTYPES or num_starts < 1:
        raise UserError(
            f"version {version}, dtype code {code}, {num_starts} document starts; known are version "
            f"{INDEX_VERSION} and dtype codes {sorted(_DTYPES)}",
            where=path,
        )
    whole = INDEX_HEADER_BYTES + 12 * num_sequences + 8 * num_starts
    size = path.stat().st_size
    if num_sequences and size == whole + num_sequences:
        raise UserError(
            "a multimodal index (a mode for each sequence at its end), whose .bin holds more than text; "
            "only text can be converted",
            where=path,
        )
    if size != whole:
        raise UserError(
            f"{size:,} bytes, where its header says {whole:,}", where=path, remedy="copy it again"
        )
    return _DTYPES[code], num_sequences, num_starts - 1


def _ends(
    index: BinaryIO, path: Path, starts: NDArray[np.int64], *, num_sequences: int, following: int, item: int
) -> tuple[NDArray[np.int64], int]:
    """Find the bytes at which documents begin.

    Args:
        index: the open index.
        path: for errors.
        starts: int64 [n + 1], the sequence at which each document begins, and the one after the last.
        num_sequences: of the whole index.
        following: the byte at which the first of these sequences must begin.
        item: bytes of a token.

    Returns:
        (int64 [n + 1], the byte at which each document starts, and the one after the last; that last byte).
    """
    ends = np.empty(len(starts), np.int64)
    ends[starts == starts[0]] = following
    # A document may have any number of sequences: read them in blocks, and note the borders of documents in each.
    for first in range(int(starts[0]), int(starts[-1]), INDEX_BLOCK):
        count = min(INDEX_BLOCK, int(starts[-1]) - first)
        lengths = read_array(index, path, "<i4", INDEX_HEADER_BYTES + 4 * first, count).astype(np.int64)
        offsets_at = INDEX_HEADER_BYTES + 4 * num_sequences + 8 * first
        offsets = read_array(index, path, "<i8", offsets_at, count)
        stops = following + np.cumsum(lengths * item)
        if (lengths < 0).any() or not np.array_equal(offsets, stops - lengths * item):
            raise UserError(
                f"its sequences {first:,} to {first + count:,} are not end to end in the .bin",
                where=path,
                remedy="write the dataset again with Megatron's IndexedDatasetBuilder",
            )
        following = int(stops[-1])
        low, high = np.searchsorted(starts, [first, first + count], side="right")
        ends[low:high] = stops[starts[low:high] - first - 1]
    return ends, following


def _place_shard(folder: Path, part: Part, *, copy: bool) -> None:
    """Link or copy a shard, after reading all of it."""
    for _ in part.documents():
        pass
    for suffix in (".bin", ".idx"):
        source = part.shards.folder / f"{part.shards.manifest.shards[part.members[0]].name}{suffix}"
        place_file(source, folder / f"{part.name}{suffix}", copy=copy)


def _write_pair(folder: Path, part: Part) -> None:
    """Write one pair for several shards; the three tables of its index are written side by side, each at its own place."""
    header = IndexHeader(
        dtype=part.shards.manifest.dtype, num_sequences=part.num_documents, num_documents=part.num_documents
    )
    places = np.cumsum([len(header.pack()), 4 * part.num_documents, 8 * part.num_documents]).tolist()
    offset = 0
    sequence = 0
    with (
        durable_file(folder / f"{part.name}.bin") as tokens_file,
        durable_file(folder / f"{part.name}.idx") as index_file,
    ):
        index_file.write(header.pack())
        for tokens, lengths in part.documents():
            tokens_file.write(tokens.view(np.uint8).data)
            stops = offset + np.cumsum(lengths) * tokens.itemsize
            tables = (
                lengths.astype("<i4"),
                (stops - lengths * tokens.itemsize).astype("<i8"),
                np.arange(sequence, sequence + len(lengths), dtype="<i8"),
            )
            for table, array in enumerate(tables):
                index_file.seek(places[table])
                index_file.write(array.tobytes())
                places[table] += array.nbytes
            offset, sequence = int(stops[-1]), sequence + len(lengths)
        index_file.seek(places[2])
        index_file.write(np.array([sequence], "<i8").tobytes())
