"""tokenize(): plan the splits, run them on an engine, commit the manifest.

While a build is under way the folder holds `.mm-build/`: the lock, the plan, and one result for every shard that is whole. A
run that starts and finds results from a killed one checks them against the input's bytes and makes only what is missing;
the last step writes the manifest and removes `.mm-build/`. So the finished folder is the same whatever happened on the way.

A finished dataset grows and changes in the same way: the shards whose input is what it was stay, the others are made, and a new
manifest takes the old one's place. The old one is taken away first only where shards that it names are written anew.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind_data.build.dedup import duplicates
from minimind_data.build.engines import run_tasks
from minimind_data.build.plan import (
    TokenizeOptions,
    chat_encoding_of,
    check_forms,
    idle_options,
    plan_tasks,
    sample_texts,
    slice_of,
)
from minimind_data.build.publish import DatasetMetadata, Summary, assemble, publish, restore
from minimind_data.build.recipe import Recipe, recipe_of
from minimind_data.build.reuse import FinishedDataset, finished_dataset, is_there, reusable
from minimind_data.build.split import HashResult, Job, SplitResult, SplitTask
from minimind_data.build.work_folder import CannotWriteError, WorkFolder, spooled
from minimind_data.build.workers import encoders_in_our_threads
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.template import ChatTemplate, chat_template_of
from minimind_data.dataset.format import (
    MANIFEST_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    InputEntry,
    Manifest,
    dtype_for,
)
from minimind_data.errors import UserError
from minimind_data.files import sha256_of, user_error_on_full_disk, write_atomic
from minimind_data.inputs.discovery import find_sources
from minimind_data.inputs.hashes import InputHashes
from minimind_data.inputs.sources import STDIN, Source
from minimind_data.options import options_from
from minimind_data.reporting import Progress, Report, Say, no_progress, say_nothing
from minimind_data.tokenizer.backends import Choice, choose_backend
from minimind_data.tokenizer.loading import SpecialTokens, Tokenizer, cached_tokenizer, load_tokenizer


def tokenize(
    inputs: Sequence[Path | str],
    options: TokenizeOptions,
    *,
    say: Say = say_nothing,
    progress: Progress = no_progress,
) -> Summary:
    """Turn text into a dataset; see this module's docstring for what an interruption leaves.

    Args:
        inputs: files, folders, globs, URIs of object stores, or `-` for standard input, in the order of the dataset.
        options: how.
        say: takes sentences that the user should know before the work is done.
        progress: shows the bytes that are read and the tokens that are made, step by step.

    Raises:
        UserError: an input, a record, the tokenizer, the folder, the disk or the settings are not as they must be.
    """
    if not inputs:
        raise UserError("no input; name at least one file or folder")
    tokenizer = load_tokenizer(
        options.tokenizer, SpecialTokens(bos=options.bos_token, eos=options.eos_token, pad=options.pad_token)
    )
    template = chat_template_of(options.tokenizer, options.chat.chat_template)
    chat = chat_encoding_of(options, tokenizer, template)
    given = [str(one) for one in inputs]
    before, after = (
        (given[: given.index(STDIN)], given[given.index(STDIN) + 1 :]) if STDIN in given else (given, [])
    )
    sources, notes = find_sources(before, options.format)
    more, more_notes = find_sources(after, options.format)
    for note in notes + more_notes:
        say(note)
    work = WorkFolder(options.out)

    def plan() -> _Build:
        piped = [spooled(work, options, progress)] if STDIN in given else []
        planned = [*sources, *piped, *more]
        for note in idle_options(planned, options.records):
            say(note)
        return _Build(
            planned,
            options,
            tokenizer,
            work,
            template=template,
            chat=chat,
            say=say,
            progress=progress,
        )

    begun = None if STDIN in given else plan()
    try:
        with user_error_on_full_disk(options.out), work.locked(options.task):
            return (begun or plan()).run()
    except CannotWriteError:
        if begun is None or (summary := begun.finished()) is None:
            raise
        return summary


def commit(out: Path | str, *, say: Say = say_nothing, progress: Progress = no_progress) -> Summary:
    """Join the slices that runs with `task` made into one dataset.

    Raises:
        UserError: there is no such build, or some of its splits are not made.
    """
    out = Path(out)
    work = WorkFolder(out)
    plan = work.plan()
    if plan is None and (out / MANIFEST_NAME).is_file():
        raise UserError(f"{out}: a finished dataset already; there are no slices to join")
    if plan is None:
        raise UserError(
            "no unfinished build there", where=out, remedy="begin one by `mm-data tokenize` with `task` 1/N"
        )
    options = options_from(TokenizeOptions, {**plan.recipe.options, "out": out, "kind": plan.recipe.kind})
    tokenizer_path, info = work.path / TOKENIZER_NAME, plan.recipe.tokenizer
    if not tokenizer_path.is_file() or sha256_of(tokenizer_path) != info.sha256:
        raise UserError(
            f"{tokenizer_path}: missing or changed; run one of the slices again, which restores it"
        )
    tokenizer = cached_tokenizer(tokenizer_path.read_text("utf-8"), info)
    template = chat_template_of(work.path)
    chat = chat_encoding_of(options, tokenizer, template)
    if gone := [source.location for source in plan.inputs if source.is_gone()]:
        raise UserError(
            f"{gone[0]}: an input of this build, not there any more; put it back, then commit again"
        )
    with user_error_on_full_disk(out), work.locked():
        joined = _Build(
            plan.inputs,
            options,
            tokenizer,
            work,
            template=template,
            chat=chat,
            say=say,
            progress=progress,
        )
        return joined.run(only_join=True)


class _Build:
    """One call of `tokenize` or `commit`, under the folder's lock."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: TokenizeOptions,
        tokenizer: Tokenizer,
        work: WorkFolder,
        *,
        template: ChatTemplate | None,
        chat: ChatEncoding | None,
        say: Say,
        progress: Progress,
    ) -> None:
        check_forms(sources, options)
        self._sources = sources
        self._options = options
        self._tokenizer = tokenizer
        self._chat = chat
        self._config_json = None if template is None else template.config_json
        self._tasks = plan_tasks(sources, options)
        self._work = work
        self._say = say
        self._progress = progress
        self._recipe = recipe_of(options, tokenizer, self._chat)
        self._start = time.monotonic()

    def run(self, *, only_join: bool = False) -> Summary:
        """Make what is missing, and the manifest unless this is a slice."""
        options, work = self._options, self._work
        work.remove_partials(self._tasks, options.task)
        hashes = InputHashes(self._sources)
        if options.task is None:  # a slice writes no manifest, and need not read the inputs of all others
            hashes.begin()
        previous = finished_dataset(work)
        same_inputs = False
        if previous is not None:
            self._refuse_other(previous)
            same_inputs = self._compare_inputs(previous, hashes.entries())
            if same_inputs and self._is_whole(previous):
                restore(work, previous, self._tokenizer.json, self._config_json, self._say)
                return self._summary(previous.manifest, previous.validation, already_done=True)
        self._begin(previous)
        inputs = hashes.entries() if previous else ()
        kept, changed = reusable(work, self._tasks, options, previous, previous_inputs=inputs, say=self._say)
        missing = [task for task in slice_of(self._tasks, options.task) if task.name not in kept]
        if only_join and missing:
            raise UserError(
                f"{options.out}: {len(missing)} of {len(self._tasks)} splits are not made ({missing[0].name}, …); run the slices "
                "that hold them, then commit again"
            )
        self._say_what_is_missing(kept, missing)
        if changed:
            work.retire()
        made, choice = self._make(missing) if missing else ({}, None)
        self._refuse_changed_shards(previous, [one for name, one in made.items() if name not in changed])
        manifest = validation = None
        if options.task is None and previous is not None and same_inputs and not changed:
            restore(work, previous, self._tokenizer.json, self._config_json, self._say)
            manifest, validation = previous.manifest, previous.validation
        elif options.task is None:
            splits = [(task, made.get(task.name) or kept[task.name]) for task in self._tasks]
            metadata = assemble(
                work,
                self._recipe,
                hashes.entries(),
                splits,
                config_json=self._config_json,
                previous=previous,
            )
            self._say_that_validation_is_empty(metadata)
            publish(work, metadata, self._tokenizer.json, self._config_json)
            manifest, validation = metadata.manifest, metadata.validation
        return self._summary(manifest, validation, made=made, kept=len(kept), choice=choice)

    def _begin(self, previous: FinishedDataset | None) -> None:
        """Write down what is to be made, and find out what must not be."""
        work = self._work
        names = {task.name for task in self._tasks} | (previous.names if previous else set())
        work.begin(self._recipe, self._sources, names)
        write_atomic(work.path / TOKENIZER_NAME, self._tokenizer.json)
        if self._config_json is not None:
            write_atomic(work.path / TOKENIZER_CONFIG_NAME, self._config_json)
        if self._options.val_fraction:
            work.val.mkdir(exist_ok=True)
        if self._options.dedup == "exact":
            self._find_duplicates()

    def _refuse_changed_shards(self, previous: FinishedDataset | None, made: Sequence[SplitResult]) -> None:
        """Refuse a lost shard that came out otherwise than the finished dataset says."""
        unlike = [result.name for result in made if previous is not None and previous.differs(result)]
        if unlike:
            raise UserError(
                f"{unlike[0]} came out otherwise than the manifest says",
                where=self._options.out,
                remedy="tokenize into another `out`",
                option="out",
            )

    def _say_that_validation_is_empty(self, metadata: DatasetMetadata) -> None:
        if self._options.val_fraction and metadata.validation is None:
            self._say(
                f"no document fell to the validation part: `val_fraction` {self._options.val_fraction} is small for it"
            )

    def finished(self) -> Summary | None:
        """Return what a finished, whole dataset of these inputs and this recipe holds, or None; writes nothing."""
        previous = finished_dataset(self._work)
        if previous is None:
            return None
        self._refuse_other(previous)
        if not self._compare_inputs(previous, InputHashes(self._sources).entries()) or not self._is_whole(
            previous
        ):
            return None
        return self._summary(previous.manifest, previous.validation, already_done=True)

    def _is_whole(self, previous: FinishedDataset) -> bool:
        val_shards = previous.validation.shards if previous.validation else ()
        return all(
            is_there(self._options.out, entry.name, entry.written) for entry in previous.manifest.shards
        ) and all(is_there(self._work.val, entry.name, entry.written) for entry in val_shards)

    def _refuse_other(self, previous: FinishedDataset) -> None:
        """Refuse another recipe than that of the finished dataset."""
        if different := Recipe.of_manifest(previous.manifest).differences(self._recipe):
            raise UserError(
                f"holds a dataset made otherwise: {'; '.join(different)}",
                where=self._options.out,
                remedy="take another `out`, or delete that dataset",
                option="out",
            )

    def _compare_inputs(self, previous: FinishedDataset, inputs: Sequence[InputEntry]) -> bool:
        """Tell whether the inputs are those of the finished dataset, in whatever folders.

        Raises:
            UserError: some are gone; one that was only renamed or moved is not.
        """
        here = [(Path(entry.path).name, entry.sha256) for entry in inputs]
        there = [(Path(entry.path).name, entry.sha256) for entry in previous.manifest.inputs]
        names, contents = {name for name, _ in here}, {sha256 for _, sha256 in here}
        removed = [name for name, sha256 in there if name not in names and sha256 not in contents]
        if removed and self._options.on_removed_input == "stop":
            some = ", ".join(removed[:3]) + (f" and {len(removed) - 3} more" if len(removed) > 3 else "")
            raise UserError(
                f"holds documents of {some}, not among the inputs now",
                where=self._options.out,
                remedy="name all inputs, old and new, or `on_removed_input` drop leaves those documents out",
                option="on_removed_input",
            )
        return here == there

    def _say_what_is_missing(self, kept: dict[str, SplitResult], missing: list[SplitTask]) -> None:
        if dtype_for(self._tokenizer.info.vocab_size) == "int32":
            self._say(
                f"the vocabulary has {self._tokenizer.info.vocab_size:,} entries, over 65,536: tokens take 4 bytes (int32)"
            )
        if kept and missing:
            self._say(f"{len(kept)} of {len(self._tasks)} splits were done before; making {len(missing)}")

    def _find_duplicates(self) -> None:
        """Note for every split which of its documents stood before."""
        job = dataclasses.replace(self._job("tokenizers"), step="hash")
        with self._progress("looking for duplicates", _num_bytes(self._tasks)) as report:
            for _ in self._run(job, self._tasks, report):
                pass
        dropped = duplicates(self._work.read_hashes(self._tasks))
        self._tasks = [
            dataclasses.replace(task, drop=drop) for task, drop in zip(self._tasks, dropped, strict=True)
        ]

    def _make(self, missing: list[SplitTask]) -> tuple[dict[str, SplitResult], Choice]:
        """Run the missing splits; where the fast backend proves wrong, run all of its splits again without it."""
        with encoders_in_our_threads():
            sample = sample_texts(missing, self._options, self._chat)
            choice = choose_backend(self._tokenizer, self._options.backend, sample)
            self._say(f"encoding with {choice.name}: {choice.note}")
            job = self._job(choice.name)
            with self._progress("tokenize", _num_bytes(missing)) as report:
                made = self._make_with(job, missing, report)
                if any(result.difference is not None for result in made.values()):
                    again = [task for task in missing if made[task.name].backend != "tokenizers"]
                    made |= self._make_with(dataclasses.replace(job, backend="tokenizers"), again, report)
        return made, choice

    def _make_with(self, job: Job, tasks: list[SplitTask], report: Report) -> dict[str, SplitResult]:
        """Run splits, write down the result of each, and say the first in which the fast backend differs from the reference."""
        made: dict[str, SplitResult] = {}
        differs = False
        for result in self._run(job, tasks, report):
            assert not isinstance(result, HashResult)
            self._work.write_result(result)
            made[result.name] = result
            if result.difference is not None and not differs:
                differs = True
                self._say(
                    f"{job.backend} differs from tokenizers ({result.name}, {result.difference}); tokenizers does the work"
                )
        return made

    def _run(self, job: Job, tasks: list[SplitTask], report: Report) -> Iterator[SplitResult | HashResult]:
        return run_tasks(job, tasks, self._options.workers, report, self._say, engine=self._options.engine)

    def _job(self, backend: str) -> Job:
        return Job(
            work_folder=self._work.path,
            out=self._options.out,
            tokenizer_json=self._tokenizer.json,
            tokenizer=self._tokenizer.info,
            dtype=dtype_for(self._tokenizer.info.vocab_size),
            backend=backend,
            records=self._options.records,
            on_bad_record=self._options.on_bad_record,
            val_fraction=self._options.val_fraction,
            chat=self._chat,
        )

    def _summary(
        self,
        manifest: Manifest | None,
        validation: Manifest | None,
        *,
        already_done: bool = False,
        made: dict[str, SplitResult] | None = None,
        kept: int = 0,
        choice: Choice | None = None,
    ) -> Summary:
        results = list((made or {}).values())
        return Summary(
            manifest=manifest,
            validation=validation,
            already_done=already_done,
            kept_shards=kept,
            made_shards=len(results),
            input_bytes=_num_bytes([task for task in self._tasks if task.name in (made or {})]),
            seconds=time.monotonic() - self._start,
            backend=choice,
            compared=sum(result.compared for result in results),
            differences=tuple(
                f"{result.name}: {result.difference}" for result in results if result.difference
            ),
        )


def _num_bytes(tasks: Sequence[SplitTask]) -> int:
    return sum(task.split.num_bytes for task in tasks)
