"""Which shards of a finished dataset, or of an interrupted build, need not be made again.

`FinishedDataset` is a dataset that a build finds in its folder: the results of its splits, and the bad records that were set aside.
`reusable` says which results still hold: those of splits whose input has not changed and whose shards are there. Only the sizes of the
shards' files are compared; `verify` is what reads them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from minimind_data.build.plan import TokenizeOptions
from minimind_data.build.split import SplitResult, SplitTask
from minimind_data.build.work_folder import WorkFolder
from minimind_data.dataset.format import (
    MANIFEST_NAME,
    SET_ASIDE_NAME,
    VALIDATION_NAME,
    InputEntry,
    Manifest,
    ShardEntry,
    WrittenShard,
)
from minimind_data.inputs.discovery import PastInput
from minimind_data.inputs.forms import form_of
from minimind_data.reporting import Say


class FinishedDataset:
    """A finished dataset that a build finds in its folder.

    Args:
        manifest: of the dataset.
        validation: the manifest of its validation part, if it has one.
        set_aside: where the file of its bad records may be, since it is moved when the manifest is taken away.
    """

    def __init__(self, manifest: Manifest, validation: Manifest | None, set_aside: Sequence[Path]) -> None:
        self.manifest = manifest
        self.validation = validation
        self._set_aside = set_aside
        self._entries = {entry.name: entry for entry in manifest.shards}
        self._val_entries = {entry.name: entry for entry in validation.shards} if validation else {}
        self._bad_records: dict[str, list[dict[str, Any]]] | None = None

    @property
    def names(self) -> set[str]:
        """The names of its shards and of those of its validation part."""
        return self._entries.keys() | self._val_entries.keys()

    @property
    def num_bad(self) -> int:
        """Records that were set aside as bad."""
        return self.manifest.set_aside

    @property
    def num_records(self) -> int:
        """All records that it was made from."""
        parts = (self.manifest, self.validation)
        documents = sum(part.num_documents for part in parts if part is not None)
        return documents + self.manifest.empty_texts + self.manifest.duplicates + self.manifest.set_aside

    def input_sha256(self, result: SplitResult) -> list[str]:
        """Return the checksums of the inputs that a split is of."""
        first, number = result.origin.input, result.origin.inputs
        return [entry.sha256 for entry in self.manifest.inputs[first : first + number]]

    def result_of(self, name: str) -> SplitResult | None:
        """Return the result of the split with this name, or None where it made no shard."""
        entry, val_entry = self._entries.get(name), self._val_entries.get(name)
        some_entry = entry or val_entry
        if some_entry is None:
            return None
        return SplitResult(
            name=name,
            origin=some_entry.origin,
            compared=0,
            backend="",
            difference=None,
            shard=None if entry is None else entry.written,
            val_shard=None if val_entry is None else val_entry.written,
        )

    def differs(self, result: SplitResult) -> bool:
        """Tell whether a split has shards here, and other ones in its new result."""
        before = self.result_of(result.name)
        return before is not None and (before.shard, before.val_shard) != (result.shard, result.val_shard)

    def bad_records(self, task: SplitTask, result: SplitResult) -> list[dict[str, Any]]:
        """Return the bad records of a split, in which lines are counted from the beginning of the split."""
        if not result.origin.set_aside:
            return []
        if self._bad_records is None:
            self._bad_records = {}
            path = next(path for path in self._set_aside if path.exists())
            for line in path.read_bytes().splitlines():
                record = orjson.loads(line)
                self._bad_records.setdefault(record.pop("path"), []).append(record)
        if task.split.more:
            return [
                {**record, "line": number}
                for number, source in enumerate(task.split.sources, 1)
                for record in self._bad_records.get(source.name, [])
            ]
        origin = (self._entries.get(task.name) or self._val_entries[task.name]).origin
        name = self.manifest.inputs[origin.input].path
        first, last = origin.first_line + 1, origin.first_line + origin.lines
        return [
            {**record, "line": record["line"] - origin.first_line}
            for record in self._bad_records.get(name, [])
            if first <= record["line"] <= last
        ]


def finished_dataset(work: WorkFolder) -> FinishedDataset | None:
    """Return the finished dataset in the folder of a build, wherever its manifest is now; None where there is none."""
    manifest = finished_manifest(work)
    if manifest is None:
        return None
    # Without a validation part, what is in that folder belongs to somebody else.
    has_validation = bool(manifest.options.get("val_fraction"))
    validation = _first_manifest(work.val, work.previous / VALIDATION_NAME) if has_validation else None
    set_aside = (work.previous / SET_ASIDE_NAME, work.out / SET_ASIDE_NAME)
    return FinishedDataset(manifest, validation, set_aside)


def finished_manifest(work: WorkFolder) -> Manifest | None:
    """Return the manifest of `finished_dataset`."""
    return _first_manifest(work.out, work.previous)


def past_inputs(work: WorkFolder) -> list[PastInput]:
    """Return the inputs of the dataset that a build finds in its folder, finished or not."""
    manifest, plan = finished_manifest(work), work.plan()
    finished = () if manifest is None else manifest.inputs
    planned = plan.inputs if plan is not None and work.has_results() else ()
    return [
        *(PastInput(path=entry.path, num_bytes=entry.bytes) for entry in finished),
        *(PastInput(path=path) for source in planned for path in (source.name, source.location)),
    ]


def _first_manifest(*folders: Path) -> Manifest | None:
    folder = next((folder for folder in folders if (folder / MANIFEST_NAME).is_file()), None)
    return None if folder is None else Manifest.read(folder)


def entries_of(
    tasks: Sequence[SplitTask], results: Sequence[SplitResult]
) -> tuple[tuple[ShardEntry, ...], tuple[ShardEntry, ...]]:
    """Return the entries of all shards: (those of the dataset, those of its validation part)."""
    sides: tuple[list[ShardEntry], list[ShardEntry]] = ([], [])
    for first_line, result in zip(first_lines(tasks, results), results, strict=True):
        origin = replace(result.origin, first_line=first_line)
        for side, written in zip(sides, (result.shard, result.val_shard), strict=True):
            if written is not None:
                side.append(ShardEntry(name=result.name, written=written, origin=origin))
    return tuple(sides[0]), tuple(sides[1])


def first_lines(tasks: Sequence[SplitTask], results: Sequence[SplitResult]) -> list[int]:
    """Return, for each split, how many records of its input come before it."""
    counts: list[int] = []
    lines, current = 0, -1
    for task, result in zip(tasks, results, strict=True):
        if task.input != current:
            lines, current = 0, task.input
        counts.append(lines)
        lines += result.origin.lines
    return counts


def is_there(folder: Path, name: str, written: WrittenShard | None) -> bool:
    """Tell, by their sizes alone, whether the files of a shard are complete; of no shard, they are."""
    sizes = {} if written is None else written.file_sizes()
    try:
        return all((folder / f"{name}{suffix}").stat().st_size == size for suffix, size in sizes.items())
    except FileNotFoundError:
        return False


def reusable(
    work: WorkFolder,
    tasks: Sequence[SplitTask],
    options: TokenizeOptions,
    previous: FinishedDataset | None,
    *,
    inputs: Sequence[InputEntry],
    say: Say,
) -> tuple[dict[str, SplitResult], set[str]]:
    """Find the results, of an interrupted build and of a finished dataset, that still hold.

    Args:
        work: the folder of the build.
        tasks: all splits, with the numbers of their duplicates where these are left out.
        options: of the build.
        previous: the finished dataset, if there is one.
        inputs: all inputs as they are now; needed where there is a finished dataset, else empty.
        say: takes a sentence about every input that changed.

    Returns:
        (results by the names of their splits, names of those shards of the finished dataset that do not hold any more).
    """
    results: dict[str, SplitResult] = {}
    changed = previous.names - {task.name for task in tasks} if previous else set()
    paths_said: set[str] = set()
    for task in tasks:
        result, is_new = _result_of(work, task, options, previous)
        if result is None:
            continue
        here = [entry.sha256 for entry in inputs[task.input : task.input + result.origin.inputs]]
        is_untouched = previous is not None and not is_new and here == previous.input_sha256(result)
        if result.origin.duplicates_sha256 != task.duplicates_sha256 or not (
            is_untouched or _is_content_of(task, result, options)
        ):
            if previous is not None and task.name in previous.names:
                changed.add(task.name)
            if task.split.path not in paths_said:
                say(
                    f"{task.split.path}: changed since {task.name} was made; the splits that changed are made again"
                )
                paths_said.add(task.split.path)
        elif is_there(work.out, task.name, result.shard) and is_there(work.val, task.name, result.val_shard):
            results[task.name] = replace(result, origin=replace(result.origin, input=task.input))
    return results, changed


def _result_of(
    work: WorkFolder, task: SplitTask, options: TokenizeOptions, previous: FinishedDataset | None
) -> tuple[SplitResult | None, bool]:
    """Return (the result of a split, whether the unfinished build has it).

    A result with bad records does not count where the build is now to stop at them.
    """
    result = work.read_result(task.name)
    if result is not None and not (result.origin.set_aside and options.on_bad_record == "stop"):
        return result, True
    return (previous.result_of(task.name) if previous else None), False


def _is_content_of(task: SplitTask, result: SplitResult, options: TokenizeOptions) -> bool:
    content = form_of(task.split.source, options.records, options.kind).content(task.split)
    origin = result.origin
    return content == (origin.input_start, origin.input_stop, origin.input_sha256)
