"""What a pre-training run can be told, and which of it `--resume` may change.

The options are resolved once, when a run begins, and from then on they are what `config.json` says. What the user writes against
it later is taken over where it cannot change the result (devices, micro-batch, logging), and otherwise refused with both sides
shown, unless the user allows that change by name, in which case it is noted in `config.json`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from minimind_data.errors import UserError
from minimind_data.options import build, flatten
from minimind_data.shards import ShardSet
from minimind_data.windows import Layout, LongDocuments
from minimind_train import loop, runs
from minimind_train.devices import resolve_device, resolve_dtype
from minimind_train.model import ModelConfig
from minimind_train.optim import OptimConfig
from minimind_train.runs import RunRecord
from minimind_train.sampler import OrderKind

COMMAND = "pretrain"
DEFAULT_EPOCHS = 2

_HARMLESS = frozenset({"shards", "device", "micro_batch", "threads", "save_every", "keep", "log_every"})
_NOT_RECORDED = frozenset({"run"})  # a run is where it is, also when its folder has been moved
_BEFORE_IT_WAS_AN_OPTION = {"document_mask": False}  # what a run does whose record does not say


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned, cut in which windows, in which order."""

    shards: Annotated[Path, "Dataset made by mm-data tokenize."] = Path("data")
    layout: Annotated[
        Layout,
        "concat: windows of the token stream; pad: one document a window; pack: whole documents share one.",
    ] = "concat"
    long_documents: Annotated[
        LongDocuments,
        "In layout pack, a document longer than a window: cut to one, fragment over several, or drop.",
    ] = "cut"
    document_mask: Annotated[
        bool | None,
        "Attention and positions stay inside each document of a window, and no step between documents is learned. By default on "
        "in layout pack, off in concat; in pad a window is one document, so it changes nothing.",
    ] = None
    seq_len: Annotated[int, "Tokens in a window."] = 340
    order: Annotated[OrderKind, "shuffled anew in each epoch, or sequential as in the shards."] = "shuffled"
    resume_from: Annotated[
        str | None, "SHARD:OFFSET, a token; begin at the window that holds it. Needs --order sequential."
    ] = None

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {self.seq_len}")
        if self.resume_from is not None:
            shard, _, offset = self.resume_from.rpartition(":")
            if not shard or not offset.isdecimal():
                raise ValueError(
                    f"resume_from must be SHARD:OFFSET, such as text-00000:4096, not {self.resume_from!r}"
                )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that a pre-training run can be told."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: loop.RunConfig = field(default_factory=loop.RunConfig)


NEEDS_SEQUENTIAL = (
    "--resume-from needs --order sequential: in a shuffled order no place of a shard is a place of the run"
)

_SHAPES = frozenset(flatten(ModelConfig())) - {
    "dropout",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
}

CHANGEABLE = (
    frozenset({"dataset", "tokenizer", *flatten(PretrainConfig())})
    - _HARMLESS
    - _NOT_RECORDED
    - _SHAPES
    - {"resume_from"}
)
"""The names that `--allow-change` takes."""


def resolved(config: PretrainConfig, shards: ShardSet) -> PretrainConfig:
    """Return the options with nothing left to this machine, to the dataset or to a default."""
    training = config.training
    epochs = DEFAULT_EPOCHS if training.epochs is None and training.steps is None else training.epochs
    # Neighbours in pack have nothing in common but that their lengths fit; concat is the plain token stream that others train on.
    masked = config.data.layout == "pack" if config.data.document_mask is None else config.data.document_mask
    return replace(
        config,
        data=replace(config.data, shards=shards.folder.resolve(), document_mask=masked),
        model=replace(config.model, vocab_size=shards.manifest.tokenizer.vocab_size).resolved(),
        training=replace(
            training,
            epochs=epochs,
            micro_batch=min(training.micro_batch, training.global_batch),
            dtype=resolve_dtype(training.dtype, resolve_device(training.device)),
            threads=training.threads or torch.get_num_threads(),
        ),
    )


def recorded(config: PretrainConfig) -> dict[str, Any]:
    """Return the options as `config.json` holds them."""
    flat = {name: value for name, value in flatten(config).items() if name not in _NOT_RECORDED}
    return flat | {"shards": str(config.data.shards)}


def record_of(config: PretrainConfig, shards: ShardSet) -> RunRecord:
    """Return what `config.json` says of a run that begins with these options, resolved, on this dataset."""
    return RunRecord(
        command=COMMAND,
        options=recorded(config),
        dataset=shards.manifest.fingerprint,
        tokenizer=shards.manifest.tokenizer,
    )


def reconciled(
    run: Path,
    record: RunRecord,
    given: Mapping[str, Any],
    shards: ShardSet,
    *,
    step: int,
    allow_change: Collection[str],
) -> tuple[PretrainConfig, RunRecord]:
    """Hold what the user wrote against what the run is; return the options that hold from here on, and their record.

    Raises:
        UserError: something differs that must not.
    """
    given = {name: value for name, value in given.items() if name not in {"resume_from", *_NOT_RECORDED}}
    begun = _BEFORE_IT_WAS_AN_OPTION | record.options
    options = begun | given
    if given.keys() & runs.ENDS:  # either one says alone when the run ends
        options |= {name: given.get(name) for name in runs.ENDS}
    try:
        config = _from_options(options, run)
    except ValueError as error:
        raise UserError(f"{run}: with these options the run cannot go on: {error}") from None
    model = config.model
    config = resolved(config, shards)
    config = replace(config, model=replace(config.model, vocab_size=model.vocab_size))
    new = replace(record_of(config, shards), changes=record.changes)
    sides = {
        name: (begun.get(name), new.options[name])
        for name in sorted(given.keys() | runs.ENDS if given.keys() & runs.ENDS else given)
        if name not in _HARMLESS
    }
    sides["dataset"] = (record.dataset[:12], new.dataset[:12])
    sides["tokenizer"] = (record.tokenizer.sha256[:12], new.tokenizer.sha256[:12])
    changes = runs.agreed_changes(run, sides, step=step, fixed=_SHAPES, allowed=allow_change)
    return config, new.changed(changes)


def _from_options(options: Mapping[str, Any], run: Path) -> PretrainConfig:
    return build(PretrainConfig, {**options, "shards": Path(options["shards"]), "run": run})
