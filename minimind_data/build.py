"""tokenize(): plan the splits, run them on an engine, commit the manifest.

While a build is under way the folder holds `.mm-build/`: the lock, the plan, and one result for every shard that is whole. A
run that starts and finds results from a killed one checks them against the input's bytes and makes only what is missing;
the last step writes the manifest and removes `.mm-build/`. So the finished folder is the same whatever happened on the way.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from minimind_data.cores import num_cores
from minimind_data.engines import encoder_threads, run_tasks
from minimind_data.errors import UserError
from minimind_data.files import (
    disk_full_is_plain,
    sha256_of,
    write_atomic,
)
from minimind_data.format import (
    MANIFEST_NAME,
    REMAKE_ALL,
    SET_ASIDE_NAME,
    TOKENIZER_NAME,
    IndexHeader,
    InputEntry,
    Manifest,
    ShardEntry,
    dtype_for,
)
from minimind_data.options import differences
from minimind_data.plan import (
    InputHashes,
    TokenizeOptions,
    contents_of,
    flat_settings,
    plan_tasks,
    sample_texts,
    settings_of,
)
from minimind_data.records import line_range
from minimind_data.split import Job, Report, SplitResult, SplitTask
from minimind_data.tokenizer import Choice, SpecialTokens, Tokenizer, choose_backend, load_tokenizer
from minimind_data.work import CannotWriteError, WorkFolder

Announce = Callable[[str], None]
Progress = Callable[[int], AbstractContextManager[Report]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a build did."""

    manifest: Manifest
    already_done: bool
    """The dataset was there, made from the same inputs with the same settings."""
    kept_shards: int
    """Shards that an earlier, interrupted run had finished."""
    made_shards: int
    input_bytes: int
    """Of the splits that were made in this run."""
    seconds: float
    backend: Choice | None
    compared: int
    """Documents held against the reference during this run."""
    differences: tuple[str, ...]
    """Where the fast backend differed from the reference, which then did the work."""


def tokenize(
    inputs: Sequence[Path],
    options: TokenizeOptions,
    *,
    announce: Announce = lambda _: None,
    progress: Progress = lambda _: contextlib.nullcontext(lambda _bytes, _tokens: None),
) -> Summary:
    """Turn JSON lines into a dataset; see this module's docstring for what an interruption leaves.

    Args:
        inputs: the files, in the order of the dataset.
        options: how.
        announce: is told, in a sentence, what the user should know before the work is done.
        progress: called with the bytes to be read; inside the `with` of what it returns, bytes and tokens are told as they
            are done.

    Raises:
        UserError: an input, a record, the tokenizer, the folder, the disk or the settings are not as they must be.
    """
    if not inputs:
        raise UserError("no input; name at least one .jsonl file")
    tokenizer = load_tokenizer(
        options.tokenizer, SpecialTokens(bos=options.bos_token, eos=options.eos_token, pad=options.pad_token)
    )
    tasks = plan_tasks(inputs, options.split_bytes)
    work = WorkFolder(options.out)
    build = _Build(inputs, options, tokenizer, tasks, work)
    try:
        with disk_full_is_plain(options.out), work.locked():
            return build.run(announce, progress)
    except CannotWriteError:
        if (summary := build.finished()) is None:
            raise
        return summary


