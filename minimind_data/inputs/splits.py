"""How inputs are cut into splits, and how a split is read: planned, opened, compared with what it held before, and named in a message.

A split is what can be read alone: a range of bytes of JSON lines or of separated text, row groups of a Parquet file, a whole compressed
file, or several small files of text. The readers themselves are in `delimited` and `parquet`.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind_data.chat.rendering import ChatSpec
from minimind_data.dataset.format import Kind
from minimind_data.errors import UserError
from minimind_data.files import sha256_of_stream
from minimind_data.inputs.blocks import RecordReader, Split
from minimind_data.inputs.delimited import ChatRecords, JsonRecords, TextFileRecords, TextRecords, ends
from minimind_data.inputs.lines import LineReader, border
from minimind_data.inputs.sources import Source, expand
from minimind_data.inputs.spec import RecordSpec


def plan_splits(
    sources: Sequence[Source], split_bytes: int, spec: RecordSpec, kind: Kind = "pretrain"
) -> list[list[Split]]:
    """Cut sources into splits: a list for each source, empty for one that shares a split with one before it.

    Args:
        sources: what is to be read.
        split_bytes: of a split, about.
        spec: what makes a document of a record, where it is a text.
        kind: what the records are.

    Raises:
        UserError: a source is unreadable.
    """
    planned: list[list[Split]] = [[] for _ in sources]
    first, weight = 0, 0  # of the group of text files that is being filled

    def close_group(stop: int) -> None:
        if weight:
            files = tuple(sources[first:stop])
            planned[first] = [Split(source=files[0], more=files[1:], start=0, stop=weight, num_bytes=weight)]

    for number, source in enumerate(sources):
        if source.form != "text" or spec.separator is not None:
            close_group(number)
            weight = 0
            planned[number] = _splits_of(source, split_bytes, spec, kind)
            continue
        size = source.stamp()[0]
        if weight + size > split_bytes:
            close_group(number)
            weight = 0
        if not weight:
            first = number
        weight += size
    close_group(len(sources))
    return planned


def _splits_of(source: Source, split_bytes: int, spec: RecordSpec, kind: Kind) -> list[Split]:
    if source.form == "parquet":
        from minimind_data.inputs.parquet import row_group_splits  # noqa: PLC0415 - takes a tenth of a second

        with source.reading():
            return list(row_group_splits(source, split_bytes, spec, kind))
    size = source.stamp()[0]
    if source.compression is not None:
        return [Split(source=source, start=0, stop=size, num_bytes=size)]
    borders = [*range(0, size, split_bytes), size]
    return [
        Split(source=source, start=start, stop=stop, num_bytes=stop - start)
        for start, stop in itertools.pairwise(borders)
    ]


def open_reader(split: Split, spec: RecordSpec, chat: ChatSpec | None = None) -> RecordReader:
    """Return the reader of a split; with `chat`, its records are conversations."""
    if split.source.form == "parquet":
        from minimind_data.inputs.parquet import ParquetChats, ParquetRecords  # noqa: PLC0415 - takes a tenth of a second

        return ParquetRecords(split, spec) if chat is None else ParquetChats(split, spec, chat)
    if chat is not None:
        return ChatRecords(split, spec, chat)
    if split.source.form == "text":
        return TextRecords(split, spec) if spec.separator is not None else TextFileRecords(split, spec)
    return JsonRecords(split, spec)


def content_of(split: Split, spec: RecordSpec, kind: Kind = "pretrain") -> tuple[int, int, str]:
    """Return (begin, end, SHA-256) of the records in a split, as its reader would tell them, without making texts of any."""
    source = split.source
    if (
        source.compression is None
        and (source.form == "jsonl" or spec.separator is not None)
        and source.form != "parquet"
    ):
        borders = ends(split, spec)
        with source.reading(), source.open() as file:
            begin = border(file, borders, split.start, split.stop)
            end = split.stop if begin == split.stop else border(file, borders, split.stop)
            return begin, end, sha256_of_stream(file, begin, end)
    if source.form == "parquet":
        from minimind_data.inputs.parquet import ParquetRows  # noqa: PLC0415 - takes a tenth of a second

        rows = ParquetRows(split, spec, kind)
        for _ in rows.batches():
            pass
        return rows.begin, rows.end, rows.sha256
    reader = open_reader(split, spec)
    for _ in reader.blocks():
        pass
    return reader.begin, reader.end, reader.sha256


def place(split: Split, spec: RecordSpec, line: int) -> str:
    """Return path:line of the record with this number in a split, for a message; in Parquet the row stands for the line."""
    source = split.source
    if source.form == "text" and spec.separator is None:
        return split.sources[line - 1].name
    return f"{source.name}:{records_before(split, spec) + line}"


def records_before(split: Split, spec: RecordSpec) -> int:
    """Count the records of a source before a split."""
    if not split.start:
        return 0
    if split.source.form == "parquet":
        from minimind_data.inputs.parquet import count_rows  # noqa: PLC0415 - takes a tenth of a second

        return count_rows(split.source, range(split.start))
    lines = LineReader(split.source, 0, split.start, ends(split, spec))
    for _ in lines.pieces():
        pass
    return lines.num_lines


_BYTES_AT_A_TIME = 16 * 2**20


def texts_of(inputs: Sequence[Path | str], spec: RecordSpec | None = None) -> Iterator[str]:
    """Yield the texts of inputs, in order.

    Args:
        inputs: files, folders, globs and URIs.
        spec: what makes a text of a record; the field `text` unless said.

    Raises:
        UserError: an input or a record cannot be read.
    """
    spec = spec or RecordSpec()
    sources, _ = expand([str(one) for one in inputs])
    for splits in plan_splits(sources, _BYTES_AT_A_TIME, spec):
        for split in splits:
            for block in open_reader(split, spec).blocks():
                if block.bad:
                    raise UserError(f"{place(split, spec, block.bad[0].line)}: {block.bad[0].reason}")
                yield from block.texts
