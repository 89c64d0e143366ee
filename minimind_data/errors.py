"""The exceptions that are the user's business.

    UserError                     whatever a user can mend: a bad record, a full disk, two settings that exclude each other
      CannotWriteError            the folder that a dataset is made in takes nothing more (minimind_data.build.work_folder)
      DamagedFileError            a JSON file does not fit the checksum in it (minimind_data.files)
      FormatError                 a file of a dataset is damaged, missing or no such file (minimind_data.dataset.format)
      DamagedCheckpointError      a file of a checkpoint is damaged or missing (minimind_train.run_folder.checkpoint)
      GoneCheckpointError         a checkpoint was deleted while it was read (minimind_train.run_folder.checkpoint)
      LostRankError               another rank has ended, so this one cannot go on (minimind_train.parallel.world)

Its text is one plain sentence: where, what is wrong, and what to do. In it a parameter is named as a Python caller knows it, in
backticks: `out`, `seq_len`. The command line turns these into its flags, prints the sentence and exits with 1. A dataclass of options
that is made with a value it cannot take raises a plain ValueError, as any constructor does, and names its fields in the same way; to
the command line that is wrong usage, status 2. Every other exception is a defect of ours and keeps its traceback.
"""

import os


class UserError(ValueError):
    """Something that the user can mend; `str(error)` is the sentence "where: what; remedy".

    Args:
        what: what is wrong.
        where: the file, folder or place in one that it is about.
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
        # As the one argument it is also what an error that was pickled is made from again; its attributes travel beside it.
        super().__init__(f"{place}{what}{f'; {remedy}' if remedy else ''}")
