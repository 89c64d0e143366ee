"""The ranks that learn one model together: who this process is among them, and what they must agree on.

A `World` is passed to whoever needs it; there is no global one. Numbers that ranks add up or agree on are few and on the host, so
they go by gloo also where the gradients go by nccl: nothing waits for a GPU. In a world of one every question has its answer at
once, and a run alone does nothing that it would not do without this module.

What rank 0 finds out (which checkpoint, which options), the others are told, so that no two ranks can come to different answers. Only
rank 0 writes and speaks.
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
from minimind_train.devices import resolve_device
from minimind_train.interrupt import Stop

T = TypeVar("T")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(minutes=30)
"""For a rank that is silent but not gone: one that saves to a slow disk, say, or a machine that has lost its network."""

_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


class LostRankError(UserError):
    """Another rank has ended, which this one noticed by its silence; the reason is that one's to tell."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among those that learn together."""

    rank: int
    """From 0, over all machines."""
    size: int
    local_rank: int
    """From 0, on this machine: which of its devices is this process's."""
    local_size: int
    """Ranks on this machine."""


class World:
    """All ranks, as one of them sees them.

    Attributes:
        place: of this rank.
        asked: a signal that the process which started the ranks wants obeyed, as if it had come here.
    """

    def __init__(self, place: Place, group: Any = None) -> None:
        self.place = place
        self.asked: signal.Signals | None = None
        self._group = group

    def on_another_line(self) -> "World":
        """Return the same ranks, for another thread to ask, whose questions do not come between this one's. All ask for it together."""
        return World(self.place, dist.new_group(backend="gloo")) if self.size > 1 else self

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.place.size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.place.rank == 0

    def device(self, name: str) -> torch.device:
        """Return what `resolve_device` does, among several ranks each one's own.

        Raises:
            UserError: there is no such device, or none for this rank.
        """
        place = self.place
        if place.size == 1 or name == "cpu":
            return resolve_device(name)
        there = torch.cuda.device_count()
        if place.local_rank < there:
            torch.cuda.set_device(place.local_rank)  # before anything makes itself at home on the first one
        device = resolve_device(name)
        if device.type == "cpu":
            return device
        if ":" in name or device.type != "cuda":
            raise UserError(
                f"--device {name}: {place.size} processes learn together each on a CUDA device of its own, or all on the CPU; write "
                "--device cuda or --device cpu"
            )
        if place.local_size > there:
            raise UserError(
                f"{place.local_size} processes on a machine with {there} cuda devices, and each needs its own; start fewer "
                "(--nproc), or add --device cpu"
            )
        return torch.device("cuda", place.local_rank)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, in double precision; every rank asks at the same time, for as many."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        totals: list[float] = sums.tolist()
        return totals

    def agreed_stop(self, asked: Stop | None) -> Stop | None:
        """Return what any rank was asked: the same for all, so that all stop after the same step."""
        asked = asked or (Stop(128 + self.asked) if self.asked else None)
        if self.size == 1:
            return asked
        number = torch.tensor(asked or 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return Stop(int(number)) if number else None

    def told(self, value: T | None) -> T:
        """Return what rank 0 brings here; the others bring None.

        Raises:
            UserError: rank 0 brings one; see `leading`.
        """
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0, group=self._group)
            value = box[0]
        if isinstance(value, UserError):
            raise value
        assert value is not None
        return value

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Let rank 0 find out what the others wait for in `told`, where they raise the `UserError` that is raised in here."""
        try:
            yield
        except UserError as error:
            if self.size > 1:
                dist.broadcast_object_list([UserError(str(error))], src=0, group=self._group)
            raise

    def give(self, tensor: Tensor) -> None:
        """Let all ranks have what rank 0 has in a tensor, which is changed in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0, group=self._group)

    def gathered(self, value: T) -> list[T]:
        """Return what each rank brings here, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.total((0.0,))


ALONE = World(Place(rank=0, size=1, local_rank=0, local_size=1))
"""The world of a run in one process."""


def launched_place() -> Place | None:
    """Return the place that `torchrun`, or what sets the same variables, gave this process; None where nothing did.

    Raises:
        UserError: it is no place.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    missing = [name for name in _LAUNCHED if not os.environ.get(name)]
    place: Place | None
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        place = Place(
            rank=rank,
            size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        )
    except ValueError:
        place = None
    if place is None or missing or not 0 <= place.rank < place.size:
        told = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _LAUNCHED)
        raise UserError(
            f"the environment says that this is one of several ranks, but not which ({told}); start it by torchrun, or unset RANK and WORLD_SIZE"
        )
    return place


@contextlib.contextmanager
def joined(world: World, store: Any = None) -> Iterator[None]:
    """Be one of the ranks inside the block.

    Args:
        world: as this process sees it.
        store: where the ranks meet, a store of `torch.distributed`; without it, at MASTER_ADDR and MASTER_PORT.

    Raises:
        LostRankError: another rank has ended.
    """
    if world.size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=_PATIENCE
        )
        yield
    except RuntimeError as error:
        if not _tells_of_loss(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise LostRankError(
            f"rank {world.rank} of {world.size} has lost the others, of which one has ended ({reason}); what that one says is the "
            "reason; go on with --resume"
        ) from None
    # On the way out of an error the group is left as it is: taking it down may wait for ranks that are gone.
    dist.destroy_process_group()


def _tells_of_loss(error: RuntimeError) -> bool:
    """Whether an error means that another rank does not answer; gloo's is told from others by its text alone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _LOST)
