"""Launching the ranks of a run on this machine: they are started, watched and ended together.

The process that the user started does not train. It starts one process for each rank, forwards signals, and waits. If a rank ends early,
it ends the others, which would wait for that rank for ever, and says why. Each rank watches its pipe to this process: when the other
end is closed, that process is gone, and the rank ends at once. So no process is left over, whichever is killed.

Processes are spawned, not forked: a fork would share the threads and devices of its parent. The ranks meet at a port of 127.0.0.1 that the
system picks. Signals are forwarded as messages, so that a signal which also reaches the ranks directly, as Ctrl-C on a terminal does, still
counts once.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm

from minimind_data.errors import UserError
from minimind_data.system import sigint_blocked
from minimind_train.parallel.interrupt import acknowledge
from minimind_train.parallel.world import LostRankError, RankPlace, World, process_group

__all__ = ["launch_ranks"]

T = TypeVar("T")

_HOST = "127.0.0.1"
_GRACE_SECONDS = 10.0
"""Time for ranks to notice that another one ended, and to finish a checkpoint that is being written."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _End(NamedTuple):
    """How a rank ended."""

    kind: Literal["done", "refused", "failed", "lost", "interrupted", "killed"]
    """`lost`: because another rank ended. `killed`: without giving a reason."""
    result: Any
    """What `work` returned, or else why the rank ended: an error, or words."""


def launch_ranks(work: Callable[[World], T], nproc: int) -> T:
    """Run `work` on several ranks on this machine, one process each, and return what rank 0 returns.

    Args:
        work: picklable, as is what it returns.
        nproc: how many ranks.

    Raises:
        UserError: a rank ended early; the message says why.
        KeyboardInterrupt: Ctrl-C a second time, or before the ranks could stop properly.
    """
    ranks = _Ranks()
    try:
        with ranks.forwarding_signals():
            ranks.start(work, nproc)
            ends = ranks.wait()
    finally:
        ranks.kill()
    # A rank that ended because another one was lost gives no reason, so it comes last.
    early = sorted(
        (item for item in ends.items() if item[1].kind != "done"), key=lambda item: item[1].kind == "lost"
    )
    if not early:
        outcome: T = ends[0].result
        return outcome
    rank, end = early[0]
    if end.kind == "interrupted" and ranks.forwarded_signal:
        # Its former handler is restored, so it does to this process what it does to any other.
        signal.raise_signal(ranks.forwarded_signal)
    raise _error(rank, end, nproc)


class _Ranks:
    """The processes of the ranks, and our ends of the pipes to them.

    Attributes:
        forwarded_signal: the signal that was forwarded, or None.
    """

    def __init__(self) -> None:
        self.forwarded_signal: signal.Signals | None = None
        self._former_handlers: dict[signal.Signals, Any] = {}
        self._processes: dict[int, SpawnProcess] = {}
        self._pipes: dict[int, Connection] = {}
        # The ranks find each other by it, so it is kept as long as they live.
        self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)

    def start(self, work: Callable[[World], Any], nproc: int) -> None:
        """Start all ranks."""
        context = multiprocessing.get_context("spawn")
        for rank in range(nproc):
            place = RankPlace(rank=rank, size=nproc, local_rank=rank, local_size=nproc)
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_be_rank, args=(work, place, self._store.port, theirs), name=f"rank-{rank}"
            )
            # Ctrl-C on a terminal reaches the ranks too. It is blocked until they have imported their modules and can handle it.
            with sigint_blocked():
                try:
                    process.start()
                finally:
                    self._processes[rank], self._pipes[rank] = process, ours
            theirs.close()
            if self.forwarded_signal:
                ours.send(self.forwarded_signal)

    def wait(self) -> dict[int, _End]:
        """Return how each rank ended, in the order in which they did. After one has failed, wait only for a while."""
        ends: dict[int, _End] = {}
        deadline: float | None = None
        while len(ends) < len(self._processes):
            running = [process.sentinel for rank, process in self._processes.items() if rank not in ends]
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not connection.wait(running, timeout):
                return ends
            ends |= {
                rank: self._end_of(rank)
                for rank, process in self._processes.items()
                if rank not in ends and not process.is_alive()
            }
            if deadline is None and any(end.kind != "done" for end in ends.values()):
                deadline = time.monotonic() + _GRACE_SECONDS
        return ends

    def kill(self) -> None:
        """Kill the ranks that are still running."""
        for process in self._processes.values():
            if process.pid is not None:
                process.kill()
                process.join()

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Forward SIGINT and SIGTERM to the ranks during the block; a second signal ends everything at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._former_handlers = {number: signal.signal(number, self._forward) for number in _SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def _forward(self, number: int, _: FrameType | None) -> None:
        if self.forwarded_signal:
            self.kill()
            self._restore()
            signal.raise_signal(number)
            return
        self.forwarded_signal = signal.Signals(number)
        acknowledge(number, in_a_step=False)  # the ranks may still be starting
        for pipe in self._pipes.values():
            with contextlib.suppress(OSError):  # that rank has just ended
                pipe.send(self.forwarded_signal)

    def _restore(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}

    def _end_of(self, rank: int) -> _End:
        pipe, process = self._pipes[rank], self._processes[rank]
        with contextlib.suppress(EOFError, OSError):
            if pipe.poll():
                return _End(*pipe.recv())
        status = process.exitcode or 0
        if -status in _SIGNALS:
            return _End("interrupted", f"was ended by {signal.Signals(-status).name}")
        if status < 0:
            memory = ", perhaps because the memory was used up" if -status == signal.SIGKILL else ""
            return _End("killed", f"was killed by {signal.Signals(-status).name}{memory}")
        return _End("killed", f"ended with status {status} without giving a reason")


def _error(rank: int, end: _End, nproc: int) -> UserError:
    """Return the error that says why a rank ended, and the run with it: its own where it had one."""
    if isinstance(end.result, UserError):
        return end.result
    return UserError(
        f"rank {rank} of {nproc} {end.result}, so the others were ended too",
        remedy="go on with `resume`, which may have another `nproc`",
        option="nproc",
    )


def _be_rank(work: Callable[[World], Any], place: RankPlace, port: int, pipe: Connection) -> None:
    """Be one of the ranks, in a spawned process."""
    world = World(place, launched=True)
    threading.Thread(target=_listen, args=(pipe, world), name="listener", daemon=True).start()
    _use_loopback()
    # tqdm's own lock is shared by all processes; one that is killed would never release it.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with process_group(world, TCPStore(_HOST, port)):
            end = _End("done", work(world))
        status = 0
    except LostRankError as error:
        end = _End("lost", error)
    except UserError as error:
        end = _End("refused", error)
    except KeyboardInterrupt:
        end = _End("interrupted", "was interrupted")
    except BaseException as error:  # noqa: BLE001 - a bug: it is shown and ends the run
        traceback.print_exc()
        end = _End("failed", f"failed ({type(error).__name__}: {error}; the traceback is above)")
    with contextlib.suppress(OSError):
        pipe.send(end)
    sys.stderr.flush()
    os._exit(status)  # a normal exit could wait for messages to ranks that are gone


def _listen(pipe: Connection, world: World) -> None:
    """Receive signals from the process that started this one, and end when it does."""
    try:
        while True:
            world.forwarded_signal = pipe.recv()
    except (EOFError, OSError):
        os._exit(1)


def _use_loopback() -> None:
    """Let gloo use the loopback interface instead of the address that the machine's name resolves to."""
    for _, name in socket.if_nameindex():
        if name in {"lo", "lo0"}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
