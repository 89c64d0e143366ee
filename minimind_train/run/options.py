"""What a run can be told: the options that all phases share, and what each phase makes of them.

They are resolved once, when a run begins, and from then on they are what its `config.json` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from minimind_data.dataset.format import Kind
from minimind_data.options import flatten
from minimind_data.windows.base import Layout, LongDocuments
from minimind_train.batches.datasets import read_sources, source_texts
from minimind_train.model.config import LoraConfig, ModelConfig
from minimind_train.objectives.options import ObjectiveOptions, PreferenceOptions
from minimind_train.order.mixture import MixtureStage
from minimind_train.order.sample_order import OrderKind
from minimind_train.order.skips import Skips
from minimind_train.resume_policy import Before, Resume, names_of
from minimind_train.run_folder.options import CheckpointChoice, parse_step
from minimind_train.training.options import OptimizerOptions, TrainingOptions, ValidationOptions


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is learned, cut in which windows, in which order."""

    shards: Annotated[
        tuple[str, ...],
        "DIR: a dataset made by mm-data tokenize. For a mixture, repeat NAME=DIR:WEIGHT; weights are "
        "shares of the tokens.",
        Resume.FREE,
    ] = ("data",)
    layout: Annotated[
        Layout,
        "concat: windows of the token stream; pad: one document in a window; pack: several whole "
        "documents in a window.",
    ] = "concat"
    long_documents: Annotated[
        LongDocuments,
        "In layout pack, for a document longer than a window: cut it to one, fragment it over several, "
        "or drop it.",
    ] = "cut"
    document_mask: Annotated[
        bool | None,
        "Keep attention and positions inside each document of a window, with no target across "
        "documents. By default on in layout pack, off in concat; in pad a window is one document, so it "
        "changes nothing.",
        Before(False),
    ] = None
    seq_len: Annotated[int, "Sequence length: tokens in a window."] = 340
    order: Annotated[OrderKind, "shuffled: a new shuffle in each epoch; sequential: as in the shards."] = (
        "shuffled"
    )
    shuffle_block: Annotated[
        int,
        "Number of neighbouring windows that stay together in the shuffle, for slow disks; 1 shuffles "
        "single windows.",
    ] = 1
    resume_from: Annotated[
        str | None,
        "SHARD:OFFSET of a token: begin at the window that holds it. Needs `order` sequential.",
        Resume.ACTION,
    ] = None
    skip_positions: Annotated[
        tuple[str, ...],
        "A:B: leave out the samples at positions A to B - 1 for good. Repeatable; with `resume`, in "
        "addition to earlier ones.",
        Resume.ACTION,
    ] = ()
    mixture_stages: Annotated[tuple[MixtureStage, ...], Resume.DERIVED] = field(
        default=(), metadata={"flag": False}
    )
    """Of a mixture: the shares of its parts, and from which position on. Made when the run begins and when it is reweighted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", source_texts(self.shards))
        read_sources(self.shards)  # refuses what it cannot read
        object.__setattr__(self, "skip_positions", Skips.of(self.skip_positions).as_texts())
        if not 1 <= self.shuffle_block <= 2**40:
            raise ValueError(f"`shuffle_block` must be from 1 to 2^40 windows, not {self.shuffle_block}")
        if self.seq_len < 1:
            raise ValueError(f"`seq_len` must be at least 1, not {self.seq_len}")
        if self.resume_from is not None:
            shard, _, offset = self.resume_from.rpartition(":")
            if not shard or not offset.isdecimal():
                raise ValueError(
                    f"`resume_from` must be SHARD:OFFSET, such as text-00000:4096, not {self.resume_from!r}"
                )


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """From which weights a run begins."""

    from_weight: Annotated[
        str | None,
        "Initial weights: the folder of a run, a Hugging Face folder, or MiniMind's .pth. A folder "
        "decides the shape of the model; for a .pth the options must give it.",
        Resume.ORIGIN,
        Before(None),
    ] = None
    from_step: Annotated[
        CheckpointChoice,
        "With `from_weight`: step of the checkpoint, or best; by default the newest complete one.",
        parse_step,
        Resume.ORIGIN,
    ] = None
    from_sha256: Annotated[str | None, Resume.DERIVED] = field(default=None, metadata={"flag": False})
    """SHA-256 of the weights that the run began from, over names, shapes and bits; the same in whatever file they lie."""

    def __post_init__(self) -> None:
        if self.from_step is not None and self.from_weight is None:
            raise ValueError("`from_step` says which checkpoint of `from_weight`; pass both or neither")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run of every phase can be told. A phase has other defaults, and options of its objective."""

    command: ClassVar[str]
    """What `mm-train` calls the phase, and what the run's record says."""
    dataset_kind: ClassVar[Kind]
    """The kind of dataset that it learns."""
    default_epochs: ClassVar[int] = 2
    """Times through the dataset where nobody says how long."""

    start: StartOptions = field(default_factory=StartOptions)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimizerOptions = field(default_factory=OptimizerOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """Everything that a pre-training run can be told."""

    command: ClassVar[str] = "pretrain"
    dataset_kind: ClassVar[Kind] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class SftOptions(RunOptions):
    """Everything that a run of supervised fine-tuning can be told; the defaults are MiniMind's."""

    command: ClassVar[str] = "sft"
    dataset_kind: ClassVar[Kind] = "sft"

    start: StartOptions = field(default_factory=partial(StartOptions, from_weight="runs/pretrain"))
    data: DataOptions = field(default_factory=partial(DataOptions, layout="pad", seq_len=768))
    optim: OptimizerOptions = field(default_factory=partial(OptimizerOptions, learning_rate=1e-5))
    training: TrainingOptions = field(
        default_factory=partial(TrainingOptions, run=Path("runs/sft"), global_batch=16, micro_batch=16)
    )

    def __post_init__(self) -> None:
        if self.data.layout == "concat":
            raise ValueError(
                "layout concat cuts conversations apart, and an answer without its question teaches nothing; take pad or pack"
            )


@dataclass(frozen=True, kw_only=True)
class DpoOptions(RunOptions):
    """Everything that a run of direct preference optimization can be told; the defaults are MiniMind's."""

    command: ClassVar[str] = "dpo"
    dataset_kind: ClassVar[Kind] = "dpo"
    default_epochs: ClassVar[int] = 1

    start: StartOptions = field(default_factory=partial(StartOptions, from_weight="runs/sft"))
    data: DataOptions = field(default_factory=partial(DataOptions, layout="pad", seq_len=1024))
    objective: PreferenceOptions = field(default_factory=PreferenceOptions)
    optim: OptimizerOptions = field(default_factory=partial(OptimizerOptions, learning_rate=4e-8))
    training: TrainingOptions = field(
        default_factory=partial(TrainingOptions, run=Path("runs/dpo"), global_batch=4, micro_batch=4)
    )

    def __post_init__(self) -> None:
        if self.data.layout != "pad":
            raise ValueError(f"`layout` must be pad, a pair a window, not {self.data.layout}")


PHASE_OPTIONS: Mapping[str, type[RunOptions]] = {
    options.command: options for options in (PretrainOptions, SftOptions, DpoOptions)
}
"""The options of each phase, by what `mm-train` calls it."""

NEEDS_SEQUENTIAL = "`resume_from` needs `order` sequential: in a shuffled order a token does not say how far the run has come"


def window_options(data: DataOptions) -> dict[str, Any]:
    """Return the options of `open_windows` that a run learns with, and is measured with."""
    return {
        "layout": data.layout,
        "seq_len": data.seq_len,
        "long_documents": data.long_documents,
        "documents_apart": bool(data.document_mask),
    }


def changeable(kind: type[RunOptions]) -> frozenset[str]:
    """Return the names that `--allow-change` takes in a phase with these options."""
    options = names_of(kind, Resume.ALLOWED, Resume.TRAINING, Resume.UNLESS_BALANCED, Resume.END)
    return options | {"dataset", "tokenizer"}


def recorded(options: RunOptions) -> dict[str, Any]:
    """Return the options as `config.json` holds them."""
    unrecorded = names_of(type(options), Resume.UNRECORDED)
    flat = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(options).items()
        if name not in unrecorded
    }
    shards, stages = options.data.shards, options.data.mixture_stages
    mixed = {"shards": list(shards), "mixture_stages": [stage.as_dict() for stage in stages]}
    return flat | (mixed if stages else {"shards": shards[0], "mixture_stages": []})
