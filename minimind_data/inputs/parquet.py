"""Parquet: the texts and conversations in a file, row group by row group; only the columns that hold them are read.

Conversations are lists of structs, as Hugging Face datasets writes them, or JSON in Arrow's type for it or in strings. Text may also be
stored as bytes of UTF-8. In Arrow every struct has all
fields of its type, and those that a message does not have are null. So a null in a struct means that the field is missing.

Source of the format: https://parquet.apache.org/docs/file-format/ (row groups, column chunks), read by pyarrow.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from minimind_data.chat.conversations import (
    ANSWER_FIELDS,
    BESIDE_FIELDS,
    MESSAGES_FIELDS,
    PROMPT_FIELDS,
    SIDE_FIELDS,
    kind_shown_by,
)
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.messages import BadConversationError
from minimind_data.dataset.format import Kind
from minimind_data.errors import UserError
from minimind_data.inputs import held_record
from minimind_data.inputs.base import Form, RecordReader, Split
from minimind_data.inputs.blocks import BadRecord, Block, ConversationCollector
from minimind_data.inputs.held_record import too_long
from minimind_data.inputs.parquet_pages import plan_reading
from minimind_data.inputs.sources import Source
from minimind_data.inputs.spec import MESSAGES_HINT, RecordSpec, kind_hint, reason, text_getter
from minimind_data.reporting import kind_of

_MAX_NAMES = 8
_PART_BYTES = 2**25
"""Rows that are made Python's together, about; a longer row is alone."""
_BYTES_A_VALUE = 8
_BEGINNING_BYTES = 1000
_LONG_REMEDY = "divide it"


class Parquet(Form):
    """Parquet: a split is some row groups, and its borders are their numbers."""

    def splits(self, sources: Sequence[Source], split_bytes: int) -> list[list[Split]]:
        """Put row groups into one split as long as the columns that are read are below `split_bytes` uncompressed; at least one.

        Raises:
            UserError: a file is damaged, or a column is missing or holds something else.
        """
        splits = []
        for source in sources:
            with source.reading(as_container=True):
                splits.append(list(self._row_group_splits(source, split_bytes)))
        return splits

    def _row_group_splits(self, source: Source, split_bytes: int) -> Iterator[Split]:
        with source.open() as file:
            parquet = pq.ParquetFile(file)
            columns = _columns(parquet.schema_arrow, source, self._spec, self._kind)
            start, weight, stored = 0, 0, 0
            for index in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(index)
                chunks = [group.column(column) for column in range(group.num_columns)]
                size = sum(
                    chunk.total_uncompressed_size
                    for chunk in chunks
                    if any(
                        chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")
                        for name in columns
                    )
                )
                if index > start and weight + size > split_bytes:
                    yield Split(source=source, start=start, stop=index, num_bytes=stored)
                    start, weight, stored = index, 0, 0
                weight += size
                stored += sum(chunk.total_compressed_size for chunk in chunks)
            if parquet.num_row_groups:
                yield Split(source=source, start=start, stop=parquet.num_row_groups, num_bytes=stored)

    def reader(self, split: Split, chat: ChatEncoding | None = None) -> RecordReader:
        """See `Form.reader`."""
        return (
            ParquetTexts(split, self._spec) if chat is None else ParquetConversations(split, self._spec, chat)
        )

    def content(self, split: Split) -> tuple[int, int, str]:
        """See `Form.content`."""
        rows = ParquetRows(split, self._spec, self._kind)
        for _ in rows.batches():
            pass
        return rows.begin, rows.end, rows.sha256

    def records_before(self, split: Split) -> int:
        """See `Form.records_before`."""
        return _count_rows(split.source, range(split.start)) if split.start else 0


def _columns(schema: Any, source: Source, spec: RecordSpec, kind: Kind) -> list[str]:
    """Return the columns to read, after checking their types and that each is there once."""
    if kind == "pretrain":
        columns = _text_columns(schema, source, spec)
    else:
        columns = _chat_columns(schema, source, kind)
    return columns


