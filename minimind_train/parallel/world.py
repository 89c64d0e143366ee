"""The ranks that train one model together: which one this process is, and the collectives that they use on the host.

A `World` is passed to whatever needs it; there is no global one. Its collectives carry a few numbers or small objects in host memory. So
they use gloo, even where gradients use nccl, and never wait for a GPU. In a world of one rank each returns its argument at once.

What rank 0 decides (which checkpoint, which options) is broadcast, so that no two ranks decide differently. Only rank 0 writes files and
prints. Gradients are averaged in `minimind_train.training.data_parallel`; ranks are started in `launch`.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_data.errors import UserError
from minimind_train.parallel.devices import resolve_device
from minimind_train.parallel.interrupt import Stop

T = TypeVar("T")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=30)
"""Long enough for a rank that is slow but alive, for example one that saves to a slow disk."""

_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


class LostRankError(UserError):
    """A collective failed because another rank ended; that rank reports the reason."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """The rank of a process among those that train together, and on its machine."""

    rank: int
    """From 0, over all machines."""
    size: int
    local_rank: int
    """From 0, on this machine: also the number of its device."""
    local_size: int
    """Ranks on this machine."""


class World:
    """All ranks, as one of them sees them. All ranks must call every collective, in the same order.

    Args:
        place: this rank's.
        group: the process group of the collectives; the default group where it is None.
        launched: whether `launch_ranks` started the ranks; then the process that called it receives signals for them.

    Attributes:
        place: this rank's.
        launched: as above.
        forwarded_signal: a signal that the launching process forwarded to its ranks, or None.
    """

    def __init__(self, place: RankPlace, group: Any = None, *, launched: bool = False) -> None:
        self.place = place
        self.launched = launched
        self.forwarded_signal: signal.Signals | None = None
        self._group = group

    def with_own_group(self) -> "World":
        """Return the same ranks with a process group of their own, so that another thread can use collectives. A collective."""
        return World(self.place, dist.new_group(backend="gloo")) if self.size > 1 else self

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self.place.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.place.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.place.rank == 0

    def device(self, name: str) -> torch.device:
        """Return the device of this rank: what `resolve_device` returns, or, with several ranks, one of the machine's devices.

        Raises:
            UserError: there is no such device, or not one for each rank.
        """
        place = self.place
        if place.size == 1 or name == "cpu":
            device = resolve_device(name)
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # so that this device is the default one too
            return device
        num_devices = torch.cuda.device_count()
        if place.local_rank < num_devices:
            torch.cuda.set_device(place.local_rank)  # before anything uses the first device
        device = resolve_device(name)
        if device.type == "cpu" or (name == "auto" and device.type != "cuda"):
            return torch.device("cpu")  # an Apple GPU is one, and gradients are not exchanged on it
        if ":" in name or device.type != "cuda":
            raise UserError(
                f"`device` {name}: {place.size} processes learn together each on a CUDA device of its own, or "
                "all on the CPU",
                remedy="write `device` cuda or `device` cpu",
                option="device",
            )
        if place.local_size > num_devices:
            raise UserError(
                f"{place.local_size} processes on a machine with {num_devices} cuda devices, and each needs its own",
                remedy="start fewer (`nproc`), or add `device` cpu",
                option="nproc",
            )
        return torch.device("cuda", place.local_rank)

    def all_reduce_sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of these numbers over all ranks, in float64; every rank passes as many."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        totals: list[float] = sums.tolist()
        return totals

    def agreed_stop(self, request: Stop | None) -> Stop | None:
        """Return the reason to stop, if any rank has one; the same on all ranks, so that all stop after the same step."""
        request = request or (Stop(128 + self.forwarded_signal) if self.forwarded_signal else None)
        if self.size == 1:
            return request
        number = torch.tensor(request or 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return Stop(int(number)) if number else None

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value, which must be picklable; the other ranks pass None.

        Raises:
            UserError: rank 0 raised it in `relaying_errors` before it came here.
        """
        if self.size > 1:
            values = [value]
            dist.broadcast_object_list(values, src=0, group=self._group)
            value = values[0]
        if isinstance(value, UserError):
            raise value
        assert value is not None
        return value

    @contextlib.contextmanager
    def relaying_errors(self) -> Iterator[None]:
        """Surround what rank 0 does while the others wait in `broadcast`: a `UserError` raised in the block is raised there too."""
        try:
            yield
        except UserError as error:
            if self.size > 1:
                dist.broadcast_object_list([error], src=0, group=self._group)
            raise

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Overwrite a tensor in place with rank 0's, of the same shape and dtype."""
        if self.size > 1:
            dist.broadcast(tensor, src=0, group=self._group)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; they must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Return when all ranks have called this."""
        self.all_reduce_sum((0.0,))


ALONE = World(RankPlace(rank=0, size=1, local_rank=0, local_size=1))
"""The world of a run in one process."""


def torchrun_place() -> RankPlace | None:
    """Return the place that `torchrun` gives this process by environment variables; None where they are not set.

    Raises:
        UserError: some of them are missing, or are not numbers.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    missing = [name for name in _LAUNCHED if not os.environ.get(name)]
    place: RankPlace | None
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        place = RankPlace(
            rank=rank,
            size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        )
    except ValueError:
        place = None
    if place is None or missing or not 0 <= place.rank < place.size:
        variables = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _LAUNCHED)
        raise UserError(
            f"the environment says that this is one of several ranks, but not which ({variables})",
            remedy="start it by torchrun, or unset RANK and WORLD_SIZE",
        )
    return place


@contextlib.contextmanager
def process_group(world: World, store: Any = None) -> Iterator[None]:
    """Initialise torch's default process group for the block and destroy it afterwards; with one rank, do nothing.

    Args:
        world: the ranks.
        store: a store of `torch.distributed` by which the ranks find each other; by default the one at MASTER_ADDR and MASTER_PORT.

    Raises:
        LostRankError: another rank ended.
    """
    if world.size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT
        )
        yield
    except RuntimeError as error:
        if not _is_connection_loss(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise LostRankError(
            f"rank {world.rank} of {world.size} has lost the others, of which one has ended ({reason})",
            remedy="what that one says is the reason; go on with `resume`",
        ) from None
    # After an error the group is left as it is: destroying it could wait for ranks that are gone.
    dist.destroy_process_group()


def _is_connection_loss(error: RuntimeError) -> bool:
    """Whether an error means that another rank does not answer; only the text of gloo's errors says so."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _LOST)
