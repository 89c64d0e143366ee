"""A run that has reached its end: what `--resume` may still do with it, and what it refuses.

What a changed option means for a run that is not finished is in `config`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minimind_data.errors import UserError
from minimind_train import runs
from minimind_train.runs import Change, RunRecord

__all__ = ["note_finish", "refuse_idle_changes", "refuse_repetition"]


def refuse_idle_changes(run: Path, step: int, changes: Sequence[Change]) -> None:
    """Refuse changes that would hold from the end of a run on, where nothing is learned any more.

    A change of the end itself, which leaves the run finished, is none of them.

    Raises:
        UserError: there are such changes.
    """
    idle = [runs.flag_of(change.name) for change in changes if change.name not in runs.ENDS]
    if idle:
        raise UserError(
            f"{run}: finished already, {step} steps, so there is nothing that {' and '.join(idle)} could change; to train on, pass a "
            "later end too, such as --epochs N --allow-change epochs; else leave that out"
        )


def refuse_repetition(run: Path, record: RunRecord) -> None:
    """Refuse to begin a run again that was at its end, which would put other metrics into the place of those it has.

    Args:
        run: a run folder that has no checkpoint.
        record: what it says of itself.

    Raises:
        UserError: it was finished once.
    """
    if record.finished is not None:
        raise UserError(
            f"{run}: finished at step {record.finished}, and its checkpoints are gone; bring them back from a backup, or train again in "
            "another --run"
        )


def note_finish(run: Path, step: int) -> None:
    """Write into the record of a run that it has reached its end; the caller holds the folder's lock."""
    record = RunRecord.read(run)
    if record.finished != step:
        replace(record, finished=step).write(run)
