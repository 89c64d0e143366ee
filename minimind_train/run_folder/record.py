"""The run folder: its files, the record of the run's options, dataset and changes, and the lock that one process at a time holds.

    runs/NAME/
        config.json       the options, resolved; the datasets' fingerprints; where datasets and weights are, seen from the
                          run folder; the tokenizer; the changes during the run; its own checksum
        run.toml          the options again, for people and for --config; `minimind_train.run.toml` makes it, and nothing reads it by itself
        tokenizer.json    a copy, so that the weights are never separated from their vocabulary; beside it, where the dataset has one,
                          tokenizer_config.json, which holds a chat template
        metrics.jsonl     see `metrics`
        checkpoints/      see `checkpoint`

`config.json` is written last when a run begins, so a folder that has one is complete. Here options are names and values; their meaning
is in `run.options`.
"""

import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

from minimind_data.dataset.format import MANIFEST_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, TokenizerInfo
from minimind_data.dataset.occupancy import (
    foreign_file,
    has_content,
    owner_of,
    refuse_folder_of_another,
    refuse_replacing,
)
from minimind_data.errors import UserError
from minimind_data.files import (
    FolderLock,
    read_checked,
    remove_partials,
    sha256_of,
    write_atomic,
    write_checked,
)
from minimind_data.json_fields import Count, FieldError, FiniteJson, Rule, read_fields, read_value
from minimind_data.tokenizer.loading import Tokenizer, cached_tokenizer
from minimind_train.run_folder import metrics

FORMAT_VERSION = 2  # 1 had no checksum
RUN_CONFIG_NAME = "config.json"
DESCRIPTION_NAME = "run.toml"
CHECKPOINTS_NAME = "checkpoints"
RESTORE = (
    "bring it back from a backup; to change an option of a run, pass it with `resume` and `allow_change`"
)
_LOCK_NAME = ".lock"
_CHECKSUM = "sha256"
MOVE = "cursor"
"""The name of a change that moves the position by hand; on disk a position is called so."""

WEIGHTS = "weights"
"""The name of a change of the weights of a mixture."""

SKIPS = "skip_positions"
"""The option that leaves out positions, and the name of its changes."""

