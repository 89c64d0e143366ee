"""What a run reads: datasets, cut in windows, in an order. Imports no torch.

    --shards data/mine                                          one dataset
    --shards zh=data/zh:0.7 --shards en=data/en:0.3             NAME=DIR:WEIGHT, the parts of a mixture

The datasets themselves are opened in `datasets`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from minimind_data.windows.base import Layout, LongDocuments
from minimind_train.order.mixture import MAX_PARTS, MixtureStage
from minimind_train.order.sample_order import OrderKind
from minimind_train.order.skips import Skips
from minimind_train.resume_policy import Before, Resume

NEEDS_SEQUENTIAL = "`resume_from` needs `order` sequential: in a shuffled order a token does not say how far the run has come"

_MIXED = re.compile(r"(?P<name>[^=:/\\]*)=(?P<folder>.+):(?P<weight>[^:]*)", re.DOTALL)
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A dataset as the command line names it."""

    name: str
    """Name of the part; empty for a dataset that is no part of a mixture."""
    folder: Path
    weight: Fraction = Fraction(1)
    """In tokens, against those of the other parts."""

    def __str__(self) -> str:
        return f"{self.name}={self.folder}:{self.weight}" if self.name else str(self.folder)


def read_sources(texts: Sequence[str]) -> tuple[DatasetSource, ...]:
    """Read the values of `shards`: one DIR, or NAME=DIR:WEIGHT each; sorted by name.

    Raises:
        ValueError: it is neither; the message says what one looks like.
    """
    if len(texts) == 1 and not _MIXED.fullmatch(texts[0]):
        return (DatasetSource(name="", folder=Path(texts[0])),)
    sources = sorted(map(_read_source, texts), key=lambda source: source.name)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two parts are named {name}; give each a name of its own")
    if not 1 <= len(sources) <= MAX_PARTS:
        raise ValueError(f"a mixture has 1 to {MAX_PARTS} parts, not {len(sources)}")
    if not any(source.weight for source in sources):
        raise ValueError("every weight is 0, so there is nothing to learn; give one part a weight")
    return tuple(sources)


def source_texts(shards: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Return the values of `shards`, one a dataset, of an option that holds one string or path, or several."""
    return (str(shards),) if isinstance(shards, str | Path) else tuple(shards)


def _read_source(text: str) -> DatasetSource:
    match = _MIXED.fullmatch(text)
    if not match or not _NAME.fullmatch(match["name"]):
        raise ValueError(f"a part of a mixture is NAME=DIR:WEIGHT, such as zh=data/zh:0.7, not {text!r}")
    try:
        weight = Fraction(match["weight"])
    except (ValueError, ZeroDivisionError):
        weight = Fraction(-1)
    if not 0 <= weight <= 10**12 or weight.denominator > 10**12:
        raise ValueError(
            f"{text}: the weight is a number from 0 to 10^12 with at most 12 decimals, such as 0.7 or 1/3, "
            f"not {match['weight']!r}"
        )
    return DatasetSource(name=match["name"], folder=Path(match["folder"]), weight=weight)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which datasets are read."""

    shards: Annotated[
        tuple[str, ...],
        "DIR: a dataset made by mm-data tokenize. For a mixture, repeat NAME=DIR:WEIGHT; weights are "
        "shares of the tokens.",
        Resume.FREE,
    ] = ("data",)


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How datasets are cut in windows."""

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


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """Which window comes when."""

    order: Annotated[OrderKind, "shuffled: a new shuffle in each epoch; sequential: as in the shards."] = (
        "shuffled"
    )
    shuffle_block: Annotated[
        int,
        "Number of neighbouring windows that stay together in the shuffle, for slow disks; 1 shuffles "
        "single windows.",
    ] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shuffle_block <= 2**40:
            raise ValueError(f"`shuffle_block` must be from 1 to 2^40 windows, not {self.shuffle_block}")


@dataclass(frozen=True, kw_only=True)
class DataOptions(OrderOptions, WindowOptions, SourceOptions):
    """What is learned, cut in which windows, in which order."""

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
        super().__post_init__()
        object.__setattr__(self, "shards", source_texts(self.shards))
        try:
            read_sources(self.shards)
        except ValueError as error:
            raise ValueError(f"`shards`: {error}") from None
        object.__setattr__(self, "skip_positions", Skips.of(self.skip_positions).as_texts())
        if self.seq_len < 1:
            raise ValueError(f"`seq_len` must be at least 1, not {self.seq_len}")
        if self.resume_from is not None:
            shard, _, offset = self.resume_from.rpartition(":")
            if not shard or not offset.isdecimal():
                raise ValueError(
                    f"`resume_from` must be SHARD:OFFSET, such as text-00000:4096, not {self.resume_from!r}"
                )


def window_options(options: WindowOptions) -> dict[str, Any]:
    """Return the options of `open_windows` that a run learns with, and is measured with."""
    return {
        "layout": options.layout,
        "seq_len": options.seq_len,
        "long_documents": options.long_documents,
        "documents_apart": bool(options.document_mask),
    }
