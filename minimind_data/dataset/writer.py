"""ShardWriter: append sequences to a shard, which appears under its name when it is complete.

Until `commit` there is no file with the shard's name, so an exception or a kill leaves no shard. `commit` makes the shard durable: all
files are flushed to the disk before they are renamed, and the index, without which there is no shard, comes last.
"""

import errno
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import (
    IndexHeader,
    MaskArray,
    TokenArray,
    TokenDtype,
    WrittenShard,
    index_bytes,
    numpy_dtype,
)
from minimind_data.files import naming, partial_name, write_atomic


class ShardWriter:
    """Writes `NAME.bin` and `NAME.idx` into a folder, and `NAME.mask` where there is a loss mask.

        with ShardWriter(folder, "text-00000", "uint16") as writer:
            writer.append(tokens, lengths)
            written = writer.commit()

    Args:
        folder: where the shard goes; it must exist.
        name: of the shard, without suffix.
        dtype: of the tokens on disk.
        sequences_per_document: 1 for pre-training and SFT, 2 for DPO (chosen, rejected).
        masked: whether the shard has a loss mask.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        dtype: TokenDtype,
        *,
        sequences_per_document: int = 1,
        masked: bool = False,
    ) -> None:
        self._path = Path(folder) / f"{name}.bin"
        self._dtype: TokenDtype = dtype
        self._sequences_per_document = sequences_per_document
        self._lengths: list[NDArray[np.int64]] = []
        self._num_tokens = 0
        self._mask: _OpenFile | None = None
        self._file = _OpenFile(self._path)
        if masked:
            try:
                self._mask = _OpenFile(self._path.with_suffix(".mask"))
            except BaseException:
                self._file.discard()
                raise

    def append(self, tokens: TokenArray, lengths: NDArray[np.int64], mask: MaskArray | None = None) -> None:
        """Add whole sequences.

        Args:
            tokens: [sum(lengths)] of the shard's dtype: the sequences end to end.
            lengths: int64 [n], the tokens of each.
            mask: uint8 [sum(lengths)], 1 where a token is learned; for a shard that is `masked`, and only for that.
        """
        assert tokens.dtype == numpy_dtype(self._dtype), (tokens.dtype, self._dtype)
        assert int(lengths.sum()) == len(tokens), (int(lengths.sum()), len(tokens))
        assert (mask is None) == (self._mask is None)
        self._file.write(np.ascontiguousarray(tokens).view(np.uint8))
        if self._mask is not None and mask is not None:
            assert len(mask) == len(tokens), (len(mask), len(tokens))
            self._mask.write(np.ascontiguousarray(mask))
        self._lengths.append(np.asarray(lengths, np.int64))
        self._num_tokens += len(tokens)

    def commit(self) -> WrittenShard:
        """Make the shard durable and give it its name, the index last."""
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int64)])
        num_documents, left_over = divmod(len(lengths), self._sequences_per_document)
        assert left_over == 0, (len(lengths), self._sequences_per_document)
        header = IndexHeader(dtype=self._dtype, num_sequences=len(lengths), num_documents=num_documents)
        starts = np.arange(num_documents + 1, dtype=np.int64) * self._sequences_per_document
        index = index_bytes(header, lengths, starts)
        files = [file for file in (self._file, self._mask) if file is not None]
        for file in files:
            file.finish()
        index_path = self._path.with_suffix(".idx")
        index_path.unlink(missing_ok=True)  # an old index must never stand beside new tokens
        for file in files:
            file.publish()
        write_atomic(index_path, index)  # also fsyncs the folder, and with it both names
        return WrittenShard(
            documents=num_documents,
            sequences=len(lengths),
            tokens=self._num_tokens,
            bytes=self._num_tokens * np.dtype(self._dtype).itemsize,
            sha256=self._file.sha256,
            index_sha256=hashlib.sha256(index).hexdigest(),
            mask_sha256="" if self._mask is None else self._mask.sha256,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.discard()
        finally:
            if self._mask is not None:
                self._mask.discard()


class _OpenFile:
    """A file of a shard that is being written under a temporary name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = partial_name(path)
        self._digest = hashlib.sha256()
        self._file = self._partial.open("wb")

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written."""
        return self._digest.hexdigest()

    def write(self, data: NDArray[np.uint8]) -> None:
        """Append bytes."""
        with naming(self._path):
            self._file.write(data.data)
        self._digest.update(data.data)

    def finish(self) -> None:
        """Flush it to the disk and close it, still under its temporary name."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        # A worker of a killed build may come here after the next build has removed its file, or has even finished.
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "removed by another run", str(self._partial))
        self._file.close()

    def publish(self) -> None:
        """Rename it to its final name."""
        self._partial.replace(self._path)

    def discard(self) -> None:
        """Close it and remove the temporary file."""
        try:
            self._file.close()  # flushes, which fails on a full disk
        finally:
            self._partial.unlink(missing_ok=True)
