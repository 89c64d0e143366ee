"""Micro-batches without the columns that nobody needs.

A position reads only what stands before it, so what stands behind the last learned target of a micro-batch, in every one of its rows,
changes neither its loss nor a gradient: it is cut off before it goes through the model. In layout pad, and so in pairs, that is most
of what MiniMind computes. Rows of like lengths go together, so that one long row does not make all others long.

What stays is a multiple of `COLUMNS`, which gives a device's kernels and memory few shapes to know.

Not for what looks at PAD: a loss that balances experts counts every position, as MiniMind's does. Numpy only; a device is never asked.

Shapes: B rows, L columns.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import IGNORED

__all__ = ["COLUMNS", "alike", "lengths_of", "trimmed"]

COLUMNS = 32

_COLUMNAR = ("input_ids", "targets", "position_ids")
"""How the names of arrays [B, L] end; others have a row a sample and nothing to be cut off."""

Samples = Mapping[str, NDArray[np.int64]]


def lengths_of(samples: Samples) -> NDArray[np.int64]:
    """Return, for each row, how many columns reach its last learned target, of either side where it is a pair: int64 [B]."""
    lengths = [_reach(array != IGNORED) for name, array in samples.items() if name.endswith("targets")]
    longest: NDArray[np.int64] = np.maximum.reduce(lengths)
    return longest


def _reach(learned: NDArray[np.bool_]) -> NDArray[np.int64]:
    behind = learned[:, ::-1].argmax(1)
    return np.where(learned.any(1), learned.shape[1] - behind, 0)


def trimmed(samples: Samples, length: int | None = None) -> dict[str, NDArray[np.int64]]:
    """Cut a batch to the columns that it needs, at least one.

    Args:
        samples: arrays [B, L], and others with a row a sample.
        length: of its longest row, where that is known.
    """
    longest = int(lengths_of(samples).max(initial=0)) if length is None else length
    kept = max(1, -(-longest // COLUMNS)) * COLUMNS
    return {
        name: np.ascontiguousarray(array[:, :kept]) if name.endswith(_COLUMNAR) else array
        for name, array in samples.items()
    }


def alike(samples: Samples, size: int) -> Iterator[tuple[NDArray[np.intp], dict[str, NDArray[np.int64]]]]:
    """Cut samples into batches of up to `size` rows of like lengths, the longest first, each trimmed.

    The longest first, because what is too large for the memory had better fail before anything is computed.

    Yields:
        Which rows they are, and the batch.
    """
    lengths = lengths_of(samples)
    steps = -(-lengths // COLUMNS)
    if len(lengths) <= size or (steps == steps[0]).all():
        order = np.arange(len(lengths))
    else:
        order = np.argsort(-steps, kind="stable")
        samples = {name: array[order] for name, array in samples.items()}
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        batch = {name: array[first : first + size] for name, array in samples.items()}
        yield rows, trimmed(batch, int(lengths[rows].max()))
