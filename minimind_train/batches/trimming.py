"""Trimming: micro-batches are cut off after the last token that is learned, before they go through the model.

Attention looks backwards only, so the columns after the last learned target of all rows change neither the loss nor a gradient. In layout
pad, and so in pairs, they are most of what MiniMind computes. Rows of like lengths share a micro-batch, so that one long row does not
keep the others long.

The number of columns that stay is a multiple of `COLUMNS`, so that a device's kernels and its memory see few shapes.

A loss that balances experts counts every position, PAD too, as MiniMind's does: such a model cannot have its batches trimmed. Everything
here is numpy; the device is never waited for.

Shapes: B rows, L columns.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import IGNORED
from minimind_train.batches.arrays import Arrays

__all__ = ["COLUMNS", "batches_of_like_lengths", "lengths_of", "trimmed"]

COLUMNS = 32

_COLUMNAR = ("input_ids", "targets", "position_ids")
"""How the names of arrays [B, L] end. Others have a row for each sample and no columns to cut off."""


def lengths_of(arrays: Arrays) -> NDArray[np.int64]:
    """Return the length of each row up to its last learned target, the longer one of a pair's two sides: int64 [B]."""
    lengths = [_length(array != IGNORED) for name, array in arrays.items() if name.endswith("targets")]
    longest: NDArray[np.int64] = np.maximum.reduce(lengths)
    return longest


def _length(learned: NDArray[np.bool_]) -> NDArray[np.int64]:
    behind = learned[:, ::-1].argmax(1)
    return np.where(learned.any(1), learned.shape[1] - behind, 0)


def trimmed(arrays: Arrays, length: int | None = None) -> dict[str, NDArray[np.int64]]:
    """Cut a batch to the columns that it needs, at least one.

    Args:
        arrays: the batch.
        length: of its longest row, where that is known.
    """
    longest = int(lengths_of(arrays).max(initial=0)) if length is None else length
    columns = max(1, -(-longest // COLUMNS)) * COLUMNS
    return {
        name: np.ascontiguousarray(array[:, :columns]) if name.endswith(_COLUMNAR) else array
        for name, array in arrays.items()
    }


def batches_of_like_lengths(
    arrays: Arrays, size: int
) -> Iterator[tuple[NDArray[np.intp], dict[str, NDArray[np.int64]]]]:
    """Cut a batch into smaller ones of up to `size` rows of like lengths, each trimmed.

    The longest rows come first, so that a batch that is too large for the memory fails before anything is computed.

    Yields:
        The numbers of the rows, and their batch.
    """
    lengths = lengths_of(arrays)
    steps = -(-lengths // COLUMNS)
    if len(lengths) <= size or (steps == steps[0]).all():
        order = np.arange(len(lengths))
    else:
        order = np.argsort(-steps, kind="stable")
        arrays = {name: array[order] for name, array in arrays.items()}
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        batch = {name: array[first : first + size] for name, array in arrays.items()}
        yield rows, trimmed(batch, int(lengths[rows].max()))
