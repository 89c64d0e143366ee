"""From the results of all splits to a finished dataset: the manifest, that of the validation part, and the file of bad records.

`assemble` makes them in memory, `publish` writes them with the manifest last, `restore` puts back what a finished dataset has lost. The result that
`build.tokenize` returns, `Summary`, is here too.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from minimind_data.build.bad_records import set_aside_path, too_many_error
from minimind_data.build.recipe import Recipe
from minimind_data.build.reuse import FinishedDataset, entries_of, first_lines
from minimind_data.build.split import SplitResult, SplitTask
from minimind_data.build.work_folder import WorkFolder
from minimind_data.dataset.format import (
    MANIFEST_NAME,
    REMAKE_ALL,
    SET_ASIDE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    InputEntry,
    Manifest,
    dtype_for,
)
from minimind_data.errors import UserError
from minimind_data.files import sha256_of, sha256_of_bytes, whole_file, write_atomic
from minimind_data.inputs.forms import form_of
from minimind_data.inputs.spec import RecordSpec
from minimind_data.reporting import Say
from minimind_data.tokenizer.backends import Choice


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """What a dataset has besides its shards and its tokenizer."""

    manifest: Manifest
    validation: Manifest | None
    """The manifest of the validation part; None where that has no document."""
    set_aside: Callable[[], Iterator[bytes]]
    """Yields the lines of the file of bad records; none where there is none. They may be more than memory holds."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a build did."""

    manifest: Manifest | None
    """None where only a slice was made."""
    validation: Manifest | None
    """The manifest of the validation part; None where there is none."""
    already_done: bool
    """Whether the dataset was there already, made from the same inputs by the same recipe."""
    kept_shards: int
    """How many shards an earlier run had made."""
    made_shards: int
    """How many shards this run made."""
    input_bytes: int
    """Size of the splits that this run made, as they are stored."""
    seconds: float
    options_taken: Mapping[str, str]
    """The options that were not passed and that hold as the dataset that was there has them, by name, where they are no defaults."""
    backend: Choice | None
    """The encoder; None where nothing was encoded."""
    compared: int
    """How many documents had their ids compared with the reference's in this run."""
    differences: tuple[str, ...]
    """The splits in which the fast backend differed from the reference, and how; the reference then made them."""


def assemble(
    work: WorkFolder,
    recipe: Recipe,
    inputs: tuple[InputEntry, ...],
    splits: Sequence[tuple[SplitTask, SplitResult]],
    *,
    config_json: str | None,
    previous: FinishedDataset | None,
) -> DatasetMetadata:
    """Put the results of all splits together.

    Args:
        work: the folder of the build.
        recipe: of the dataset.
        inputs: of the dataset.
        splits: the task and the result of every split, in order.
        config_json: the text of tokenizer_config.json; None where the tokenizer has no chat template.
        previous: the finished dataset that was there before, if there was one.

    Raises:
        UserError: no split has a document.
    """
    tasks, results = [task for task, _ in splits], [result for _, result in splits]
    shards, val_shards = entries_of(tasks, results)
    if not shards and any(result.num_bad for result in results):
        counts = sum(result.num_bad for result in results), sum(result.num_records for result in results)
        raise too_many_error(*first_bad_record(work, splits, previous), counts)
    if not shards:
        raise UserError("no record has any text, so there is nothing to tokenize", where=inputs[0].path)

    def set_aside() -> Iterator[bytes]:
        return _bad_records(work, tasks, results, previous)

    manifest = Manifest(
        kind=recipe.kind,
        dtype=dtype_for(recipe.tokenizer.vocab_size),
        tokenizer=recipe.tokenizer,
        options=recipe.options,
        inputs=inputs,
        shards=shards,
        empty_texts=sum(result.origin.empty_texts for result in results),
        set_aside=sum(result.origin.set_aside for result in results),
        duplicates=sum(result.origin.duplicates for result in results),
        set_aside_sha256=_sha256_of_all(set_aside()),
        tokenizer_config_sha256=None if config_json is None else sha256_of_bytes(config_json.encode()),
    )
    validation = replace(
        manifest,
        options={**manifest.options, "part": "validation"},
        shards=val_shards,
        empty_texts=0,
        set_aside=0,
        duplicates=0,
        set_aside_sha256=None,
    )
    return DatasetMetadata(
        manifest=manifest, validation=validation if val_shards else None, set_aside=set_aside
    )


def _bad_records(
    work: WorkFolder,
    tasks: Sequence[SplitTask],
    results: Sequence[SplitResult],
    previous: FinishedDataset | None,
) -> Iterator[bytes]:
    """Yield the bad records of all splits as JSON lines, in which lines are counted from the beginning of their file."""
    for task, result, first_line in zip(tasks, results, first_lines(tasks, results), strict=True):
        for record in _bad_records_of(work, task, result, previous):
            if task.split.more:
                entry = {**record, "path": task.split.sources[record["line"] - 1].name, "line": 1}
            else:
                entry = {**record, "path": task.split.path, "line": record["line"] + first_line}
            yield orjson.dumps({"path": entry.pop("path"), **entry}, option=orjson.OPT_APPEND_NEWLINE)


