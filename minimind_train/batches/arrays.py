"""A batch as numpy arrays by name, before it becomes tensors: `input_ids`, `targets` and what else a sample has, int64 [B, L] mostly."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from minimind_data.dataset.format import IGNORED

Arrays = Mapping[str, NDArray[np.int64]]


def num_targets(arrays: Arrays) -> int:
    """Return how many targets of a batch are learned."""
    return sum(
        int(np.count_nonzero(array != IGNORED)) for name, array in arrays.items() if name.endswith("targets")
    )
