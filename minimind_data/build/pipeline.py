"""tokenize(): plan the splits, run them on an engine, write the manifest.

During a build the folder of the dataset has a folder `.mm-build/` with the lock, the plan, and a result for every shard that is
complete. A run that finds the results of a killed one checks them against the bytes of the inputs, and makes only the shards that are
missing. The last step writes the manifest and removes `.mm-build/`. So the dataset is the same whatever happened on the way.

A finished dataset grows and changes in the same way, by the options that it was made with (`precedent`): shards whose input has not changed stay, the others are made, and a new manifest
replaces the old one. The old manifest is taken away beforehand only where shards that it names are written anew.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from minimind_data.build.bad_records import BadShare, are_too_many, too_many_error
from minimind_data.build.dedup import duplicates
from minimind_data.build.engines import run_tasks
from minimind_data.build.ownership import Outputs, refuse_foreign_files, refuse_unusable_folder
from minimind_data.build.plan import (
    TokenizeOptions,
    chat_encoding_of,
    idle_options,
    plan_tasks,
    sample_texts,
    slice_of,
)
from minimind_data.build.precedent import Contradiction, Precedent
from minimind_data.build.publish import (
    DatasetMetadata,
    Summary,
    assemble,
    first_bad_record,
    publish,
    restore,
    tokenizer_files,
)
from minimind_data.build.recipe import recipe_of
from minimind_data.build.reuse import (
    FinishedDataset,
    finished_dataset,
    finished_manifest,
    is_there,
    past_inputs,
    reusable,
)
from minimind_data.build.split import HashResult, Job, SplitResult, SplitTask
from minimind_data.build.work_folder import STDIN_NAME, CannotWriteError, WorkFolder, spool_stdin
from minimind_data.build.workers import encoders_in_our_threads
from minimind_data.chat.encoding import ChatEncoding
from minimind_data.chat.template import ChatTemplate, chat_template_of
from minimind_data.dataset.format import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    InputEntry,
    Manifest,
    dtype_for,
)
from minimind_data.errors import UserError
from minimind_data.files import sha256_of, user_error_on_full_disk, write_atomic
from minimind_data.inputs.discovery import check_is_file, find_sources
from minimind_data.inputs.forms import check_forms
from minimind_data.inputs.hashes import InputHashes
from minimind_data.inputs.sources import STDIN, Source
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
    """Turn text into a dataset; the docstring of this module says what an interruption leaves behind.

    Args:
        inputs: files, folders, globs, URIs of object stores, or `-` for standard input, in the order of the dataset.
        options: how, and where the dataset goes. Where one is there already, finished or not, the options that shape it and are not
            passed are those that it was made with.
        say: takes sentences that the user should know before the work is done.
        progress: shows the bytes that are read and the tokens that are made, step by step.

    Raises:
        UserError: there is something wrong with an input, a record, the tokenizer, the folder, the disk or the options.
    """
    if not inputs:
        raise UserError("no input", remedy="name at least one file or folder")
    names = [str(one) for one in inputs]
    work = WorkFolder(options.out)
    refuse_unusable_folder(work, names)
    request = _Request(inputs=names, options=options)
    precedent = Precedent.of(work, finished_manifest(work))
    contradictions: list[Contradiction] = []
    options_taken: dict[str, str] = {}
    if precedent is None:
        special = SpecialTokens(bos=options.bos_token, eos=options.eos_token, pad=options.pad_token)
        tokenizer = load_tokenizer(options.tokenizer, special)
        template = chat_template_of(options.tokenizer, options.chat.chat_template)
    else:
        options, contradictions, options_taken = precedent.complete(options)
        tokenizer, template = precedent.tokenizer(options)
    if template is not None:
        template = template.for_tokenizer(tokenizer.info)
    chat = chat_encoding_of(options, tokenizer, template)
    if precedent is not None:
        contradictions += precedent.contradictions(recipe_of(options, tokenizer, chat), options, tokenizer)
        precedent.refuse(contradictions, request.inputs, request.options)
    reads_stdin = STDIN in names
    named, notes = find_sources(names, options.format, past=past_inputs(work), takes_stdin=True)
    for note in notes:
        say(note)

    def prepare() -> _Build:
        sources = [
            spool_stdin(work, options, progress) if source.name == STDIN else source for source in named
        ]
        for note in idle_options(sources, options.records):
            say(note)
        build = _Build(
            sources,
            options,
            tokenizer,
            work,
            template=template,
            chat=chat,
            say=say,
            progress=progress,
            request=request,
            options_taken=options_taken,
        )
        build.refuse_foreign_files()
        return build

    build = None if reads_stdin else prepare()  # standard input is copied to the folder, under its lock
    try:
        with user_error_on_full_disk(options.out), work.locked(options.task):
            return (build or prepare()).run()
    except CannotWriteError:  # nor is there anything to write where the dataset is finished
        if build is None or (summary := build.finished()) is None:
            raise
        return summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of `tokenize`, as they were passed."""

    inputs: Sequence[str]
    options: TokenizeOptions


