"""What a run reads: one dataset, or several as the parts of a mixture, opened, checked and cut in windows.

    --shards data/mine                                          one dataset
    --shards zh=data/zh:0.7 --shards en=data/en:0.3             NAME=DIR:WEIGHT, the parts of a mixture

Weights are in tokens, while a mixture takes whole windows. So the weight of a part is divided by the mean number of tokens in its windows,
PAD left out. That number is the same for all parts in layout concat, nearly so in pack, and very different in pad, where a window is a
document.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.reporting import Say
from minimind_data.tokenizer.loading import refuse_other_tokenizer
from minimind_data.windows.base import Windows
from minimind_data.windows.opening import open_windows
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.order.mixture import MAX_PARTS, MixtureOrder, MixtureStage, Order, shares_of
from minimind_train.order.sample_order import OrderKind, SampleOrder
from minimind_train.order.skips import Skips

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
    """Read the values of `--shards`: one DIR, or NAME=DIR:WEIGHT each; sorted by name.

    Raises:
        ValueError: it is neither; the message says what one looks like.
    """
    if len(texts) == 1 and not _MIXED.fullmatch(texts[0]):
        return (DatasetSource(name="", folder=Path(texts[0])),)
    sources = sorted(map(_read_source, texts), key=lambda source: source.name)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`shards`: two parts are named {name}; give each a name of its own")
    if not 1 <= len(sources) <= MAX_PARTS:
        raise ValueError(f"`shards`: a mixture has 1 to {MAX_PARTS} parts, not {len(sources)}")
    if not any(source.weight for source in sources):
        raise ValueError("`shards`: every weight is 0, so there is nothing to learn; give one part a weight")
    return tuple(sources)


def source_texts(shards: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Return the values of `--shards`, one a dataset, of an option that holds one string or path, or several."""
    return (str(shards),) if isinstance(shards, str | Path) else tuple(shards)


def _read_source(text: str) -> DatasetSource:
    match = _MIXED.fullmatch(text)
    if not match or not _NAME.fullmatch(match["name"]):
        raise ValueError(
            f"`shards`: a part of a mixture is NAME=DIR:WEIGHT, such as zh=data/zh:0.7, not {text!r}"
        )
    try:
        weight = Fraction(match["weight"])
    except (ValueError, ZeroDivisionError):
        weight = Fraction(-1)
    if not 0 <= weight <= 10**12 or weight.denominator > 10**12:
        raise ValueError(
            f"`shards` {text}: the weight is a number from 0 to 10^12 with at most 12 decimals, such as 0.7 or 1/3, "
            f"not {match['weight']!r}"
        )
    return DatasetSource(name=match["name"], folder=Path(match["folder"]), weight=weight)


class Datasets:
    """The datasets of a run, opened: one, or the parts of a mixture.

    Attributes:
        sources: their names and folders, sorted by name.
        sets: the opened datasets, in the same order.
    """

    def __init__(self, sources: Sequence[DatasetSource], sets: Sequence[ShardSet]) -> None:
        self.sources = tuple(sources)
        self.sets = tuple(sets)

    @classmethod
    def open(cls, texts: Sequence[str]) -> Self:
        """Open the datasets that the values of `--shards` name.

        Raises:
            ValueError: a value is neither DIR nor NAME=DIR:WEIGHT.
            FormatError: a folder is no dataset, or damaged.
            UserError: the parts have different tokenizers.
        """
        sources = read_sources(texts)
        datasets = cls(sources, [ShardSet.open(source.folder) for source in sources])
        first = datasets.sets[0]
        for other in datasets.sets[1:]:
            refuse_other_tokenizer(
                (first.folder, first.manifest.tokenizer),
                (other.folder, other.manifest.tokenizer),
                why="the parts of a mixture share one",
            )
        return datasets

    @property
    def mixed(self) -> bool:
        """Whether these are the parts of a mixture."""
        return bool(self.sources[0].name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(source.name for source in self.sources)

    @property
    def folder(self) -> Path:
        """A folder that has the tokenizer."""
        return self.sets[0].folder

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer of all of them."""
        return self.sets[0].manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        """What names the tokens: the dataset's fingerprint, or NAME=FINGERPRINT of each part."""
        prints = [shards.manifest.fingerprint for shards in self.sets]
        if not self.mixed:
            return prints[0]
        return " ".join(f"{name}={each}" for name, each in zip(self.names, prints, strict=True))

    def resolved(self) -> tuple[str, ...]:
        """Return values of `--shards` that open the same datasets from any working directory."""
        resolved = (
            DatasetSource(name=source.name, folder=source.folder.resolve(), weight=source.weight)
            for source in self.sources
        )
        return tuple(map(str, resolved))

    def windows(self, *, say: Say, **options: Any) -> Windows | MixedWindows:
        """Return their windows; `options` are those of `open_windows`.

        Raises:
            UserError: one of them has no such window.
        """
        parts = [open_windows(shards, say=say, **options) for shards in self.sets]
        return MixedWindows(self.names, parts) if self.mixed else parts[0]

    def shares(self, windows: MixedWindows) -> tuple[int, ...]:
        """Return the share of each part, in windows of a period, by its weight in tokens."""
        return shares_of(
            [
                source.weight * len(part) / max(1, part.num_places - part.padding)
                for source, part in zip(self.sources, windows.parts, strict=True)
            ]
        )

    def order(
        self,
        windows: Windows | MixedWindows,
        *,
        seed: int,
        kind: OrderKind,
        block: int = 1,
        stages: Sequence[MixtureStage] = (),
    ) -> Order:
        """Return the order of their windows; of a mixture without `stages`, by its weights from the first position on."""
        if not isinstance(windows, MixedWindows):
            return SampleOrder(num_windows=len(windows), seed=seed, kind=kind, block=block)
        if not stages:
            shares = self.shares(windows)
            stages = [MixtureStage(start=0, shares=shares, taken=(0,) * len(shares))]
        sizes = dict(zip(self.names, map(len, windows.parts), strict=True))
        return MixtureOrder.of(sizes, seed=seed, kind=kind, block=block, stages=stages)


def shown_weights(sources: Sequence[DatasetSource]) -> str:
    """Return the weights, each as its share of all of them, so that 7 and 3 are 0.7 and 0.3."""
    total = sum(source.weight for source in sources)
    return " ".join(f"{source.name}={float(source.weight / total):.6g}" for source in sources)


def data_of_run(options: Mapping[str, Any], say: Say) -> tuple[Windows | MixedWindows, Order, Skips]:
    """Return what a run reads, in which order, and what it leaves out, from the options in its record.

    Raises:
        UserError: a dataset is not where it was.
    """
    datasets = Datasets.open(source_texts(options["shards"]))
    cut = {name: options[name] for name in ("layout", "seq_len", "long_documents") if name in options}
    windows = datasets.windows(say=say, **cut)
    order = datasets.order(
        windows,
        seed=options["seed"],
        kind=options["order"],
        block=options.get("shuffle_block", 1),
        stages=[MixtureStage.of(values) for values in options.get("mixture_stages", ())],
    )
    return windows, order, Skips.of(options.get("skip_positions", ()))