_TYPES_OF_CHANGES = {MOVE: Count, SKIPS: tuple[str, ...]}
"""The types of the values of those changes that are read again; the others are only shown."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A deliberate change of an option of the run, or of its position."""

    step: Count
    """Optimizer steps completed before it."""
    name: Annotated[str, Rule("the name of an option", str.isidentifier)]
    old: FiniteJson
    new: FiniteJson
    position: Count | None = field(default=None, compare=False)
    """Samples that the run had consumed by then; None where that was not recorded."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The contents of `config.json`."""

    command: Annotated[str, Rule("the name of a command", str.isidentifier)]
    """The phase of the run, such as `pretrain`."""
    options: dict[str, FiniteJson]
    """Every option by its flat name, as JSON holds it; whoever uses one holds it against its type (`options_in_file`)."""
    dataset: str
    """Fingerprint of the dataset."""
    tokenizer: TokenizerInfo
    changes: tuple[Change, ...] = field(default=())
    validation: str | None = None
    """Fingerprint of the validation set, if the run has one."""
    relative_paths: dict[str, str] = field(default_factory=dict)
    """Each path in the options, relative to the run folder, by the path itself."""
    finished: Count | None = None
    """The last step of the run, if it has reached its end; then there is a checkpoint of it."""

    @classmethod
    def read(cls, run: Path) -> Self:
        """Read the record of a run folder.

        Raises:
            UserError: the folder holds no run, or its record is damaged.
        """
        path = run / RUN_CONFIG_NAME
        try:
            content = read_checked(path, key=_CHECKSUM, remedy=RESTORE, version=FORMAT_VERSION)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_run(run) from None
        try:
            if content.pop("format_version", None) != FORMAT_VERSION:
                _refuse("format_version is missing")
            record = read_fields(cls, content)
            _refuse_contradictions(record)
        except FieldError as error:
            raise UserError(f"edited or damaged ({error})", where=path, remedy=RESTORE) from None
        return record

    def write(self, run: Path) -> None:
        """Write the record, whole or not at all."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_checked(run / RUN_CONFIG_NAME, content, key=_CHECKSUM)

    def changed(self, changes: Iterable[Change]) -> Self:
        """Return the record with more changes."""
        return replace(self, changes=(*self.changes, *changes))

    def without_moves_after(self, step: int) -> Self:
        """Return the record without moves of the position after `step`; going back to an earlier checkpoint undoes them."""
        changes = [change for change in self.changes if change.name != MOVE or change.step <= step]
        return replace(self, changes=tuple(changes))

    def dated(self, step: int, position: int) -> Self:
        """Return the record in which the changes that take effect here have this step and position.

        These are the changes of this step, and of later steps where the run has gone back to an earlier checkpoint. The
        weights of a mixture are an exception: they take effect at a position, whenever the run comes there.
        """
        changes = [
            change
            if change.step < step
            or (change.position is not None and (change.step == step or change.name == WEIGHTS))
            else replace(change, step=step, position=position)
            for change in self.changes
        ]
        return replace(self, changes=tuple(changes))

    def skip_positions_at(self, position: int) -> tuple[str, ...]:
        """Return the ranges of positions that are skipped by the run at a position."""
        changes = [change for change in self.changes if change.name == SKIPS]
        for change in reversed(changes):
            if change.position is None or change.position <= position:
                return tuple(change.new)
        return tuple(changes[0].old if changes else self.options.get(SKIPS, ()))

    def position_at(self, step: int, position: int) -> int:
        """Return the position at which a checkpoint of `step` resumes: its own, or the one to which it has been moved since."""
        moves = [change.new for change in self.changes if change.name == MOVE and change.step == step]
        return moves[-1] if moves else position


def _refuse_contradictions(record: RunRecord) -> None:
    """Refuse a record whose values are each of their type, and cannot be read or cannot all be true.

    Raises:
        FieldError: the clause says which.
    """
    for change in record.changes:
        kind = _TYPES_OF_CHANGES.get(change.name, Any)
        for value in (change.old, change.new):
            read_value(kind, value, f"a change of {change.name}")
    info = record.tokenizer
    if any(number is not None and number >= info.vocab_size for number in info.special_ids):
        _refuse(f"special tokens {info.special_ids} in a {info.summary}")


def _refuse(clause: str) -> NoReturn:
    raise FieldError(clause)


def _no_run(run: Path) -> UserError:
    """Return the error that there is no run, and how to start one."""
    if run.exists() and not run.is_dir():
        return UserError(
            "no run but a file", where=run, remedy="pass the folder of a run by `run`", option="run"
        )
    for parent in run.absolute().parents:
        if (parent / RUN_CONFIG_NAME).is_file() and (parent / CHECKPOINTS_NAME).is_dir():
            remedy = f"pass `run` {shlex.quote(str(parent))}"
            return UserError("a folder inside of a run", where=run, remedy=remedy, option="run")
    what = f"no {RUN_CONFIG_NAME} in the folder" if run.exists() else "no such folder"
    return UserError(
        f"no run there ({what})",
        where=run,
        remedy="correct the name, or begin one by `mm-train pretrain` with `shards` DATASET and `run` "
        f"{shlex.quote(str(run))}, without `resume`",
        option="run",
    )


def move(step: int, old: int, new: int) -> Change:
    """Return the change by which a run resumes at another position than that of its checkpoint."""
    return Change(step=step, name=MOVE, old=old, new=new)


def lock(run: Path) -> FolderLock:
    """Return the lock of a run folder; it is held as long as a process works on the run."""
    return FolderLock(
        run / _LOCK_NAME, f"{run}: another process is working on this run; wait for it, or take another `run`"
    )


def is_begun(run: Path) -> bool:
    """Tell whether a folder holds a run."""
    return (run / RUN_CONFIG_NAME).exists()


def refuse_occupied(run: Path) -> None:
    """Refuse to begin a run in a folder that holds one.

    Raises:
        UserError: the folder holds a run, a part of one, a dataset or a model.
    """
    if run.exists() and not run.is_dir():
        raise UserError("is a file", where=run, remedy="take another `run`", option="run")
    if run.is_symlink() and not run.exists():
        raise foreign_file(run, "run")
    if owner_of(run) == "a model":
        refuse_folder_of_another(run, "run")
    if is_begun(run):
        raise UserError(
            "holds a run already",
            where=run,
            remedy="go on with it by `resume`, or take another `run`",
            option="run",
        )
    if (run / MANIFEST_NAME).exists():
        raise UserError(
            "is a dataset",
            where=run,
            remedy="take another `run`, so that neither overwrites the other's files",
            option="run",
        )
    for name in (metrics.FILE_NAME, CHECKPOINTS_NAME):
        if os.path.lexists(run / name):
            raise UserError(
                f"holds {name} of a run whose {RUN_CONFIG_NAME} is gone",
                where=run,
                remedy="bring that back, or take another `run`",
                option="run",
            )


def create(run: Path, record: RunRecord, dataset: Path, description: str) -> None:
    """Write the files of a new run; `description` is the text of run.toml. The caller holds the folder's lock.

    Raises:
        UserError: one of them is there, and not from a begin of this very run that was killed.
    """
    contents = {DESCRIPTION_NAME: description.encode(), **_tokenizer_files(dataset)}
    for name, content in contents.items():
        refuse_replacing(run / name, "run", is_ours=has_content(content))
    refuse_replacing(run / RUN_CONFIG_NAME, "run", is_ours=lambda _: False)
    clean(run)
    _copy_tokenizer(run, dataset)
    write_atomic(run / DESCRIPTION_NAME, description)
    record.write(run)


def update(run: Path, old: RunRecord, new: RunRecord, dataset: Path, description: str) -> None:
    """Write the files of a run that have changed; the caller holds the folder's lock."""
    if new != old or not (run / DESCRIPTION_NAME).exists():
        write_atomic(run / DESCRIPTION_NAME, description)
    path = run / TOKENIZER_NAME
    if not path.is_file() or sha256_of(path) != new.tokenizer.sha256:
        _copy_tokenizer(run, dataset)
    if new != old:
        new.write(run)