def _type_of(schema: Any, name: str, source: Source) -> Any:
    """Return the type of a column.

    Raises:
        UserError: another column has the same name, or two fields inside it have the same.
    """
    twice = name if schema.names.count(name) > 1 else _doubled_field(schema.field(name).type)
    if twice is not None:
        raise UserError(
            f"two columns or fields of the name {twice!r}",
            where=source.name,
            remedy="rename or drop one of them, for which is meant cannot be told",
        )
    return schema.field(name).type


def _doubled_field(kind: Any) -> str | None:
    """Return a name that two fields of one struct have, somewhere in a type; None if there is none."""
    if isinstance(kind, pa.BaseExtensionType):
        return _doubled_field(kind.storage_type)
    children = [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_struct(kind):
        names = [child.name for child in children]
        if twice := next((name for name in names if names.count(name) > 1), None):
            return str(twice)
    return next((name for child in children if (name := _doubled_field(child.type)) is not None), None)


def _chat_columns(schema: Any, source: Source, kind: Literal["sft", "dpo"]) -> list[str]:
    names, shown = set(schema.names), kind_shown_by(schema.names)
    if kind == "sft":
        columns = [name for name in MESSAGES_FIELDS if name in names]
        missing = None if columns else "'conversations' or 'messages'"
        beside = ["system", "tools", "history"]
        if missing and shown == "sft":
            beside = [*PROMPT_FIELDS, *ANSWER_FIELDS, *BESIDE_FIELDS]
            missing = None
    else:
        columns = list(SIDE_FIELDS)
        missing = next((repr(name) for name in SIDE_FIELDS if name not in names), None)
        beside = ["prompt", "tools", "system", "history"]
        if "prompt" not in names:
            beside += [name for name in PROMPT_FIELDS if name != "prompt"]
        if missing is None and not all(_is_list(_type_of(schema, name, source)) for name in columns):
            beside += MESSAGES_FIELDS
    if missing is not None:
        which = "the messages" if kind == "sft" else "that side of the pairs"
        other = f", or let `kind` {shown} read it" if shown not in (None, kind) else ""
        if shown is None and "text" in names:
            other = "; or let `kind` pretrain read the texts"
        raise UserError(
            f"no column {missing} (its columns: {', '.join(schema.names[:_MAX_NAMES])})",
            where=source.name,
            remedy=f"rename the one with {which}{other}",
        )
    for name in columns:
        _check_holds_messages(_type_of(schema, name, source), name, source, kind)
    columns += [name for name in beside if name in names]
    for name in columns:
        _type_of(schema, name, source)
    return columns


def _check_holds_messages(column_type: Any, name: str, source: Source, kind: Literal["sft", "dpo"]) -> None:
    is_one_message = kind == "dpo" and pa.types.is_struct(column_type)
    if not (_is_list(column_type) or _is_json(column_type) or _is_text(column_type) or is_one_message):
        raise UserError(
            f"column {name!r} holds {column_type}, not lists of messages",
            where=source.name,
            remedy="write each as a list of structs with role and content",
        )


def _text_columns(schema: Any, source: Source, spec: RecordSpec) -> list[str]:
    columns = []
    for field in spec.fields:
        name, steps = _path(schema, field)
        if name not in schema.names:
            names = ", ".join(schema.names[:_MAX_NAMES])
            raise UserError(
                f"no column {field!r} (its columns: {names})",
                where=source.name,
                remedy=f"name the column of the text with `field`{kind_hint(schema.names)}",
                option="field",
            )
        kind = _type_of(schema, name, source)
        for step in steps:
            if not pa.types.is_struct(kind) or kind.get_field_index(step) < 0:
                raise UserError(
                    f"no column {field!r} ({name} is {kind})",
                    where=source.name,
                    remedy="name the column of the text with `field`",
                    option="field",
                )
            kind = kind.field(step).type
        if not _is_text(kind):
            raise UserError(
                f"column {field!r} holds {kind}, not strings",
                where=source.name,
                remedy="name the column of the text with `field`"
                + (
                    MESSAGES_HINT
                    if field not in MESSAGES_FIELDS and _is_messages(kind) and not steps
                    else kind_hint(schema.names)
                ),
                option="field",
            )
        columns.append(".".join((name, *steps)))
    return columns


def _is_messages(kind: Any) -> bool:
    """Tell whether a type is that of lists of messages."""
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    return any(kind.value_type.get_field_index(name) >= 0 for name in ("role", "from"))


def _path(schema: Any, field: str) -> tuple[str, list[str]]:
    if field in schema.names:
        return field, []
    name, *steps = field.split(".")
    return name, steps


def _count_rows(source: Source, groups: range) -> int:
    with source.reading(as_container=True), source.open() as file:
        metadata = pq.ParquetFile(file).metadata
        return sum(int(metadata.row_group(index).num_rows) for index in groups)


class ParquetRows:
    """The rows of a split, with the fields that make documents of this kind."""

    def __init__(self, split: Split, spec: RecordSpec, kind: Kind) -> None:
        self._split = split
        self._spec = spec
        self._kind = kind
        self._digest = hashlib.sha256()
        self.begin, self.end = split.start, split.stop
        self.num_lines = 0
        self.unread: list[str] = []
        """Columns that are not read, once reading has begun."""

    @property
    def sha256(self) -> str:
        """Of the fields that were read, row by row."""
        return self._digest.hexdigest()

    def batches(self) -> Iterator["_Rows"]:
        """Yield the rows in order, as many at once as fit into memory however little of it the file takes."""
        source = self._split.source
        groups = range(self._split.start, self._split.stop)
        total_rows = _count_rows(source, groups)
        reported = 0
        with source.reading(as_container=True), source.open() as file:
            schema = pq.ParquetFile(file).schema_arrow
            columns = _columns(schema, source, self._spec, self._kind)
            fields = self._spec.fields if self._kind == "pretrain" else columns
            read = {*columns, *(column.partition(".")[0] for column in columns)}
            self.unread = [name for name in schema.names if name not in read]
            types = [_field_type(schema, field) for field in fields]
            for batch in self._arrow_batches(file, columns):
                arrays = [_column(batch, schema, field) for field in fields]
                for start, stop in _parts(arrays, batch.num_rows):
                    part = [array.slice(start, stop - start) for array in arrays]
                    first = self.num_lines + 1
                    self.num_lines += stop - start
                    done = self._split.num_bytes * self.num_lines // total_rows
                    yield self._rows(first, fields, part, types, done - reported)
                    reported = done

    def _arrow_batches(self, file: BinaryIO, columns: list[str]) -> Iterator[Any]:
        parquet = pq.ParquetFile(file)
        for group in range(self._split.start, self._split.stop):
            reading = plan_reading(file, parquet.metadata, group, columns, self._split.source.name)
            # The dictionaries to keep are chosen when a file is opened.
            opened = pq.ParquetFile(file, read_dictionary=reading.dictionaries, metadata=parquet.metadata)
            yield from opened.iter_batches(reading.rows_at_once, row_groups=[group], columns=columns)

    def _rows(
        self, first: int, fields: Sequence[str], arrays: list[Any], types: list[pa.DataType], num_bytes: int
    ) -> "_Rows":
        if len(arrays[0]) == 1 and (size := sum(map(_bytes_of_row, arrays))) > held_record.MAX_RECORD_BYTES:
            beginning = _beginning(arrays[0])
            self._digest.update(b"%d bytes: " % size + beginning + b",")
            return _Rows(first=first, records=[], types=types, num_bytes=num_bytes, too_long=beginning)
        rows = list(zip(*map(_values, arrays, types), strict=True))
        # The same bytes wherever a batch ends: rows joined by commas.
        self._digest.update(orjson.dumps(rows, default=repr)[1:-1] + b",")
        records = [dict(zip(fields, row, strict=True)) for row in rows]
        return _Rows(first=first, records=records, types=types, num_bytes=num_bytes)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows that follow each other, or one that is too long."""

    first: int
    """Number of the first, from 1 at the first of the split."""
    records: list[dict[str, Any]]
    """By their fields."""
    types: list[pa.DataType]
    """Of the fields."""
    num_bytes: int
    """Of input that they took."""
    too_long: bytes | None = None
    """The beginning of a row that is too long; then there are no records."""

    def bad(self) -> list[BadRecord]:
        """Return the bad record of a row that is too long."""
        return [] if self.too_long is None else [too_long(self.first, self.too_long, _LONG_REMEDY)]

    @property
    def num_rows(self) -> int:
        """How many they are."""
        return len(self.records) + (self.too_long is not None)


class ParquetTexts(ParquetRows):
    """The texts in them; see `RecordReader`."""

    def __init__(self, split: Split, spec: RecordSpec) -> None:
        super().__init__(split, spec, "pretrain")

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the texts."""
        get_text = text_getter(self._spec)
        for rows in self.batches():
            texts: list[str] = []
            bad = rows.bad()
            empty_texts = 0
            for number, record in enumerate(rows.records, rows.first):
                text = get_text(record)
                why = None
                if not isinstance(text, str) or len(text) > self._spec.max_word_chars:
                    why = reason(record, text, self._spec)
                if why is not None:
                    bad.append(BadRecord(line=number, reason=why, data=_as_json(record)))
                elif text:
                    texts.append(text)
                else:
                    empty_texts += 1
            yield Block(
                texts=texts,
                empty_texts=empty_texts,
                bad=bad,
                num_bytes=rows.num_bytes,
                unread=Counter(dict.fromkeys(self.unread, rows.num_rows)),
            )


class ParquetConversations(ParquetRows):
    """The conversations in them, or pairs of conversations; see `RecordReader`."""

    def __init__(self, split: Split, spec: RecordSpec, chat: ChatEncoding) -> None:
        super().__init__(split, spec, chat.kind)
        self._conversations = ConversationCollector(spec, chat)

    def blocks(self) -> Generator[Block, None, None]:
        """Yield the conversations as texts."""
        for rows in self.batches():
            for number, record in enumerate(rows.records, rows.first):
                self._conversations.add(
                    number,
                    functools.partial(_json_record, record, rows.types),
                    functools.partial(_as_json, record),
                )
            block = self._conversations.take(rows.num_bytes)
            block.bad.extend(rows.bad())
            block.unread.update(dict.fromkeys(self.unread, rows.num_rows))
            yield block


def _parts(arrays: list[Any], num_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of rows that are made Python's together: about `_PART_BYTES`, or one row."""
    sizes = sum(map(_row_bytes, arrays))
    start, total = 0, 0
    for stop, size in enumerate(np.broadcast_to(sizes, num_rows).tolist()):
        if stop > start and total + size > _PART_BYTES:
            yield start, stop
            start, total = stop, 0
        total += size
    if num_rows:
        yield start, num_rows


def _bytes_of_row(array: Any) -> int:
    return int(_row_bytes(array)[0])


def _row_bytes(array: Any) -> NDArray[np.int64]:
    """Return how many bytes the values of each row have, as they are without a dictionary: int64 [rows]."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _row_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        numbers = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        lengths = _row_bytes(array.dictionary)
        return lengths[numbers] if len(lengths) else np.zeros(len(array), np.int64)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32)  # four for each, and the first is its length
        return views[4 * array.offset :: 4][: len(array)].astype(np.int64) + _BYTES_A_VALUE
    if _is_string(kind) or _is_binary(kind):
        lengths = pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
        return np.asarray(lengths, np.int64) + _BYTES_A_VALUE
    if _is_list(kind) or pa.types.is_map(kind):
        return _list_bytes(array)
    sizes = np.full(len(array), _BYTES_A_VALUE, np.int64)
    if pa.types.is_struct(kind):
        for child in array.flatten():
            sizes += _row_bytes(child)
    return sizes


def _list_bytes(array: Any) -> NDArray[np.int64]:
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        ends, inner = np.cumsum(lengths, dtype=np.int64), _row_bytes(array.flatten())
    else:
        offsets = array.offsets.to_numpy().astype(np.int64)
        lengths, ends = np.diff(offsets), offsets[1:] - offsets[0]
        children = [array.keys, array.items] if pa.types.is_map(kind) else [array.values]
        inner = np.zeros(offsets[-1] - offsets[0], np.int64)
        for child in children:
            inner += _row_bytes(child.slice(offsets[0], len(inner)))
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(inner)])
    sizes: NDArray[np.int64] = sums[ends] - sums[ends - lengths] + _BYTES_A_VALUE
    return sizes


def _beginning(array: Any) -> bytes:
    """Return the beginning of a text that is too long; of anything else, nothing."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary.slice(array.indices[0].as_py(), 1)
    if not (_is_string(array.type) or _is_binary(array.type)):
        return b""
    return memoryview(array[0].as_buffer())[:_BEGINNING_BYTES].tobytes()


def _as_json(record: dict[str, Any]) -> bytes:
    return orjson.dumps(record, default=repr)


def _column(batch: Any, schema: Any, field: str) -> Any:
    name, steps = _path(schema, field)
    column = batch.column(batch.schema.get_field_index(name))
    return pc.struct_field(column, steps) if steps else column


def _is_string(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: Any) -> bool:
    """Tell whether a column holds strings, or bytes that may be some."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_string(kind) or _is_binary(kind)


def _holds_binary(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_binary(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _holds_binary(kind.value_type)
    if _is_binary(kind):
        return True
    return any(_holds_binary(kind.field(index).type) for index in range(kind.num_fields))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_json(kind: Any) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def _field_type(schema: Any, field: str) -> Any:
    name, steps = _path(schema, field)
    kind = schema.field(name).type
    for step in steps:
        kind = kind.field(step).type
    return kind


def _values(column: Any, kind: Any) -> list[Any]:
    """Return the values of a column of this type; a string that is no UTF-8 comes as bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values: list[Any] = column.to_pylist()
        if _holds_binary(kind):
            values = [_decoded(value, kind) for value in values]
    except UnicodeDecodeError:
        values = [_decoded(value, kind) for value in column.cast(_with_bytes(kind)).to_pylist()]
    return values


def _with_bytes(kind: Any) -> Any:
    """Return a type with bytes in place of strings."""
    if isinstance(kind, pa.BaseExtensionType):
        return _with_bytes(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_bytes(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_with_bytes(kind.key_type), _with_bytes(kind.item_type))
    if _is_list(kind):
        return pa.large_list(kind.value_field.with_type(_with_bytes(kind.value_type)))
    return pa.large_binary() if _is_string(kind) else kind


def _decoded(value: Any, kind: Any) -> Any:
    """Undo `_with_bytes` in a value, wherever its bytes are UTF-8."""
    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        return _decoded(value, kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _decoded(value, kind.value_type)
    if pa.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return [(_decoded(key, kind.key_type), _decoded(item, kind.item_type)) for key, item in value]
    if _is_list(kind):
        return [_decoded(item, kind.value_type) for item in value]
    if not isinstance(value, bytes) or not (_is_string(kind) or _is_binary(kind)):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _json_record(record: dict[str, Any], types: list[pa.DataType]) -> dict[str, Any]:
    """Return the record that a line of JSON would hold for this row."""
    fields = zip(record.items(), types, strict=True)
    return {name: _json_value(value, kind, name) for (name, value), kind in fields}


def _json_value(value: Any, kind: Any, name: str) -> Any:
    """Return a value as JSON has it: without the nulls that fill structs, and with JSON in Arrow's type for it parsed.

    Args:
        value: as pyarrow gives it.
        kind: its Arrow type.
        name: of the field that it stands in, for a message.

    Raises:
        BadConversationError: JSON has no such value.
    """
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {
            field.name: _json_value(value[field.name], field.type, field.name)
            for field in kind
            if value[field.name] is not None
        }
    if _is_list(kind):
        return [_json_value(item, kind.value_type, name) for item in value]
    if pa.types.is_map(kind):
        return {
            _json_value(key, kind.key_type, name): _json_value(item, kind.item_type, name)
            for key, item in value
        }
    if _is_json(kind) and isinstance(value, str):
        try:
            return orjson.loads(value)
        except ValueError as error:
            raise BadConversationError(f"{name} holds what is no JSON ({error}); mend it") from None
    if not isinstance(value, str | bool | int | float):
        content = kind_of(value) if isinstance(value, bytes) else f"{str(value)[:40]} of type {kind}"
        raise BadConversationError(
            f"{name} holds {content}, which JSON has no form for; write it as a string"
        )
    return value
