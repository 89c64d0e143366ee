"""with_checkpoint(): reading a checkpoint of a run that may still be training: the newest, the best, or that of a step.

Such a run may delete a checkpoint while it is read; then a newer one is tried.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minimind_data.errors import UserError
from minimind_train.progress import Say
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.checkpoint import Checkpoint, GoneCheckpointError
from minimind_train.run_folder.options import CheckpointChoice

_MAX_TRIES = 5

T = TypeVar("T")


def with_checkpoint(run: Path, step: CheckpointChoice, use: Callable[[Checkpoint], T], say: Say) -> T:
    """Find a checkpoint of a run, which may be training, and return what `use` returns for it.

    Args:
        run: the run's folder.
        step: which checkpoint.
        use: reads the checkpoint; it is called again with a newer one where the run has deleted the first meanwhile.
        say: takes a sentence on each damaged checkpoint.

    Raises:
        UserError: there is no such checkpoint.
    """
    if step is not None:
        return use(checkpoint.load_best(run) if step == "best" else checkpoint.load(run, step))
    for _ in range(_MAX_TRIES - 1):
        with contextlib.suppress(GoneCheckpointError):
            return use(_newest(run, say))
    return use(_newest(run, say))


def _newest(run: Path, say: Say) -> Checkpoint:
    newest = checkpoint.load_latest(run, say)
    if newest is None:
        raise UserError(
            "no checkpoint yet",
            where=run,
            remedy="the first comes after `save_every` steps, or when the run ends",
            option="save_every",
        )
    return newest
