"""From windows and an order to the optimizer steps of our own loop.

One thread reads ahead, there are no worker processes (a batch is one gather from mapped files; handing it from process to process would
cost more), and what a `StepLoader` yields is an optimizer step.

All count in positions (see `minimind_train.order.sample_order`). The loader does not decide what has been learned: each step says which positions it
holds, and the loop that completes a step knows the position.
"""

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_data.windows.base import WindowSource
from minimind_data.windows.read_ahead import ReadAhead
from minimind_train.batches.samples import num_targets
from minimind_train.batches.trimming import alike, trimmed
from minimind_train.order.mixture import Order
from minimind_train.order.sample_order import check_range, check_shares, rank_positions
from minimind_train.order.skips import NO_SKIPS, Skips

_PLANNED_WINDOWS = 1024
"""Of a rank: so many are put in order at once; and so far behind a step is the one that is asked for beside it, while windows come from a
disk."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank learns in one optimizer step.

    Attributes:
        start: the position before the step. The batch is made of the positions from here to `stop` that are not left out.
        stop: the position behind its last: the position after the step.
        micro_batches: this rank's share, cut into tensors [micro_batch or less, seq_len], of fewer columns where they are trimmed. Where
            shares differ a rank may have one fewer than another, or none.
        stand_in: where this rank has one fewer, a micro-batch of one window in its place, which is not learned: ranks that add up
            gradients must all make as many passes.
        num_targets: how many of this rank's targets are learned.
        num_terms: of how many terms the objective's sum over this rank's share is made; in pre-training, the targets.
        num_windows: samples of this rank's share.
        rows: where the rows of the micro-batches, one after the other, stand in this rank's share; None where they are in its order.
    """

    start: int
    stop: int
    micro_batches: list[dict[str, Tensor]]
    num_targets: int
    num_terms: int
    num_windows: int
    stand_in: dict[str, Tensor] | None = None
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
class _Share:
    """What one rank reads for one step: windows, and none or one for a stand-in."""

    start: int
    stop: int
    windows: NDArray[np.int64]
    stand_in: NDArray[np.int64]


