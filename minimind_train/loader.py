"""From windows and an order to batches: for our own loop, and for anybody's DataLoader.

`StepLoader` is what the training loop uses: one thread reads ahead, there are no worker processes (a batch is one gather from
mapped files; handing it from process to process would cost more), and what it yields is an optimizer step.

`WindowDataset` and `ResumableBatchSampler` are the same data and the same order for a loop that brings its own
`torch.utils.data.DataLoader`, or torchdata's `StatefulDataLoader`.

All count in positions (see `minimind_train.sampler`). No loader decides what has been learned: each batch says which positions it
holds, and the loop that completes a step moves the cursor.
"""

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from minimind_data.errors import UserError
from minimind_data.windows import IGNORED
from minimind_train.parts import Order, Samples
from minimind_train.sampler import rank_positions
from minimind_train.skips import NO_SKIPS, Skips

__all__ = ["ResumableBatchSampler", "StepBatch", "StepLoader", "WindowDataset", "num_targets"]


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows as a map-style dataset; a sample is a dict of int64 tensors [seq_len].

    A `ShardSet` pickles as its folder's name, so a worker started by `spawn` maps the files for itself.
    """

    def __init__(self, windows: Samples) -> None:
        self.windows = windows

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        """Return one window."""
        return self.__getitems__([window])[0]

    def __getitems__(self, windows: list[int]) -> list[dict[str, Tensor]]:
        """Return many windows, read in one gather; this is what a DataLoader calls for a batch."""
        if not windows:
            return []
        if min(windows) < 0 or max(windows) >= len(self.windows):
            raise IndexError(
                f"windows {min(windows)} to {max(windows)} asked for, there are {len(self.windows)}"
            )
        batch = self.windows.fetch(np.array(windows, np.int64))
        rows = zip(*(torch.from_numpy(array).unbind() for array in batch.values()), strict=True)
        return [dict(zip(batch, row, strict=True)) for row in rows]


class ResumableBatchSampler(Sampler[list[int]]):
    """A batch sampler whose place is one number: `DataLoader(WindowDataset(windows), batch_sampler=sampler)`.

    An iteration runs from the sampler's place to the end of the epoch, and the next one through the next epoch, in another order;
    there is no `set_epoch`. With `stop` it runs to that position instead, through as many epochs as that takes. An iteration
    that is broken off does not count: the next begins where it began. (Unless a loader with workers had already taken its last
    batch. To go on after breaking off, load a state.)

    The place is a position: it counts samples, so it means the same with another `global_batch` or `world_size`. At the end of
    an epoch it is the beginning of the next, so a loop over epochs goes on with `for epoch in range(sampler.epoch, …)`.

    To save the place:

    - torchdata's `StatefulDataLoader` does it by itself, with any number of workers.
    - A `DataLoader` with workers asks for batches long before it hands them out, and the sampler cannot know how long. Count the
      batches that your loop has consumed since the iteration began, and save `state_after(batches_consumed)`.
    - `state_dict()` is the place after the last batch that the *loader* took. That is exact where nothing reads ahead
      (`num_workers=0`), and at the end of an epoch. Anywhere else it is too far, and a resume from it would leave samples out.

    Args:
        order: the order of the windows.
        global_batch: samples in a batch, over all ranks.
        rank: which of the ranks this is; it gets every `world_size`-th sample of each batch.
        world_size: how many ranks share a batch.
        start: the position to begin at.
        stop: the position to end at; without it each iteration ends with its epoch.
        drop_last: leave out a last batch that is shorter than the others.
        skips: positions that are left out.
    """

    def __init__(
        self,
        order: Order,
        global_batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int | None = None,
        drop_last: bool = False,
        skips: Skips = NO_SKIPS,
    ) -> None:
        _check_shares(global_batch, rank, world_size)
        _check_range(start, start if stop is None else stop)
        self.order = order
        self.global_batch = global_batch
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.skips = skips
        self.stop = stop
        self._latest = self._iteration(start)

    @property
    def epoch(self) -> int:
        """The epoch in which the next iteration begins."""
        return self._next_start // self.order.num_windows

    def __len__(self) -> int:
        """Return the number of batches of the next iteration."""
        return len(self._iteration(self._next_start))

    def __iter__(self) -> Iterator[list[int]]:
        """Begin at the place.

        Raises:
            UserError: the last batch would leave a rank without a sample, where every rank must take part.
        """
        iteration = self._iteration(self._next_start)
        rest = self.skips.count(iteration.start, iteration.stop) % self.global_batch
        if not self.drop_last and 0 < rest < self.world_size:
            raise UserError(
                f"the last batch before position {iteration.stop} would have {rest} samples for {self.world_size} ranks; "
                "take another global_batch, or drop_last=True to leave them out"
            )
        self._latest = iteration
        return iteration

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch that was taken from this sampler."""
        return self._state(self._latest.position)

    def state_after(self, batches_consumed: int) -> dict[str, Any]:
        """Return the place after so many batches of the present iteration, however far a loader has read ahead."""
        if not 0 <= batches_consumed <= len(self._latest):
            raise ValueError(
                f"the iteration has {len(self._latest)} batches, so {batches_consumed} cannot have been consumed"
            )
        end = self.skips.after(self._latest.start, batches_consumed * self.global_batch)
        return self._state(self._latest.place_after(end))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            UserError: the place belongs to another order of samples, or lies behind the end.
        """
        here = self._state(int(state["position"]))
        different = [name for name in here | state if state.get(name) != here.get(name)]
        if different:
            sides = "; ".join(
                f"{name} is {state.get(name)} in the saved state, {here.get(name)} here" for name in different
            )
            raise UserError(f"the saved place belongs to another order of samples: {sides}")
        position = int(state["position"])
        if self.stop is not None and position > self.stop:
            raise UserError(
                f"the saved place, position {position}, lies behind the end of this run at {self.stop}"
            )
        self._latest = self._iteration(position)

    @property
    def _next_start(self) -> int:
        return self._latest.stop if self._latest.finished else self._latest.start

    def _iteration(self, start: int) -> "_Iteration":
        n = self.order.num_windows
        return _Iteration(self, start, (start // n + 1) * n if self.stop is None else self.stop)

    def _state(self, position: int) -> dict[str, Any]:
        return {"position": position, **self.order.described(position)}


class _Iteration(Iterator[list[int]]):
    """One iteration of a `ResumableBatchSampler`, over the positions [start, stop).

    It has a state of its own because torchdata asks iterators for one. It differs from the sampler's where an epoch has just
    ended: what is left of this iteration is nothing, while the sampler's next one is the next epoch.
    """

    def __init__(self, sampler: ResumableBatchSampler, start: int, stop: int) -> None:
        self.sampler = sampler
        self.start = start
        self.stop = stop
        self.position = self.place_after(start)
        self.finished = False

    def __len__(self) -> int:
        """Return the number of its batches."""
        whole, rest = divmod(self.sampler.skips.count(self.start, self.stop), self.sampler.global_batch)
        return whole + (rest > 0 and not self.sampler.drop_last)

    def __next__(self) -> list[int]:
        sampler = self.sampler
        if self.position >= self.stop:
            self.finished = True
            raise StopIteration
        first = sampler.skips.kept_before(self.position)
        last = min(first + sampler.global_batch, sampler.skips.kept_before(self.stop))
        positions = sampler.skips.kept(rank_positions(first, last, sampler.rank, sampler.world_size))
        self.position = self.place_after(sampler.skips.after(self.position, last - first))
        windows: list[int] = sampler.order.windows(positions).tolist()
        return windows

    def place_after(self, end: int) -> int:
        """Where the place is when everything before `end` is done: a remainder that is dropped is passed over."""
        needed = self.sampler.global_batch if self.sampler.drop_last else 1
        return self.stop if self.sampler.skips.count(end, self.stop) < needed else end

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "stop": self.stop}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.position = state["position"]
        self.stop = state["stop"]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank learns in one optimizer step.

    Attributes:
        start: the cursor before the step. The batch is made of the positions from here to `stop` that are not left out.
        stop: the position behind its last; the cursor after the step.
        micro_batches: this rank's share, cut into tensors [micro_batch or less, seq_len]. Where shares differ a rank may have one
            fewer than another, or none.
        stand_in: where this rank has one fewer, a micro-batch of one window in its place, which is not learned: ranks that add up
            gradients must all make as many passes.
        num_targets: how many of this rank's targets are learned.
        num_terms: of how many terms the objective's sum over this rank's share is made; in pre-training, the targets.
        num_windows: samples of this rank's share.
    """

    start: int
    stop: int
    micro_batches: list[dict[str, Tensor]]
    num_targets: int
    num_terms: int
    num_windows: int
    stand_in: dict[str, Tensor] | None = None

    @property
    def num_tokens(self) -> int:
        """Positions of this rank's share that go through the model, PAD included."""
        return sum(
            tensor.numel()
            for micro_batch in self.micro_batches
            for name, tensor in micro_batch.items()
            if name.endswith("input_ids")
        )


