"""Which of a run's options `--resume` may change.

What the user writes against `config.json` later is taken over where it cannot change the result (devices, micro-batch, logging), and
otherwise refused with both sides shown, unless the user allows that change by name, in which case it is noted in `config.json`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minimind_data.errors import UserError
from minimind_data.options import build, flatten
from minimind_train.batches.datasets import Datasets, Source, read_sources, shown_weights, source_texts
from minimind_train.model.config import NO_SHAPES, ModelConfig
from minimind_train.model.lora import LoraConfig
from minimind_train.model.precision import resolve_dtype
from minimind_train.order.mixture import MixtureStage
from minimind_train.order.skips import Skips
from minimind_train.parallel.devices import resolve_device
from minimind_train.run.options import PHASE_OPTIONS, RunOptions
from minimind_train.run_folder import record as runs
from minimind_train.run_folder.record import Change, RunRecord
from minimind_train.run_folder.saver import SaveConfig
from minimind_train.training.evaluate import ValidationConfig
from minimind_train.training.excerpts import ExcerptConfig
from minimind_train.training.tracking import TrackConfig

_HARMLESS = frozenset(
    {
        "shards",
        "device",
        "nproc",
        "parallel",
        "micro_batch",
        "threads",
        "compile",
        "activation_checkpointing",
        "log_every",
        "max_hours",
        "on_nonfinite",
    }
).union(flatten(ValidationConfig()), flatten(SaveConfig()), flatten(TrackConfig()), flatten(ExcerptConfig()))

_MICRO_BATCH = frozenset({"micro_batch"})  # harmless but where experts are balanced over it

_SKIPS = "skip_positions"

WEIGHTS = "weights"

"""What a change of a mixture's weights is called."""

_DERIVED = frozenset({"mixture_stages", "from_sha256"})  # by the run, not by the user

_ACTIONS = frozenset(
    {"resume_from", _SKIPS}
)  # a resume does these because they are asked for: no --allow-change needed

_UNRECORDED = frozenset({"run"})  # a run is where it is, also when its folder has been moved

_ORIGIN = frozenset(
    {"from_weight", "from_step"}
)  # where they lie may change; that they are the same is checked

_DEFAULTS_OF_OLD_RECORDS = (
    flatten(ModelConfig())
    | flatten(LoraConfig())
    | {
        "document_mask": False,
        "shuffle_block": 1,
        "from_weight": None,
        "from_step": None,
        "from_sha256": None,
        "tf32": False,
    }
)  # what a run does whose record does not say

_SHAPES = frozenset(flatten(ModelConfig())) - NO_SHAPES | frozenset(flatten(LoraConfig()))


def changeable(kind: type[RunOptions]) -> frozenset[str]:
    """Return the names that `--allow-change` takes in a phase with these options."""
    names = frozenset({"dataset", "tokenizer", *flatten(kind())})
    return names - (_HARMLESS - _MICRO_BATCH) - _UNRECORDED - _SHAPES - _DERIVED - _ACTIONS - _ORIGIN


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


def recorded(options: RunOptions) -> dict[str, Any]:
    """Return the options as `config.json` holds them."""
    flat = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(options).items()
        if name not in _UNRECORDED
    }
    shards, stages = options.data.shards, options.data.mixture_stages
    mixed = {"shards": list(shards), "mixture_stages": [stage.as_dict() for stage in stages]}
    return flat | (mixed if stages else {"shards": shards[0], "mixture_stages": []})


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
    skipped = Skips.of((*record.options.get(_SKIPS, ()), *options_given.get(_SKIPS, ()))).as_texts()
    given = {name: value for name, value in options_given.items() if name not in _ACTIONS | _UNRECORDED}
    begun = _DEFAULTS_OF_OLD_RECORDS | record.options
    values = begun | given | {_SKIPS: skipped}
    if "nproc" in given and "threads" not in given:
        values["threads"] = 0  # the share of a core's threads is another one now
    if given.keys() & runs.ENDS:  # either one says alone when the run ends
        values |= {name: given.get(name) for name in runs.ENDS}
    try:
        options = options_of(replace(record, options=values), run)
    except ValueError as error:
        raise UserError(f"{run}: with these options the run cannot go on: {error}") from None
    model = options.model
    options = resolved(options, shards)
    options = replace(options, model=replace(options.model, vocab_size=model.vocab_size))
    new = replace(record_of(options, shards), changes=record.changes)
    harmless = _HARMLESS - _MICRO_BATCH if options.model.balances_micro_batches else _HARMLESS
    sides = {
        name: (begun.get(name), new.options[name])
        for name in sorted(given.keys() | runs.ENDS if given.keys() & runs.ENDS else given)
        if name not in harmless | _ORIGIN
    }
    then, now = read_sources(source_texts(record.options["shards"])), shards.sources
    if [source.name for source in then] != [source.name for source in now]:
        raise UserError(
            f"{run}: --shards has other parts (in the run: {_names(then)}, on the command line: {_names(now)}); the parts of a "
            "run stay, where one may wait with weight 0; write them all, or start a new run in another --run"
        )
    if "shards" in given and shards.mixed:
        sides[WEIGHTS] = (shown_weights(then), shown_weights(now))
    sides["dataset"] = (_shown(record.dataset), _shown(new.dataset))
    sides["tokenizer"] = (record.tokenizer.sha256[:12], new.tokenizer.sha256[:12])
    changes = runs.agreed_changes(run, sides, step=step, fixed=_SHAPES, allowed=allow_change)
    if (before := record.options.get(_SKIPS, [])) != list(skipped):
        changes.append(Change(step=step, name=_SKIPS, old=before, new=list(skipped)))
    return options, new.changed(changes)


def options_of(record: RunRecord, run: Path) -> RunOptions:
    """Return the options of a run from its record.

    Raises:
        UserError: the run is of a phase that this program does not know.
        ValueError: an option has a value that it may not have.
    """
    kind = PHASE_OPTIONS.get(record.command)
    if kind is None:
        raise UserError(
            f"{run}: a run of `mm-train {record.command}`, which this program does not have; resume it with the program that began it"
        )
    stages = tuple(map(MixtureStage.of, record.options.get("mixture_stages", ())))
    values = {"shards": source_texts(record.options["shards"]), "mixture_stages": stages, "run": run}
    return build(kind, {**record.options, **values})


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.name for source in sources if source.name) or "one dataset without a name"


def _shown(dataset: str) -> str:
    """Shorten the fingerprints of a dataset, or of the parts of a mixture, for the eye."""
    parts = (each.rpartition("=") for each in dataset.split(" "))
    return " ".join(f"{name}{equals}{fingerprint[:12]}" for name, equals, fingerprint in parts)
