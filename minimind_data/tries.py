"""How often a split whose worker died is tried again: a few times, each announced, whichever engine runs it."""

from collections import Counter

from minimind_data.errors import UserError
from minimind_data.reporting import Announce
from minimind_data.split import SplitTask

MAX_TRIES = 3


class Tries:
    """Counts how often the worker of each split has died.

    Args:
        announce: is told of every split that is tried again.
    """

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
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
                f"{where}, {MAX_TRIES} times; run the same command again, with fewer --workers or a smaller --split-bytes if "
                "memory was short"
            )
        self._announce(f"{where}; that split is tried again")
