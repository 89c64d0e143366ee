"""Which of a run's options a resume may change.

An option that cannot change the result (devices, micro-batch, logging) is taken over. Any other that differs from `config.json` is refused,
with both sides shown, unless the user allows that change by name; then it is noted in `config.json`. Which of these holds for an option
stands in its annotation; see `resume_policy`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minimind_data.errors import UserError
from minimind_train.batches.datasets import Datasets, shown_weights
from minimind_train.batches.options import DatasetSource, read_sources, source_texts
from minimind_train.model.precision import resolve_dtype
from minimind_train.order.mixture import MixtureStage
from minimind_train.order.skips import Skips
from minimind_train.parallel.devices import resolve_device
from minimind_train.resume_policy import Resume, names_of, policies
from minimind_train.run.options import RunOptions, begun_with, kind_of, options_with, recorded
from minimind_train.run_folder.places import relative_paths, validation_fingerprint
from minimind_train.run_folder.record import MOVE, SKIPS, WEIGHTS, Change, RunRecord

_ALLOWING = {WEIGHTS: "`reweight`"}
"""Changes that have a parameter of their own to allow them."""

_PARAMETERS = _ALLOWING | {
    MOVE: "`resume_from`",
    "dataset": "`shards`",
    "tokenizer": "`shards`",
}
"""The parameters that ask for changes, where they are not the names of the changes."""


def with_stages(options: RunOptions, stages: tuple[MixtureStage, ...]) -> RunOptions:
    """Return the options with the shares of a mixture, and the positions from which on they hold."""
    return replace(options, data=replace(options.data, mixture_stages=stages))


def resolved(options: RunOptions, datasets: Datasets) -> RunOptions:
    """Return the options with everything decided that was left to this machine, to the dataset or to a default."""
    training = options.training
    epochs = options.default_epochs if training.epochs is None and training.steps is None else training.epochs
    val_shards, origin = (
        path and str(Path(path).resolve())
        for path in (options.validation.val_shards, options.start.from_weight)
    )
    # Documents share a packed window only because their lengths fit; concat is the plain token stream, as other projects train on it.
    document_mask = (
        options.data.layout == "pack" if options.data.document_mask is None else options.data.document_mask
    )
    # Initial weights have a vocabulary size of their own, which may be larger than the tokenizer's.
    vocab_size = options.model.vocab_size if options.start.from_sha256 else datasets.tokenizer.vocab_size
    return replace(
        options,
        data=replace(options.data, shards=datasets.resolved(), document_mask=document_mask),
        start=replace(options.start, from_weight=origin),
        validation=replace(options.validation, val_shards=val_shards),
        model=replace(options.model, vocab_size=vocab_size).resolved(),
        training=replace(
            training,
            epochs=epochs,
            micro_batch=min(training.micro_batch, training.global_batch),
            dtype=resolve_dtype(training.dtype, resolve_device(training.device)),
            threads=training.threads or torch.get_num_threads(),
        ),
    )


def record_of(options: RunOptions, datasets: Datasets) -> RunRecord:
    """Return the record of a run that begins with these options, resolved, on these datasets."""
    values = recorded(options)
    return RunRecord(
        command=options.command,
        options=values,
        dataset=datasets.fingerprint,
        tokenizer=datasets.tokenizer,
        validation=validation_fingerprint(values),
        relative_paths=relative_paths(values, options.training.run),
    )


def reconciled(
    run: Path,
    record: RunRecord,
    options_given: Mapping[str, Any],
    datasets: Datasets,
    *,
    step: int,
    allow_change: Collection[str],
) -> tuple[RunOptions, RunRecord]:
    """Compare the options that the user gave with those of the run; return the options that hold from here on, and their record.

    Raises:
        UserError: an option differs that must not.
    """
    kind = kind_of(record, run)
    policy = policies(kind)
    if unknown := options_given.keys() - policy.keys():
        raise UserError(
            f"a run of `mm-train {record.command}` has no option {min(unknown)}",
            where=run,
            remedy="leave it out",
        )
    skips = Skips.of((*record.options.get(SKIPS, ()), *options_given.get(SKIPS, ()))).as_texts()
    new_values = {
        name: value
        for name, value in options_given.items()
        if policy[name].resume not in {Resume.ACTION, Resume.UNRECORDED}
    }
    old_values = begun_with(kind, record)
    values = old_values | new_values | {SKIPS: skips}
    if "nproc" in new_values and "threads" not in new_values:
        values["threads"] = 0  # another number of processes shares the cores now
    ends = names_of(kind, Resume.END)
    if new_values.keys() & ends:  # each of them alone says when the run ends
        new_values |= {name: new_values.get(name) for name in ends}
        values |= new_values
    try:
        options = options_with(kind, values, run)
    except ValueError as error:
        raise UserError(f"with these options the run cannot go on: {error}", where=run) from None
    model = options.model
    options = resolved(options, datasets)
    options = replace(options, model=replace(options.model, vocab_size=model.vocab_size))
    new = replace(record_of(options, datasets), changes=record.changes)
    free = {Resume.FREE, Resume.ORIGIN} | (
        set() if options.model.balances_micro_batches else {Resume.UNLESS_BALANCED}
    )
    sides = {
        name: (old_values[name], new.options[name])
        for name in sorted(new_values)
        if policy[name].resume not in free
    }
    sources_then, sources_now = read_sources(source_texts(record.options["shards"])), datasets.sources
    if [source.name for source in sources_then] != [source.name for source in sources_now]:
        raise UserError(
            f"`shards` has other parts (in the run: {_names(sources_then)}, asked for: {_names(sources_now)})",
            where=run,
            remedy="the parts of a run stay, where one may wait with weight 0; write them all, or start a "
            "new run in another `run`",
            option="shards",
        )
    if "shards" in new_values and datasets.mixed:
        sides[WEIGHTS] = (shown_weights(sources_then), shown_weights(sources_now))
    sides["dataset"] = (_shortened(record.dataset), _shortened(new.dataset))
    sides["tokenizer"] = (record.tokenizer.sha256[:12], new.tokenizer.sha256[:12])
    changes = _agreed_changes(run, kind, sides, step=step, allowed=allow_change)
    if (before := record.options.get(SKIPS, [])) != list(skips):
        changes.append(Change(step=step, name=SKIPS, old=before, new=list(skips)))
    return options, new.changed(changes)


def _agreed_changes(
    run: Path,
    kind: type[RunOptions],
    sides: Mapping[str, tuple[Any, Any]],
    *,
    step: int,
    allowed: Collection[str],
) -> list[Change]:
    """Return the changes that a resume makes to a run, if the user allows them all.

    Args:
        run: the run folder, for the error.
        kind: the options of its phase.
        sides: by name, (in the run, asked for) of everything that decides the result.
        step: after which the changes hold.
        allowed: names that may change. One of the options that say when a run ends stands for all of them, as they replace each other.

    Raises:
        UserError: an option differs that must not.
    """
    different = {name: pair for name, pair in sides.items() if pair[0] != pair[1]}

    def show(name: str) -> str:
        where = "in the dataset now" if name in {"dataset", "tokenizer"} else "asked for"
        return f"{name} (in the run: {different[name][0]}, {where}: {different[name][1]})"

    for name in sorted(different.keys() & names_of(kind, Resume.SHAPE)):
        raise UserError(
            f"{show(name)} decides the shape of the weights",
            where=run,
            remedy="leave that out, or start a new run in another `run`",
            option="run",
        )
    differing = different.keys() - allowed
    ends = names_of(kind, Resume.END)
    if not ends.isdisjoint(allowed):
        differing -= ends
    if differing:
        differences = "; ".join(map(show, sorted(differing)))
        # Of two options that say when the run ends, allowing the one that holds from here on is enough.
        names = sorted(name for name in differing if name not in ends or different[name][1] is not None)
        passing = " ".join(_ALLOWING.get(name, f"`allow_change` {name}") for name in names)
        raise UserError(
            f"this would be another run: {differences}",
            where=run,
            remedy=f"leave that out, or pass {passing} to change it from step {step + 1} on",
        )
    return [Change(step=step, name=name, old=old, new=new) for name, (old, new) in different.items()]


def refuse_idle_changes(options: RunOptions, step: int, changes: Sequence[Change]) -> None:
    """Refuse changes that would hold only after the end of a run, when nothing is learned any more.

    A change of the end itself is allowed, even if it leaves the run finished.

    Raises:
        UserError: there are such changes.
    """
    ends = names_of(type(options), Resume.END)
    idle = [_PARAMETERS.get(change.name, f"`{change.name}`") for change in changes if change.name not in ends]
    if idle:
        raise UserError(
            f"finished already, {step} steps, so there is nothing that {' and '.join(idle)} could change",
            where=options.training.run,
            remedy="to train on, pass a later end too, such as `epochs` N and `allow_change` epochs; else leave "
            "that out",
            option="epochs",
        )


def _names(sources: Sequence[DatasetSource]) -> str:
    return ", ".join(source.name for source in sources if source.name) or "one dataset without a name"


def _shortened(dataset: str) -> str:
    """Return the fingerprint of a dataset, or those of a mixture's parts, cut to a length that can be read."""
    parts = (each.rpartition("=") for each in dataset.split(" "))
    return " ".join(f"{name}{equals}{fingerprint[:12]}" for name, equals, fingerprint in parts)
