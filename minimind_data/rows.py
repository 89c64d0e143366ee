"""The texts in a Parquet file, row group by row group; only the columns that hold them are read.

Source of the format: https://parquet.apache.org/docs/file-format/ (row groups, column chunks), read by pyarrow.
"""

import hashlib
from collections.abc import Generator, Iterator
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from minimind_data.blocks import BadRecord, Block, Split
from minimind_data.errors import UserError
from minimind_data.fields import RecordSpec, reason, text_getter
from minimind_data.sources import Source

_BATCH_ROWS = 1024
_MAX_NAMES = 8


def row_group_splits(source: Source, split_bytes: int, spec: RecordSpec) -> Iterator[Split]:
    """Yield the splits of a source.

    A split takes row groups as long as the columns that are read stay below `split_bytes` before compression; one at least.

    Raises:
        UserError: a column is missing or holds no strings.
    """
    with source.open() as file:
        parquet = pq.ParquetFile(file)
        wanted = _columns(parquet.schema_arrow, source, spec)
        start, weight, stored = 0, 0, 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            chunks = [group.column(column) for column in range(group.num_columns)]
            size = sum(
                chunk.total_uncompressed_size
                for chunk in chunks
                if any(
                    chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")
                    for name in wanted
                )
            )
            if index > start and weight + size > split_bytes:
                yield Split(source=source, start=start, stop=index, num_bytes=stored)
                start, weight, stored = index, 0, 0
            weight += size
            stored += sum(chunk.total_compressed_size for chunk in chunks)
        if parquet.num_row_groups:
            yield Split(source=source, start=start, stop=parquet.num_row_groups, num_bytes=stored)


def _columns(schema: Any, source: Source, spec: RecordSpec) -> list[str]:
    """Return the columns that hold the fields, after a look at their types."""
    columns = []
    for field in spec.fields:
        name, steps = _path(schema, field)
        if name not in schema.names:
            names = ", ".join(schema.names[:_MAX_NAMES])
            raise UserError(
                f"{source.name}: no column {field!r} (its columns: {names}); name the column of the text with --field"
            )
        kind = schema.field(name).type
        for step in steps:
            if not pa.types.is_struct(kind) or kind.get_field_index(step) < 0:
                raise UserError(
                    f"{source.name}: no column {field!r} ({name} is {kind}); name the column of the text with --field"
                )
            kind = kind.field(step).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(
                f"{source.name}: column {field!r} holds {kind}, not strings; name the column of the text with --field"
            )
        columns.append(".".join((name, *steps)))
    return columns


def _path(schema: Any, field: str) -> tuple[str, list[str]]:
    if field in schema.names:
        return field, []
    name, *steps = field.split(".")
    return name, steps


def count_rows(source: Source, groups: range) -> int:
    """Return the rows of some row groups."""
    with source.reading(), source.open() as file:
        metadata = pq.ParquetFile(file).metadata
        return sum(int(metadata.row_group(index).num_rows) for index in groups)


class ParquetRecords:
    """The rows of a split's row groups; see `RecordReader`."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        self._split = split
        self._spec = spec
        self._digest = hashlib.sha256()
        self.begin, self.end = split.start, split.stop
        self.num_lines = 0

    @property
    def sha256(self) -> str:
        """Of the fields that were read, row by row."""
        return self._digest.hexdigest()

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts."""
        source, fields = self._split.source, self._spec.fields
        groups = range(self._split.start, self._split.stop)
        total_rows = count_rows(source, groups)
        reported = 0
        with source.reading(), source.open() as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            wanted = _columns(schema, source, self._spec)
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=list(groups), columns=wanted):
                columns = [_strings(_column(batch, schema, field)) for field in fields]
                rows = list(zip(*columns, strict=True))
                # The same bytes wherever a batch ends: rows joined by commas.
                self._digest.update(orjson.dumps(rows, default=repr)[1:-1] + b",")
                records = [dict(zip(fields, row, strict=True)) for row in rows]
                done = self._split.num_bytes * (self.num_lines + len(rows)) // total_rows
                yield self._block(records, done - reported)
                reported = done

    def _block(self, records: list[dict[str, Any]], num_bytes: int) -> Block:
        get_text = text_getter(self._spec)
        texts: list[str] = []
        bad: list[BadRecord] = []
        empty_texts = 0
        for record in records:
            self.num_lines += 1
            text = get_text(record)
            why = None
            if not isinstance(text, str) or len(text) > self._spec.max_word_chars:
                why = reason(record, text, self._spec)
            if why is not None:
                bad.append(
                    BadRecord(line=self.num_lines, reason=why, data=orjson.dumps(record, default=repr))
                )
            elif text:
                texts.append(text)
            else:
                empty_texts += 1
        return Block(texts=texts, empty_texts=empty_texts, bad=bad, num_bytes=num_bytes)


def _column(batch: Any, schema: Any, field: str) -> Any:
    name, steps = _path(schema, field)
    column = batch.column(batch.schema.get_field_index(name))
    return pc.struct_field(column, steps) if steps else column


def _strings(column: Any) -> list[Any]:
    """Return a column's values: strings, None, and bytes where a string is no UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_string(value) for value in column.cast(pa.large_binary()).to_pylist()]
    return values


def _string(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
