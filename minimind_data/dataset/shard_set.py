"""ShardSet: open a dataset, check it, and read rows of tokens out of its memory maps.

Opening a dataset reads the manifest and hashes the tokenizer, nothing else. A shard is mapped into memory, and compared with the
manifest, when the first of its tokens is read. `verify` is what reads every byte.

All shards together are one stream of tokens and one list of documents, both addressed by global numbers (int64).
"""

import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import (
    INDEX_HEADER_BYTES,
    REMAKE,
    RESTORE,
    TOKENIZER_NAME,
    FormatError,
    Manifest,
    MaskArray,
    TokenArray,
    numpy_dtype,
)
from minimind_data.dataset.gather import RowGather
from minimind_data.dataset.shard import Shard, mask_of
from minimind_data.errors import UserError
from minimind_data.files import sha256_of
from minimind_data.system import allow_open_files

__all__ = ["Shard", "ShardSet"]

_TOKENS_PER_COUNT = 2**20
"""So many bytes of a loss mask are counted at a time."""


class ShardSet:
    """All shards of a dataset as one stream of tokens and one list of documents.

    Attributes:
        folder: of the dataset.
        manifest: of the dataset.
        dtype: of the tokens, little-endian.
        token_starts: int64 [shards + 1], the global number of the first token of each shard, and at last the number of tokens.
        document_starts: int64 [shards + 1], the same for documents.
        sequence_starts: int64 [shards + 1], the same for sequences; a pair is two of them.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.dtype = numpy_dtype(manifest.dtype)
        counts = [(entry.written.tokens, entry.written.documents) for entry in manifest.shards]
        totals = np.cumsum(np.array([(0, 0), *counts], np.int64), axis=0)
        self.token_starts: NDArray[np.int64] = np.ascontiguousarray(totals[:, 0])
        self.document_starts: NDArray[np.int64] = np.ascontiguousarray(totals[:, 1])
        self._num_sequences = np.array([entry.written.sequences for entry in manifest.shards], np.int64)
        self.sequence_starts: NDArray[np.int64] = np.cumsum([0, *self._num_sequences.tolist()])
        self._index_by_name = {entry.name: index for index, entry in enumerate(manifest.shards)}
        self._shards: dict[int, Shard] = {}
        self._mapping = threading.Lock()
        self._tokens = RowGather.empty(self.dtype, len(manifest.shards))
        self._indexes = RowGather.empty(np.dtype(np.uint8), len(manifest.shards))
        self._masks = RowGather.empty(np.dtype(np.uint8), len(manifest.shards))

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a dataset.

        Raises:
            FormatError: the folder is not a dataset, or its tokenizer is not the one that made the shards.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        path = folder / TOKENIZER_NAME
        if not path.is_file():
            raise FormatError("missing", where=path, remedy=RESTORE)
        sha256 = sha256_of(path)
        if sha256 != manifest.tokenizer.sha256:
            raise FormatError(
                f"its SHA-256 is {sha256[:12]}…, but the shards were made with {manifest.tokenizer.sha256[:12]}…",
                where=path,
                remedy=f"put the right tokenizer back, or {RESTORE}",
            )
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder and the manifest alone: the process that unpickles them maps the files itself."""
        return (type(self), (self.folder, self.manifest))

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return int(self.token_starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return int(self.document_starts[-1])

    @property
    def tokenizer_json(self) -> str:
        """The text of its tokenizer.json."""
        return (self.folder / TOKENIZER_NAME).read_bytes().decode()

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.manifest.shards)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...

    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        """Return a shard, mapped, or the shards of a slice.

        Raises:
            IndexError: there is no such shard; negative numbers count from the end.
        """
        if isinstance(index, slice):
            return [self.shard(number) for number in range(len(self))[index]]
        try:
            number = range(len(self))[index]
        except IndexError:
            raise IndexError(f"shard {index} asked for, and there are {len(self)}") from None
        return self.shard(number)

    def __repr__(self) -> str:
        return f"ShardSet({str(self.folder)!r}: {self.manifest.summary})"

    def __iter__(self) -> Iterator[Shard]:
        """Iterate over the shards in order, mapping each."""
        return (self.shard(index) for index in range(len(self)))

    def shard(self, index: int) -> Shard:
        """Return a shard by its index in the manifest, mapping it when it is asked for the first time."""
        self._map_all(np.array([index]))
        return self._shards[index]

    def open_shard(self, index: int) -> Shard:
        """Map a shard for the caller alone: `shard` keeps its maps, while a pass over all shards by this has one map at a time."""
        return Shard(self.folder, self.manifest.shards[index], self.manifest.dtype)

    def rows(self, starts: NDArray[np.int64], width: int) -> TokenArray:
        """Copy rows of the token stream; a row may span any number of shards.

        Args:
            starts: int64 [B], the global number of the first token of each row.
            width: the number of tokens of a row.

        Returns:
            uint16 or int32 [B, width].

        Raises:
            IndexError: a row begins before the first token or ends after the last.
            FormatError: a token is outside of the vocabulary.
        """
        rows = self._rows(starts, width, masks=False)
        self.check_tokens(rows, starts)
        return rows

    def mask_rows(self, starts: NDArray[np.int64], width: int) -> MaskArray:
        """Copy the loss mask of rows of the token stream, uint8 [B, width]; otherwise like `rows`."""
        assert self.manifest.has_masks, self.manifest.kind
        return self._rows(starts, width, masks=True)

    def _rows(self, starts: NDArray[np.int64], width: int, *, masks: bool) -> NDArray[Any]:
        if len(starts) and (starts.min() < 0 or starts.max() + width > self.num_tokens):
            raise IndexError(
                f"rows of {width} tokens at {starts.min()}…{starts.max()} in a stream of {self.num_tokens}"
            )
        owners = self.owners(starts)
        self._map_all(owners)
        gather = self._masks if masks else self._tokens
        offsets = starts - self.token_starts[owners]
        inside = starts + width <= self.token_starts[owners + 1]
        if inside.all():
            return gather.rows(owners, offsets, width)
        rows = np.empty((len(starts), width), np.uint8 if masks else self.dtype)
        rows[inside] = gather.rows(owners[inside], offsets[inside], width)
        read = self.mask_slice if masks else self.slice
        for place in np.flatnonzero(~inside):
            rows[place] = read(int(starts[place]), int(starts[place]) + width)
        return rows

    def check_tokens(self, rows: TokenArray, starts: NDArray[np.int64]) -> None:
        """Check that all tokens have a place in an embedding table; on a GPU, one that has none ends the process without saying where.

        This is one pass over tokens that have just been copied, and takes about a fifth of the time of the copy.

        Args:
            rows: uint16 or int32 [B, width], rows of the token stream.
            starts: int64 [B], the global number of the first token of each row.

        Raises:
            FormatError: one is outside of the vocabulary.
        """
        vocab_size = self.manifest.tokenizer.vocab_size
        unsigned = rows.view(f"<u{rows.itemsize}")  # in which a negative token is larger than any vocabulary
        if not rows.size or unsigned.max() < vocab_size:
            return
        row, column = np.argwhere(unsigned >= vocab_size)[0].tolist()
        name, offset = self.name_and_offset(int(starts[row]) + column)
        raise FormatError(
            f"token {rows[row, column]} at offset {offset} is outside of the vocabulary of {vocab_size:,} entries",
            where=self.folder / f"{name}.bin",
            remedy=f"`mm-data verify {shlex.quote(str(self.folder))}` shows what is damaged, so that it can be made again",
        )

    def count_learned(self) -> int:
        """Count the tokens that are learned, for which all loss masks are read; without masks, all tokens are learned."""
        if not self.manifest.has_masks:
            return self.num_tokens
        masks = (mask_of(shard) for shard in self)
        return sum(
            int(np.count_nonzero(mask[start : start + _TOKENS_PER_COUNT]))
            for mask in masks
            for start in range(0, len(mask), _TOKENS_PER_COUNT)
        )

    def sequence_spans(
        self, owners: NDArray[np.intp], sequences: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look sequences up in the indexes of their shards.

        Args:
            owners: intp [B], the shard of each sequence, by its index.
            sequences: int64 [B], the number of each sequence in its shard.

        Returns:
            (global number of the first token of each, its length in tokens), both int64 [B].

        Raises:
            FormatError: an index points outside its shard.
        """
        self._map_all(owners)
        offsets_start = INDEX_HEADER_BYTES + 4 * self._num_sequences[owners]
        lengths = self._indexes.rows(owners, INDEX_HEADER_BYTES + 4 * sequences, 4).view("<i4")[:, 0]
        offsets = self._indexes.rows(owners, offsets_start + 8 * sequences, 8).view("<i8")[:, 0]
        first, lengths = offsets // self.dtype.itemsize, lengths.astype(np.int64)
        outside = (first < 0) | (lengths < 0) | (lengths > np.diff(self.token_starts)[owners] - first)
        if outside.any():
            place = int(np.argmax(outside))
            name = self.manifest.shards[int(owners[place])].name
            raise FormatError(
                f"damaged (sequence {sequences[place]} lies outside the shard)",
                where=self.folder / f"{name}.idx",
                remedy=REMAKE,
            )
        return first + self.token_starts[owners], lengths

    def will_need(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """Tell the system that rows [start, stop) of the token stream will be read soon, so that it reads them all at once.

        Args:
            starts: int64 [B], the global number of the first token of each row.
            stops: int64 [B], the number after that of its last token; greater than the start.
        """
        firsts, lasts = self.owners(starts), self.owners(stops - 1)
        self._map_all(np.concatenate([firsts, lasts]))
        rows = zip(firsts.tolist(), lasts.tolist(), starts.tolist(), stops.tolist(), strict=True)
        for first, last, start, stop in rows:
            for index in range(first, last + 1):
                begin = int(self.token_starts[index])
                # A row seldom spans more than two shards; those between its first and its last may not be mapped yet.
                shard = self._shards.get(index) or self.shard(index)
                shard.will_need(max(0, start - begin), stop - begin)

    def slice(self, start: int, stop: int) -> TokenArray:
        """Return the tokens [start, stop) of the stream: a view where they are all in one shard, else a copy."""
        return self._joined(start, stop, lambda shard: shard.tokens)

    def mask_slice(self, start: int, stop: int) -> MaskArray:
        """Return the loss mask of the tokens [start, stop), as `slice` does."""
        return self._joined(start, stop, mask_of)

    def _joined(self, start: int, stop: int, array_of: Callable[[Shard], NDArray[Any]]) -> NDArray[Any]:
        first, last = (int(index) for index in self.owners(np.array([start, max(start, stop - 1)])))
        parts = [
            array_of(self.shard(index))[
                max(0, start - int(self.token_starts[index])) : stop - int(self.token_starts[index])
            ]
            for index in range(first, last + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def owners(self, tokens: NDArray[np.int64]) -> NDArray[np.intp]:
        """Return the index of the shard of each of these tokens, intp of the same shape."""
        return np.searchsorted(self.token_starts, tokens, side="right") - 1

    def sequences_at(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Return (index of its shard, number of its sequence in that shard) for each of these tokens, both of the same shape.

        One binary search finds the sequences of all tokens at the same time, in however many indexes they are.
        """
        owners = self.owners(tokens)
        self._map_all(owners)
        offsets = (tokens - self.token_starts[owners]) * self.dtype.itemsize
        places = INDEX_HEADER_BYTES + 4 * self._num_sequences[owners]
        low, high = np.zeros_like(tokens), self._num_sequences[owners]
        while (high - low > 1).any():
            middle = (low + high) // 2
            begins = self._indexes.rows(owners, places + 8 * middle, 8).view("<i8")[:, 0]
            later = begins > offsets
            low, high = np.where(later, low, middle), np.where(later, middle, high)
        return owners, low

    def name_and_offset(self, token: int) -> tuple[str, int]:
        """Return (name of the shard, offset in tokens in that shard) of a token by its global number."""
        owner = min(int(self.owners(np.array([token]))[0]), len(self) - 1)
        return self.manifest.shards[owner].name, token - int(self.token_starts[owner])

    def index_of(self, name: str) -> int:
        """Return the index, in the manifest, of the shard of this name.

        Raises:
            UserError: there is no such shard.
        """
        index = self._index_by_name.get(name)
        if index is None:
            names = list(self._index_by_name)
            some = ", ".join(names[:3]) + (f", … {names[-1]}" if len(names) > 3 else "")
            raise UserError(
                f"no shard named {name!r}", where=self.folder, remedy=f"its {len(names)} shards are {some}"
            )
        return index

    def token_at(self, name: str, offset: int) -> int:
        """Return the global number of the token at `offset` in the shard `name`: the inverse of `name_and_offset`.

        Raises:
            UserError: there is no such shard, or it has no token at that offset.
        """
        index = self.index_of(name)
        num_tokens = self.manifest.shards[index].written.tokens
        if not 0 <= offset < num_tokens:
            raise UserError(
                f"shard {name} has tokens 0 to {num_tokens - 1}, and none at {offset}", where=self.folder
            )
        return int(self.token_starts[index]) + offset

    def _map_all(self, owners: NDArray[np.intp]) -> None:
        """Map those of the shards that are not mapped yet; once all shards are, this costs one comparison."""
        if len(self._shards) == len(self):
            return
        unmapped = [index for index in np.unique(owners).tolist() if index not in self._shards]
        if not unmapped:
            return
        with self._mapping:
            allow_open_files(2 * len(self))
            new_shards = {}
            for index in unmapped:
                if index in self._shards:  # another thread was faster, and the gathers have its map
                    continue
                shard = self.open_shard(index)
                if not self.manifest.has_masks:
                    self._check_ends(shard)
                new_shards[index] = shard
            not_empty = {index: shard for index, shard in new_shards.items() if len(shard.tokens)}
            self._tokens = self._tokens.with_maps({index: one.tokens for index, one in not_empty.items()})
            self._indexes = self._indexes.with_maps({index: one.index for index, one in not_empty.items()})
            if self.manifest.has_masks:
                self._masks = self._masks.with_maps({index: mask_of(one) for index, one in not_empty.items()})
            # Last, so that a thread that finds a shard here without taking the lock finds its maps in the gathers too.
            self._shards |= new_shards

    def _check_ends(self, shard: Shard) -> None:
        """Check that a shard begins with BOS and ends with EOS, which one that another tokenizer made seldom does."""
        info = self.manifest.tokenizer
        if shard.ends is None:
            return
        begin, end = shard.ends
        if end != info.eos_id or info.bos_id not in (None, begin):
            bos = "no BOS" if info.bos_id is None else f"BOS {info.bos_id}"
            raise FormatError(
                f"begins with token {begin} and ends with {end}, where this dataset's tokenizer has {bos} and EOS {info.eos_id}, so it "
                "belongs to another dataset",
                where=self.folder / f"{shard.entry.name}.bin",
                remedy=REMAKE,
            )
