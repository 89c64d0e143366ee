"""How much memory the rows of a Parquet file may take, from the headers of its pages, before any page is decompressed.

A page of a few kilobytes can hold a gigabyte of one letter, and a dictionary of one long text can be referred to by millions of rows. The
footer shows neither: its sizes count a dictionary once, and are sums. So the headers are read, which stand before each page, and from them follow

- how many rows are read at once: as many as fit into `_BATCH_BYTES`, however the long ones are spread among the short, and
- which columns are read as numbers of entries of their dictionary, because their rows could be far larger than what is stored.

Source of the format: https://parquet.apache.org/docs/file-format/data-pages/ and parquet.thrift there (PageHeader, in Thrift's compact protocol).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from minimind_data.errors import UserError
from minimind_data.inputs import held_record

_BATCH_BYTES = 2**27
_DICTIONARY_BYTES = 2**28
"""What the rows of one column may take because of its dictionary, when they are read as strings."""
_LOOKED_AT_BYTES = 2**26
_MAX_ROWS = 1024
_MAX_RATIO = 1000
"""Rows of lists cannot be bounded by pages; a column of them that unpacks to more than the longest record, and more than so many
times what is stored, holds no conversations."""
_BYTES_A_VALUE = 16
"""Of a null, or an entry of a dictionary: its number and where it stands in lists."""
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DICTIONARY_ENCODINGS = (2, 8)
_HEADER_BYTES = 2**16
_MAX_HEADER_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the rows of a row group are to be read."""

    rows_at_once: int
    dictionaries: tuple[str, ...]
    """Paths of the columns to be read as numbers of entries."""


@dataclass(frozen=True, kw_only=True)
class _Page:
    kind: int
    size: int
    """Bytes, decompressed."""
    values: int
    encoding: int
    place: int
    """Of its bytes in the file, behind its header."""
    stored_bytes: int


def plan_reading(file: BinaryIO, metadata: Any, group: int, columns: list[str], where: str) -> Reading:
    """Return how the rows of a row group are to be read.

    Args:
        file: the Parquet file; it is left anywhere.
        metadata: pyarrow's, of the file.
        group: number of the row group.
        columns: paths of those that are read; one stands for all below it.
        where: name of the file, for a message.

    Raises:
        UserError: a page, or a column of lists, holds more than can be read in bounded memory.
    """
    row_group = metadata.row_group(group)
    rows, dictionaries = _MAX_ROWS, []
    for index in range(row_group.num_columns):
        chunk = row_group.column(index)
        path = chunk.path_in_schema
        if not any(path == name or path.startswith(f"{name}.") for name in columns):
            continue
        is_list = metadata.schema.column(index).max_repetition_level > 0
        what = f"column {path!r} of row group {group}"
        if is_list:
            _refuse_bomb(chunk, what, where)
        if chunk.physical_type == "BYTE_ARRAY":
            rows_here, is_large = _plan_column(file, chunk, is_list, what, where)
            rows = min(rows, rows_here)
            dictionaries += [path] if is_large else []
    return Reading(rows_at_once=rows, dictionaries=tuple(dictionaries))


def _refuse_bomb(chunk: Any, what: str, where: str) -> None:
    unpacked = chunk.total_uncompressed_size + _BYTES_A_VALUE * chunk.num_values
    ratio = unpacked // max(chunk.total_compressed_size, 1)
    if unpacked > held_record.MAX_RECORD_BYTES and ratio > _MAX_RATIO:
        raise UserError(
            f"{what} unpacks to {unpacked >> 20:,} MiB, {ratio:,} times what is stored",
            where=where,
            remedy="no conversations are like that; leave the file out",
        )


