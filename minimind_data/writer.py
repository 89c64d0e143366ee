"""ShardWriter: append documents, commit by rename.

Until `commit` nothing carries the shard's name; an exception, or a process that is killed, leaves no shard. What a commit
leaves is durable: both files are fsynced before their rename, and the index, without which a shard is none, comes last.
"""

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from minimind_data.files import partial_name, write_atomic
from minimind_data.format import IndexHeader, TokenArray, TokenDtype, index_bytes, numpy_dtype


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """Size and checksums of a shard that was committed; the fields are those of `format.ShardEntry`."""

    documents: int
    sequences: int
    tokens: int
    bytes: int
    sha256: str
    index_sha256: str


class ShardWriter:
    """Writes `NAME.bin` and `NAME.idx` into a folder.

        with ShardWriter(folder, "text-00000", "uint16") as writer:
            writer.append(tokens, lengths)
            written = writer.commit()

    Args:
        folder: where the shard goes; it exists.
        name: the shard's name, without suffix.
        dtype: of the tokens on disk.
        sequences_per_document: 1 for pre-training and SFT, 2 for DPO (chosen, rejected).
    """

    def __init__(
        self, folder: Path, name: str, dtype: TokenDtype, *, sequences_per_document: int = 1
    ) -> None:
        self._path = folder / f"{name}.bin"
        self._partial = partial_name(self._path)
        self._dtype: TokenDtype = dtype
        self._sequences_per_document = sequences_per_document
        self._lengths: list[NDArray[np.int64]] = []
        self._digest = hashlib.sha256()
        self._num_tokens = 0
        self._file = self._partial.open("wb")

    def append(self, tokens: TokenArray, lengths: NDArray[np.int64]) -> None:
        """Add whole sequences.

        Args:
            tokens: [sum(lengths)] of the shard's dtype: the sequences end to end.
            lengths: int64 [n], the tokens of each.
        """
        assert tokens.dtype == numpy_dtype(self._dtype), (tokens.dtype, self._dtype)
        assert int(lengths.sum()) == len(tokens), (int(lengths.sum()), len(tokens))
        data = np.ascontiguousarray(tokens).view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(np.asarray(lengths, np.int64))
        self._num_tokens += len(tokens)

    def commit(self) -> WrittenShard:
        """Make the shard durable under its name, `.bin` first and `.idx` last."""
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int64)])
        num_documents, left_over = divmod(len(lengths), self._sequences_per_document)
        assert left_over == 0, (len(lengths), self._sequences_per_document)
        header = IndexHeader(dtype=self._dtype, num_sequences=len(lengths), num_documents=num_documents)
        starts = np.arange(num_documents + 1, dtype=np.int64) * self._sequences_per_document
        index = index_bytes(header, lengths, starts)
        self._file.flush()
        os.fsync(self._file.fileno())
        # A writer whose build was killed may come this late; the next build has removed its file and may be done already.
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "removed by another run", str(self._partial))
        self._file.close()
        index_path = self._path.with_suffix(".idx")
        index_path.unlink(missing_ok=True)  # an old index must never stand beside new tokens
        self._partial.replace(self._path)
        write_atomic(index_path, index)  # also fsyncs the folder, and with it both names
        return WrittenShard(
            documents=num_documents,
            sequences=len(lengths),
            tokens=self._num_tokens,
            bytes=self._num_tokens * np.dtype(self._dtype).itemsize,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # flushes, which a full disk refuses
        finally:
            self._partial.unlink(missing_ok=True)
