"""Windows over a ShardSet: fixed-length samples, addressed by number, each at the cost of one slice.

With sequence length L:

- `concat`: window k is the tokens [kL, kL + L] of the stream: L + 1 tokens at stride L, so every token is a target once.
- `pad`: window k is document k, cut to BOS + its first tokens + EOS where it is longer, then PAD. Unshifted at L = 340
  it is MiniMind's `PretrainDataset(max_length=340)`, id for id.

A sample is `input_ids` and `targets`, both int64 [L]: `targets[t]` is what follows `input_ids[t]`, -100 where nothing is to
be learned. For loops that shift inside the model (Hugging Face, MiniMind) a sample is `input_ids` and `labels`, both cut
from L tokens, unshifted. Which windows come when is not this module's business.
"""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_data.format import TokenArray
from minimind_data.shards import ShardSet

Layout = Literal["concat", "pad"]
MAX_SEQ_LEN = 2**24
"""A longer window is a slip of the keyboard: 16 million tokens, in int64 128 MiB."""
IGNORED = -100
"""The target of a position at which nothing is learned; PyTorch's default `ignore_index`."""


class Windows(Protocol):
    """What a training loop needs of a layout."""

    @property
    def shards(self) -> ShardSet:
        """The dataset."""
        ...

    @property
    def layout(self) -> Layout:
        """The layout's name."""
        ...

    @property
    def seq_len(self) -> int:
        """Tokens of `input_ids` in a window."""
        ...

    @property
    def labels(self) -> bool:
        """Whether samples are unshifted (`input_ids`, `labels`) rather than shifted (`input_ids`, `targets`)."""
        ...

    @property
    def unused_tokens(self) -> int:
        """Tokens of the dataset that stand in no window as a target, cut off or left over at the end."""
        ...

    def __len__(self) -> int:
        """Return the number of windows."""
        ...

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch: `input_ids` and `targets` (or `labels`), each int64 [len(windows), seq_len]."""
        ...

    def document_ids(self, window: int) -> NDArray[np.int64]:
        """Return, for each input position of a window, the number of its document, -1 for PAD: int64 [seq_len]."""
        ...

    def locate(self, window: int) -> tuple[str, int]:
        """Return (shard name, token offset) of the first token of a window."""
        ...

    def window_of(self, shard: str, offset: int) -> int:
        """Return the window that holds this token of this shard."""
        ...


def open_windows(shards: ShardSet, *, layout: Layout, seq_len: int, labels: bool = False) -> Windows:
    """Lay windows of `seq_len` tokens over a dataset.

    Args:
        shards: the dataset.
        layout: `concat` or `pad`.
        seq_len: L, tokens of `input_ids`.
        labels: give unshifted `labels` in place of shifted `targets`.

    Raises:
        UserError: the dataset has no such window.
    """
    if layout == "pad" and seq_len < 2:
        raise UserError(f"seq_len {seq_len} is too short for layout pad: BOS and EOS alone take 2")
    if seq_len < 1:
        raise UserError(f"seq_len must be at least 1, not {seq_len}")
    if seq_len > MAX_SEQ_LEN:
        raise UserError(f"seq_len must be at most {MAX_SEQ_LEN:,} tokens, not {seq_len:,}")
    windows = _LAYOUTS[layout](shards, seq_len, labels)
    if not len(windows):
        raise UserError(
            f"{shards.folder}: {shards.num_tokens:,} tokens in {shards.num_documents:,} documents make no {layout} window of "
            f"{seq_len} tokens; take a shorter --seq-len or more text"
        )
    return windows


class _WindowsBase:
    """What both layouts share: they cut `width` tokens and make a sample of them."""

    layout: Layout

    def __init__(self, shards: ShardSet, seq_len: int, labels: bool) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.labels = labels
        self.width = seq_len if labels else seq_len + 1

    def _sample(self, tokens: TokenArray, ignored: NDArray[np.bool_] | None) -> dict[str, NDArray[np.int64]]:
        """Make a batch of [B, width] tokens; `ignored` [B, width] marks those that are no target."""
        first = 0 if self.labels else 1
        input_ids = tokens[:, : self.seq_len].astype(np.int64)
        learned = tokens[:, first:].astype(np.int64)
        if ignored is not None:
            learned[ignored[:, first:]] = IGNORED
        return {"input_ids": input_ids, "labels" if self.labels else "targets": learned}

    def _check(self, windows: NDArray[np.int64], count: int) -> None:
        if len(windows) and (windows.min() < 0 or windows.max() >= count):
            raise IndexError(f"windows {windows.min()}…{windows.max()} asked for, there are {count}")


class ConcatWindows(_WindowsBase):
    """The token stream cut every L tokens; texts run on from window to window."""

    layout = "concat"

    def __len__(self) -> int:
        """Return the number of full windows."""
        return max(0, (self.shards.num_tokens - (self.width - self.seq_len)) // self.seq_len)

    @property
    def unused_tokens(self) -> int:
        """Tokens after the last full window."""
        return self.shards.num_tokens - (len(self) * self.seq_len + self.width - self.seq_len)

    def rows(self, windows: NDArray[np.int64]) -> TokenArray:
        """Return the tokens of windows as they are on disk: uint16 or int32 [B, width]."""
        self._check(windows, len(self))
        return self.shards.rows(windows * self.seq_len, self.width)

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch; see `Windows.fetch`."""
        return self._sample(self.rows(windows), None)

    def document_ids(self, window: int) -> NDArray[np.int64]:
        """Return the document of each input position; see `Windows.document_ids`."""
        start = window * self.seq_len
        tokens = np.arange(start, start + self.seq_len, dtype=np.int64)
        owners = self.shards.owners(tokens)
        documents = np.empty(self.seq_len, np.int64)
        for index in np.unique(owners):
            here = owners == index
            shard = self.shards.shard(int(index))
            offsets = (tokens[here] - self.shards.token_starts[index]) * self.shards.dtype.itemsize
            sequences = np.searchsorted(shard.offsets, offsets, side="right") - 1
            local = np.searchsorted(shard.document_starts, sequences, side="right") - 1
            documents[here] = local + self.shards.document_starts[index]
        return documents

    def locate(self, window: int) -> tuple[str, int]:
        """Return where a window begins; see `Windows.locate`."""
        return self.shards.name_and_offset(window * self.seq_len)

    def window_of(self, shard: str, offset: int) -> int:
        """Return the window that holds a token; see `Windows.window_of`.

        Raises:
            UserError: no such token, or it lies in the tail that fills no window.
        """
        window = self.shards.token_at(shard, offset) // self.seq_len
        if window >= len(self):
            raise UserError(
                f"{shard}:{offset} lies in the last {self.unused_tokens} tokens, which fill no window of {self.seq_len}"
            )
        return window


