"""What a run reads: one dataset, or several as the parts of a mixture, opened, checked and cut in windows.

Which datasets, which windows and which order is in `options`. The weights of a mixture are in tokens, while it takes whole windows. So the
weight of a part is divided by the mean number of tokens in its windows, PAD left out. That number is the same for all parts in layout
concat, nearly so in pack, and very different in pad, where a window is a document.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from minimind_data.dataset.format import TokenizerInfo
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.reporting import Say
from minimind_data.tokenizer.loading import refuse_other_tokenizer
from minimind_data.windows.base import Windows
from minimind_data.windows.opening import open_windows
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.batches.options import DataOptions, DatasetSource, read_sources, window_options
from minimind_train.order.mixture import MixtureOrder, MixtureStage, Order, shares_of
from minimind_train.order.sample_order import OrderKind, SampleOrder


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

    def windows_and_order(
        self, data: DataOptions, *, seed: int, say: Say
    ) -> tuple[Windows | MixedWindows, Order]:
        """Return the windows that a run of these options reads, and their order.

        Raises:
            UserError: one of the datasets has no such window.
        """
        windows = self.windows(**window_options(data), say=say)
        order = self.order(
            windows, seed=seed, kind=data.order, block=data.shuffle_block, stages=data.mixture_stages
        )
        return windows, order

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