class StepLoader:
    """The steps of a run, read ahead by one thread.

    Every iteration begins at `start` and ends at `stop`; the last global batch may be short, so that no sample is lost. Which samples
    a step has depends on nothing but the order, `start` and `global_batch`. Leaving the loop ends the thread; a `with` block does so
    at once and for certain, also when the loop is left by an exception.

    Args:
        windows: where samples are read.
        order: which sample comes when.
        start: the position to begin at.
        stop: the position to end at.
        global_batch: samples in a step over all ranks.
        micro_batch: the most samples of a rank in one forward pass.
        rank: which of the ranks this is.
        world_size: how many ranks share a step.
        device: where the tensors go. For CUDA they go by way of pinned memory, without waiting.
        prefetch: how many steps are kept ready.
        skips: positions that are left out.
        num_terms: how many terms the objective's sum over samples has; without it, their learned targets.
        trim: leave out the columns that change nothing, and put rows of like lengths into one micro-batch; see `trimming`.
    """

    def __init__(
        self,
        windows: WindowSource,
        order: Order,
        *,
        start: int,
        stop: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        skips: Skips = NO_SKIPS,
        num_terms: Callable[[Mapping[str, NDArray[np.int64]]], int] | None = None,
        trim: bool = False,
    ) -> None:
        check_shares(global_batch, rank, world_size)
        check_range(start, stop)
        if micro_batch < 1 or prefetch < 1:
            raise ValueError(f"micro_batch and prefetch must be at least 1, not {micro_batch} and {prefetch}")
        if len(windows) != order.num_windows:
            raise ValueError(
                f"the order is one of {order.num_windows} windows, the dataset has {len(windows)}"
            )
        if windows.labels:
            raise ValueError("a step needs targets; open the windows with labels=False")
        self.windows = windows
        self.order = order
        self.start = start
        self.stop = stop
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.skips = skips
        self.num_terms = num_terms or num_targets
        self.trim = trim
        self._ahead = ReadAhead(windows)
        self._planned_steps = max(1, _PLANNED_WINDOWS * world_size // global_batch)
        self._planned: dict[int, list[_Share]] = {}
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
        self._iteration = None

    def positions(self, batch: StepBatch) -> NDArray[np.int64]:
        """Return the positions of a step, those of all ranks; this rank's windows are every `world_size`-th of them from `rank` on."""
        first, last = (self.skips.kept_before(position) for position in (batch.start, batch.stop))
        return self.skips.kept(np.arange(first, last, dtype=np.int64))

    def _iterate(self) -> Generator[StepBatch, None, None]:
        numbers = iter(range(len(self)))
        # One thread, so the steps are read one after the other. A future carries an exception to where the step is consumed.
        thread = ThreadPoolExecutor(1, thread_name_prefix="step-loader")
        try:
            steps = deque(thread.submit(self._read, number) for number in islice(numbers, 1))
            wait(steps)  # The first step is what a run waits for, so nothing is read beside it.
            steps.extend(thread.submit(self._read, number) for number in islice(numbers, self.prefetch - 1))
            while steps:
                step = steps.popleft()
                steps.extend(thread.submit(self._read, number) for number in islice(numbers, 1))
                yield self._on_device(step.result())
        finally:
            thread.shutdown(cancel_futures=True)

    def _firsts(self) -> range:
        """The first sample of each step, by its number among the positions that are kept."""
        return range(self.skips.kept_before(self.start), self.skips.kept_before(self.stop), self.global_batch)

    def _share(self, number: int) -> _Share:
        """What this rank reads for a step."""
        block, index = divmod(number, self._planned_steps)
        shares = self._planned.get(block)
        if shares is None:
            shares = self._plan(block)
            if len(self._planned) > 1:
                del self._planned[min(self._planned)]
            self._planned[block] = shares
        return shares[index]

    def _plan(self, block: int) -> list[_Share]:
        """Put many steps in order at once: numpy takes as long for a few positions as for hundreds."""
        firsts, end = self._firsts(), self._firsts().stop
        steps = [
            (first, min(first + self.global_batch, end))
            for first in firsts[block * self._planned_steps : (block + 1) * self._planned_steps]
        ]
        numbers = [rank_positions(first, last, self.rank, self.world_size) for first, last in steps]
        for own, (first, last) in zip(numbers[:], steps, strict=True):
            most = -(-(last - first) // self.world_size)
            is_one_fewer = -(-len(own) // self.micro_batch) < -(-most // self.micro_batch)
            numbers.append(np.arange(first, first + is_one_fewer))
        windows = self.order.windows(self.skips.kept(np.concatenate(numbers)))
        parts = np.split(windows, np.cumsum([len(part) for part in numbers])[:-1])
        return [
            _Share(
                start=self.skips.after(self.start, first - firsts.start),
                stop=self.skips.after(self.start, last - firsts.start),
                windows=own,
                stand_in=stand_in,
            )
            for (first, last), own, stand_in in zip(
                steps, parts[: len(steps)], parts[len(steps) :], strict=True
            )
        ]

    def _read(self, number: int) -> StepBatch:
        """Read one step; runs in the thread."""
        share = self._share(number)
        stand_in = None
        if share.stand_in.size:
            found = self.windows.fetch(share.stand_in)
            stand_in = self._tensors(trimmed(found) if self.trim else found)
        if not share.windows.size:
            nothing: dict[str, Any] = {
                "micro_batches": [],
                "num_targets": 0,
                "num_terms": 0,
                "num_windows": 0,
            }
            return StepBatch(start=share.start, stop=share.stop, stand_in=stand_in, **nothing)

        def later() -> NDArray[np.int64]:
            beyond = number + self._planned_steps
            return self._share(beyond).windows if beyond < len(self) else np.empty(0, np.int64)

        arrays = self._ahead.fetch(share.windows, later)
        rows = None
        if self.trim:
            cut = list(alike(arrays, self.micro_batch))
            rows = np.concatenate([own for own, _ in cut])
            micro_batches = [self._tensors(batch) for _, batch in cut]
        else:
            firsts = range(0, len(share.windows), self.micro_batch)
            micro_batches = [
                self._tensors(
                    {name: array[first : first + self.micro_batch] for name, array in arrays.items()}
                )
                for first in firsts
            ]
        return StepBatch(
            start=share.start,
            stop=share.stop,
            micro_batches=micro_batches,
            num_targets=(targets := num_targets(arrays)),
            num_terms=targets if self.num_terms is num_targets else self.num_terms(arrays),
            num_windows=len(share.windows),
            stand_in=stand_in,
            rows=rows,
        )

    def _tensors(self, arrays: dict[str, NDArray[np.int64]]) -> dict[str, Tensor]:
        """Make tensors that a device can take."""
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def _on_device(self, step: StepBatch) -> StepBatch:
        """Send a step to the device; called by the consumer, so that the kernels on its stream wait for the copies."""

        def sent(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

        stand_in = None if step.stand_in is None else sent(step.stand_in)
        return replace(step, micro_batches=[sent(batch) for batch in step.micro_batches], stand_in=stand_in)
