"""The exceptions that a user can do something about.

    UserError                     whatever a user can put right: a bad record, a full disk, two options that exclude each other
      CannotWriteError            the folder of a dataset cannot be written to (minimind_data.build.work_folder)
      DamagedFileError            a JSON file does not have the checksum that stands in it (minimind_data.files)
      FormatError                 a file of a dataset is missing, damaged or of another kind (minimind_data.dataset.format)
      DamagedCheckpointError      a file of a checkpoint is damaged or missing (minimind_train.run_folder.checkpoint)
      GoneCheckpointError         a checkpoint was deleted while it was read (minimind_train.run_folder.checkpoint)
      LostRankError               another rank has ended, so this one cannot go on (minimind_train.parallel.world)

The text of each is one plain sentence: where, what is wrong, and what to do. It names a parameter in backticks, as a Python caller
knows it: `out`, `seq_len`. The command line turns these into its flags, prints the sentence and exits with status 1. A dataclass of
options that gets a value it cannot take raises a plain ValueError, as any constructor does, which names its fields in the same way; for
the command line that is wrong usage, status 2. Every other exception is a bug in this program and keeps its traceback.
"""

import os
from typing import Any


class UserError(ValueError):
    """Something that the user can put right; `str(error)` is the sentence "where: what; remedy".

    Args:
        what: what is wrong.
        where: the file or folder that it is about, or a place in one.
        remedy: what to do.
        option: the name of the parameter that it is about, where it is one that the user passed or could pass.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | os.PathLike[str] | None = None,
        remedy: str | None = None,
        option: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else os.fspath(where)
        self.remedy = remedy
        self.option = option
        place = "" if where is None else f"{self.where}: "
        super().__init__(f"{place}{what}{f'; {remedy}' if remedy else ''}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, so that other processes have it whole, whatever a subclass is made from."""
        return _unpickled, (type(self), str(self), self.__dict__)


def _unpickled(kind: type[UserError], sentence: str, parts: dict[str, Any]) -> UserError:
    error = kind.__new__(kind, sentence)
    error.__dict__.update(parts)
    return error