def clean(run: Path) -> None:
    """Delete files that killed processes left half-written in a run folder; the caller holds its lock."""
    ours = {RUN_CONFIG_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, DESCRIPTION_NAME, metrics.FILE_NAME}
    remove_partials(run, ours)  # the rest may be the user's
    remove_partials(run / CHECKPOINTS_NAME)


def refuse_repetition(run: Path, record: RunRecord) -> None:
    """Refuse to start a finished run again, which would overwrite its metrics.

    Args:
        run: a run folder without checkpoints.
        record: its record.

    Raises:
        UserError: the run has been finished once.
    """
    if record.finished is not None:
        raise UserError(
            f"finished at step {record.finished}, and its checkpoints are gone",
            where=run,
            remedy="bring them back from a backup, or train again in another `run`",
            option="run",
        )


def note_finish(run: Path, step: int) -> None:
    """Record that a run has reached its end; the caller holds the folder's lock."""
    record = RunRecord.read(run)
    if record.finished != step:
        replace(record, finished=step).write(run)


def _copy_tokenizer(run: Path, dataset: Path) -> None:
    for name, content in _tokenizer_files(dataset).items():
        write_atomic(run / name, content)


def _tokenizer_files(dataset: Path) -> dict[str, bytes]:
    """Return the content of the tokenizer's files in a dataset, by their names, tokenizer.json last."""
    names = (TOKENIZER_CONFIG_NAME, TOKENIZER_NAME)
    return {
        name: (dataset / name).read_bytes()
        for name in names
        if name == TOKENIZER_NAME or (dataset / name).is_file()
    }


def load_run_tokenizer(run: Path, info: TokenizerInfo) -> Tokenizer:
    """Return the tokenizer of a run.

    Raises:
        UserError: the file is missing, or is another tokenizer.
    """
    path = run / TOKENIZER_NAME
    if not path.is_file() or sha256_of(path) != info.sha256:
        raise UserError(
            "missing, or not the tokenizer that the run was trained with",
            where=path,
            remedy="copy it from the dataset",
        )
    return cached_tokenizer(path.read_bytes().decode(), info)