def commit(out: Path | str, *, say: Say = say_nothing, progress: Progress = no_progress) -> Summary:
    """Join the slices that several runs with `task` have made into one dataset.

    Args:
        out: the folder of the dataset.
        say: as for `tokenize`.
        progress: as for `tokenize`.

    Raises:
        UserError: no such build is there, or some of its splits are not made yet.
    """
    out = Path(out)
    work = WorkFolder(out)
    plan = work.plan()
    if plan is None and (out / MANIFEST_NAME).is_file():
        raise UserError("a finished dataset already, so there are no slices to join", where=out)
    if plan is None:
        raise UserError(
            "no unfinished build there", where=out, remedy="begin one by `mm-data tokenize` with `task` 1/N"
        )
    # The slices have decided about their bad records.
    options = dataclasses.replace(work.options_of(plan), on_bad_record="set-aside", max_bad_share=1.0)
    tokenizer_path, info = work.path / TOKENIZER_NAME, plan.recipe.tokenizer
    if not tokenizer_path.is_file() or sha256_of(tokenizer_path) != info.sha256:
        raise UserError(
            "missing or changed",
            where=tokenizer_path,
            remedy="run one of the slices again, which restores it",
        )
    tokenizer = cached_tokenizer(tokenizer_path.read_text("utf-8"), info)
    template = chat_template_of(work.path)
    chat = chat_encoding_of(options, tokenizer, template)
    if missing := [source.location for source in plan.inputs if source.is_gone()]:
        raise UserError(
            "an input of this build, which is not there any more",
            where=missing[0],
            remedy="put it back, then commit again",
        )
    for source in plan.inputs:
        check_is_file(source)
    with user_error_on_full_disk(out), work.locked():
        build = _Build(
            plan.inputs,
            options,
            tokenizer,
            work,
            template=template,
            chat=chat,
            say=say,
            progress=progress,
            request=_Request(inputs=[source.name for source in plan.inputs], options=options),
        )
        return build.run(only_join=True)


