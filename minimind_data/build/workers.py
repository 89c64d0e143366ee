"""What every engine shares: how many cores a process takes, encoders kept to one thread each, and how often a split is tried again."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator

from minimind_data.build.split import SplitTask
from minimind_data.errors import UserError
from minimind_data.reporting import Say

MAX_TRIES = 3


class Tries:
    """Counts how often the worker of each split has died.

    Args:
        say: takes a sentence about every split that is tried again.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._deaths: Counter[str] = Counter()

    def again(self, task: SplitTask, cause: str) -> None:
        """Allow another try of a split whose worker died.

        Raises:
            UserError: that was the last try.
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
"""Keeps encoders to the thread that calls them; they read it at their first batch.

Several of our threads, each with a block of its own, keep the same cores busy with a fifth less work than threads inside the
encoder, which divide every batch anew.
"""


@contextlib.contextmanager
def encoders_in_our_threads() -> Iterator[None]:
    """Keep encoders from starting threads of their own, here and in worker processes, unless the user has a setting."""
    settings = {name: value for name, value in ENCODER_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
