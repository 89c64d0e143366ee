"""Reading and writing Arrow and Parquet files with pyarrow: rows with a list of integers in each column, a record batch at a time.

`tables` has the formats. It imports this module only when it reads or writes, because importing pyarrow takes a tenth of a second.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from minimind_data.dataset.framing import check_ids, check_lengths, document_ranges
from minimind_data.dataset.staging import durable_file
from minimind_data.errors import UserError

_ROWS_PER_BATCH = 1000
_ARROW_FILE_MAGIC = b"ARROW1"

Table = tuple[int, int, NDArray[Any], NDArray[np.int64]]


def read_tables(files: tuple[Path, ...], column: str, vocab_size: int, block_tokens: int) -> Iterator[Table]:
    """Read the rows of some files.

    Args:
        files: Arrow IPC streams or files, or Parquet; the content decides.
        column: the list column that holds the ids.
        vocab_size: the largest id plus one.
        block_tokens: of a batch, about.

    Yields:
        (number of the file, bytes of it that were read for this batch, tokens [sum(lengths)], lengths int64 [rows]).

    Raises:
        UserError: a file is damaged, has no such column, or holds something that is no id of the vocabulary.
    """
    for number, path in enumerate(files):
        row = 0
        try:
            for num_bytes, array in _open(path, column):
                lengths, tokens = _ids_of(path, column, row, array)
                check_ids(tokens, vocab_size, _place(path, column, row, lengths))
                check_lengths(lengths, str(path))
                stops = np.cumsum(lengths)
                for first, last in document_ranges(lengths, block_tokens):
                    part = tokens[stops[first] - lengths[first] : stops[last - 1]]
                    yield number, num_bytes, part, lengths[first:last]
                    num_bytes = 0  # noqa: PLW2901 - counted once for the whole record batch
                row += len(array)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # the system's, not the format's
                raise
            raise UserError(
                f"damaged or not of this format ({error})", where=path, remedy="make it again"
            ) from None


def _open(path: Path, column: str) -> Iterator[tuple[int, pa.Array]]:
    """Yield (bytes of the file that were read, the column) for every record batch."""
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(8)
    if magic.startswith(b"PAR1"):
        with pq.ParquetFile(path, pre_buffer=False) as table:
            _check_column(path, column, table.schema_arrow)
            for batch in table.iter_batches(_ROWS_PER_BATCH, columns=[column], use_threads=False):
                yield size * len(batch) // max(1, table.metadata.num_rows), batch.column(column)
        return
    with pa.OSFile(str(path)) as source:
        if magic.startswith(_ARROW_FILE_MAGIC):
            reader = pa.ipc.open_file(source)
            _check_column(path, column, reader.schema)
            for index in range(reader.num_record_batches):
                yield size // reader.num_record_batches, reader.get_batch(index).column(column)
            return
        stream = pa.ipc.open_stream(source)
        _check_column(path, column, stream.schema)
        before = 0
        for batch in stream:
            here = source.tell()
            yield here - before, batch.column(column)
            before = here
        if before == size:  # to pyarrow a stream that was cut off between two batches is a finished one
            raise UserError(
                "ends without the mark that ends an Arrow stream",
                where=path,
                remedy="it was cut off, copy it again",
            )


def _check_column(path: Path, column: str, schema: pa.Schema) -> None:
    if column not in schema.names:
        raise UserError(
            f"no column {column!r}",
            where=path,
            remedy=f"it has {', '.join(schema.names)}, so say with `column` which one holds ids",
        )
    kind = schema.field(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise UserError(
            f"column {column!r} is of type {kind}, not of lists of integers",
            where=path,
            remedy="say with `column` which one holds ids",
        )


def _ids_of(path: Path, column: str, row: int, array: pa.Array) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return (lengths int64 [rows], tokens [sum(lengths)]).

    Raises:
        pa.ArrowInvalid: the lists are not made of the values, which pyarrow itself does not look at when it reads a file.
        UserError: a row or a token is null.
    """
    array.validate(full=True)
    if array.null_count:
        first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"row {row + first:,} has no {column!r}", where=path, remedy="take such rows out")
    values = array.flatten()
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(len(array), array.type.list_size, np.int64)
    else:
        lengths = np.diff(array.offsets.to_numpy(zero_copy_only=False)).astype(np.int64)
    if values.null_count:
        token = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{_place(path, column, row, lengths)(token)} is null", remedy="take it out")
    return lengths, values.to_numpy(zero_copy_only=False)


def _place(path: Path, column: str, row: int, lengths: NDArray[np.int64]) -> Callable[[int], str]:
    """Return a function that names the row and place of a token, from its number in a batch."""
    stops = np.cumsum(lengths)

    def place(index: int) -> str:
        inside = int(np.searchsorted(stops, index, side="right"))
        return f"{path}: {column!r} of row {row + inside:,}, token {index - int(stops[inside] - lengths[inside]):,}"

    return place


Columns = list[tuple[NDArray[Any], NDArray[np.int64]]]
"""For each column, the lists of some rows end to end, and the length of each."""


def write_arrow(
    path: Path, columns: Sequence[str], blocks: Iterable[Columns], metadata: Mapping[str, str]
) -> None:
    """Write documents as an Arrow IPC stream: in each column one list of int32 a row.

    Args:
        path: of the file.
        columns: their names.
        blocks: the rows.
        metadata: of the schema.
    """
    schema = _schema(columns, metadata)
    with durable_file(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _record_batches(schema, blocks):
            writer.write_batch(batch)


def write_parquet(
    path: Path, columns: Sequence[str], blocks: Iterable[Columns], metadata: Mapping[str, str]
) -> None:
    """Write documents as Parquet, zstd-compressed; the arguments are those of `write_arrow`."""
    schema = _schema(columns, metadata)
    with durable_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for block in blocks:
            writer.write_table(pa.Table.from_batches(list(_record_batches(schema, [block])), schema))


def _schema(columns: Sequence[str], metadata: Mapping[str, str]) -> pa.Schema:
    return pa.schema([(name, pa.list_(pa.int32())) for name in columns], metadata=dict(metadata))


def _record_batches(schema: pa.Schema, blocks: Iterable[Columns]) -> Iterator[pa.RecordBatch]:
    """Turn blocks of documents into record batches of at most a thousand rows."""
    for columns in blocks:
        offsets = [np.concatenate([[0], np.cumsum(lengths)]) for _, lengths in columns]
        for first in range(0, len(columns[0][1]), _ROWS_PER_BATCH):
            lists = []
            for (values, _), borders in zip(columns, offsets, strict=True):
                here = borders[first : first + _ROWS_PER_BATCH + 1]
                ids = pa.array(values[here[0] : here[-1]].astype(np.int32))
                lists.append(pa.ListArray.from_arrays(pa.array((here - here[0]).astype(np.int32)), ids))
            yield pa.RecordBatch.from_arrays(lists, schema=schema)
