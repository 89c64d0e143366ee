"""A run, the folder of a Hugging Face model or MiniMind's `.pth`, opened from Python: its model, its tokenizer, its options, and what it reads.

trained = open_run("runs/first")
"".join(trained.complete("The sky is"))
trained.windows[trained.order.window(40)[1]]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import Tokenizer
from minimind_data.windows.base import Windows
from minimind_train.batches.datasets import Datasets
from minimind_train.batches.mixed_windows import MixedWindows
from minimind_train.generation.chat_session import ChatSession, template_of
from minimind_train.generation.completion import continue_text
from minimind_train.generation.options import DEFAULTS, GenerateOptions
from minimind_train.model.transformer import MiniMind
from minimind_train.order.mixture import Order
from minimind_train.parallel.devices import resolve_device
from minimind_train.progress import Say, say_on_stderr
from minimind_train.run.options import RunOptions, options_of
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.run_folder.places import with_present_places
from minimind_train.run_folder.record import RunRecord
from minimind_train.weights.loading import open_model

__all__ = ["OpenRun", "open_run"]


@dataclass(frozen=True, kw_only=True, repr=False)
class OpenRun:
    """A trained model and where it comes from; `open_run` makes it."""

    folder: Path
    """Of the run or model, or the file of its weights."""
    model: MiniMind
    """In evaluation mode, where it is to compute."""
    tokenizer: Tokenizer
    options: RunOptions | None
    """Of the run; None for weights that are no run's."""
    step: int | None
    """Of the checkpoint; None for weights that are no run's."""
    tokenizer_folder: Path
    """The folder with the tokenizer and, where there is one, its chat template."""

    def complete(self, prompt: str, options: GenerateOptions = DEFAULTS) -> Iterator[str]:
        """Yield what the model generates after a text, piece by piece.

        Raises:
            UserError: the prompt is empty, or too long for the model.
        """
        return continue_text(self.model, self.tokenizer, prompt, options)

    def chat(self, options: GenerateOptions = DEFAULTS, *, system: str | None = None) -> ChatSession:
        """Begin a chat with the model, by the template of its tokenizer.

        Raises:
            UserError: there is none.
        """
        return ChatSession(self.model, self.tokenizer, template_of(self.tokenizer_folder), options, system)

    @property
    def windows(self) -> Windows | MixedWindows:
        """The windows that the run reads.

        Raises:
            UserError: it is no run, or its dataset is not where it was.
        """
        return self._reading[0]

    @property
    def order(self) -> Order:
        """Which of them stands at which position.

        Raises:
            UserError: as `windows`.
        """
        return self._reading[1]

    @cached_property
    def _reading(self) -> tuple[Windows | MixedWindows, Order]:
        if self.options is None:
            raise UserError("is no run, so it reads nothing", where=self.folder)
        record = with_present_places(
            RunRecord.read(self.folder), self.folder, say_on_stderr, names=("shards",)
        )
        data, seed = options_of(record, self.folder).data, self.options.training.seed
        return Datasets.open(data.shards).windows_and_order(data, seed=seed, say=say_on_stderr)

    def __repr__(self) -> str:
        if self.options is not None:
            kind = f"{self.options.command}, step {self.step}"
        else:
            kind = "file of weights" if self.folder.is_file() else "Hugging Face model"
        num_parameters = sum(weight.numel() for weight in self.model.parameters())
        return f"OpenRun({str(self.folder)!r}: {kind}, {num_parameters / 1e6:,.2f} M parameters, {self.tokenizer!r})"


def open_run(
    folder: Path | str,
    *,
    checkpoint: CheckpointChoice = None,
    device: str = "auto",
    changes: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: Path | str | None = None,
    lora: Path | str | None = None,
    say: Say = say_on_stderr,
) -> OpenRun:
    """Open a run, which may still be training, the folder of a Hugging Face model, or a file of weights such as MiniMind's `.pth`.

    Args:
        folder: of the run or model, or the file.
        checkpoint: of a run, the step of one, or `best`; the newest whole one by default.
        device: where the model is to compute.
        changes: options of the model: those that are to differ, such as those of its positions, or that a `.pth` does not tell.
        tokenizer: of weights that are no run's, where it is not beside them or MiniMind's own.
        lora: a file of MiniMind's adapters, which are merged into the weights.
        say: called with a sentence about each damaged checkpoint, and on what a `.pth` was taken for.

    Raises:
        UserError: there is no such model or checkpoint.
    """
    folder = Path(folder)
    trained = open_model(folder, step=checkpoint, say=say, changes=changes, tokenizer=tokenizer, lora=lora)
    return OpenRun(
        folder=folder,
        model=trained.model.to(resolve_device(device)),
        tokenizer=trained.tokenizer,
        options=options_of(trained.record, folder) if trained.record else None,
        step=trained.step,
        tokenizer_folder=trained.tokenizer_folder,
    )