def _plan_column(file: BinaryIO, chunk: Any, is_list: bool, what: str, where: str) -> tuple[int, bool]:
    """Return (rows to be read at once, whether they may be far larger than what is stored, because of a dictionary)."""
    rows, numbers, num_bytes, dictionary = _MAX_ROWS, 0, 0, None
    for page in _pages(file, chunk):
        if page.size > held_record.MAX_RECORD_BYTES and page.values > _MAX_ROWS:
            raise UserError(
                f"{what} has a page of {page.size >> 20:,} MiB, and at most {held_record.MAX_RECORD_BYTES >> 20:,} are read at once",
                where=where,
                remedy="write the file again with smaller pages",
            )
        if page.kind == _DICTIONARY:
            dictionary = page
        elif page.encoding in _DICTIONARY_ENCODINGS:
            numbers += page.values
        elif is_list or page.values < _MAX_ROWS or page.size > _BATCH_BYTES:
            num_bytes += page.size
            rows = min(rows, max(1, _BATCH_BYTES // max(page.size, 1)))
    if num_bytes <= _BATCH_BYTES:  # all of them together
        rows = _MAX_ROWS
    if dictionary is None or dictionary.size * numbers <= _DICTIONARY_BYTES:
        return rows, False
    return rows, _longest_entry(file, dictionary, chunk.compression) * numbers > _DICTIONARY_BYTES


def _longest_entry(file: BinaryIO, page: _Page, compression: str) -> int:
    """Return the size of the longest entry of a dictionary, or where it is too large to look, that of all together."""
    if page.size > _LOOKED_AT_BYTES:
        return page.size
    file.seek(page.place)
    data = file.read(page.stored_bytes)
    if compression != "UNCOMPRESSED":
        try:
            data = pa.decompress(data, page.size, codec=compression.lower(), asbytes=True)
        except (pa.ArrowException, ValueError, OSError):  # such as the LZ4 of Hadoop
            return page.size
    longest = place = 0
    while place + 4 <= len(data):
        size = int.from_bytes(data[place : place + 4], "little")
        longest = max(longest, size)
        place += 4 + size
    return longest


def _pages(file: BinaryIO, chunk: Any) -> Iterator[_Page]:
    """Yield the pages of a column chunk, which stand one behind the other.

    Raises:
        OSError: a header is damaged.
    """
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    stop = place + chunk.total_compressed_size
    while place < stop:
        try:
            header, header_bytes = _header(file, place)
            kind, size, stored_bytes = header[1], header[2], header[3]
            description = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), {})
            page = _Page(
                kind=kind,
                size=size,
                values=description.get(1, 0),
                encoding=description.get(4 if kind == _DATA_V2 else 2, 0),
                place=place + header_bytes,
                stored_bytes=stored_bytes,
            )
            is_damaged = min(size, stored_bytes, page.values, page.encoding) < 0
        except (IndexError, KeyError, AttributeError, TypeError, RecursionError):
            is_damaged = True
        if is_damaged:
            raise OSError(f"no page header at byte {place:,}")
        yield page
        place += header_bytes + stored_bytes


def _header(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """Return (the fields of a page's header by their ids, how many bytes it takes).

    Raises:
        IndexError: the file ends in it.
    """
    num_bytes = _HEADER_BYTES
    while True:
        file.seek(place)
        data = file.read(num_bytes)
        try:
            return _struct(data, 0)
        except IndexError:
            if len(data) < num_bytes or num_bytes >= _MAX_HEADER_BYTES:
                raise
            num_bytes = _MAX_HEADER_BYTES  # statistics in it can be whole texts


def _struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
    """Read a struct in Thrift's compact protocol: (its fields by their ids, where it ends)."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[place]) != 0:
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            number, place = _zigzag(data, place)
        kind = head & 15
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], place = _value(data, place, kind)
    return fields, place + 1


_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def _value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    """Read a value: (a number or a struct, else None, for a page's header needs nothing else; where it ends)."""
    if kind in (_I16, _I32, _I64):
        return _zigzag(data, place)
    if kind == _STRUCT:
        return _struct(data, place)
    if kind == _BINARY:
        size, place = _varint(data, place)
        return None, place + size
    if kind in (_LIST, _SET, _MAP):
        return None, _after_items(data, place, kind)
    return None, place + {_TRUE: 1, _FALSE: 1, _BYTE: 1, _DOUBLE: 8}[kind]


def _after_items(data: bytes, place: int, kind: int) -> int:
    if kind == _MAP:
        size, place = _varint(data, place)
        if not size:
            return place
        kinds = [data[place] >> 4, data[place] & 15]
        place += 1
    else:
        size, kinds = data[place] >> 4, [data[place] & 15]
        place += 1
        if size == 15:
            size, place = _varint(data, place)
    for _ in range(size):
        for kind_of_item in kinds:
            _, place = _value(data, place, kind_of_item)
        if place > len(data):
            raise IndexError
    return place


def _zigzag(data: bytes, place: int) -> tuple[int, int]:
    number, place = _varint(data, place)
    return (number >> 1) ^ -(number & 1), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7
        if shift > 63:
            raise KeyError("a number of over 64 bits")
