"""What all engines have in common: the cores for each process, encoders without threads of their own, and retries of splits."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator

from minimind_data.build.split import SplitTask
from minimind_data.errors import UserError
from minimind_data.reporting import Say

MAX_TRIES = 3


class Tries:
    """Counts how often a worker has died while it made a split.

    Args:
        say: takes a sentence about each split that is tried again.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._deaths: Counter[str] = Counter()

    def again(self, task: SplitTask, cause: str) -> None:
        """Note that the worker of a split died, after which the split may be tried again.

        Raises:
            UserError: it has died `MAX_TRIES` times.
        """
        split = task.split
        where = f"{split.path}: the worker on bytes {split.start:,} to {split.stop:,} died ({cause})"
        self._deaths[task.name] += 1
        if self._deaths[task.name] == MAX_TRIES:
            raise UserError(
                f"{where}, {MAX_TRIES} times",
                remedy="run the same command again, with fewer `workers` or a smaller `split_bytes` if memory "
                "was short",
                option="workers",
            )
        self._say(f"{where}; that split is tried again")


CORES_PER_PROCESS = 4
"""A process keeps about this many cores busy; beyond that, the one Python thread that reads and parses JSON is the limit."""

ENCODER_ENVIRONMENT = {
    "FASTOKENS_BPE_THREADS": "1",
    "FASTOKENS_SPIN_US": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Keeps an encoder to the thread that calls it; encoders read this at their first batch.

Several threads that each encode a block of their own do the same work on the same cores in a fifth less time than the threads of an
encoder, which divide every block among themselves.
"""


@contextlib.contextmanager
def encoders_in_our_threads() -> Iterator[None]:
    """Keep encoders from starting threads, here and in worker processes, where the user has not set these variables."""
    settings = {name: value for name, value in ENCODER_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
