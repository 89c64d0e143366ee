"""What a run can be told: the options that all phases share.

They are resolved once, when a run begins, and from then on they are what its `config.json` says.
"""

from dataclasses import Field, dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from minimind_data.windows.base import Layout
from minimind_data.windows.best_fit import LongDocuments
from minimind_train.batches.datasets import read_sources, source_texts
from minimind_train.model.config import ModelConfig
from minimind_train.model.lora import LoraConfig
from minimind_train.order.mixture import MixtureStage
from minimind_train.order.sample_order import OrderKind
from minimind_train.order.skips import Skips
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
    ] = None
    seq_len: Annotated[int, "Tokens in a window."] = 340
    order: Annotated[OrderKind, "shuffled anew in each epoch, or sequential as in the shards."] = "shuffled"
    shuffle_block: Annotated[
        int,
        "Neighbouring windows that stay together in the shuffle, for slow disks; 1 shuffles each on its own.",
    ] = 1
    resume_from: Annotated[
        str | None, "SHARD:OFFSET, a token; begin at the window that holds it. Needs --order sequential."
    ] = None
    skip_positions: Annotated[
        tuple[str, ...],
        "A:B, leave out the samples at positions A to B - 1 for good. Repeatable; with --resume, in addition to those before.",
    ] = ()
    mixture_stages: tuple[MixtureStage, ...] = field(default=(), metadata={"flag": False})
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
    ] = None
    from_step: Annotated[
        CheckpointChoice,
        "With --from-weight: the step of the checkpoint, or best; the newest whole one by default.",
        parse_step,
    ] = None
    from_sha256: str | None = field(default=None, metadata={"flag": False})
    """SHA-256 of the weights that the run began from, over names, shapes and bits; the same in whatever file they lie."""

    def __post_init__(self) -> None:
        if self.from_step is not None and self.from_weight is None:
            raise ValueError("from_step says which checkpoint of --from-weight; pass both or neither")


class PhaseConfig(Protocol):
    """What the options of every phase have; a phase composes them with its own."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def default_epochs(self) -> int:
        """Times through the dataset where nobody says how long."""
        ...

    @property
    def start(self) -> StartConfig:
        """From which weights it begins."""
        ...

    @property
    def lora(self) -> LoraConfig:
        """Whether adapters are learned in place of them."""
        ...

    @property
    def data(self) -> DataConfig:
        """What is learned."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""
        ...

    @property
    def optim(self) -> OptimConfig:
        """How the weights move."""
        ...

    @property
    def training(self) -> loop.RunConfig:
        """How long, how large, how often."""
        ...

    @property
    def validation(self) -> ValidationConfig:
        """On what the run is measured."""
        ...


ConfigT = TypeVar("ConfigT", bound=PhaseConfig)

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
