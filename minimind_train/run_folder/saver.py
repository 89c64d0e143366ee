"""Saver: when checkpoints are due, which of them are kept, and how they are saved while training goes on.

Training waits only while the tensors are copied into host memory, which is kept for this; a thread writes, flushes, checks and renames
the files while the next steps run. At most one save is running: the next one waits for it, so a disk that is slower than `save_every`
slows the run down, but fills no memory. On CUDA the copies are queued behind their step, into pinned memory, and training does not
wait for them either. The price is host memory for one more set of weights and optimizer state.
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
    """Which checkpoints are kept: all those that one of these rules names."""

    newest: int = 3
    """Keep this many of the newest; 0 keeps all."""
    every: int = 0
    """Keep those whose step is a multiple of this; 0 for none."""
    best: bool = False
    """Keep the one with the lowest validation loss."""

    def apply(self, run: Path, *, newest: int) -> None:
        """Delete the checkpoints of a run that no rule keeps.

        Args:
            run: the run folder.
            newest: the step of the newest whole checkpoint.
        """
        # Later ones were skipped because they are damaged, so they must not take the place of others.
        steps = [step for step in checkpoint.steps_of(run) if step <= newest]
        retained = set(steps[-self.newest :] if self.newest else steps)
        if self.every:
            retained |= {step for step in steps if step % self.every == 0}
        if self.best and (best := checkpoint.best_of(run, last_step=newest)):
            retained.add(best.step)
        for step in steps:
            if step not in retained:
                checkpoint.delete(checkpoint.folder_of(run, step))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The functions that return the present state of a run for a checkpoint."""

    tensors: Callable[[], Tensors]
    """Returns the tensors; see `tensors_of`."""
    state: Callable[[Mapping[str, Any]], CheckpointState]
    """Returns the rest of the checkpoint, for a line of metrics (with `step` and `position`)."""
    flush: Callable[[], None] = lambda: None
    """Flushes what must be on the disk before the checkpoint gets its name; called in the thread that writes."""


class _Abandoned(BaseException):
    """Ends a save in its thread."""


class Saver:
    """Saves the checkpoints of one run; a context manager that waits at its end until nothing is being written.

    Args:
        run: the run folder.
        config: when to save, and which checkpoints to keep.
        snapshot: returns the present state of the run.
        best: the state of the checkpoint with the lowest validation loss so far.
        writers: the ranks that write a checkpoint together, over a connection of their own; None where this rank does not write.
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
        """Save a checkpoint where one is due; at the end of the run, wait until it is written.

        Args:
            record: the step's line of metrics.
            leaving: whether this is the last step.

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
            self._abandoned.set()  # a second Ctrl-C: the user does not want to wait for the disk
        try:
            self.wait()
        except Exception as failure:  # noqa: BLE001 - the first error is the one that is raised
            if failure is not error:
                self._say(str(failure))

    def _save(self, state: CheckpointState) -> None:
        writers = self._writers
        assert writers is not None
        self.wait()
        tensors, wait_for_copies = self._copy(self._snapshot.tensors())

        def write() -> None:
            try:
                wait_for_copies()
                self._snapshot.flush()
                checkpoint.save(self._run, state, tensors, between_files=self._check_abandoned, world=writers)
                if writers.is_main:
                    self._retention.apply(self._run, newest=state.step)
            except _Abandoned:
                pass
            except BaseException as error:  # noqa: BLE001 - it is raised where the training sees it
                self._error = error

        # A daemon thread, so that it does not keep the interpreter from ending.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _check_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise _Abandoned

    def _raise_failure(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise error

    def _copy(self, tensors: Tensors) -> tuple[Tensors, Callable[[], None]]:
        """Return copies in host memory, and a function that waits until they are complete."""
        self._copies = {
            file: {
                name: _copy_into(self._copies.get(file, {}).get(name), tensor)
                for name, tensor in by_name.items()
            }
            for file, by_name in tensors.items()
        }
        devices = [
            tensor.device for by_name in tensors.values() for tensor in by_name.values() if tensor.is_cuda
        ]
        if not devices:
            return self._copies, lambda: None
        # On the stream of the device that they come from, which need not be the default device.
        return self._copies, torch.cuda.current_stream(devices[0]).record_event().synchronize


def _copy_into(buffer: Tensor | None, tensor: Tensor) -> Tensor:
    """Copy a tensor into host memory, reusing the buffer of the last copy, without waiting for a CUDA device."""
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
