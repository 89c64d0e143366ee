"""`nanogpt`, `llmc` and `llmc-llama3`: streams of ids, one of which divides documents; little-endian.

nanogpt      A .bin of uint16 ids, nothing else; the end-of-text id (GPT-2's <|endoftext|>) follows each document.
llmc         llm.c's .bin: 256 int32, of which [0] is 20240520, [1] is 1 and [2] the number of tokens; then uint16 ids. The end-of-text id
             precedes each document, and a document may go on in the next file. modded-nanogpt's files are the same.
llmc-llama3  The same with 20240801, 7, and uint32 ids.

Where the tokenizer has no BOS, EOS is the dividing id of both: it follows each document in nanogpt and precedes it in llmc.

A reader takes a document that contains the dividing id for several documents. And if a text itself ends with EOS (in nanogpt) or begins with BOS (in
llmc; with EOS where there is no BOS), that token is taken for the document's frame when the files are converted back.

Sources: nanoGPT data/openwebtext/prepare.py; llm.c dev/data/data_common.py (`write_datafile`), dev/data/fineweb.py and
llmc/dataloader.h; modded-nanogpt data/fineweb.py and train_gpt.py (`_load_data_shard`).
"""

import struct
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import TokenArray, TokenizerInfo
from minimind_data.dataset.framing import check_ids, check_lengths
from minimind_data.dataset.staging import durable_file
from minimind_data.errors import UserError
from minimind_data.interchange.base import (
    Batch,
    Part,
    ReadOptions,
    TokenFiles,
    TokenFormat,
    WriteOptions,
    read_array,
    token_place,
)

_HEADER_BYTES = 1024


class Stream(TokenFormat):
    """Ids of a fixed size, one of which divides documents."""

    suffix = ".bin"
    options = frozenset({"separator_id"})
    token_bytes: ClassVar[int] = 2
    """Bytes of an id, an unsigned integer."""
    max_tokens: ClassVar[int | None] = None
    """Maximum tokens of a file; None if there is no limit."""

    @abstractmethod
    def extent(self, path: Path) -> tuple[int, int]:
        """Return (byte of the first token, number of tokens) of a file, after checking its size."""

    @abstractmethod
    def write_header(self, file: BinaryIO, num_tokens: int) -> None:
        """Write what precedes the ids."""

    def read(self, files: TokenFiles, options: ReadOptions) -> Iterator[Batch]:
        """Cut the files, which are one stream of tokens, at the separator; it may be before, after or between documents.

        A document that goes on in the next file belongs to the file in which it begins. Two separators in a row make no empty document:
        the first may end one, and the second begin the next.
        """
        dtype = f"<u{self.token_bytes}"
        item = np.dtype(dtype).itemsize
        open_document = _OpenDocument(files)
        for number, path in enumerate(files.token_files):
            offset, num_tokens = self.extent(path)
            num_cuts = 0
            with path.open("rb") as file:
                for first in range(0, num_tokens, options.block_tokens):
                    count = min(options.block_tokens, num_tokens - first)
                    block = read_array(file, path, dtype, offset + first * item, count)
                    check_ids(block, options.vocab_size, token_place(path, first))
                    cuts = np.flatnonzero(block == options.separator_id)
                    num_cuts += len(cuts)
                    byte = offset + first * item
                    if len(cuts) and open_document.is_of_a_file_before(number):
                        yield open_document.end(block[: cuts[0]])
                        block, byte = block[cuts[0] + 1 :], byte + (int(cuts[0]) + 1) * item
                        cuts = cuts[1:] - cuts[0] - 1
                    if len(cuts):
                        last = int(cuts[-1]) + 1
                        start, tokens = open_document.take(number, byte, block[:last])
                        is_separator = tokens == options.separator_id
                        lengths = np.diff(np.flatnonzero(is_separator), prepend=-1) - 1
                        stop = byte + last * item
                        yield Batch(
                            input=number,
                            start=start,
                            stop=stop,
                            num_bytes=stop - start,
                            tokens=tokens[~is_separator],
                            lengths=lengths[lengths > 0],
                        )
                        block, byte = block[last:], stop
                    open_document.add(number, byte, block)
            if number == 0 and not num_cuts and num_tokens:
                raise UserError(
                    f"the id {options.separator_id}, which divides documents, is nowhere in it",
                    where=path,
                    remedy="say with `separator_id` which id does that here",
                )
        if open_document.num_tokens:
            yield open_document.end(np.empty(0, dtype))

    def write(self, folder: Path, part: Part, options: WriteOptions) -> int:  # noqa: ARG002 - it has none
        """See `TokenFormat.write`; readers will cut a document that has the dividing id inside."""
        path = folder / f"{part.name}{self.suffix}"
        info = part.shards.manifest.tokenizer
        if self.token_bytes < part.shards.dtype.itemsize:
            raise UserError(
                f"its vocabulary of {info.vocab_size:,} entries does not fit the {self.token_bytes}-byte ids "
                f"of {self.name}",
                where=part.shards.folder,
                remedy="take `target_format` llmc-llama3 or another",
            )
        num_tokens = part.num_tokens - (0 if info.bos_id is None else part.num_documents)
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise UserError(
                f"{num_tokens:,} tokens, where the header of this format can say {self.max_tokens:,}",
                where=path.name,
                remedy="leave out `one_file`",
            )
        divider = self.divider_id(info)
        divided = 0
        with durable_file(path) as file:
            self.write_header(file, num_tokens)
            for framed, framed_lengths in part.documents():
                ids, lengths = self._divided(framed, framed_lengths, info)
                # Count the dividers in each document: one is its own, more are inside
                documents = np.searchsorted(np.cumsum(lengths), np.flatnonzero(ids == divider), "right")
                divided += int((np.bincount(documents, minlength=len(lengths)) > 1).sum())
                file.write(ids.astype(f"<u{self.token_bytes}").tobytes())
        return divided

    def _divided(
        self, tokens: TokenArray, lengths: NDArray[np.int64], info: TokenizerInfo
    ) -> tuple[TokenArray, NDArray[np.int64]]:
        """Return documents, and the length of each, with the id that divides them in the place of BOS and EOS."""
        if info.bos_id is None:
            # All of them end with EOS, so each has the one of the document before it in front when all move on by a place.
            return (np.roll(tokens, 1) if self.divider == "bos" else tokens), lengths
        stops = np.cumsum(lengths)
        mask = np.ones(len(tokens), bool)
        mask[stops - 1 if self.divider == "bos" else stops - lengths] = False
        return tokens[mask], lengths - 1


