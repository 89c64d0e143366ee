"""The finished dataset that a build finds in its folder: the results of its splits, and the bad records that it had set aside.

Whether those results still hold is decided in `reuse.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import orjson

from minimind_data.format import IndexHeader, Manifest, ShardEntry
from minimind_data.split import SplitResult, SplitTask
from minimind_data.writer import WrittenShard

_WRITTEN = tuple(one.name for one in fields(WrittenShard))
_SAME_NAMES = (
    "name", "input", "input_start", "input_stop", "input_sha256", "inputs", "lines", "empty_texts", "set_aside", "duplicates",
    "duplicates_sha256", "different_prompts", "unlearned",
)  # fmt: skip


class Previous:
    """A finished dataset.

    Args:
        manifest: its manifest.
        validation: the manifest of its validation part, where it has one.
        set_aside: where the file of its bad records may stand, where it has any; it moves when the manifest is taken away.
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
        """The names of its shards."""
        return self._entries.keys() | self._val_entries.keys()

    def input_sha256(self, result: SplitResult) -> list[str]:
        """Return the checksums of the whole inputs that a split's shard came from."""
        return [entry.sha256 for entry in self.manifest.inputs[result.input : result.input + result.inputs]]

    def result_of(self, name: str) -> SplitResult | None:
        """Return what the split of this name gave, or None where it has no shard."""
        entry = self._entries.get(name) or self._val_entries.get(name)
        if entry is None:
            return None
        same = {field: getattr(entry, field) for field in _SAME_NAMES}
        return SplitResult(
            **same,
            compared=0,
            backend="",
            difference=None,
            shard=_written(self._entries.get(name)),
            val_shard=_written(self._val_entries.get(name)),
        )

    def differs(self, result: SplitResult) -> bool:
        """Tell whether a split that had shards gave other ones now."""
        before = self.result_of(result.name)
        return before is not None and (before.shard, before.val_shard) != (result.shard, result.val_shard)

    def bad_records(self, task: SplitTask, result: SplitResult) -> list[dict[str, Any]]:
        """Return the bad records of a split, their lines counted from its first."""
        if not result.set_aside:
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
        entry = self._entries.get(task.name) or self._val_entries[task.name]
        name = self.manifest.inputs[entry.input].path
        first, last = entry.first_line + 1, entry.first_line + entry.lines
        return [
            {**record, "line": record["line"] - entry.first_line}
            for record in self._bad_records.get(name, [])
            if first <= record["line"] <= last
        ]


def _written(entry: ShardEntry | None) -> WrittenShard | None:
    return None if entry is None else WrittenShard(**{name: getattr(entry, name) for name in _WRITTEN})


def entries_of(
    tasks: Sequence[SplitTask], results: Sequence[SplitResult]
) -> tuple[tuple[ShardEntry, ...], tuple[ShardEntry, ...]]:
    """Return what manifests say of the shards that splits gave: (the dataset's, its validation part's)."""
    sides: tuple[list[ShardEntry], list[ShardEntry]] = ([], [])
    for first_line, result in zip(first_lines(tasks, results), results, strict=True):
        same = {field: getattr(result, field) for field in _SAME_NAMES}
        for side, shard in zip(sides, (result.shard, result.val_shard), strict=True):
            if shard is not None:
                side.append(ShardEntry(**same, first_line=first_line, **asdict(shard)))
    return tuple(sides[0]), tuple(sides[1])


def first_lines(tasks: Sequence[SplitTask], results: Sequence[SplitResult]) -> list[int]:
    """Return how many records of its input come before each split."""
    found: list[int] = []
    lines, current = 0, -1
    for task, result in zip(tasks, results, strict=True):
        if task.input != current:
            lines, current = 0, task.input
        found.append(lines)
        lines += result.lines
    return found


def is_there(folder: Path, name: str, shard: WrittenShard | ShardEntry | None) -> bool:
    """Tell by their sizes whether a shard's files are whole; `verify` reads them."""
    if shard is None:
        return True
    header = IndexHeader(dtype="uint16", num_sequences=shard.sequences, num_documents=shard.documents)
    sizes = {".bin": shard.bytes, ".idx": header.file_bytes} | (
        {".mask": shard.tokens} if shard.mask_sha256 else {}
    )
    try:
        return all((folder / f"{name}{suffix}").stat().st_size == size for suffix, size in sizes.items())
    except FileNotFoundError:
        return False
