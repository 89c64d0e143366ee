"""When checkpoints are due, which of them are kept, and how they are saved without stopping the training for longer than a copy.

The tensors are copied to memory of the host that is kept for this; a thread writes, flushes, checks and renames while the next
steps run. One save is in flight at most: the next one waits for it, so a disk that is slower than `--save-every` slows the run down
and fills no memory. On CUDA the copies are queued behind the step that they belong to, into pinned memory, and not even they are
waited for. The price is memory of the host for one more set of weights and optimizer state.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from minimind_train.parallel.world import ALONE, World
from minimind_train.progress import Say
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.checkpoint import CheckpointState
from minimind_train.run_folder.options import SaveOptions
from minimind_train.run_folder.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What a checkpoint can have for a reason to stay; one is enough."""

    newest: int = 3
    """It is one of so many newest ones; 0 keeps all."""
    every: int = 0
    """Its step is a multiple of this; 0 is no reason."""
    best: bool = False
    """It has the lowest validation loss."""

    def apply(self, run: Path, *, newest: int) -> None:
        """Delete the checkpoints of a run that have no reason to stay, the newest whole one being of step `newest`."""
        # Anything newer was passed over as damaged, so it must not count among those that stay.
        there = [step for step in checkpoint.steps_of(run) if step <= newest]
        stay = set(there[-self.newest :] if self.newest else there)
        if self.every:
            stay |= {step for step in there if step % self.every == 0}
        if self.best and (best := checkpoint.best_of(run, last_step=newest)):
            stay.add(best.step)
        for step in there:
            if step not in stay:
                checkpoint.delete(checkpoint.folder_of(run, step))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """How a checkpoint is taken of a run as it is now."""

    tensors: Callable[[], Tensors]
    """Returns what is to be saved; see `tensors.tensors_of`."""
    state: Callable[[Mapping[str, Any]], CheckpointState]
    """Returns what else the checkpoint says, of a line of metrics (with `step` and `position`)."""
    flush: Callable[[], None] = lambda: None
    """Brings to the disk what must be there before the checkpoint gets its name; called in the thread that writes."""


class _Abandoned(BaseException):
    """Ends a save in its thread."""


class Saver:
    """Saves the checkpoints of one run; a context manager, which is left only when nothing is being written any more.

    Args:
        run: the run folder.
        config: when, and what stays.
        snapshot: how a checkpoint is taken.
        best: what the checkpoint with the lowest validation loss so far says.
        writers: the ranks that write a checkpoint together, by a line of their own; None where this rank does not write.
        say: takes lines for the user.
    """

    def __init__(
        self,
        run: Path,
        config: SaveOptions,
        snapshot: Snapshot,
        *,
        best: CheckpointState | None = None,
        writers: World | None = ALONE,
        say: Say,
    ) -> None:
        self._run = run
        self._config = config
        self._retention = Retention(newest=config.keep, every=config.keep_every, best=config.save_best)
        self._snapshot = snapshot
        self._lowest_loss = math.inf if best is None or best.val_loss is None else best.val_loss
        self._writers = writers
        self._say = say
        self._copies: Tensors = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()

    def after_step(self, record: Mapping[str, Any], *, leaving: bool) -> None:
        """Save where that is due, and wait for it where the run is `leaving`.

        Args:
            record: the step's line of metrics.
            leaving: no step follows.

        Raises:
            UserError: this or an earlier checkpoint could not be written.
        """
        self._raise_failure()
        step, config = record["step"], self._config
        due = leaving or any(every and step % every == 0 for every in (config.save_every, config.keep_every))
        if (loss := record.get("val_loss", math.inf)) < self._lowest_loss:
            self._lowest_loss = loss
            due = due or config.save_best
        if due and self._writers:
            self._save(self._snapshot.state(record))
        if leaving:
            self.wait()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            UserError: it could not be written.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        self._raise_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            return
        if not isinstance(error, Exception):
            self._abandoned.set()  # a second Ctrl-C: whoever sends it does not want to wait for a disk
        try:
            self.wait()
        except Exception as failure:  # noqa: BLE001 - the first error is the one that is raised
            if failure is not error:
                self._say(str(failure))

    def _save(self, state: CheckpointState) -> None:
        writers = self._writers
        assert writers is not None
        self.wait()
        tensors, arrived = self._copy(self._snapshot.tensors())

        def write() -> None:
            try:
                arrived()
                self._snapshot.flush()
                checkpoint.save(self._run, state, tensors, go_on=self._go_on, world=writers)
                if writers.is_main:
                    self._retention.apply(self._run, newest=state.step)
            except _Abandoned:
                pass
            except BaseException as error:  # noqa: BLE001 - it is raised where the training sees it
                self._error = error

        # A daemon, so that an interpreter that must end does.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise _Abandoned

    def _raise_failure(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise error

    def _copy(self, tensors: Tensors) -> tuple[Tensors, Callable[[], None]]:
        """Return copies in memory of the host, and what waits until they have arrived there."""
        self._copies = {
            file: {
                name: _copy_into(self._copies.get(file, {}).get(name), tensor)
                for name, tensor in named.items()
            }
            for file, named in tensors.items()
        }
        devices = [tensor.device for named in tensors.values() for tensor in named.values() if tensor.is_cuda]
        if not devices:
            return self._copies, lambda: None
        # On the stream of the device that they come from, which need not be the one that is used by default.
        return self._copies, torch.cuda.current_stream(devices[0]).record_event().synchronize


def _copy_into(buffer: Tensor | None, tensor: Tensor) -> Tensor:
    """Copy a tensor into host memory, that of the copy before if there is one, without waiting for a CUDA device."""
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
