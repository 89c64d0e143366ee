"""Which of a run's options a resume may change.

What the user writes against `config.json` later is taken over where it cannot change the result (devices, micro-batch, logging), and
otherwise refused with both sides shown, unless the user allows that change by name, in which case it is noted in `config.json`. Which of
these holds for an option is in its annotation; see `resume_policy`.
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
from minimind_train.run.options import RunOptions, begun_with, kind_of, options_of, recorded
from minimind_train.run_folder.record import MOVE, WEIGHTS, Change, RunRecord

_SKIPS = "skip_positions"

_ALLOWING = {WEIGHTS: "`reweight`"}
"""Changes that are allowed by a parameter of their own."""

_PARAMETERS = _ALLOWING | {
    MOVE: "`resume_from`",
    "dataset": "`shards`",
    "tokenizer": "`shards`",
}
"""What changes are asked for by, where it is not their name."""


def with_stages(options: RunOptions, stages: tuple[MixtureStage, ...]) -> RunOptions:
    """Return the options with the shares of a mixture that hold, and from where on."""
    return replace(options, data=replace(options.data, mixture_stages=stages))


def resolved(options: RunOptions, shards: Datasets) -> RunOptions:
    """Return the options with nothing left to this machine, to the dataset or to a default."""
    training = options.training
    epochs = options.default_epochs if training.epochs is None and training.steps is None else training.epochs
    measured_on, origin = (
        path and str(Path(path).resolve())
        for path in (options.validation.val_shards, options.start.from_weight)
    )
    # Neighbours in pack have nothing in common but that their lengths fit; concat is the plain token stream that others train on.
    masked = (
        options.data.layout == "pack" if options.data.document_mask is None else options.data.document_mask
    )
    # Weights that were trained before bring their own room for entries, which may be more than the tokenizer has.
    entries = options.model.vocab_size if options.start.from_sha256 else shards.tokenizer.vocab_size
    return replace(
        options,
        data=replace(options.data, shards=shards.resolved(), document_mask=masked),
        start=replace(options.start, from_weight=origin),
        validation=replace(options.validation, val_shards=measured_on),
        model=replace(options.model, vocab_size=entries).resolved(),
        training=replace(
            training,
            epochs=epochs,
            micro_batch=min(training.micro_batch, training.global_batch),
            dtype=resolve_dtype(training.dtype, resolve_device(training.device)),
            threads=training.threads or torch.get_num_threads(),
        ),
    )


def record_of(options: RunOptions, shards: Datasets) -> RunRecord:
    """Return what `config.json` says of a run that begins with these options, resolved, on this dataset."""
    return RunRecord(
        command=options.command,
        options=recorded(options),
        dataset=shards.fingerprint,
        tokenizer=shards.tokenizer,
    )


def reconciled(
    run: Path,
    record: RunRecord,
    options_given: Mapping[str, Any],
    shards: Datasets,
    *,
    step: int,
    allow_change: Collection[str],
) -> tuple[RunOptions, RunRecord]:
    """Hold what the user wrote against what the run is; return the options that hold from here on, and their record.

    Raises:
        UserError: something differs that must not.
    """
    kind = kind_of(record, run)
    policy = policies(kind)
    if unknown := options_given.keys() - policy.keys():
        raise UserError(
            f"{run}: a run of `mm-train {record.command}` has no option {min(unknown)}; leave it out"
        )
    skipped = Skips.of((*record.options.get(_SKIPS, ()), *options_given.get(_SKIPS, ()))).as_texts()
    given = {
        name: value
        for name, value in options_given.items()
        if policy[name].resume not in {Resume.ACTION, Resume.UNRECORDED}
    }
    begun = begun_with(kind, record)
    values = begun | given | {_SKIPS: skipped}
    if "nproc" in given and "threads" not in given:
        values["threads"] = 0  # the share of a core's threads is another one now
    ends = names_of(kind, Resume.END)
    if given.keys() & ends:  # either one says alone when the run ends
        given |= {name: given.get(name) for name in ends}
        values |= given
    try:
        options = options_of(replace(record, options=values), run)
    except ValueError as error:
        raise UserError(f"{run}: with these options the run cannot go on: {error}") from None
    model = options.model
    options = resolved(options, shards)
    options = replace(options, model=replace(options.model, vocab_size=model.vocab_size))
    new = replace(record_of(options, shards), changes=record.changes)
    free = {Resume.FREE, Resume.ORIGIN} | (
        set() if options.model.balances_micro_batches else {Resume.UNLESS_BALANCED}
    )
    sides = {
        name: (begun[name], new.options[name]) for name in sorted(given) if policy[name].resume not in free
    }
    then, now = read_sources(source_texts(record.options["shards"])), shards.sources
    if [source.name for source in then] != [source.name for source in now]:
        raise UserError(
            f"`shards` has other parts (in the run: {_names(then)}, asked for: {_names(now)})",
            where=run,
            remedy="the parts of a run stay, where one may wait with weight 0; write them all, or start a "
            "new run in another `run`",
            option="shards",
        )
    if "shards" in given and shards.mixed:
        sides[WEIGHTS] = (shown_weights(then), shown_weights(now))
    sides["dataset"] = (_shown(record.dataset), _shown(new.dataset))
    sides["tokenizer"] = (record.tokenizer.sha256[:12], new.tokenizer.sha256[:12])
    changes = _agreed_changes(run, kind, sides, step=step, allowed=allow_change)
    if (before := record.options.get(_SKIPS, [])) != list(skipped):
        changes.append(Change(step=step, name=_SKIPS, old=before, new=list(skipped)))
    return options, new.changed(changes)


def _agreed_changes(
    run: Path,
    kind: type[RunOptions],
    sides: Mapping[str, tuple[Any, Any]],
    *,
    step: int,
    allowed: Collection[str],
) -> list[Change]:
    """Return the changes that a resume makes to what a run is, if the user allows them all.

    Args:
        run: the run folder, for the error.
        kind: the options of its phase.
        sides: by name, (in the run, asked for) of whatever decides the result.
        step: after which they hold.
        allowed: names that the user lets change. Either of the options that say when a run ends stands for all, as they replace
            each other.

    Raises:
        UserError: something differs that must not.
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
    refused = different.keys() - allowed
    ends = names_of(kind, Resume.END)
    if not ends.isdisjoint(allowed):
        refused -= ends
    if refused:
        shown = "; ".join(map(show, sorted(refused)))
        # Of two ends of a run that change places, the one that holds from here on is enough.
        names = sorted(name for name in refused if name not in ends or different[name][1] is not None)
        passing = " ".join(_ALLOWING.get(name, f"`allow_change` {name}") for name in names)
        raise UserError(
            f"{run}: this would be another run: {shown}; leave that out, or pass {passing} to change it from step {step + 1} on"
        )
    return [Change(step=step, name=name, old=old, new=new) for name, (old, new) in different.items()]


def refuse_idle_changes(options: RunOptions, step: int, changes: Sequence[Change]) -> None:
    """Refuse changes that would hold from the end of a run on, where nothing is learned any more.

    A change of the end itself, which leaves the run finished, is none of them.

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


def _shown(dataset: str) -> str:
    """Shorten the fingerprints of a dataset, or of the parts of a mixture, for the eye."""
    parts = (each.rpartition("=") for each in dataset.split(" "))
    return " ".join(f"{name}{equals}{fingerprint[:12]}" for name, equals, fingerprint in parts)
