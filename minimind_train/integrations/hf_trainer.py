"""Hugging Face's `Trainer` over our order of samples, resumed by arithmetic.

    windows = open_windows(ShardSet.open("data/mine"), layout="pack", seq_len=512, labels=True)
    order = SampleOrder(num_windows=len(windows), seed=42)
    trainer = OrderedTrainer(model=model, args=args, train_dataset=WindowDataset(windows), order=order)
    trainer.train(resume_from_checkpoint=True)

`Trainer` resumes by reading through the batches that are done, and counts them in batches of the current size: with another number of
devices or another batch size it continues at another sample. Here every checkpoint records its position in `trainer_state.json`, in samples,
and a resume starts there. An optimizer step takes the same samples however they are divided into devices, micro-batches and accumulation.

Differences from `Trainer`: a step is always a whole global batch and may reach from one epoch into the next. So a run of
E epochs ends with the step that takes the last sample of the E-th, filled up from the epoch after it. To `Trainer` the run is one
long epoch; what it logs as `epoch` is computed from the position, and what is due at the end of an epoch is done there. The sampler
divides the batches between the devices itself, so `accelerate`'s own division, `group_by_length` and the like have no effect.

No other module imports this one: it needs `transformers` and `accelerate` (the extra `hf`).
"""

import math
from pathlib import Path
from typing import Any

from torch import Generator, Tensor
from torch.utils.data import DataLoader, default_collate

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import DefaultFlowCallback, ExportableState
    from transformers.trainer_utils import get_last_checkpoint
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"minimind_train.integrations.hf_trainer needs {error.name}, which is not installed; pip install 'minimind-pipeline[hf]'",
        name=error.name,
    ) from None

from minimind_data.errors import UserError
from minimind_data.files import parse_json
from minimind_train.batches.torch_loader import ResumableBatchSampler
from minimind_train.order.mixture import Order
from minimind_train.order.skips import NO_SKIPS, Skips

__all__ = ["OrderedTrainer", "PlaceCallback"]