class NanoGPT(Stream):
    """Leaves out BOS: ids + EOS, so EOS divides documents. All documents go into one file."""

    name = "nanogpt"
    divider = "eos"
    is_one_file = True

    def extent(self, path: Path) -> tuple[int, int]:
        """See `Stream.extent`."""
        size = path.stat().st_size
        if size % self.token_bytes:
            raise UserError(
                f"{size:,} bytes are no whole number of {self.token_bytes}-byte ids",
                where=path,
                remedy="name another `source_format`",
            )
        return 0, size // self.token_bytes

    def write_header(self, file: BinaryIO, num_tokens: int) -> None:
        """Write nothing: there is no header."""


class LLMC(Stream):
    """Leaves out EOS: BOS + ids, so BOS divides documents. Without BOS it is EOS + ids."""

    name = "llmc"
    divider = "bos"
    magic: ClassVar[int] = 20240520
    version: ClassVar[int] = 1
    max_tokens = 2**31 - 1  # what the count in the header can say

    def recognizes(self, path: Path, start: bytes) -> bool:  # noqa: ARG002 - its name does not matter
        """See `TokenFormat.recognizes`."""
        return start.startswith(struct.pack("<2i", self.magic, self.version))

    def extent(self, path: Path) -> tuple[int, int]:
        """See `Stream.extent`."""
        size = path.stat().st_size
        with path.open("rb") as file:
            magic, version, num_tokens = (
                int(number) for number in read_array(file, path, "<i4", 0, _HEADER_BYTES // 4)[:3]
            )
        if (magic, version) != (self.magic, self.version):
            raise UserError(
                f"begins with {magic}, {version}, where this format has {self.magic}, {self.version}",
                where=path,
                remedy="name another `source_format`",
            )
        whole = _HEADER_BYTES + num_tokens * self.token_bytes
        if size != whole:
            raise UserError(
                f"{size:,} bytes, where its header says {num_tokens:,} tokens, which are {whole:,} bytes",
                where=path,
                remedy="copy it again",
            )
        return _HEADER_BYTES, num_tokens

    def write_header(self, file: BinaryIO, num_tokens: int) -> None:
        """See `Stream.write_header`."""
        file.write(struct.pack("<3i", self.magic, self.version, num_tokens).ljust(_HEADER_BYTES, b"\0"))


class LLMCLlama3(LLMC):
    """The same with ids of four bytes."""

    name = "llmc-llama3"
    token_bytes = 4
    magic = 20240801
    version = 7


class _OpenDocument:
    """The tokens since the last separator: a document whose end has not been read yet."""

    def __init__(self, files: TokenFiles) -> None:
        self._files = files.token_files
        self._parts: list[NDArray[Any]] = []
        self._input = self._start = 0
        self.num_tokens = 0

    def is_of_a_file_before(self, number: int) -> bool:
        return bool(self.num_tokens) and self._input != number

    def add(self, number: int, byte: int, tokens: NDArray[Any]) -> None:
        """Add tokens that begin at this byte of the file with this number."""
        if not self.num_tokens:
            self._input, self._start = number, byte
        if len(tokens):
            self._parts.append(tokens.copy())  # not a view that keeps its whole block
            self.num_tokens += len(tokens)
        check_lengths(np.array([self.num_tokens]), str(self._files[number]))

    def take(self, number: int, byte: int, tokens: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """Add the last tokens; return (byte at which the document began, all of its tokens), and begin the next one."""
        self.add(number, byte, tokens)
        start, joined = self._start, np.concatenate([*self._parts, tokens[:0]])
        self._parts, self.num_tokens = [], 0
        return start, joined

    def end(self, tokens: NDArray[Any]) -> Batch:
        """Add the last tokens; return the document as one that ends with the file in which it began."""
        number = self._input
        start, document = self.take(number, 0, tokens)
        stop = self._files[number].stat().st_size
        return Batch(
            input=number,
            start=start,
            stop=stop,
            num_bytes=stop - start,
            tokens=document,
            lengths=np.array([len(document)]),
        )
