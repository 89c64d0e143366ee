"""tokenize(): plan the splits, run them on an engine, commit the manifest.

While a build is under way the folder holds `.mm-build/`: the lock, the plan, and one result for every shard that is whole. A
run that starts and finds results from a killed one checks them against the input's bytes and makes only what is missing;
the last step writes the manifest and removes `.mm-build/`. So the finished folder is the same whatever happened on the way.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from minimind_data.engines import num_cores, run_local
from minimind_data.errors import UserError
from minimind_data.files import (
    FolderLock,
    disk_full_is_plain,
    is_disk_full,
    remove_partials,
    sha256_of,
    write_atomic,
)
from minimind_data.format import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
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
from minimind_data.split import SET_ASIDE_SUFFIX, Job, Report, SplitResult, SplitTask, set_aside_path
from minimind_data.tokenizer import Choice, SpecialTokens, Tokenizer, choose_backend, load_tokenizer
from minimind_data.writer import WrittenShard

WORK_FOLDER_NAME = ".mm-build"
SET_ASIDE_NAME = "set-aside.jsonl"
_PLAN_NAME = "plan.json"
_LOCK_NAME = "lock"
_RESULT_SUFFIX = ".result.json"


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
    announce: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], Report] = lambda _: lambda _bytes, _tokens: None,
) -> Summary:
    """Turn JSON lines into a dataset; see this module's docstring for what an interruption leaves.

    Args:
        inputs: the files, in the order of the dataset.
        options: how.
        announce: is told, in a sentence, what the user should know before the work is done.
        progress: called with the bytes to be read; what it returns is told of bytes and tokens as they are done.

    Raises:
        UserError: an input, a record, the tokenizer, the folder, the disk or the settings are not as they must be.
    """
    if not inputs:
        raise UserError("no input; name at least one .jsonl file")
    tokenizer = load_tokenizer(
        options.tokenizer, SpecialTokens(bos=options.bos_token, eos=options.eos_token, pad=options.pad_token)
    )
    tasks = plan_tasks(inputs, options.split_bytes)
    work_folder = options.out / WORK_FOLDER_NAME
    try:
        with disk_full_is_plain(options.out), _locked(options.out, work_folder):
            return _Build(inputs, options, tokenizer, tasks).run(announce, progress)
    finally:
        _remove_if_idle(work_folder)


class _Build:
    """One call of `tokenize`, under the folder's lock."""

    def __init__(
        self, inputs: Sequence[Path], options: TokenizeOptions, tokenizer: Tokenizer, tasks: list[SplitTask]
    ) -> None:
        self._inputs = inputs
        self._options = options
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._work = options.out / WORK_FOLDER_NAME
        self._settings = settings_of(options, tokenizer)

    def run(self, announce: Callable[[str], None], progress: Callable[[int], Report]) -> Summary:
        start = time.monotonic()
        out = self._options.out
        remove_partials(self._work)
        shard_files = {f"{task.name}{suffix}" for task in self._tasks for suffix in (".bin", ".idx")}
        remove_partials(out, shard_files | {TOKENIZER_NAME, SET_ASIDE_NAME, MANIFEST_NAME})
        hashes = InputHashes(self._inputs)
        manifest = self._existing_manifest()
        if manifest is not None:
            self._refuse_other(manifest, hashes.entries())
            return self._repair(manifest, announce, progress, start)
        self._check_plan()
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

    def _repair(
        self,
        manifest: Manifest,
        announce: Callable[[str], None],
        progress: Callable[[int], Report],
        start: float,
    ) -> Summary:
        """Make what is missing from a finished dataset; where nothing is, say so."""
        out = self._options.out
        if not (out / TOKENIZER_NAME).is_file():
            write_atomic(out / TOKENIZER_NAME, self._tokenizer.json)
        lost = {entry.name: entry for entry in manifest.shards if not _is_there(out, entry)}
        if not lost:
            self._clean()
            return self._summary(manifest, start, already_done=True)
        announce(
            f"{len(lost)} of {len(manifest.shards)} shards of the finished dataset are missing or cut off; making them again"
        )
        made, choice = self._make([task for task in self._tasks if task.name in lost], announce, progress)
        if changed := [name for name, entry in lost.items() if _entry_of(made[name]) != entry]:
            raise UserError(
                f"{out}: {', '.join(changed)} came out otherwise than the manifest says; tokenize into another --out"
            )
        self._clean()
        return self._summary(manifest, start, made=made, kept=len(manifest.shards) - len(made), choice=choice)

    def _make(
        self, missing: list[SplitTask], announce: Callable[[str], None], progress: Callable[[int], Report]
    ) -> tuple[dict[str, SplitResult], Choice]:
        """Run the missing splits; where the fast backend proves wrong, run all of its splits again without it."""
        choice = choose_backend(self._tokenizer, self._options.backend, sample_texts(missing, self._options))
        announce(f"encoding with {choice.name}: {choice.note}")
        made: dict[str, SplitResult] = {}
        report = progress(sum(task.split.stop - task.split.start for task in missing))
        job = self._job(choice.name)
        left = missing
        while left:
            distrusted = False
            for result in run_local(job, left, self._options.workers or num_cores(), report):
                write_atomic(self._work / f"{result.name}{_RESULT_SUFFIX}", json.dumps(asdict(result)))
                made[result.name] = result
                if result.difference is not None and not distrusted:
                    distrusted = True
                    announce(
                        f"{choice.name} differs from tokenizers ({result.name}, {result.difference}); tokenizers does the work"
                    )
            job = dataclasses.replace(job, backend="tokenizers")
            left = [task for task in left if distrusted and made[task.name].backend != "tokenizers"]
        return made, choice

    def _commit(self, results: list[SplitResult], inputs: tuple[InputEntry, ...]) -> Manifest:
        out = self._options.out
        shards = tuple(_entry_of(result) for result in results if result.shard is not None)
        if not shards:
            raise UserError(f"{self._inputs[0]}: no record with any text in it; there is nothing to tokenize")
        manifest = Manifest(
            kind=self._options.kind,
            dtype=dtype_for(self._tokenizer.info.vocab_size),
            tokenizer=self._tokenizer.info,
            options=self._settings["options"],
            inputs=inputs,
            shards=shards,
            empty_texts=sum(result.empty_texts for result in results),
            set_aside=sum(result.set_aside for result in results),
        )
        write_atomic(out / TOKENIZER_NAME, self._tokenizer.json)
        if manifest.set_aside:
            write_atomic(out / SET_ASIDE_NAME, self._set_aside(results))
        write_atomic(out / MANIFEST_NAME, manifest.to_json())
        self._clean()
        return manifest

    def _clean(self) -> None:
        """Remove what only an unfinished build needs; the lock goes last, when it is released."""
        for pattern in (_PLAN_NAME, f"*{_RESULT_SUFFIX}", f"*{SET_ASIDE_SUFFIX}"):
            for path in self._work.glob(pattern):
                path.unlink()

    def _set_aside(self, results: list[SplitResult]) -> bytes:
        """Join the splits' bad records, their lines counted from the first of the file."""
        lines: list[bytes] = []
        line_offset = 0
        for before, result in zip([None, *results], results, strict=False):
            line_offset = line_offset + before.lines if before and before.input == result.input else 0
            if result.set_aside:
                for line in set_aside_path(self._work, result.name).read_bytes().splitlines():
                    record = orjson.loads(line)
                    record["line"] += line_offset
                    told = {"path": str(self._inputs[result.input]), **record}
                    lines.append(orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))
        return b"".join(lines)

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

    def _check_plan(self) -> None:
        """Go on with a build only under the settings it was begun with."""
        path = self._work / _PLAN_NAME
        plan = {**self._settings, "inputs": [str(path) for path in self._inputs]}
        if not any(
            self._work.glob(f"*{_RESULT_SUFFIX}")
        ):  # nothing done yet: nothing that other settings could spoil
            write_atomic(path, json.dumps(plan, indent=1))
            return
        begun = json.loads(path.read_bytes())
        there, here = (
            flat_settings(one["kind"], one["tokenizer"], one["options"]) | {"inputs": one["inputs"]}
            for one in (begun, plan)
        )
        if found := differences(there, here, here):
            raise UserError(
                f"{self._options.out}: holds an unfinished build made otherwise: {'; '.join(found)}; finish it as it was begun, "
                f"take another --out, or delete {self._work}"
            )

    def _finished(self, announce: Callable[[str], None]) -> dict[str, SplitResult]:
        """Return the results of an interrupted run whose input bytes and shard files are still what they were."""
        results: dict[str, SplitResult] = {}
        for task in self._tasks:
            path = self._work / f"{task.name}{_RESULT_SUFFIX}"
            if not path.exists():
                continue
            told = json.loads(path.read_bytes())
            result = SplitResult(**{**told, "shard": told["shard"] and WrittenShard(**told["shard"])})
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
            work_folder=self._work,
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
    try:
        return (folder / f"{entry.name}.bin").stat().st_size == entry.bytes and (
            folder / f"{entry.name}.idx"
        ).exists()
    except FileNotFoundError:
        return False


def _entry_of(result: SplitResult) -> ShardEntry:
    assert result.shard is not None
    places = {
        name: getattr(result, name) for name in ("name", "input", "input_start", "input_stop", "input_sha256")
    }
    return ShardEntry(**places, **asdict(result.shard))


@contextlib.contextmanager
def _locked(out: Path, work_folder: Path) -> Iterator[None]:
    """Make the folders and hold the lock."""
    lock = FolderLock(
        work_folder / _LOCK_NAME, f"{out}: another run is writing there; wait for it or take another --out"
    )
    try:
        work_folder.mkdir(parents=True, exist_ok=True)
        lock.__enter__()
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); take another folder with --out"
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _remove_if_idle(work_folder: Path) -> None:
    """Leave no empty work folder behind."""
    try:
        if work_folder.is_dir() and not any(work_folder.iterdir()):
            work_folder.rmdir()
    except OSError:
        pass  # another run has just begun there
