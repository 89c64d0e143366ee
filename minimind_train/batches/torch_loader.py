"""From windows and their order to the batches of any PyTorch loop; our own loop uses `batches.steps.StepLoader`.

`WindowDataset` and `ResumableBatchSampler` give the same samples in the same order to `torch.utils.data.DataLoader`, or to torchdata's
`StatefulDataLoader`.

The state is a position (see `minimind_train.order.sample_order`). A loader reads ahead of the training, so it is the loop that says how many
batches it has finished.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from minimind_data.errors import UserError
from minimind_data.windows.base import WindowSource
from minimind_data.windows.read_ahead import ReadAhead
from minimind_train.order.mixture import Order
from minimind_train.order.sample_order import check_range, check_shares, rank_positions
from minimind_train.order.skips import NO_SKIPS, Skips

__all__ = ["ResumableBatchSampler", "WindowDataset"]


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows as a map-style dataset; a sample is a dict of int64 tensors [seq_len].

    A `ShardSet` pickles as its folder's name, so a worker started by `spawn` maps the files for itself.
    """

    def __init__(self, windows: WindowSource) -> None:
        self.windows = windows
        self._ahead = ReadAhead(windows)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __repr__(self) -> str:
        return f"WindowDataset({self.windows!r})"

    def __getitem__(self, window: int | list[int]) -> dict[str, Tensor]:
        """Return one window, or for a list a whole batch, int64 [B, seq_len] each.

        With `DataLoader(dataset, sampler=batch_sampler, batch_size=None)` the loader asks for whole batches, which are then not taken apart
        and collated again.
        """
        if isinstance(window, list):
            return {name: torch.from_numpy(array) for name, array in self._batch(window).items()}
        return self.__getitems__([window])[0]

    def __getitems__(self, windows: list[int]) -> list[dict[str, Tensor]]:
        """Return several windows, read in one gather; a DataLoader calls this for a batch."""
        batch = self._batch(windows)
        rows = zip(*(torch.from_numpy(array).unbind() for array in batch.values()), strict=True)
        return [dict(zip(batch, row, strict=True)) for row in rows]

    def _batch(self, windows: list[int]) -> dict[str, NDArray[np.int64]]:
        if windows and (min(windows) < 0 or max(windows) >= len(self.windows)):
            raise IndexError(
                f"windows {min(windows)} to {max(windows)} asked for, there are {len(self.windows)}"
            )
        return self._ahead.fetch(np.array(windows, np.int64))


class ResumableBatchSampler(Sampler[list[int]]):
    """A batch sampler whose state is one number, its position: `DataLoader(WindowDataset(windows), batch_sampler=sampler)`.

    An iteration runs from the sampler's position to the end of the epoch, and the next one through the next epoch in another order;
    `set_epoch` is not needed. With `stop` it runs to that position instead, through as many epochs as that takes. An iteration that is
    left early does not count: the next one starts where it started, unless a loader with workers had already taken its last batch. To go
    on after leaving an iteration, load a state.

    A position counts samples, so it means the same with another `global_batch` or `world_size`. At the end of an epoch it is the
    beginning of the next one, so a loop over epochs continues with `for epoch in range(sampler.epoch, …)`.

    To save the position:

    - torchdata's `StatefulDataLoader` saves it by itself, with any number of workers.
    - A `DataLoader` with workers asks for batches before the loop gets them, and the sampler cannot know how many. Count the batches
      that your loop has finished since the iteration began, and save `state_after(batches_consumed)`.
    - `state_dict()` is the position after the last batch that the *loader* took. It is exact without read-ahead (`num_workers=0`) and
      at the end of an epoch. Otherwise it is too far, and a resume from it would skip samples.

    Args:
        order: the order of the windows.
        global_batch: samples in a batch, over all ranks.
        rank: which of the ranks this is; it gets every `world_size`-th sample of each batch.
        world_size: how many ranks share a batch.
        start: the position to begin at.
        stop: the position to end at; by default each iteration ends with its epoch.
        drop_last: drop a last batch that is shorter than the others.
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
        check_shares(global_batch, rank, world_size)
        check_range(start, start if stop is None else stop)
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
        """The epoch in which the next iteration starts."""
        return self._next_start // self.order.num_windows

    def __repr__(self) -> str:
        share = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        return f"ResumableBatchSampler(at position {self._latest.position:,}, batches of {self.global_batch}{share}, {self.order!r})"

    def __len__(self) -> int:
        """Return the number of batches of the next iteration."""
        return len(self._iteration(self._next_start))

    def __iter__(self) -> Iterator[list[int]]:
        """Start at the sampler's position.

        Raises:
            UserError: some ranks would have no sample in the last batch, and every rank must take part.
        """
        iteration = self._iteration(self._next_start)
        rest = self.skips.count(iteration.start, iteration.stop) % self.global_batch
        if not self.drop_last and 0 < rest < self.world_size:
            raise UserError(
                f"the last batch before position {iteration.stop} would have {rest} samples for "
                f"{self.world_size} ranks",
                remedy="take another global_batch, or drop_last=True to leave them out",
            )
        self._latest = iteration
        return iteration

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch that was taken from this sampler."""
        return self._state(self._latest.position)

    def state_after(self, batches_consumed: int) -> dict[str, Any]:
        """Return the state after so many batches of the current iteration, however far a loader has read ahead."""
        if not 0 <= batches_consumed <= len(self._latest):
            raise ValueError(
                f"the iteration has {len(self._latest)} batches, so {batches_consumed} cannot have been consumed"
            )
        end = self.skips.after(self._latest.start, batches_consumed * self.global_batch)
        return self._state(self._latest.position_after(end))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of a saved state.

        Raises:
            UserError: the position belongs to another order of samples, or is beyond the end.
        """
        here = self._state(int(state["position"]))
        different = [name for name in here | state if state.get(name) != here.get(name)]
        if different:
            sides = "; ".join(
                f"{name} is {state.get(name)} in the saved state, {here.get(name)} here" for name in different
            )
            raise UserError(f"the saved position belongs to another order of samples: {sides}")
        position = int(state["position"])
        if self.stop is not None and position > self.stop:
            raise UserError(f"the saved position {position} is beyond the end of this run at {self.stop}")
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

    torchdata asks iterators for a state, so it has one of its own. It differs from the sampler's at the end of an epoch: this iteration has
    nothing left, while the sampler's next one is the next epoch.
    """

    def __init__(self, sampler: ResumableBatchSampler, start: int, stop: int) -> None:
        self.sampler = sampler
        self.start = start
        self.stop = stop
        self.position = self.position_after(start)
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
        self.position = self.position_after(sampler.skips.after(self.position, last - first))
        windows: list[int] = sampler.order.windows(positions).tolist()
        return windows

    def position_after(self, end: int) -> int:
        """The position when everything before `end` is done; a remainder that is dropped counts as done."""
        needed = self.sampler.global_batch if self.sampler.drop_last else 1
        return self.stop if self.sampler.skips.count(end, self.stop) < needed else end

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "stop": self.stop}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.position = state["position"]
        self.stop = state["stop"]
