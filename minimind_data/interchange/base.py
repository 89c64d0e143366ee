"""What every format of other projects' token files has in common.

`TokenFormat` says what a format must provide: it recognizes its files, finds them, reads documents out of them in batches, and writes parts
of a dataset. `formats` has the table of all formats.

Files are read from front to back in blocks of bounded size, so memory does not grow with them. Ids are checked against the vocabulary as
they are read; the documents keep whatever frame they have. A dataset is written from `checked_documents`, which compares the bytes
with the manifest's checksums on the way, so damage is never passed on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.checked_reading import Documents, checked_documents
from minimind_data.dataset.format import Manifest, TokenizerInfo
from minimind_data.dataset.framing import BLOCK_TOKENS, check_ids, check_lengths, document_ranges
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.reporting import Report

INDEX_BLOCK = 2**17
"""Number of documents whose index entries are read at a time."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some whole documents of one file."""

    input: int
    """Number of the token file in which they begin."""
    start: int
    """First byte of that file that belongs to them."""
    stop: int
    """The byte after the last."""
    num_bytes: int
    """Bytes of the file that were read for it, for progress."""
    tokens: NDArray[Any]
    """[sum(lengths)] integers of the files' own dtype, ids checked."""
    lengths: NDArray[np.int64]
    """[documents]"""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader must know besides the files."""

    vocab_size: int
    separator_id: int
    """The id at which streams are cut into documents."""
    column: str
    """Name of the column of ids in Arrow and Parquet tables."""
    block_tokens: int = BLOCK_TOKENS
    """Tokens of a batch, about; a document is never divided."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What a writer must know besides the dataset."""

    column: str
    """Name of the column of ids in Arrow and Parquet tables."""
    copy: bool
    """Whether to copy shards that could be linked."""


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """The files of a dataset of another project."""

    format: str
    """A name in `formats.FORMATS`."""
    token_files: tuple[Path, ...]
    """In the order of the dataset: by name, or as the format says."""
    index_files: tuple[Path, ...] = ()
    """The indexes, which say where documents begin: one for each token file, or none at all."""


def read_array(file: BinaryIO, path: Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """Read `count` numbers from the byte `offset` on."""
    file.seek(offset)
    array = np.fromfile(file, dtype, count)
    if len(array) != count:
        raise UserError(
            f"ends at byte {offset + array.nbytes:,} in the middle of its data",
            where=path,
            remedy="copy it again",
        )
    return array


def read_documents(
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
            check_ids(tokens, options.vocab_size, token_place(path, start))
            yield Batch(
                input=number,
                start=start * item,
                stop=stop * item,
                num_bytes=(stop - start) * item,
                tokens=tokens,
                lengths=lengths[first:last],
            )


def token_place(path: Path, first_token: int) -> Callable[[int], str]:
    """Return a function that names the place of a token in the file, from its number in a block that begins at `first_token`."""
    return lambda index: f"{path}: token {first_token + index:,}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """The shards that become one file, or one pair of files."""

    name: str
    """Of the file, without its suffix."""
    shards: ShardSet
    members: range
    """Which shards, by their places in the manifest."""
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


class TokenFormat(ABC):
    """A format of token files: how its files are recognized and read, and how a dataset is written in it.

    A document of a dataset is BOS + ids + EOS, or ids + EOS where the tokenizer has no BOS. The docstring of a format says what it leaves out of that.
    """

    name: ClassVar[str]
    """In options and manifests."""
    suffix: ClassVar[str]
    """Of the files with the tokens."""
    index_needed: ClassVar[str] = ""
    """If each of them has an index beside it: what a message says about it."""
    options: ClassVar[frozenset[str]] = frozenset()
    """The options of a conversion that apply to this format but not to every format."""
    divider: ClassVar[Literal["bos", "eos"] | None] = None
    """Which id divides documents, if nothing else says where each ends; EOS where there is no BOS."""
    takes_conversations: ClassVar[bool] = False
    """Whether it has a place for loss masks and for pairs."""
    is_one_file: ClassVar[bool] = False
    """Whether its own tools expect all documents in one file."""

    def divider_id(self, tokenizer: TokenizerInfo) -> int | None:
        """Return the id that divides documents; None where something else says where each ends."""
        if self.divider is None:
            return None
        has_bos = self.divider == "bos" and tokenizer.bos_id is not None
        return tokenizer.bos_id if has_bos else tokenizer.eos_id

    def recognizes(self, path: Path, start: bytes) -> bool:  # noqa: ARG002 - for those that can
        """Tell whether a file certainly has this format, from its first 16 bytes and the files beside it."""
        return False

    def recognizes_folder(self, folder: Path) -> bool:  # noqa: ARG002 - for those that can
        """Tell whether a folder certainly holds this format, from what is in it besides token files."""
        return False

    def open(self, source: Path) -> TokenFiles:
        """Find the files of a dataset.

        Args:
            source: a folder, or one file of it.

        Raises:
            UserError: there are none, or one of a pair is missing.
        """
        if source.is_dir():
            files = sorted(path for path in source.iterdir() if path.suffix == self.suffix and path.is_file())
            if not files:
                raise UserError(
                    f"no {self.suffix} file in it, which format {self.name} has",
                    where=source,
                    remedy="name another `source_format`",
                    option="source_format",
                )
        else:
            files = [self.file_of(source)]
        indexes = [index for path in files if (index := self.index_of(path)) is not None]
        for path in (*files, *indexes):
            if not path.is_file():
                raise UserError("no such file", where=path, remedy=f"{self.name} needs it{self.index_needed}")
        return TokenFiles(format=self.name, token_files=tuple(files), index_files=tuple(indexes))

    def file_of(self, source: Path) -> Path:
        """Return the token file that a user means by a path that is no folder."""
        return source

    def index_of(self, path: Path) -> Path | None:  # noqa: ARG002 - for those that have one
        """Return the index of a token file, which says where documents begin; None if the format has none."""
        return None

    @abstractmethod
    def read(self, files: TokenFiles, options: ReadOptions) -> Iterator[Batch]:
        """Yield all documents in order, in batches.

        Raises:
            UserError: a file is damaged or not of this format, or an id is not in the vocabulary.
        """

    def file_names(self, names: Sequence[str]) -> list[str]:
        """Return the names of files that are to hold parts of these names, without their suffix."""
        return list(names)

    @abstractmethod
    def write(self, folder: Path, part: Part, options: WriteOptions) -> int:
        """Write one part.

        Returns:
            Number of its documents that a reader will take for several.

        Raises:
            FormatError: a shard is damaged.
            UserError: the format cannot hold it.
        """

    def finish(self, folder: Path, manifest: Manifest, files: Sequence[str], options: WriteOptions) -> None:  # noqa: B027 - for those that have such files
        """Write what belongs beside the token files, when these are written.

        Args:
            folder: that they are in.
            manifest: of the dataset.
            files: their names, in order.
            options: as for `write`.
        """
