"""What becomes of records that make no document: the build stops at the first, or they are set aside in a file, as long as they are few.

Where more are set aside than `max_bad_share`, it is no dataset with some bad records in it, but one that was not understood, so the build
stops. Shares are taken in the order of the dataset, from its first record on, so whether a build stops depends on its inputs alone, and not
on workers or on what an earlier run had made.
"""

import base64
import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import orjson

from minimind_data.errors import UserError
from minimind_data.files import whole_file
from minimind_data.inputs.base import Split
from minimind_data.inputs.blocks import BadRecord
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.spec import RecordSpec

SET_ASIDE_SUFFIX = ".set-aside.jsonl"
_ENOUGH_RECORDS = 1000
"""From so many records on, a share of them is taken for that of the whole."""
_FEW_RECORDS = 20
"""Of fewer records in all, any may be bad; that one is good may be as much as can be wanted."""


def set_aside_path(work_folder: Path, name: str) -> Path:
    """Return the path of the bad records of a split, until the manifest is written."""
    return work_folder / f"{name}{SET_ASIDE_SUFFIX}"


class _Counts(Protocol):
    @property
    def num_records(self) -> int: ...
    @property
    def num_bad(self) -> int: ...


class BadShare:
    """The share of bad records among those of the first splits, which grows as the splits are made, in whatever order that is.

    Args:
        names: of all splits, in order.
        most: the share that is allowed.
    """

    def __init__(self, names: Sequence[str], most: float) -> None:
        self._names = names
        self.most = most
        self._next = 0
        self._num_records = 0
        self._num_bad = 0

    def problem(self, results: Mapping[str, _Counts]) -> tuple[int, int] | None:
        """Look at the splits that are made.

        Args:
            results: of the splits by name; a split without one ends what is looked at.

        Returns:
            (bad records, records) where there are too many bad ones, else None.
        """
        while self._next < len(self._names) and (result := results.get(self._names[self._next])) is not None:
            self._next += 1
            self._num_records += result.num_records
            self._num_bad += result.num_bad
            is_last = self._next == len(self._names)
            if are_too_many(self._num_bad, self._num_records, self.most, is_all=is_last):
                return self._num_bad, self._num_records
        return None


def are_too_many(num_bad: int, num_records: int, most: float, *, is_all: bool = False) -> bool:
    """Tell whether so many bad records are more than a share of the records; of few, that cannot be told before they are all."""
    return num_records >= (_FEW_RECORDS if is_all else _ENOUGH_RECORDS) and num_bad > most * num_records


def too_many_error(where: str, reason: str, counts: tuple[int, int]) -> UserError:
    """Return the error of a build that has too many bad records to set them aside.

    Args:
        where: the place of the first bad record.
        reason: what is wrong with it.
        counts: (bad records, records).
    """
    num_bad, num_records = counts
    return UserError(
        f"{num_bad:,} of the first {num_records:,} records are bad, too many to be set aside, and this is the first of them: {reason}",
        where=where,
        remedy="or pass `max_bad_share` 1, which leaves them out all the same",
        option="max_bad_share",
    )


_OF_ANOTHER_SHAPE = re.compile(r"no field (?!.*\(null\))|the record is |(field )?\S+ is (true|an?)\b.*, not ")
"""How the reasons of records begin that are of another shape altogether; if the first is, the others are most likely too."""


def bad_record_error(split: Split, records: RecordSpec, bad: BadRecord) -> UserError:
    """Return the error of a build that stops at a bad record.

    Args:
        split: in which it is.
        records: what makes a document of a record.
        bad: the record.
    """
    where = form_of(split.source, records).place(split, bad.line)
    if bad.line == 1 and not split.start and _OF_ANOTHER_SHAPE.match(bad.reason):
        return UserError(bad.reason, where=where)  # without them, nothing may be left
    return UserError(
        f"{bad.reason} (or pass `on_bad_record` set-aside, which leaves out such records)",
        where=where,
        option="on_bad_record",
    )


_OPTION_OF_RECORDS = re.compile(r"`(field|template|max_word_chars|allow_special_in_content)`")


def set_aside_line(bad: BadRecord) -> bytes:
    """Return a line of JSON with a bad record, from which its bytes can be restored; `line` counts from the beginning of the split.

    Its reason names options by their flags, whoever called: the file is part of the dataset, whose bytes do not depend on that.
    """
    reason = _OPTION_OF_RECORDS.sub(lambda option: f"--{option[1].replace('_', '-')}", bad.reason)
    try:
        data = {"data": bad.data.decode()}
    except UnicodeDecodeError:
        data = {"data_base64": base64.b64encode(bad.data).decode()}
    return orjson.dumps({"line": bad.line, "reason": reason, **data}, option=orjson.OPT_APPEND_NEWLINE)


class SetAsideFile(contextlib.ExitStack):
    """Writes the bad records of a split as they come, for they may be many; the file is there once its block ends, if there are any.

    Args:
        path: of the file.

    Attributes:
        first: the first of them.
        num_bad: how many there are.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file: BinaryIO | None = None
        self.first: BadRecord | None = None
        self.num_bad = 0

    def add(self, records: Sequence[BadRecord]) -> None:
        """Write the records that follow."""
        if not records:
            return
        if self._file is None:
            self.first = records[0]
            self._file = self.enter_context(whole_file(self._path))
        self._file.writelines(map(set_aside_line, records))
        self.num_bad += len(records)
