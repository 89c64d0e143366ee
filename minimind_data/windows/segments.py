"""Segments: which documents, or parts of documents, stand where in a batch of windows; document ids and positions follow from that.

They are plain arrays, made without reading a token. Which documents share a window is decided by the layout: `concat`, `pad`, `pack`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The segments of a batch of windows, row by row, from left to right.

    A segment is a document, or the part of one that stands in a window. The segments of a row begin at its first column and
    follow each other without a gap; the rest of the row is PAD.

    Attributes:
        shape: (B, width): rows are the windows of the batch, columns the tokens that they are cut from. In shifted windows
            (`input_ids` and `targets`) width is seq_len + 1, and the last column is only a target.
        rows: int64 [S], ascending.
        columns: int64 [S], where in its row each begins.
        lengths: int64 [S], tokens, at least 1.
        documents: int64 [S], the number of its document.
        starts: int64 [S], the global number of its first token.
    """

    shape: tuple[int, int]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    lengths: NDArray[np.int64]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def filled(self) -> NDArray[np.int64]:
        """Tokens in each row; the columns from there on are PAD: int64 [B]."""
        return np.bincount(self.rows, weights=self.lengths, minlength=self.shape[0]).astype(np.int64)

    def document_ids(self, num_columns: int) -> NDArray[np.int64]:
        """Return the document at each position of the first columns, -1 for PAD: int64 [B, num_columns]."""
        ids = np.full(self.shape, -1, np.int64)
        ids[np.arange(self.shape[1]) < self.filled[:, None]] = np.repeat(self.documents, self.lengths)
        return np.ascontiguousarray(ids[:, :num_columns])

    def position_ids(self, num_columns: int) -> NDArray[np.int64]:
        """Return the position of each token in its segment, from 0: int64 [B, num_columns].

        The PAD of a row counts as a segment of its own. So a segment begins at every 0: the places of the zeros are the
        `cu_seqlens` that attention over sequences of different lengths takes.
        """
        num_rows, width = self.shape
        behind = self.filled + np.arange(num_rows) * width
        padded = np.flatnonzero(self.filled < width)
        begins = np.sort(np.concatenate([self.rows * width + self.columns, behind[padded]]))
        places = np.arange(num_rows * width)
        places -= np.repeat(begins, np.diff(begins, append=num_rows * width))
        return np.ascontiguousarray(places.reshape(self.shape)[:, :num_columns])


def spread(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the parts of wholes: `counts` [3, 0, 2] gives wholes [0, 0, 0, 2, 2] and parts [0, 1, 2, 0, 1].

    Args:
        counts: int64 [N], parts of each whole.

    Returns:
        (whole of each part, its number in that whole), both int64 [sum of counts].
    """
    wholes = np.repeat(np.arange(len(counts)), counts)
    stops = np.cumsum(counts)
    total = int(stops[-1]) if len(stops) else 0
    return wholes, np.arange(total) - np.repeat(stops - counts, counts)