class PadWindows(_WindowsBase):
    """One document a window, cut or padded to length."""

    layout = "pad"

    def __init__(self, shards: ShardSet, seq_len: int, labels: bool) -> None:
        super().__init__(shards, seq_len, labels)
        info = shards.manifest.tokenizer
        # A PAD that stands inside a text is ignored too, as MiniMind does; unless PAD is EOS or BOS by another name, which
        # must be learned.
        self._ignored_id = info.pad_id if info.pad_id not in (info.bos_id, info.eos_id) else None
        self._unused_tokens: int | None = None

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.shards.num_documents

    @property
    def unused_tokens(self) -> int:
        """Tokens cut off documents that are longer than a window; counted over all indexes when first asked for."""
        if self._unused_tokens is None:
            self._unused_tokens = sum(
                int(np.maximum(shard.lengths.astype(np.int64) - self.width, 0).sum()) for shard in self.shards
            )
        return self._unused_tokens

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch; see `Windows.fetch`."""
        self._check(windows, len(self))
        starts, lengths = self._spans(windows)
        # Read a full row for each document and paint over what lies behind its end; the last documents of the dataset have
        # nothing behind them, so their rows begin earlier and are moved.
        shift = np.maximum(starts + self.width - self.shards.num_tokens, 0)
        info = self.shards.manifest.tokenizer
        if self.width > self.shards.num_tokens:
            rows = np.full((len(windows), self.width), info.pad_id, self.shards.dtype)
            for row, start, length in zip(rows, starts, np.minimum(lengths, self.width), strict=True):
                row[:length] = self.shards.slice(int(start), int(start + length))
        else:
            rows = self.shards.rows(starts - shift, self.width)
            for place in np.flatnonzero(shift):
                rows[place] = np.roll(rows[place], -shift[place])
        rows[lengths > self.width, -1] = info.eos_id
        padding = np.arange(self.width) >= lengths[:, None]
        rows[padding] = info.pad_id
        ignored = padding if self._ignored_id is None else rows == self._ignored_id
        return self._sample(rows, ignored)

    def document_ids(self, window: int) -> NDArray[np.int64]:
        """Return the document of each input position; see `Windows.document_ids`."""
        _, lengths = self._spans(np.array([window]))
        return np.where(np.arange(self.seq_len) < lengths[0], window, -1).astype(np.int64)

    def locate(self, window: int) -> tuple[str, int]:
        """Return where a window begins; see `Windows.locate`."""
        starts, _ = self._spans(np.array([window]))
        return self.shards.name_and_offset(int(starts[0]))

    def window_of(self, shard: str, offset: int) -> int:
        """Return the document that holds a token; see `Windows.window_of`."""
        self.shards.token_at(shard, offset)
        index = self.shards.index_of(shard)
        return int(self.shards.document_starts[index]) + self.shards.shard(index).sequence_of(offset)

    def _spans(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (global number of the first token, length in tokens) of documents, both int64 [B]."""
        owners = np.searchsorted(self.shards.document_starts, documents, side="right") - 1
        return self.shards.sequence_spans(owners, documents - self.shards.document_starts[owners])


_LAYOUTS: dict[Layout, type[ConcatWindows] | type[PadWindows]] = {"concat": ConcatWindows, "pad": PadWindows}