class OrderedTrainer(Trainer):  # type: ignore[misc]
    """`Trainer`, with an order of samples.

    Args:
        order: the order of the windows of `train_dataset`, whose samples are unshifted (`labels=True`) for the models of
            `transformers`.
        skips: positions that are left out.
        settings: those of `Trainer`. `max_steps` of `args` is the number of steps of the whole run; without it `num_train_epochs` says
            where it ends.

    Raises:
        UserError: the order belongs to another dataset, or the settings divide a batch in a way that an order of samples cannot follow.
    """

    def __init__(self, *, order: Order, skips: Skips = NO_SKIPS, **settings: Any) -> None:
        # All samples have the same length, so they are stacked and never padded.
        settings["data_collator"] = settings.get("data_collator") or default_collate
        settings["callbacks"] = [PlaceCallback(), *(settings.get("callbacks") or ())]
        super().__init__(**settings)
        args: TrainingArguments = self.args
        self._order = order
        self._skips = skips
        self._micro_batch = args.train_batch_size * args.world_size
        self._max_steps = args.max_steps
        self._sampler: _StepSampler | None = None
        if self.get_total_train_batch_size(args) != self._micro_batch * args.gradient_accumulation_steps:
            raise UserError(
                "the devices of a tensor, context or sequence parallel group share their samples, which an "
                "order of samples cannot follow",
                remedy="use data parallelism, FSDP included",
            )
        if len(self.train_dataset) != order.num_windows:
            raise UserError(
                f"the order has {order.num_windows:,} windows, train_dataset has {len(self.train_dataset):,}",
                remedy="make the order from the windows of that dataset",
            )
        if args.auto_find_batch_size:
            raise UserError(
                "auto_find_batch_size changes the samples of a step during the run",
                remedy="pass per_device_train_batch_size",
            )
        args.ignore_data_skip = True  # no batches are read to be skipped

    def train(self, resume_from_checkpoint: str | bool | None = None, **settings: Any) -> Any:
        """Train from the beginning, or from a checkpoint, as `Trainer.train` does.

        Raises:
            UserError: the checkpoint belongs to another order of samples, or records no position.
        """
        args: TrainingArguments = self.args
        folder = (
            get_last_checkpoint(args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        step, position = _position_of(Path(folder)) if folder else (0, None)
        self._sampler = _StepSampler(
            self._order,
            self._micro_batch,
            accumulation=args.gradient_accumulation_steps,
            first_step=step,
            rank=args.process_index,
            world_size=args.world_size,
            skips=self._skips,
        )
        if position:
            self._sampler.load_state_dict(position)
        if self._max_steps <= 0:
            end = math.ceil(args.num_train_epochs * self._order.num_windows)
            args.max_steps = step + self._sampler.steps_to(end)
        self._sampler.end_after_step(args.max_steps)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return this process's share of the remaining batches."""
        args: TrainingArguments = self.args
        assert self._sampler is not None
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            # Without it each start would draw a number from the random states that a checkpoint has just restored.
            generator=Generator(),
        )


class PlaceCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the position after each step, for the log and for `trainer_state.json`; `OrderedTrainer` adds it itself.

    Its own name, and that of its attribute, stand in checkpoints.
    """

    def __init__(self) -> None:
        self.place: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {"args": {}, "attributes": {"place": self.place}}

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - Trainer passes it
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **others: Any,
    ) -> None:
        """Note the position at which the run starts."""
        self._note_position(others["train_dataloader"].batch_sampler, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Note the position after a step; where an epoch ended in the step, ask for what is due then."""
        sampler: _StepSampler = others["train_dataloader"].batch_sampler
        epoch = self.place["position"] // sampler.order.num_windows
        self._note_position(sampler, state)
        # `Trainer` itself asks for what is due at the end of the run.
        if state.epoch >= epoch + 1 and state.global_step < state.max_steps:
            DefaultFlowCallback().on_epoch_end(args, state, control)

    def _note_position(self, sampler: "_StepSampler", state: TrainerState) -> None:
        self.place = sampler.state_after_step(state.global_step)
        state.epoch = self.place["position"] / sampler.order.num_windows


class _StepSampler(ResumableBatchSampler):
    """The micro-batches of a run, `accumulation` of them in a step, from step `first_step` on."""

    def __init__(
        self, order: Order, micro_batch: int, *, accumulation: int, first_step: int, **settings: Any
    ) -> None:
        super().__init__(order, micro_batch, **settings)
        self._accumulation = accumulation
        self._first_step = first_step
        self._last_step = first_step

    def __len__(self) -> int:
        """Return the number of micro-batches of the whole run, by which `Trainer` counts its progress."""
        return self._last_step * self._accumulation

    def steps_to(self, position: int) -> int:
        """Return how many steps it takes to train on everything before a position."""
        begin = self._next_start
        samples = self.skips.count(begin, max(begin, position))
        return -(-samples // (self.global_batch * self._accumulation))

    def end_after_step(self, step: int) -> None:
        """Set the last step of the run; where it is past already, the run ends at once."""
        self._last_step = max(step, self._first_step)
        batches = (self._last_step - self._first_step) * self._accumulation
        self.stop = self.skips.after(self._next_start, batches * self.global_batch)
        self._latest = self._iteration(self._next_start)

    def state_after_step(self, step: int) -> dict[str, Any]:
        """Return the position after a step of this run."""
        return self.state_after((step - self._first_step) * self._accumulation)


def _position_of(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Return the step and the position at which a checkpoint was taken.

    Raises:
        UserError: the checkpoint records none.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        content = parse_json(path.read_bytes())
        return int(content["global_step"]), content["stateful_callbacks"][PlaceCallback.__name__][
            "attributes"
        ]["place"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"records no position in the order of samples ({type(error).__name__}: {error})",
            where=path,
            remedy="resume a checkpoint that OrderedTrainer saved, or train from the beginning",
        ) from None