class _Build:
    """One call of `tokenize`, under the folder's lock."""

    def __init__(
        self,
        inputs: Sequence[Path],
        options: TokenizeOptions,
        tokenizer: Tokenizer,
        tasks: list[SplitTask],
        work: WorkFolder,
    ) -> None:
        self._inputs = inputs
        self._options = options
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._work = work
        self._settings = settings_of(options, tokenizer)

    def run(self, announce: Announce, progress: Progress) -> Summary:
        start = time.monotonic()
        self._work.remove_partials(self._tasks)
        hashes = InputHashes(self._inputs)
        manifest = self._existing_manifest()
        if manifest is not None:
            self._refuse_other(manifest, hashes.entries())
            return self._repair(manifest, announce, progress, start)
        self._work.begin(self._settings, self._inputs, self._tasks)
        results = self._finished(announce)
        missing = [task for task in self._tasks if task.name not in results]
        if dtype_for(self._tokenizer.info.vocab_size) == "int32":
            announce(
                f"the vocabulary has {self._tokenizer.info.vocab_size:,} entries, over 65,536: tokens take 4 bytes (int32)"
            )
        if results:
            announce(
                f"{len(results)} of {len(self._tasks)} splits were done before; making the other {len(missing)}"
            )
        made, choice = self._make(missing, announce, progress) if missing else ({}, None)
        results |= made
        manifest = self._commit([results[task.name] for task in self._tasks], hashes.entries())
        return self._summary(manifest, start, made=made, kept=len(results) - len(made), choice=choice)

    def finished(self) -> Summary | None:
        """Return what a finished, whole dataset of these inputs and settings holds, or None; writes nothing."""
        start = time.monotonic()
        manifest = self._existing_manifest()
        if manifest is None:
            return None
        self._refuse_other(manifest, InputHashes(self._inputs).entries())
        if not all(_is_there(self._options.out, entry) for entry in manifest.shards):
            return None
        return self._summary(manifest, start, already_done=True)

    def _repair(
        self,
        manifest: Manifest,
        announce: Announce,
        progress: Progress,
        start: float,
    ) -> Summary:
        """Make what is missing from a finished dataset; where nothing is, say so."""
        out = self._options.out
        for name, wanted in ((TOKENIZER_NAME, self._tokenizer.json), (MANIFEST_NAME, manifest.to_json())):
            path = out / name
            if not path.is_file() or path.read_bytes() != wanted.encode():
                write_atomic(path, wanted)
                announce(f"{path}: was missing or changed; it is restored")
        if manifest.set_aside and not _has_sha256(out / SET_ASIDE_NAME, manifest.set_aside_sha256):
            announce(f"{out / SET_ASIDE_NAME}: missing or changed; {REMAKE_ALL}")
        lost = {entry.name: entry for entry in manifest.shards if not _is_there(out, entry)}
        if not lost:
            self._work.clean()
            return self._summary(manifest, start, already_done=True)
        announce(
            f"{len(lost)} of {len(manifest.shards)} shards of the finished dataset are missing or cut off; making them again"
        )
        made, choice = self._make([task for task in self._tasks if task.name in lost], announce, progress)
        if changed := [name for name, entry in lost.items() if _entry_of(made[name]) != entry]:
            raise UserError(
                f"{out}: {', '.join(changed)} came out otherwise than the manifest says; tokenize into another --out"
            )
        self._work.clean()
        return self._summary(manifest, start, made=made, kept=len(manifest.shards) - len(made), choice=choice)

    def _make(
        self, missing: list[SplitTask], announce: Announce, progress: Progress
    ) -> tuple[dict[str, SplitResult], Choice]:
        """Run the missing splits; where the fast backend proves wrong, run all of its splits again without it."""
        workers = self._options.workers or num_cores()
        num_bytes = sum(task.split.stop - task.split.start for task in missing)
        made: dict[str, SplitResult] = {}
        with encoder_threads(workers, len(missing)):
            choice = choose_backend(
                self._tokenizer, self._options.backend, sample_texts(missing, self._options)
            )
            announce(f"encoding with {choice.name}: {choice.note}")
            job = self._job(choice.name)
            left = missing
            with progress(num_bytes) as report:
                while left:
                    distrusted = False
                    for result in run_tasks(
                        job, left, self._options.workers, report, announce, engine=self._options.engine
                    ):
                        self._work.write_result(result)
                        made[result.name] = result
                        if result.difference is not None and not distrusted:
                            distrusted = True
                            announce(
                                f"{choice.name} differs from tokenizers ({result.name}, {result.difference}); tokenizers does "
                                "the work"
                            )
                    job = dataclasses.replace(job, backend="tokenizers")
                    left = [task for task in left if distrusted and made[task.name].backend != "tokenizers"]
        return made, choice

    def _commit(self, results: list[SplitResult], inputs: tuple[InputEntry, ...]) -> Manifest:
        out = self._options.out
        shards = tuple(_entry_of(result) for result in results if result.shard is not None)
        if not shards:
            raise UserError(f"{self._inputs[0]}: no record with any text in it; there is nothing to tokenize")
        set_aside = self._work.set_aside(self._inputs, results)
        manifest = Manifest(
            kind=self._options.kind,
            dtype=dtype_for(self._tokenizer.info.vocab_size),
            tokenizer=self._tokenizer.info,
            options=self._settings["options"],
            inputs=inputs,
            shards=shards,
            empty_texts=sum(result.empty_texts for result in results),
            set_aside=sum(result.set_aside for result in results),
            set_aside_sha256=hashlib.sha256(set_aside).hexdigest() if set_aside else None,
        )
        self._work.remove_stale_shards(keep={entry.name for entry in shards})
        write_atomic(out / TOKENIZER_NAME, self._tokenizer.json)
        if set_aside:
            write_atomic(out / SET_ASIDE_NAME, set_aside)
        write_atomic(out / MANIFEST_NAME, manifest.to_json())
        self._work.clean()
        return manifest

    def _existing_manifest(self) -> Manifest | None:
        if not (self._options.out / MANIFEST_NAME).exists():
            return None
        return Manifest.read(self._options.out)

    def _refuse_other(self, manifest: Manifest, inputs: tuple[InputEntry, ...]) -> None:
        there = {
            **flat_settings(manifest.kind, asdict(manifest.tokenizer), manifest.options),
            **contents_of(manifest.inputs),
        }
        here = {
            **flat_settings(self._options.kind, asdict(self._tokenizer.info), self._settings["options"]),
            **contents_of(inputs),
        }
        if found := differences(there, here, sorted(there.keys() | here.keys())):
            raise UserError(
                f"{self._options.out}: holds a dataset made otherwise: {'; '.join(found)}; take another --out, or delete that dataset"
            )

    def _finished(self, announce: Announce) -> dict[str, SplitResult]:
        """Return the results of an interrupted run whose input bytes and shard files are still what they were."""
        results: dict[str, SplitResult] = {}
        for task in self._tasks:
            result = self._work.read_result(task.name)
            if result is None:
                continue
            if result.set_aside and self._options.on_bad_record == "stop":
                continue
            source = task.split.path
            here = line_range(task.split)
            if (
                here != (result.input_start, result.input_stop)
                or sha256_of(source, *here) != result.input_sha256
            ):
                announce(f"{source}: changed since {task.name} was made; that split is made again")
            elif result.shard is None or _is_there(self._options.out, _entry_of(result)):
                results[task.name] = result
        return results

    def _job(self, backend: str) -> Job:
        return Job(
            work_folder=self._work.path,
            out=self._options.out,
            tokenizer_json=self._tokenizer.json,
            tokenizer=self._tokenizer.info,
            dtype=dtype_for(self._tokenizer.info.vocab_size),
            backend=backend,
            field=self._options.field,
            max_word_chars=self._options.max_word_chars,
            on_bad_record=self._options.on_bad_record,
        )

    def _summary(
        self,
        manifest: Manifest,
        start: float,
        *,
        already_done: bool = False,
        made: dict[str, SplitResult] | None = None,
        kept: int = 0,
        choice: Choice | None = None,
    ) -> Summary:
        results = list((made or {}).values())
        return Summary(
            manifest=manifest,
            already_done=already_done,
            kept_shards=kept,
            made_shards=len(results),
            input_bytes=sum(result.input_stop - result.input_start for result in results),
            seconds=time.monotonic() - start,
            backend=choice,
            compared=sum(result.compared for result in results),
            differences=tuple(
                f"{result.name}: {result.difference}" for result in results if result.difference
            ),
        )


def _is_there(folder: Path, entry: ShardEntry) -> bool:
    """Tell by their sizes whether a shard's files are whole; `verify` reads them."""
    header = IndexHeader(dtype="uint16", num_sequences=entry.sequences, num_documents=entry.documents)
    sizes = {".bin": entry.bytes, ".idx": header.file_bytes}
    try:
        return all(
            (folder / f"{entry.name}{suffix}").stat().st_size == size for suffix, size in sizes.items()
        )
    except FileNotFoundError:
        return False


def _has_sha256(path: Path, wanted: str | None) -> bool:
    return path.is_file() and sha256_of(path) == wanted


def _entry_of(result: SplitResult) -> ShardEntry:
    assert result.shard is not None
    places = {
        name: getattr(result, name) for name in ("name", "input", "input_start", "input_stop", "input_sha256")
    }
    return ShardEntry(**places, **asdict(result.shard))