class _Build:
    """One call of `tokenize` or `commit`; `run` is called under the lock of the folder."""

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
        request: _Request,
        options_taken: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        check_forms(sources, options.kind)
        self._sources = sources
        self._options = options
        self._tokenizer = tokenizer
        self._chat = chat
        self._config_json = None if template is None else template.config_json
        self._tasks = plan_tasks(sources, options)
        self._work = work
        self._say = say
        self._progress = progress
        self._request = request
        self._options_taken = options_taken
        self._previous: FinishedDataset | None = None
        self._made: dict[str, SplitResult] = {}
        self._bad_share = BadShare([], 1.0)
        self._recipe = recipe_of(options, tokenizer, self._chat)
        self._start = time.monotonic()

    def run(self, *, only_join: bool = False) -> Summary:
        """Make the shards that are missing, and the manifest unless this is a slice.

        Args:
            only_join: refuse to make shards.
        """
        options, work = self._options, self._work
        self.refuse_foreign_files()
        work.remove_partials(self._tasks, options.task)
        hashes = InputHashes(self._sources)
        # A slice writes no manifest, so it need not read the inputs of the other slices.
        if options.task is None:
            hashes.begin()
        previous = finished_dataset(work)
        self._refuse_other_recipe(previous)
        same_inputs = False
        if previous is not None:
            same_inputs = self._compare_inputs(previous, hashes.entries())
            if same_inputs and self._is_whole(previous):
                restore(work, previous, self._tokenizer.json, self._config_json, self._say)
                return self._summary(previous.manifest, previous.validation, already_done=True)
        self._begin(previous)
        inputs = hashes.entries() if previous else ()
        reused, changed = reusable(work, self._tasks, options, previous, inputs=inputs, say=self._say)
        missing = [task for task in slice_of(self._tasks, options.task) if task.name not in reused]
        if only_join and missing:
            raise UserError(
                f"{len(missing)} of {len(self._tasks)} splits are not made ({missing[0].name}, …)",
                where=options.out,
                remedy="run the slices that they are in, then commit again",
            )
        self._say_what_is_missing(reused, missing)
        self._watch_bad_records(reused, previous)
        if changed:
            work.retire()
        results, backend = self._make(missing) if missing else ({}, None)
        self._refuse_changed_shards(
            previous, [result for name, result in results.items() if name not in changed]
        )
        manifest = validation = None
        if options.task is None and previous is not None and same_inputs and not changed:
            restore(work, previous, self._tokenizer.json, self._config_json, self._say)
            manifest, validation = previous.manifest, previous.validation
        elif options.task is None:
            splits = [(task, results.get(task.name) or reused[task.name]) for task in self._tasks]
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
        return self._summary(manifest, validation, results=results, num_kept=len(reused), backend=backend)

    def refuse_foreign_files(self) -> None:
        """Refuse a folder in which this build would replace what belongs to somebody else."""
        outputs = Outputs(
            shards=[task.name for task in self._tasks],
            kind=self._options.kind,
            tokenizer=tokenizer_files(self._tokenizer.json, self._config_json),
            has_validation=bool(self._options.val_fraction),
        )
        inputs = [source.location for source in self._sources if source.name != STDIN]
        try:
            refuse_foreign_files(self._work, outputs, inputs)
        except UserError:
            if any(source.name == STDIN for source in self._sources):  # copied for this build, under the lock
                (self._work.path / STDIN_NAME).unlink(missing_ok=True)
            raise

    def _begin(self, previous: FinishedDataset | None) -> None:
        """Write down the plan, and find the duplicates, which are not to be made."""
        work = self._work
        names = {task.name for task in self._tasks}
        with work.planning():
            self._refuse_other_recipe(previous)  # of a slice that began meanwhile
            # First, for other slices take the tokenizer from there as soon as there is a plan.
            for name, content in tokenizer_files(self._tokenizer.json, self._config_json).items():
                write_atomic(work.path / name, content)
            work.begin(self._recipe, self._sources, names, previous.names if previous else set())
        if self._options.val_fraction:
            work.val.mkdir(exist_ok=True)
        if self._options.dedup == "exact":
            self._find_duplicates()

    def _refuse_changed_shards(
        self, previous: FinishedDataset | None, results: Sequence[SplitResult]
    ) -> None:
        """Refuse a shard that the finished dataset had lost and that now differs from what its manifest says."""
        different = [result.name for result in results if previous is not None and previous.differs(result)]
        if different:
            raise UserError(
                f"{different[0]} was made again, and differs from what the manifest says",
                where=self._options.out,
                remedy="tokenize into another `out`",
                option="out",
            )

    def _say_that_validation_is_empty(self, metadata: DatasetMetadata) -> None:
        if self._options.val_fraction and metadata.validation is None:
            self._say(
                f"the validation part got no document: `val_fraction` {self._options.val_fraction} is too small for so few"
            )

    def finished(self) -> Summary | None:
        """Return the summary of the finished dataset where these inputs and this recipe made it and it is whole; writes nothing."""
        previous = finished_dataset(self._work)
        if previous is None:
            return None
        self._refuse_other_recipe(previous)
        same_inputs = self._compare_inputs(previous, InputHashes(self._sources).entries())
        if not (same_inputs and self._is_whole(previous)):
            return None
        return self._summary(previous.manifest, previous.validation, already_done=True)

    def _is_whole(self, previous: FinishedDataset) -> bool:
        val_shards = previous.validation.shards if previous.validation else ()
        return all(
            is_there(self._options.out, entry.name, entry.written) for entry in previous.manifest.shards
        ) and all(is_there(self._work.val, entry.name, entry.written) for entry in val_shards)

    def _refuse_other_recipe(self, previous: FinishedDataset | None) -> None:
        """Refuse another recipe than that of what is there, which may have come there since the options were completed."""
        precedent = Precedent.of(self._work, None if previous is None else previous.manifest)
        if precedent is not None:
            contradictions = precedent.contradictions(self._recipe, self._options, self._tokenizer)
            precedent.refuse(contradictions, self._request.inputs, self._request.options)

    def _compare_inputs(self, previous: FinishedDataset, inputs: Sequence[InputEntry]) -> bool:
        """Tell whether the inputs are those of the finished dataset, in whatever folders they are now.

        Raises:
            UserError: an input of the dataset is not among them, neither its name nor its content.
        """
        here = [(Path(entry.path).name, entry.sha256) for entry in inputs]
        there = [(Path(entry.path).name, entry.sha256) for entry in previous.manifest.inputs]
        names, contents = {name for name, _ in here}, {sha256 for _, sha256 in here}
        removed = [name for name, sha256 in there if name not in names and sha256 not in contents]
        if removed and self._options.on_removed_input == "stop":
            some = ", ".join(removed[:3]) + (f" and {len(removed) - 3} more" if len(removed) > 3 else "")
            raise UserError(
                f"holds documents of {some}, which is not among the inputs now",
                where=self._options.out,
                remedy="name all inputs, old and new, or leave those documents out with `on_removed_input` drop",
                option="on_removed_input",
            )
        return here == there

    def _say_what_is_missing(self, reused: dict[str, SplitResult], missing: list[SplitTask]) -> None:
        if dtype_for(self._tokenizer.info.vocab_size) == "int32":
            self._say(
                f"the vocabulary has {self._tokenizer.info.vocab_size:,} entries, over 65,536: tokens take 4 bytes (int32)"
            )
        if reused and missing:
            self._say(f"{len(reused)} of {len(self._tasks)} splits are done already; making {len(missing)}")

    def _find_duplicates(self) -> None:
        """Note for every split which of its documents have the text of an earlier one."""
        job = dataclasses.replace(self._job("tokenizers"), step="hash")
        with self._progress("looking for duplicates", _num_bytes(self._tasks)) as report:
            for _ in self._run(job, self._tasks, report):
                pass
        drops = duplicates(self._work.read_hashes(self._tasks))
        self._tasks = [
            dataclasses.replace(task, drop=drop) for task, drop in zip(self._tasks, drops, strict=True)
        ]

    def _watch_bad_records(self, reused: Mapping[str, SplitResult], previous: FinishedDataset | None) -> None:
        """Look at the bad records in what is made already, and from here on in what this run makes.

        Raises:
            UserError: as `_refuse_many_bad`.
        """
        options = self._options
        # Who has set aside most records of a dataset before may go on with it.
        accepts_all = options.on_bad_record == "stop" or (
            previous is not None
            and are_too_many(previous.num_bad, previous.num_records, options.max_bad_share, is_all=True)
        )
        names = [task.name for task in slice_of(self._tasks, options.task)]
        self._bad_share = BadShare(names, 1.0 if accepts_all else options.max_bad_share)
        self._previous = previous
        self._refuse_many_bad(reused.values())

    def _refuse_many_bad(self, results: Iterable[SplitResult]) -> None:
        """Refuse to set aside too many records.

        Raises:
            UserError: with these results, too many are bad.
        """
        self._made |= {result.name: result for result in results}
        if (counts := self._bad_share.problem(self._made)) is not None:
            splits = [(task, self._made[task.name]) for task in self._tasks if task.name in self._made]
            raise too_many_error(*first_bad_record(self._work, splits, self._previous), counts)

    def _make(self, missing: list[SplitTask]) -> tuple[dict[str, SplitResult], Choice]:
        """Make the missing splits; if the fast backend proves wrong in one, make all splits that it encoded again without it."""
        with encoders_in_our_threads():
            sample = sample_texts(missing, self._options, self._chat)
            backend = choose_backend(self._tokenizer, self._options.backend, sample)
            self._say(f"encoding with {backend.name}: {backend.note}")
            job = self._job(backend.name)
            with self._progress("tokenize", _num_bytes(missing)) as report:
                results = self._make_with(job, missing, report)
                if any(result.difference is not None for result in results.values()):
                    again = [task for task in missing if results[task.name].backend != "tokenizers"]
                    results |= self._make_with(dataclasses.replace(job, backend="tokenizers"), again, report)
        return results, backend

    def _make_with(self, job: Job, tasks: list[SplitTask], report: Report) -> dict[str, SplitResult]:
        """Make splits, write down the result of each, and say in which one the fast backend first differs from the reference."""
        results: dict[str, SplitResult] = {}
        differs = False
        for result in self._run(job, tasks, report):
            assert not isinstance(result, HashResult)
            self._work.write_result(result)
            results[result.name] = result
            self._refuse_many_bad([result])
            if result.difference is not None and not differs:
                differs = True
                self._say(
                    f"{job.backend} differs from tokenizers ({result.name}, {result.difference}); tokenizers does the work"
                )
        return results

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
            max_bad_share=self._bad_share.most,
            val_fraction=self._options.val_fraction,
            chat=self._chat,
        )

    def _summary(
        self,
        manifest: Manifest | None,
        validation: Manifest | None,
        *,
        already_done: bool = False,
        results: Mapping[str, SplitResult] = MappingProxyType({}),
        num_kept: int = 0,
        backend: Choice | None = None,
    ) -> Summary:
        return Summary(
            manifest=manifest,
            validation=validation,
            already_done=already_done,
            kept_shards=num_kept,
            made_shards=len(results),
            input_bytes=_num_bytes([task for task in self._tasks if task.name in results]),
            seconds=time.monotonic() - self._start,
            options_taken=self._options_taken,
            backend=backend,
            compared=sum(result.compared for result in results.values()),
            differences=tuple(
                f"{result.name}: {result.difference}" for result in results.values() if result.difference
            ),
        )


def _num_bytes(tasks: Sequence[SplitTask]) -> int:
    return sum(task.split.num_bytes for task in tasks)
