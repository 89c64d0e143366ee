"""What readers and writers of other projects' token files share: a source, a batch of documents, a part that is written.

Files are read from front to back in blocks of bounded size, so memory does not grow with them. Ids are held against the vocabulary as
they come; the documents keep whatever frame they have. What is written is read through `checked_documents`, which holds the bytes
against the manifest's checksums on the way: damage is never passed on. Each writer says what it leaves out of a document, which is
BOS + ids + EOS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.checked import Documents, checked_documents, checked_sequences
from minimind_data.dataset.format import (
    IGNORED,
    Kind,
)
from minimind_data.dataset.framing import BLOCK_TOKENS, check_ids, check_lengths, document_ranges
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.reporting import Report

INDEX_BLOCK = 2**17

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


def read_array(file: BinaryIO, path: Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """Read `count` numbers from the byte `offset` on."""
    file.seek(offset)
    array = np.fromfile(file, dtype, count)
    if len(array) != count:
        raise UserError(
            f"{path}: ends at byte {offset + array.nbytes:,} in the middle of its data; copy it again"
        )
    return array


def documents(
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
            tokens = read_array(file, path, dtype, start * item, stop - start)
            check_ids(tokens, options.vocab_size, place(path, start))
            yield Batch(
                input=number,
                start=start * item,
                stop=stop * item,
                num_bytes=(stop - start) * item,
                tokens=tokens,
                lengths=lengths[first:last],
            )


def place(path: Path, first_token: int) -> Callable[[int], str]:
    """Return what says, of a token of a block, where in the file it stands."""
    return lambda index: f"{path}: token {first_token + index:,}"


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


ForeignFormat = Literal["megatron", "nanogpt", "llmc", "llmc-llama3", "datatrove", "hf", "parquet"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a foreign dataset."""

    format: ForeignFormat
    token_files: tuple[Path, ...]
    """In the order of the dataset: by name, or as state.json has them."""
    side_files: tuple[Path, ...]
    """The indexes, which tell where documents begin and so decide the tokens too."""
