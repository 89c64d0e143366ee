"""A dataset of ours in the formats that `foreign.py` describes, file by file.

Everything is read through `checked_documents`, which holds the bytes against the manifest's checksums on the way: damage
is never passed on. Each writer says what it leaves out of a document, which is BOS + ids + EOS. Tables hold conversations and
pairs too, as those are: nothing stands around them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimind_data.checked import Documents, checked_documents, checked_sequences
from minimind_data.errors import UserError
from minimind_data.foreign import MAX_STREAM_TOKENS, STREAM_HEADERS, ForeignFormat
from minimind_data.format import TOKENIZER_NAME, IndexHeader, Kind
from minimind_data.reporting import Report
from minimind_data.shards import ShardSet
from minimind_data.staging import durable_file, place_file
from minimind_data.window_base import IGNORED

TABLES = frozenset({"hf", "parquet"})
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


@dataclass(frozen=True, kw_only=True)
class Part:
    """The shards that become one foreign file (or one pair), and its name without suffix."""

    name: str
    shards: ShardSet
    members: range
    """Places in the manifest."""
    report: Report

    @property
    def num_tokens(self) -> int:
        """Tokens of all members."""
        starts = self.shards.token_starts
        return int(starts[self.members.stop] - starts[self.members.start])

    @property
    def num_documents(self) -> int:
        """Documents of all members."""
        starts = self.shards.document_starts
        return int(starts[self.members.stop] - starts[self.members.start])

    def documents(self) -> Iterator[Documents]:
        """Read all documents in order, in blocks of bounded size."""
        for index in self.members:
            yield from checked_documents(self.shards, index, self.report)

    def columns(self) -> Iterator[list[Documents]]:
        """Read all documents in order, in blocks of bounded size, each column of a table by itself; see `columns_of`."""
        each = self.shards.manifest.sequences_per_document
        for index in self.members:
            for tokens, lengths, mask in checked_sequences(self.shards, index, self.report):
                columns: list[Documents] = []
                for side in range(each):
                    here = (
                        np.repeat(np.arange(len(lengths)) % each == side, lengths)
                        if each > 1
                        else slice(None)
                    )
                    columns.append((tokens[here], lengths[side::each]))
                    if mask is not None:
                        labels = np.where(mask[here], tokens[here].astype(np.int32), IGNORED)
                        columns.append((labels, lengths[side::each]))
                yield columns


def columns_of(kind: Kind, column: str) -> list[str]:
    """Return the columns of a table with documents of this kind.

    Args:
        kind: of the dataset.
        column: the name of the ids.
    """
    if kind == "dpo":
        return [f"{side}_{name}" for side in ("chosen", "rejected") for name in (column, "labels")]
    return [column] if kind == "pretrain" else [column, "labels"]


def write_part(kind: ForeignFormat, folder: Path, part: Part, column: str, *, copy: bool) -> tuple[str, int]:
    """Write one part.

    Args:
        kind: the format.
        folder: where to.
        part: what.
        column: the name of the ids in Arrow and Parquet.
        copy: Megatron's pairs, which are our shards as they are, are copied and not linked.

    Returns:
        (name of the file with the tokens, number of documents that a reader will take for several).

    Raises:
        FormatError: a shard is damaged.
        UserError: the format cannot hold it.
    """
    if kind in TABLES:
        from minimind_data.foreign_arrow import write_arrow, write_parquet  # noqa: PLC0415 - takes a while to load

        name = f"{part.name}.{'arrow' if kind == 'hf' else 'parquet'}"
        columns = columns_of(part.shards.manifest.kind, column)
        (write_arrow if kind == "hf" else write_parquet)(folder / name, columns, part.columns())
        return name, 0
    if kind == "megatron":
        if len(part.members) == 1:
            _place_pair(folder, part, copy=copy)
        else:
            _write_megatron(folder, part)
        return f"{part.name}.bin", 0
    if kind == "datatrove":
        _write_datatrove(folder, part)
        return f"{part.name}.ds", 0
    return f"{part.name}.bin", _write_stream(kind, folder / f"{part.name}.bin", part)


def _place_pair(folder: Path, part: Part, *, copy: bool) -> None:
    """Link or copy a shard, after reading all of it: documents are Megatron's as they are."""
    for _ in part.documents():
        pass
    for suffix in (".bin", ".idx"):
        source = part.shards.folder / f"{part.shards.manifest.shards[part.members[0]].name}{suffix}"
        place_file(source, folder / f"{part.name}{suffix}", copy=copy)


def _write_megatron(folder: Path, part: Part) -> None:
    """Write one pair for several shards; the three tables of the index grow in their places at once."""
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


def _write_stream(kind: ForeignFormat, path: Path, part: Part) -> int:
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


def _write_datatrove(folder: Path, part: Part) -> None:
    """Write a .ds file with its index and metadata; documents stay as they are."""
    item = part.shards.dtype.itemsize
    done = 0
    path = folder / f"{part.name}.ds"
    with durable_file(path) as file, durable_file(folder / f"{path.name}.index") as index:
        for tokens, lengths in part.documents():
            file.write(tokens.view(np.uint8).data)
            stops = done + np.cumsum(lengths)
            index.write(stops.astype("<u8").tobytes())
            done = int(stops[-1])
    with durable_file(folder / f"{path.name}.metadata") as file:
        file.write(f"{TOKENIZER_NAME}|{item}\n{done}\n{_for_people(done)}T".encode())


def _for_people(number: int) -> str:
    """Write a number with three digits and a unit: 1.23 M."""
    for worth, unit in _UNITS:
        if number >= worth:
            return f"{number / worth:.3g} {unit}"
    return f"{number} "
