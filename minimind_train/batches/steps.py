"""From windows and their order to the optimizer steps of our own loop.

One thread reads ahead, there are no worker processes (a batch is one gather from mapped files; handing it from process to process would
cost more), and what a `StepLoader` yields is an optimizer step.

The loader does not decide what has been learned: each step says which positions it holds, and the loop that completes the step saves the
one behind them.
"""

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_data.windows.base import WindowSource
from minimind_data.windows.read_ahead import ReadAhead
from minimind_train.batches.arrays import Arrays, num_targets
from minimind_train.batches.trimming import batches_of_like_lengths, trimmed
from minimind_train.order.sample_order import check_shares, rank_positions
from minimind_train.order.sample_range import SampleRange

_PLANNED_WINDOWS = 1024
"""A rank plans this many windows at once; and while windows come from a disk, it asks for those that it will need this much later."""


@dataclass(frozen=True, kw_only=True)
class BatchDivision:
    """How a global batch is divided: among ranks, and a rank's share into micro-batches."""

    global_batch: int
    """Samples in a step over all ranks."""
    micro_batch: int
    """The most samples of a rank in one forward pass."""
    rank: int = 0
    """Which of the ranks this is."""
    world_size: int = 1
    """How many ranks share a step."""

    def __post_init__(self) -> None:
        check_shares(self.global_batch, self.rank, self.world_size)
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, not {self.micro_batch}")

    def num_passes(self, num_samples: int) -> int:
        """Return how many micro-batches a rank's share of so many samples is cut into."""
        return -(-num_samples // self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank learns in one optimizer step.

    Attributes:
        start: the position before the step. The batch is made of the positions from here to `stop` that are not left out.
        stop: the position after its last, which is the one after the step.
        micro_batches: this rank's share, cut into tensors [micro_batch or less, seq_len], of fewer columns where they are trimmed. Where
            shares differ a rank may have one fewer than another, or none.
        padding_batch: where this rank has one fewer, one window that is computed and not learned: ranks that add up gradients must
            all make as many passes.
        num_targets: how many of this rank's targets are learned.
        num_terms: of how many terms the objective's sum over this rank's share is made; in pre-training, the targets.
        num_windows: samples of this rank's share.
        rows: of each row of the micro-batches, one after the other, its number in this rank's share; None where they are in its order.
    """

    start: int
    stop: int
    micro_batches: list[dict[str, Tensor]]
    num_targets: int
    num_terms: int
    num_windows: int
    padding_batch: dict[str, Tensor] | None = None
    rows: NDArray[np.intp] | None = None

    @property
    def num_tokens(self) -> int:
        """Positions of this rank's share that go through the model, PAD included."""
        return sum(
            tensor.numel()
            for micro_batch in self.micro_batches
            for name, tensor in micro_batch.items()
            if name.endswith("input_ids")
        )


@dataclass(frozen=True, kw_only=True)
class _StepPlan:
    """What one rank reads for one step."""

    start: int
    stop: int
    windows: NDArray[np.int64]
    padding: NDArray[np.int64]
    """The window of the padding batch; none where the rank makes as many passes as the others without one."""


class StepLoader:
    """The steps of a run, read ahead by one thread.

    Every iteration goes through the whole range; the last global batch may be short, so that no sample is lost. Which samples a step has
    depends on nothing but the range and the size of the global batch. Leaving the loop ends the thread; a `with` block does so at once
    and for certain, also when the loop is left by an exception.

    Args:
        windows: where samples are read.
        samples: which of them, in which order.
        division: of their global batches.
        device: where the tensors go. For CUDA they go by way of pinned memory, without waiting.
        prefetch: how many steps are kept ready.
        num_terms: how many terms the objective's sum over samples has; without it, their learned targets.
        trim: leave out the columns that change nothing, and put rows of like lengths into one micro-batch; see `trimming`.
    """

    def __init__(
        self,
        windows: WindowSource,
        samples: SampleRange,
        division: BatchDivision,
        *,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        num_terms: Callable[[Arrays], int] = num_targets,
        trim: bool = False,
    ) -> None:
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, not {prefetch}")
        if len(windows) != samples.order.num_windows:
            raise ValueError(
                f"the order is one of {samples.order.num_windows} windows, the dataset has {len(windows)}"
            )
        if windows.labels:
            raise ValueError("a step needs targets; open the windows with labels=False")
        self.windows = windows
        self.samples = samples
        self.division = division
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.num_terms = num_terms
        self.trim = trim
        self._ahead = ReadAhead(windows)
        self._steps_in_plan = max(1, _PLANNED_WINDOWS * division.world_size // division.global_batch)
        self._plans: dict[int, list[_StepPlan]] = {}
        # Weak, so that an iteration ends as soon as its loop has dropped it.
        self._iteration: weakref.ref[Generator[StepBatch, None, None]] | None = None

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._firsts())

    def __iter__(self) -> Iterator[StepBatch]:
        """Begin at `start`; an earlier iteration of this loader ends."""
        self.close()
        iteration = self._iterate()
        self._iteration = weakref.ref(iteration)
        return iteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, if one is running; the batch that it is reading is finished first."""
        iteration = self._iteration() if self._iteration else None
        if iteration is not None:
            iteration.close()

    def positions(self, batch: StepBatch) -> NDArray[np.int64]:
        """Return the positions of a step, those of all ranks; this rank's windows are every `world_size`-th of them from `rank` on."""
        step = replace(self.samples, start=batch.start, stop=batch.stop)
        return step.positions(np.arange(len(step), dtype=np.int64))

    def _iterate(self) -> Generator[StepBatch, None, None]:
        numbers = iter(range(len(self)))
        # One thread, so the steps are read one after the other. A future carries an exception to where the step is consumed.
        thread = ThreadPoolExecutor(1, thread_name_prefix="step-loader")
        try:
            steps = deque(thread.submit(self._read, number) for number in islice(numbers, self.prefetch))
            while steps:
                step = steps.popleft()
                steps.extend(thread.submit(self._read, number) for number in islice(numbers, 1))
                yield self._on_device(step.result())
        finally:
            thread.shutdown(cancel_futures=True)

    def _firsts(self) -> range:
        """The number of the first sample of each step."""
        return range(0, len(self.samples), self.division.global_batch)

    def _plan(self, number: int) -> _StepPlan:
        """What this rank reads for a step."""
        block, index = divmod(number, self._steps_in_plan)
        plans = self._plans.get(block)
        if plans is None:
            plans = self._plan_block(block)
            if len(self._plans) > 1:
                del self._plans[min(self._plans)]
            self._plans[block] = plans
        return plans[index]

    def _plan_block(self, block: int) -> list[_StepPlan]:
        """Plan many steps at once: numpy takes as long for a few positions as for hundreds."""
        division, end = self.division, len(self.samples)
        steps = [
            (first, min(first + division.global_batch, end))
            for first in self._firsts()[block * self._steps_in_plan : (block + 1) * self._steps_in_plan]
        ]
        shares = [rank_positions(*step, division.rank, division.world_size) for step in steps]
        paddings = []
        for share, (first, last) in zip(shares, steps, strict=True):
            largest_share = -(-(last - first) // division.world_size)
            is_one_short = division.num_passes(len(share)) < division.num_passes(largest_share)
            paddings.append(np.arange(first, first + is_one_short))
        numbers = [*shares, *paddings]
        windows = self.samples.windows(np.concatenate(numbers))
        windows_of = np.split(windows, np.cumsum([len(each) for each in numbers])[:-1])
        return [
            _StepPlan(
                start=self.samples.position_after(first),
                stop=self.samples.position_after(last),
                windows=own,
                padding=padding,
            )
            for (first, last), own, padding in zip(
                steps, windows_of[: len(steps)], windows_of[len(steps) :], strict=True
            )
        ]

    def _read(self, number: int) -> StepBatch:
        """Read one step; runs in the thread."""
        plan = self._plan(number)
        padding_batch = None
        if plan.padding.size:
            padding = self.windows.fetch(plan.padding)
            padding_batch = self._tensors(trimmed(padding) if self.trim else padding)
        if not plan.windows.size:
            return StepBatch(
                start=plan.start,
                stop=plan.stop,
                micro_batches=[],
                num_targets=0,
                num_terms=0,
                num_windows=0,
                padding_batch=padding_batch,
            )

        def windows_later() -> NDArray[np.int64]:
            later = number + self._steps_in_plan
            return self._plan(later).windows if later < len(self) else np.empty(0, np.int64)

        arrays = self._ahead.fetch(plan.windows, windows_later)
        rows, size = None, self.division.micro_batch
        if self.trim:
            pieces = list(batches_of_like_lengths(arrays, size))
            rows = np.concatenate([own_rows for own_rows, _ in pieces])
            micro_batches = [self._tensors(piece) for _, piece in pieces]
        else:
            micro_batches = [
                self._tensors({name: array[first : first + size] for name, array in arrays.items()})
                for first in range(0, len(plan.windows), size)
            ]
        return StepBatch(
            start=plan.start,
            stop=plan.stop,
            micro_batches=micro_batches,
            num_targets=num_targets(arrays),
            num_terms=self.num_terms(arrays),
            num_windows=len(plan.windows),
            padding_batch=padding_batch,
            rows=rows,
        )

    def _tensors(self, arrays: Arrays) -> dict[str, Tensor]:
        """Make tensors that a device can take."""
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def _on_device(self, step: StepBatch) -> StepBatch:
        """Send a step to the device; called by the consumer, so that the kernels on its stream wait for the copies."""

        def send(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

        return replace(
            step,
            micro_batches=[send(batch) for batch in step.micro_batches],
            padding_batch=None if step.padding_batch is None else send(step.padding_batch),
        )