class StepLoader:
    """The steps of a run, read ahead by one thread.

    Every iteration begins at `start` and ends at `stop`; the last global batch may be short, so that no sample is lost. Which samples
    a step has depends on nothing but the order, `start` and `global_batch`. Leaving the loop ends the thread; a `with` block does so
    at once and for certain, also when the loop is left by an exception.

    Args:
        windows: where samples are read.
        order: which sample comes when.
        start: the position to begin at: the cursor.
        stop: the position to end at.
        global_batch: samples in a step over all ranks.
        micro_batch: the most samples of a rank in one forward pass.
        rank: which of the ranks this is.
        world_size: how many ranks share a step.
        device: where the tensors go. For CUDA they go by way of pinned memory, without waiting.
        prefetch: how many steps are kept ready.
        skips: positions that are left out.
        num_terms: how many terms the objective's sum over samples has; without it, their learned targets.
    """

    def __init__(
        self,
        windows: Samples,
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
    ) -> None:
        _check_shares(global_batch, rank, world_size)
        _check_range(start, stop)
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

    def _iterate(self) -> Generator[StepBatch, None, None]:
        firsts = iter(self._firsts())
        # One thread, so the steps are read one after the other. A future carries an exception to where the step is consumed.
        thread = ThreadPoolExecutor(1, thread_name_prefix="step-loader")
        try:
            steps = deque(thread.submit(self._read, first) for first in islice(firsts, self.prefetch))
            while steps:
                step = steps.popleft()
                steps.extend(thread.submit(self._read, first) for first in islice(firsts, 1))
                yield self._on_device(step.result())
        finally:
            thread.shutdown(cancel_futures=True)

    def _firsts(self) -> range:
        """The first sample of each step, by its number among the positions that are kept."""
        return range(self.skips.kept_before(self.start), self.skips.kept_before(self.stop), self.global_batch)

    def _read(self, first: int) -> StepBatch:
        """Read one step; runs in the thread."""
        begun, last = self._firsts().start, min(first + self.global_batch, self._firsts().stop)
        start, stop = (self.skips.after(self.start, number - begun) for number in (first, last))
        of_most, own = (rank_positions(first, last, rank, self.world_size) for rank in (0, self.rank))
        stand_in = None
        if -(-len(own) // self.micro_batch) < -(-len(of_most) // self.micro_batch):
            _, stand_in = self._fetched(of_most[:1])
        if not own.size:
            nothing: dict[str, Any] = {
                "micro_batches": [],
                "num_targets": 0,
                "num_terms": 0,
                "num_windows": 0,
            }
            return StepBatch(start=start, stop=stop, stand_in=stand_in, **nothing)
        arrays, share = self._fetched(own)
        micro_batches = zip(
            *(torch.split(tensor, self.micro_batch) for tensor in share.values()), strict=True
        )
        return StepBatch(
            start=start,
            stop=stop,
            micro_batches=[dict(zip(share, tensors, strict=True)) for tensors in micro_batches],
            num_targets=num_targets(arrays),
            num_terms=self.num_terms(arrays),
            num_windows=len(own),
            stand_in=stand_in,
        )

    def _fetched(self, numbers: NDArray[np.int64]) -> tuple[dict[str, NDArray[np.int64]], dict[str, Tensor]]:
        """Read samples, by their numbers among the positions that are kept: as they are, and as tensors that a device can take."""
        arrays = self.windows.fetch(self.order.windows(self.skips.kept(numbers)))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return arrays, tensors

    def _on_device(self, step: StepBatch) -> StepBatch:
        """Send a step to the device; called by the consumer, so that the kernels on its stream wait for the copies."""

        def sent(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

        stand_in = None if step.stand_in is None else sent(step.stand_in)
        return replace(step, micro_batches=[sent(batch) for batch in step.micro_batches], stand_in=stand_in)


def num_targets(samples: Mapping[str, NDArray[np.int64]]) -> int:
    """Return how many targets of a batch are learned."""
    return sum(
        int(np.count_nonzero(array != IGNORED)) for name, array in samples.items() if name.endswith("targets")
    )


def _check_shares(global_batch: int, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, not {rank} of {world_size}")
    if global_batch < world_size:
        raise ValueError(
            f"global_batch must be at least one sample for each of {world_size} ranks, not {global_batch}"
        )


def _check_range(start: int, stop: int) -> None:
    if not 0 <= start <= stop:
        raise ValueError(f"positions count from 0 and a run goes forward, not from {start} to {stop}")