def _sha256_of_all(lines: Iterator[bytes]) -> str | None:
    """Return the SHA-256 of lines together; None if there is none."""
    digest, is_empty = hashlib.sha256(), True
    for line in lines:
        digest.update(line)
        is_empty = False
    return None if is_empty else digest.hexdigest()


def tokenizer_files(tokenizer_json: str, config_json: str | None) -> dict[str, str]:
    """Return the content of the tokenizer's files in a dataset, by their names."""
    files = {TOKENIZER_NAME: tokenizer_json}
    return files if config_json is None else files | {TOKENIZER_CONFIG_NAME: config_json}


def _bad_records_of(
    work: WorkFolder, task: SplitTask, result: SplitResult, previous: FinishedDataset | None
) -> Iterator[dict[str, Any]]:
    """Yield the bad records of a split, in which lines are counted from its beginning."""
    if not result.num_bad:
        return
    path = set_aside_path(work.path, task.name)
    if path.exists():
        with path.open("rb") as file:
            yield from map(orjson.loads, file)
    else:
        assert previous is not None
        yield from previous.bad_records(task, result)


def first_bad_record(
    work: WorkFolder, splits: Iterable[tuple[SplitTask, SplitResult]], previous: FinishedDataset | None
) -> tuple[str, str]:
    """Return (place, reason) of the first record that was set aside; there must be one.

    Args:
        work: the folder of the build.
        splits: the task and the result of every split that is made, in order.
        previous: the finished dataset that was there before, if there was one.
    """
    task, result = next((task, result) for task, result in splits if result.num_bad)
    record = next(_bad_records_of(work, task, result, previous))
    place = form_of(task.split.source, RecordSpec()).place(task.split, record["line"])
    return place, str(record["reason"])


def publish(
    work: WorkFolder, metadata: DatasetMetadata, tokenizer_json: str, config_json: str | None
) -> None:
    """Write the metadata beside the shards, the manifest last, and remove the files that only the build needed."""
    work.retire()
    for folder in (work.out, work.val) if metadata.validation is not None else (work.out,):
        for name, content in tokenizer_files(tokenizer_json, config_json).items():
            write_atomic(folder / name, content)
    if metadata.manifest.set_aside_sha256 is not None:
        with whole_file(work.out / SET_ASIDE_NAME) as file:
            file.writelines(metadata.set_aside())
    else:
        (work.out / SET_ASIDE_NAME).unlink(missing_ok=True)
    if metadata.validation is not None:
        write_atomic(work.val / MANIFEST_NAME, metadata.validation.to_json())
    write_atomic(work.out / MANIFEST_NAME, metadata.manifest.to_json())
    _tidy(work, metadata.manifest, metadata.validation)


def restore(
    work: WorkFolder,
    previous: FinishedDataset,
    tokenizer_json: str,
    config_json: str | None,
    say: Say,
) -> None:
    """Put a finished dataset whose shards are all there into the state that its manifest says."""
    for folder, manifest in ((work.out, previous.manifest), (work.val, previous.validation)):
        if manifest is None:
            continue
        files = [(TOKENIZER_NAME, tokenizer_json), (MANIFEST_NAME, manifest.to_json())]
        if (
            config_json is not None
            and sha256_of_bytes(config_json.encode()) == manifest.tokenizer_config_sha256
        ):
            files.insert(0, (TOKENIZER_CONFIG_NAME, config_json))
        for name, text in files:
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write_atomic(path, text)
                say(f"{path}: was missing or changed, and is restored")
    path, expected_sha256 = work.out / SET_ASIDE_NAME, previous.manifest.set_aside_sha256
    if expected_sha256 is not None and not (path.is_file() and sha256_of(path) == expected_sha256):
        say(f"{path}: missing or changed; {REMAKE_ALL}")
    _tidy(work, previous.manifest, previous.validation)


def _tidy(work: WorkFolder, manifest: Manifest, validation: Manifest | None) -> None:
    val_names = {entry.name for entry in validation.shards} if validation else set()
    with _complete_all_the_same(work):
        work.remove_stale_shards({entry.name for entry in manifest.shards}, val_names)
        work.clean()


@contextlib.contextmanager
def _complete_all_the_same(work: WorkFolder) -> Iterator[None]:
    """Let an error while files are removed, when the manifest is written, say that the dataset is complete."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot be removed ({error.strerror})",
            where=error.filename or work.path,
            remedy=f"the dataset in {work.out} is complete, and the same command, run again, removes what is left over",
        ) from None
