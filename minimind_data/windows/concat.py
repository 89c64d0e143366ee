"""Layout `concat`: the token stream cut every L tokens; texts run on from window to window."""

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import MaskArray, TokenArray
from minimind_data.errors import UserError
from minimind_data.windows.base import Windows, ignore_first_tokens
from minimind_data.windows.segments import Segments, spread


class ConcatWindows(Windows):
    """The token stream cut every L tokens; texts run on from window to window."""

    layout = "concat"
    padding = 0

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

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system which stretches of the stream a batch is; no index is read."""
        self._check(windows, len(self))
        starts = windows * self.seq_len
        self.shards.will_need(starts, starts + self.width)

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, one row of the stream each."""
        rows = self.rows(windows)
        ignored = self._mask(windows) == 0 if self._masked else None
        if not self.documents_apart:
            return self._sample(rows, ignored, None)
        segments = self.segments(windows)
        if ignored is None:
            ignored = np.zeros(rows.shape, np.bool_)
        ignore_first_tokens(ignored, segments)
        return self._sample(rows, ignored, segments)

    def _mask(self, windows: NDArray[np.int64]) -> MaskArray:
        return self.shards.mask_rows(windows * self.seq_len, self.width)

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the documents of a batch; those that begin or end outside of a window are cut off there."""
        self._check(windows, len(self))
        begins = windows * self.seq_len
        ends = begins + self.width
        owners, sequences = self.shards.sequences_at(np.concatenate([begins, ends - 1]))
        first, last = np.split(self.shards.document_starts[owners] + sequences, 2)
        rows, parts = spread(last - first + 1)
        documents = first[rows] + parts
        starts, lengths = self._spans(documents)
        stops = np.minimum(starts + lengths, ends[rows])
        starts = np.maximum(starts, begins[rows])
        present = stops > starts  # a document without a token stands nowhere
        rows, starts = rows[present], starts[present]
        return Segments(
            shape=(len(windows), self.width),
            rows=rows,
            columns=starts - begins[rows],
            lengths=stops[present] - starts,
            documents=documents[present],
            starts=starts,
        )

    def locate(self, window: int) -> tuple[str, int]:
        """Return (shard name, token offset) of the first token of a window; no index is read."""
        return self.shards.name_and_offset(window * self.seq_len)

    def window_of(self, shard: str, offset: int) -> int:
        """Return the window in which a token is an input.

        Raises:
            UserError: there is no such token, or it lies in the tail that fills no window.
        """
        window = self.shards.token_at(shard, offset) // self.seq_len
        if window >= len(self):
            raise UserError(
                f"{shard}:{offset} lies in the last {self.unused_tokens} tokens, which fill no window of {self.seq_len}"
            )
        return window
