"""Exact duplicates: which documents of a build have the text of an earlier one.

First the texts of every split are hashed, 16 bytes a document on disk; then all hashes are sorted at once. Of the documents with the same
text the first one stays, in the order of the dataset, so what is left out depends on the inputs alone. Sorting takes about 60 bytes of
memory for each document of all inputs.
"""

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minimind_data.hashing import belongs_to_share

HASH_BYTES = 16
"""Of BLAKE2b. Among a trillion documents, the chance that any two different texts have the same hash is below 2 in 10^15."""


def hashes_of(texts: Sequence[str]) -> bytes:
    """Return the hashes of texts end to end, `HASH_BYTES` bytes each."""
    return b"".join(hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest() for text in texts)


def duplicates(hashes: Sequence[bytes]) -> list[NDArray[np.int32]]:
    """Find the documents that have the text of an earlier one.

    Args:
        hashes: of each split's documents, splits in order.

    Returns:
        For each split the numbers of its documents to drop, ascending: int32.
    """
    counts = [len(one) // HASH_BYTES for one in hashes]
    halves = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
    # A stable sort, so that equal hashes stay in the order of the dataset.
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    repeats = np.zeros(len(order), np.bool_)
    repeats[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    repeated = np.sort(order[repeats])
    starts = np.cumsum([0, *counts])
    return [
        (repeated[np.searchsorted(repeated, start) : np.searchsorted(repeated, stop)] - start).astype(
            np.int32
        )
        for start, stop in itertools.pairwise(starts)
    ]


def in_validation(texts: Sequence[str], fraction: float) -> NDArray[np.bool_]:
    """Tell which texts belong to the validation part, by their hashes alone: the same text is always in the same part.

    Returns:
        bool [len(texts)].
    """
    chosen = (belongs_to_share(text, fraction, b"validation") for text in texts)
    return np.fromiter(chosen, np.bool_, len(texts))
