"""What a run can be told: the options that all phases share, and what each phase makes of them.

They are resolved once, when a run begins, and from then on they are what its `config.json` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from minimind_data.dataset.format import Kind
from minimind_data.windows.base import Layout, LongDocuments
from minimind_train.batches.datasets import read_sources, source_texts
from minimind_train.model.config import ModelConfig
from minimind_train.model.lora import LoraConfig
from minimind_train.objectives.objective import ObjectiveOptions
from minimind_train.objectives.preference import PreferenceOptions
from minimind_train.order.mixture import MixtureStage
from minimind_train.order.sample_order import OrderKind
from minimind_train.order.skips import Skips
from minimind_train.resume_policy import Before, Resume
from minimind_train.run_folder.choice import CheckpointChoice, parse_step
from minimind_train.training import loop
from minimind_train.training.evaluate import ValidationConfig
from minimind_train.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned, cut in which windows, in which order."""

    shards: Annotated[
        tuple[str, ...],
        "DIR, a dataset made by mm-data tokenize; or, repeated, NAME=DIR:WEIGHT, the parts of a mixture and their weights in tokens.",
        Resume.FREE,
    ] = ("data",)
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
        Before(False),
    ] = None
    seq_len: Annotated[int, "Tokens in a window."] = 340
    order: Annotated[OrderKind, "shuffled anew in each epoch, or sequential as in the shards."] = "shuffled"
    shuffle_block: Annotated[
        int,
        "Neighbouring windows that stay together in the shuffle, for slow disks; 1 shuffles each on its own.",
    ] = 1
    resume_from: Annotated[
        str | None,
        "SHARD:OFFSET, a token; begin at the window that holds it. Needs --order sequential.",
        Resume.ACTION,
    ] = None
    skip_positions: Annotated[
        tuple[str, ...],
        "A:B, leave out the samples at positions A to B - 1 for good. Repeatable; with --resume, in addition to those before.",
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
            raise ValueError(f"shuffle_block must be from 1 to 2^40 windows, not {self.shuffle_block}")
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {self.seq_len}")
        if self.resume_from is not None:
            shard, _, offset = self.resume_from.rpartition(":")
            if not shard or not offset.isdecimal():
                raise ValueError(
                    f"resume_from must be SHARD:OFFSET, such as text-00000:4096, not {self.resume_from!r}"
                )


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """From which weights a run begins."""

    from_weight: Annotated[
        str | None,
        "Weights that the run begins from: the folder of a run, a Hugging Face folder, or a .pth of MiniMind's. A folder decides the "
        "shape of the model; of a .pth the options must say it.",
        Resume.ORIGIN,
        Before(None),
    ] = None
    from_step: Annotated[
        CheckpointChoice,
        "With --from-weight: the step of the checkpoint, or best; the newest whole one by default.",
        parse_step,
        Resume.ORIGIN,
    ] = None
    from_sha256: Annotated[str | None, Resume.DERIVED] = field(default=None, metadata={"flag": False})
    """SHA-256 of the weights that the run began from, over names, shapes and bits; the same in whatever file they lie."""

    def __post_init__(self) -> None:
        if self.from_step is not None and self.from_weight is None:
            raise ValueError("from_step says which checkpoint of --from-weight; pass both or neither")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run of every phase can be told. A phase has other defaults, and options of its objective."""

    command: ClassVar[str]
    """What `mm-train` calls the phase, and what the run's record says."""
    dataset_kind: ClassVar[Kind]
    """The kind of dataset that it learns."""
    default_epochs: ClassVar[int] = 2
    """Times through the dataset where nobody says how long."""

    start: StartConfig = field(default_factory=StartConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: loop.RunConfig = field(default_factory=loop.RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


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

    start: StartConfig = field(default_factory=partial(StartConfig, from_weight="runs/pretrain"))
    data: DataConfig = field(default_factory=partial(DataConfig, layout="pad", seq_len=768))
    optim: OptimConfig = field(default_factory=partial(OptimConfig, learning_rate=1e-5))
    training: loop.RunConfig = field(
        default_factory=partial(loop.RunConfig, run=Path("runs/sft"), global_batch=16, micro_batch=16)
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

    start: StartConfig = field(default_factory=partial(StartConfig, from_weight="runs/sft"))
    data: DataConfig = field(default_factory=partial(DataConfig, layout="pad", seq_len=1024))
    objective: PreferenceOptions = field(default_factory=PreferenceOptions)
    optim: OptimConfig = field(default_factory=partial(OptimConfig, learning_rate=4e-8))
    training: loop.RunConfig = field(
        default_factory=partial(loop.RunConfig, run=Path("runs/dpo"), global_batch=4, micro_batch=4)
    )

    def __post_init__(self) -> None:
        if self.data.layout != "pad":
            raise ValueError(f"layout must be pad, a pair a window, not {self.data.layout}")


PHASE_OPTIONS: Mapping[str, type[RunOptions]] = {
    options.command: options for options in (PretrainOptions, SftOptions, DpoOptions)
}
"""The options of each phase, by what `mm-train` calls it."""

NEEDS_SEQUENTIAL = (
    "--resume-from needs --order sequential: in a shuffled order no place of a shard is a place of the run"
)


def window_options(data: DataConfig) -> dict[str, Any]:
    """Return the options of `open_windows` that a run learns with, and is measured with."""
    return {
        "layout": data.layout,
        "seq_len": data.seq_len,
        "long_documents": data.long_documents,
        "documents_apart": bool(data.document_mask),
    }
