"""The data of a run: its windows, their order, the positions at which the run begins and ends, and its validation.

Everything here is arithmetic on the position and the options; nothing is learned or saved. Opening datasets is in
`batches.datasets`, reading batches in `batches.steps`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import refuse_other_tokenizer
from minimind_train.batches.datasets import Datasets, shown_weights
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.batches.options import NEEDS_SEQUENTIAL, window_options
from minimind_train.batches.positions import epochs_of, mixture_lines
from minimind_train.order.mixture import MixtureOrder, MixtureStage
from minimind_train.order.skips import Skips
from minimind_train.progress import Say
from minimind_train.run.options import RunOptions
from minimind_train.training.evaluate import Evaluator, open_evaluator
from minimind_train.training.learner import Compute

__all__ = ["RunData"]


class RunData:
    """The windows of a run, their order, and its begin and end in them.

    Args:
        options: the run's resolved options.
        datasets: the opened dataset, or those of a mixture.
        say: takes lines for the user.

    Attributes:
        windows: the windows of the dataset, or of all parts.
        order: which window stands at which position.
        skips: the positions that are left out.

    Raises:
        UserError: the dataset, or a part of the mixture, has no window, or nothing is learned in any of them.
    """

    def __init__(self, options: RunOptions, datasets: Datasets, say: Say) -> None:
        self._datasets = datasets
        self._say = say
        self._data, self._training = options.data, options.training
        self.skips = Skips.of(options.data.skip_positions)
        self._validation = options.validation
        self.windows, self.order = datasets.windows_and_order(
            options.data, seed=options.training.seed, say=say
        )
        self._refuse_nothing_to_learn()

    @property
    def stages(self) -> tuple[MixtureStage, ...]:
        """The shares of the parts of a mixture, and from which position on."""
        return self.order.stages if isinstance(self.order, MixtureOrder) else ()

    def first_position(self) -> int:
        """Return the position at which a new run begins.

        Raises:
            UserError: there is no such token, or nothing to learn from there on.
        """
        token = self._data.resume_from
        first = self.position_of(token, near=0) if token else 0
        if not self.end(0, first)[1]:
            raise UserError(
                "`skip_positions` leaves out all that the run would learn",
                remedy="leave less out",
                option="skip_positions",
            )
        return first

    def position_of(self, token: str, *, near: int) -> int:
        """Return the position of the window that holds the token SHARD:OFFSET, in the epoch of the position `near`.

        Raises:
            UserError: the order is not sequential, or there is no such token.
        """
        if self._data.order != "sequential":
            raise UserError(NEEDS_SEQUENTIAL)
        if isinstance(self.order, MixtureOrder) or isinstance(self.windows, MixedWindows):
            raise UserError(
                "`resume_from` needs one dataset: the parts of a mixture are at many tokens at once",
                option="resume_from",
            )
        shard, _, offset = token.rpartition(":")
        window = self.windows.window_of(shard, int(offset))
        begin_shard, begin = self.windows.locate(window)
        self._say(f"beginning at window {window}, which begins at {begin_shard}:{begin} and holds {token}")
        return self.order.position_of(window, near // len(self.windows))

    def reweight(self, position: int) -> None:
        """Let the weights of `shards` hold from a position on, where every part goes on from its own."""
        assert isinstance(self.order, MixtureOrder)
        assert isinstance(self.windows, MixedWindows)
        self.order = self.order.reweighted(position, self._datasets.shares(self.windows))

    def end(self, step: int, position: int) -> tuple[int, int]:
        """Return the position at which the run ends and the steps of the whole run, as seen from a step and its position."""
        training = self._training
        if training.steps is not None:
            steps_left = max(0, training.steps - step)
            return self.skips.after(position, steps_left * training.global_batch), training.steps
        assert training.epochs is not None  # since the options are resolved
        end = training.epochs * len(self.windows)
        return end, step + -(-self.skips.count(position, end) // training.global_batch)

    def describe(self, position: int) -> dict[str, Any]:
        """Return what metrics say of a position: the epoch of the sample before it and, in sequential order, the token that comes next.

        An epoch of a mixture is as many samples as all parts have windows; `epochs` counts those of each part.
        """
        details: dict[str, Any] = {"epoch": max(0, position - 1) // len(self.windows)}
        if isinstance(self.order, MixtureOrder):
            details["epochs"] = epochs_of(self.order, position)
        elif self._data.order == "sequential":
            _, window = self.order.window(position)
            details["shard"], details["offset"] = self.windows.locate(window)
        return details

    def evaluator(self, compute: Compute) -> Evaluator | None:
        """Return what evaluates a model on `val_shards`, or None where the run has none.

        Raises:
            UserError: there is no such dataset, or it has another kind, another tokenizer or no text.
        """
        if not self._validation.val_shards:
            return None
        shards = ShardSet.open(self._as_datasets_are_named(Path(self._validation.val_shards)))
        kind, kind_learned = shards.manifest.kind, self._datasets.sets[0].manifest.kind
        if kind != kind_learned:
            raise UserError(
                f"a dataset of kind {kind}, and the run learns kind {kind_learned}",
                where=shards.folder,
                remedy=f"take one of kind {kind_learned} for `val_shards`",
                option="val_shards",
            )
        refuse_other_tokenizer(
            (self._datasets.folder, self._datasets.tokenizer),
            (shards.folder, shards.manifest.tokenizer),
            why="a model is measured with its own",
        )
        if shards.manifest.fingerprint in {each.manifest.fingerprint for each in self._datasets.sets}:
            self._say(f"{shards.folder}: is learned too, so what `val_shards` measures is memory")
        training = self._training
        return open_evaluator(
            shards,
            num_windows=self._validation.val_batches * training.global_batch or None,
            batch_size=training.micro_batch,
            compute=compute,
            say=self._say,
            **window_options(self._data),
        )

    def _as_datasets_are_named(self, folder: Path) -> Path:
        """Return the folder of a dataset as the run's own are named: from the current folder, if they are and it lies in that."""
        here = Path.cwd()
        if any(source.folder.is_absolute() for source in self._datasets.sources):
            return folder
        return folder.relative_to(here) if folder.is_relative_to(here) else folder

    def _refuse_nothing_to_learn(self) -> None:
        """Refuse windows in which no token is learned; parts of a mixture with weight 0 do not count.

        Raises:
            UserError: there is no such token.
        """
        parts = self.windows.parts if isinstance(self.windows, MixedWindows) else [self.windows]
        learned = [part for part, source in zip(parts, self._datasets.sources, strict=True) if source.weight]
        if not any(part.any_learned() for part in learned):
            why = "all answers begin beyond their end, or the datasets mark none"
            if not any(part.shards.manifest.has_masks for part in learned):
                why = "no document has a token besides its EOS"
            raise UserError(
                f"in none of the {sum(map(len, learned)):,} windows of {self._data.seq_len} tokens is a token learned: {why}",
                where=" and ".join(str(part.shards.folder) for part in learned),
                remedy="take a longer `seq_len`, or check the datasets by `mm-data window`",
                option="seq_len",
            )

    def introduce(self, position: int) -> Sequence[str]:
        """Return lines that say which positions are left out and what a mixture consists of."""
        lines = [
            f"positions {first} to {stop - 1} are left out"
            + (f", but the run is at {position} and has been there" if stop <= position else "")
            for first, stop in self.skips.ranges
        ]
        if isinstance(self.order, MixtureOrder):
            lines += mixture_lines(self.order, position, shown_weights(self._datasets.sources))
        return lines
